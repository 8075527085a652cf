"""Fit one probe or direction on a saved model and write it to a file, with what it is worth on held-out texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from interp_rlhf.activations.capturing import read_prompts
from interp_rlhf.activations.hookpoints import layout, resolve_hookpoints
from interp_rlhf.activations.json_lines import json_lines
from interp_rlhf.activations.labelled import LabelledTexts
from interp_rlhf.activations.prompts import ContrastPair, Prompt, Tokens
from interp_rlhf.activations.rows import row_texts
from interp_rlhf.activations.tokenizers import no_content, padding, tokenizer_hash
from interp_rlhf.checkpoints import load_checkpoint, load_tokenizer, model_folder, short_name
from interp_rlhf.drift.crossfit import (
    Fitter,
    FoldWins,
    cross_fit_texts,
    direction_fitter,
    fold_thresholds,
    probe_fitter,
    shuffled_pair_wins,
    shuffled_text_auc,
    text_wins,
)
from interp_rlhf.drift.nulls import bootstrap_statistic
from interp_rlhf.drift.panel import SHUFFLES
from interp_rlhf.errors import ConfigError, FormatError, MeasurementError, PromptError
from interp_rlhf.readouts.baselines import held_length_scores, held_token_scores
from interp_rlhf.readouts.directions import Direction
from interp_rlhf.readouts.folds import check_no_leak, label_folds, pair_folds
from interp_rlhf.readouts.packs import load_pack, render
from interp_rlhf.readouts.probes import LinearProbe

if TYPE_CHECKING:
    from interp_rlhf.sae_training import SaeOptions

Kind = Literal["probe", "direction"]

#: Pairs at least, and labelled texts of each class at least.
_PAIRS, _OF_A_CLASS = 16, 8


@dataclass(frozen=True, slots=True)
class FitOptions:
    """What to fit on, and where to read it. Exactly one of ``pairs``, ``labels`` and ``pack`` is given.

    Attributes:
        hookpoint: where to read; a depth (``layers.50%.resid_post``) is resolved on the model.
        pairs: JSON lines with chosen and rejected (``docs/formats.md``, Prompts); chosen is positive.
        labels: JSON lines with a text, or a prompt and its completion, and a ``label``, true or false.
        pack: a packaged pack's name or the path of a pack file.
        name: of the readout; the pack's, or the file's without its ending, unless given.
        tokenizer: folder to read the tokenizer from, where the model's has none.
        base: the base of an adapter, instead of the one its configuration names.
        tokens: which tokens enter a text's mean; ``completion`` falls back to the text where there is none.
        max_length: tokens kept per text.
        batch_size: texts per forward pass.
        folds: folds of the cross-fit that says what the readout is worth.
        fpr: false-positive rate of the threshold.
        seed: seeds folds, shuffles and bootstrap.
    """

    hookpoint: str
    pairs: str | Path | None = None
    labels: str | Path | None = None
    pack: str | None = None
    name: str | None = None
    tokenizer: str | Path | None = None
    base: str | Path | None = None
    tokens: Tokens = "completion"
    max_length: int = 512
    batch_size: int = 16
    folds: int = 5
    fpr: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("pairs", "labels", "pack") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"fit: expected one of pairs, labels and pack, found {' and '.join(given) or 'none'}")
        if not 0 < self.fpr < 1:
            raise ConfigError(f"fit: fpr: expected a rate between 0 and 1, found {self.fpr:g}")
        for field, least in (("max_length", 2), ("batch_size", 1), ("folds", 2), ("seed", 0)):
            if getattr(self, field) < least:
                raise ConfigError(f"fit: {field}: expected at least {least}, found {getattr(self, field)}")


@dataclass(frozen=True, slots=True)
class FitReport:
    """What was written, and what a readout fitted the same way is worth on texts it never saw.

    Attributes:
        kind: ``probe`` or ``direction``.
        name, hookpoint: of the readout, the hookpoint resolved.
        model: last part of the model's path.
        path: the file.
        paired: whether positives and negatives are the two sides of pairs.
        n_positive, n_negative: texts.
        folds: folds of the cross-fit.
        auc, auc_low, auc_high: AUC within folds and its 95 % bootstrap interval over pairs (texts without pairs).
        tokens_auc, length_auc, shuffled_auc: the same of the bag of tokens, the length, and shuffled labels.
        fpr: false-positive rate at which recall is read.
        recall: share of held-out positives above their fold's threshold; ``None`` where negatives are too few.
        no_recall: why there is none; empty where there is one.
    """

    kind: Kind
    name: str
    hookpoint: str
    model: str
    path: Path
    paired: bool
    n_positive: int
    n_negative: int
    folds: int
    auc: float
    auc_low: float
    auc_high: float
    tokens_auc: float
    length_auc: float
    shuffled_auc: float
    fpr: float
    recall: float | None
    no_recall: str

    def __str__(self) -> str:
        n = f"{self.n_positive} pairs" if self.paired else f"{self.n_positive} positive, {self.n_negative} negative"
        recall = self.no_recall
        if self.recall is not None:
            recall = f"recall {self.recall:.3f} at a false-positive rate of {self.fpr:g}"
        return "\n".join(
            (
                f"{self.kind} {self.name} at {self.hookpoint} of {self.model}: {n}, {self.folds} folds",
                f"  held-out AUC {self.auc:.3f} ({self.auc_low:.3f} to {self.auc_high:.3f})",
                f"  baselines: words {self.tokens_auc:.3f}, length {self.length_auc:.3f}, "
                f"shuffled labels {self.shuffled_auc:.3f}",
                f"  {recall}",
                f"  written to {self.path}",
            )
        )


def fit_probe_file(model: str | Path, out: str | Path, options: FitOptions) -> FitReport:
    """Fit a probe on all texts and write it; its threshold is the mean of the folds' held-out thresholds.

    Args:
        model: folder of a saved causal language model or of a PEFT adapter; nothing in it is changed.
        out: the file to write; must not exist.

    Raises:
        FormatError: the file exists or cannot be written.
        ConfigError: no model or tokenizer there, no such pack.
        HookpointError: no such hookpoint on this model.
        PromptError: an unreadable file, too few texts, labels of one class, a text in two folds.
    """
    return _fit("probe", model, Path(out), options)


def fit_direction(model: str | Path, out: str | Path, options: FitOptions) -> FitReport:
    """Fit a difference in means on all texts and write it; arguments and errors as :func:`fit_probe_file`."""
    return _fit("direction", model, Path(out), options)


@dataclass(frozen=True, slots=True)
class _Texts:
    """Positives first; ``folds`` of each text. Text i and text i + n are one pair where there are ``pairs``."""

    name: str
    prompts: tuple[Prompt, ...]
    labels: Tensor
    folds: tuple[int, ...]
    paired: bool


def open_model(
    model: str | Path, out: Path, options: FitOptions | SaeOptions, *, new: Literal["file", "folder"]
) -> tuple[nn.Module, Any, str, int]:
    """The model to fit on, its tokenizer, the hookpoint on it, and how many tokens a text may have.

    Args:
        out: where the ``new`` file or folder is to be.

    Raises:
        FormatError: ``out`` exists, or its folder does not.
        ConfigError: no model or tokenizer there.
        HookpointError: no such hookpoint on this model.
    """
    if out.exists():
        raise FormatError(f"{out}: exists, expected the name of a new {new}")
    if not out.parent.is_dir():
        raise FormatError(f"{out}: cannot be written, {out.parent} is no folder")
    tokenizer = load_tokenizer(options.tokenizer or model_folder(model))
    if tokenizer is None:
        raise ConfigError(f"{options.tokenizer or model}: expected a tokenizer to read the texts with, found none")
    loaded = load_checkpoint(model, base=options.base)
    tree = layout(loaded)
    (point,) = resolve_hookpoints([options.hookpoint], tree)
    return loaded, tokenizer, point.name, min(options.max_length, tree.max_positions or options.max_length)


def _fit(kind: Kind, model: str | Path, out: Path, options: FitOptions) -> FitReport:
    loaded, tokenizer, hookpoint, limit = open_model(model, out, options, new="file")
    texts = _read_texts(options, tokenizer, limit)
    x = _activations(loaded, texts.prompts, hookpoint, tokenizer, options)
    fitter = probe_fitter if kind == "probe" else direction_fitter
    scores = cross_fit_texts(x, texts.labels, texts.folds, fitter).held(x, texts.folds)
    thresholds, no_recall = None, ""
    try:
        thresholds = fold_thresholds(scores[~texts.labels], _of(texts, False), options.fpr)
    except MeasurementError as reason:
        no_recall = str(reason)
    weights, biases = fitter([(x, texts.labels[None])])[0]
    readout: LinearProbe | Direction
    if kind == "probe":
        threshold = None if thresholds is None else float(thresholds.mean())
        about = (float(biases[0]), threshold, tokenizer_hash(tokenizer))
        readout = LinearProbe(texts.name, hookpoint, weights[0], *about)
    else:
        readout = Direction(texts.name, hookpoint, weights[0])
    report = _report(readout, out, short_name(model), texts, options, x, scores, thresholds, no_recall, fitter)
    readout.save(out)
    return report


def _report(
    readout: LinearProbe | Direction,
    out: Path,
    model: str,
    texts: _Texts,
    options: FitOptions,
    x: Tensor,
    scores: Tensor,
    thresholds: Tensor | None,
    no_recall: str,
    fitter: Fitter,
) -> FitReport:
    positives, negatives = _of(texts, True), _of(texts, False)
    wins = text_wins(scores, texts.labels, texts.folds)
    n = len(positives) if texts.paired else len(texts.folds)
    low, high = bootstrap_statistic(wins.by_pair if texts.paired else wins.by_text, n, seed=options.seed)
    tokens = [prompt.input_ids[prompt.completion_start :] or prompt.input_ids for prompt in texts.prompts]
    sides = tokens[: len(positives)], tokens[len(positives) :]
    folds = positives, negatives
    words, lengths = (
        FoldWins.of(*score(*sides, *folds), *folds).value for score in (held_token_scores, held_length_scores)
    )
    recall = None
    if thresholds is not None:
        recall = float((scores[texts.labels] > thresholds[torch.tensor(positives)]).double().mean())
    return FitReport(
        kind="probe" if isinstance(readout, LinearProbe) else "direction",
        name=readout.name,
        hookpoint=readout.hookpoint,
        model=model,
        path=out,
        paired=texts.paired,
        n_positive=len(positives),
        n_negative=len(negatives),
        folds=len(set(texts.folds)),
        auc=wins.value,
        auc_low=low,
        auc_high=high,
        tokens_auc=words,
        length_auc=lengths,
        shuffled_auc=_shuffled(texts, x, options.seed, fitter),
        fpr=options.fpr,
        recall=recall,
        no_recall=no_recall,
    )


def _shuffled(texts: _Texts, x: Tensor, seed: int, fitter: Fitter) -> float:
    if not texts.paired:
        return shuffled_text_auc(x, texts.labels, texts.folds, shuffles=SHUFFLES, seed=seed, fitter=fitter)
    n = len(x) // 2
    return shuffled_pair_wins(x[:n], x[n:], texts.folds[:n], shuffles=SHUFFLES, seed=seed, fitter=fitter).value


def _of(texts: _Texts, label: bool) -> list[int]:
    """Folds of the texts of one class."""
    return [fold for fold, own in zip(texts.folds, texts.labels.tolist(), strict=True) if own is label]


def _activations(
    model: nn.Module, prompts: Sequence[Prompt], hookpoint: str, tokenizer: Any, options: FitOptions
) -> Tensor:
    readings = read_prompts(
        model, prompts, [hookpoint], batch_size=options.batch_size, pad_token_id=padding(tokenizer),
        tokens=options.tokens, skip_ids=no_content(tokenizer),
    )  # fmt: skip
    return readings.means[hookpoint]


def _read_texts(options: FitOptions, tokenizer: Any, limit: int) -> _Texts:
    if options.labels is not None:
        name = options.name or Path(options.labels).stem
        return _labelled(LabelledTexts.from_jsonl(options.labels, tokenizer, name=name, max_length=limit), options)
    if options.pack is not None:
        pack = load_pack(options.pack)
        return _paired(options.name or pack.name, render(pack, tokenizer, limit), options.pack, options)
    path = Path(str(options.pairs))
    return _paired(options.name or path.stem, _pairs(path, tokenizer, limit), str(path), options)


def _labelled(found: LabelledTexts, options: FitOptions) -> _Texts:
    true = sum(found.labels)
    if min(true, len(found.labels) - true) < _OF_A_CLASS:
        raise PromptError(
            f"{options.labels}: expected at least {_OF_A_CLASS} texts of each class, found {true} true and "
            f"{len(found.labels) - true} false"
        )
    order = sorted(range(len(found.labels)), key=lambda i: not found.labels[i])
    labels = [found.labels[i] for i in order]
    folds = tuple(label_folds(labels, options.folds, options.seed))
    return _Texts(found.name, tuple(found.prompts[i] for i in order), torch.tensor(labels), folds, paired=False)


def _paired(name: str, pairs: Sequence[ContrastPair], where: str, options: FitOptions) -> _Texts:
    if options.tokens == "prompt":
        raise PromptError(f"{where}: both sides of a pair answer one prompt, expected tokens completion or all")
    pairs = list({(pair.positive.id, pair.negative.id): pair for pair in pairs}.values())  # a copy is no evidence
    if len(pairs) < _PAIRS:
        raise PromptError(
            f"{where}: expected at least {_PAIRS} different pairs that fit the token limit, found {len(pairs)}"
        )
    groups = [pair.group for pair in pairs]
    if len(set(groups)) < 2:
        raise PromptError(f"{where}: expected pairs of at least 2 groups, found 1")
    folds = pair_folds(groups, options.folds, options.seed)
    try:
        check_no_leak([(pair.positive.id, pair.negative.id) for pair in pairs], groups, folds)
    except PromptError as error:
        raise PromptError(f"{where}: as this tokenizer reads them, {error}") from None
    prompts = (*(pair.positive for pair in pairs), *(pair.negative for pair in pairs))
    labels = torch.arange(len(prompts)) < len(pairs)
    return _Texts(name, prompts, labels, (*folds, *folds), paired=True)


def _pairs(path: Path, tokenizer: Any, limit: int) -> list[ContrastPair]:
    """Pairs of a JSONL file; those of which a side is longer than the limit are left out, never cut."""
    pairs = []
    for place, row in json_lines(path):
        pair = _pair(row, place, tokenizer)
        if max(len(pair.positive.input_ids), len(pair.negative.input_ids)) <= limit:
            pairs.append(pair)
    return pairs


def _pair(row: Any, place: str, tokenizer: Any) -> ContrastPair:
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise PromptError(f"{place}: expected an object with chosen and rejected, found {found}")
    try:
        texts = row_texts(row, tokenizer, max_length=sys.maxsize)
    except (PromptError, TypeError, ValueError, KeyError) as error:
        raise PromptError(f"{place}: {error}") from None
    pair = texts[0].pair if len(texts) == 1 else None
    if pair is None:
        raise PromptError(f"{place}: expected two different answers, found the same twice or an empty one")
    return pair
