"""Train a dictionary of features for one's own model: activations of texts, streamed into SAELens's trainer.

texts ─► the model up to the hookpoint ─► a shuffled buffer of tokens ─► SAELens ─► a folder in its format
texts held out ─► the dictionary read back from that folder ─► FVU, L0, dead features
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from interp_rlhf.activations.capturing import capture, read_prompts
from interp_rlhf.activations.engines import unchanged_random_states
from interp_rlhf.activations.feature_sums import FeatureReading, FeatureStream
from interp_rlhf.activations.json_lines import json_lines
from interp_rlhf.activations.prompts import Prompt, batches
from interp_rlhf.activations.rows import row_texts
from interp_rlhf.activations.tokenizers import no_content, padding
from interp_rlhf.checkpoints import short_name
from interp_rlhf.drift.feature_health import fraction_unexplained
from interp_rlhf.errors import ConfigError, PromptError
from interp_rlhf.fitting import open_model
from interp_rlhf.readouts.sae_hooks import lens_name
from interp_rlhf.readouts.saes import SparseAutoencoder

Recipe = Literal["topk", "batchtopk", "standard", "jumprelu", "gated"]

#: Texts at least: a tenth is held out, never fewer than two.
_TEXTS = 16
#: Batches over which the scale of activations is estimated before training.
_NORM_BATCHES = 20


@dataclass(frozen=True, slots=True)
class SaeOptions:
    """What to train on, and how.

    Attributes:
        hookpoint: where to read; a depth (``layers.50%.resid_post``) is resolved on the model.
        data: JSON lines of texts, prompts or preference pairs (``docs/formats.md``, Prompts); all their tokens but the
            first are used, both sides of a pair.
        width: F, number of features.
        architecture: of the dictionary.
        k: features per token of ``topk`` and ``batchtopk``.
        sparsity: coefficient of the penalty on activity of the other architectures.
        tokens: tokens trained on; texts come again, in another order, until there were that many.
        batch: tokens per step.
        lr: learning rate of Adam; activations are scaled to a mean norm of √d for training.
        buffer: tokens from which a batch is drawn.
        name: of the dictionary, and its folder's name where not given.
        tokenizer: folder to read the tokenizer from, where the model's has none.
        base: the base of an adapter, instead of the one its configuration names.
        max_length: tokens kept per text.
        batch_size: texts per forward pass.
        seed: seeds weights, order and the choice of what is held out.
    """

    hookpoint: str
    data: str | Path
    width: int
    architecture: Recipe = "topk"
    k: int = 32
    sparsity: float = 1.0
    tokens: int = 2_000_000
    batch: int = 1024
    lr: float = 3e-4
    buffer: int = 65_536
    name: str | None = None
    tokenizer: str | Path | None = None
    base: str | Path | None = None
    max_length: int = 512
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Recipe):
            raise ConfigError(
                f"fit sae: architecture: expected one of {', '.join(get_args(Recipe))}, found {self.architecture!r}"
            )
        for field, least in (("width", 2), ("k", 1), ("tokens", 1), ("batch", 2), ("max_length", 2), ("batch_size", 1)):
            if getattr(self, field) < least:
                raise ConfigError(f"fit sae: {field}: expected at least {least}, found {getattr(self, field)}")
        if self.architecture in ("topk", "batchtopk") and self.k > self.width:
            raise ConfigError(f"fit sae: k: expected at most the width {self.width}, found {self.k}")
        if self.buffer < self.batch or self.tokens < self.batch:
            raise ConfigError(
                f"fit sae: expected a buffer and a number of tokens of at least one batch ({self.batch}), found "
                f"{self.buffer} and {self.tokens}"
            )
        if not self.lr > 0 or not self.sparsity >= 0 or self.seed < 0:
            raise ConfigError("fit sae: expected a learning rate above 0, a sparsity and a seed of at least 0")


@dataclass(frozen=True, slots=True)
class SaeReport:
    """What was written, and what it is worth on texts it was not trained on.

    Attributes:
        name, hookpoint: of the dictionary.
        model: last part of the model's path.
        path: its folder, in SAELens format.
        architecture, width: as asked.
        trained, held: texts trained on and held out.
        tokens: tokens trained on, repetitions counted.
        fvu: fraction of variance unexplained on the held-out texts (0: perfect, 1: as good as the mean).
        l0: features per token there.
        dead: share of features that fired on none of them.
    """

    name: str
    hookpoint: str
    model: str
    path: Path
    architecture: str
    width: int
    trained: int
    held: int
    tokens: int
    fvu: float
    l0: float
    dead: float

    def __str__(self) -> str:
        return "\n".join(
            (
                f"dictionary {self.name} ({self.architecture}): {self.width} features at {self.hookpoint} of "
                f"{self.model}",
                f"  trained on {self.tokens} tokens of {self.trained} texts",
                f"  on {self.held} held-out texts: unexplained variance {self.fvu:.3f}, {self.l0:.1f} features per "
                f"token, {self.dead:.0%} never fire",
                f"  written to {self.path}",
            )
        )


def fit_sae(model: str | Path, out: str | Path, options: SaeOptions) -> SaeReport:
    """Train a dictionary on a saved model's activations and write it in SAELens format. Shows its progress.

    Args:
        model: folder of a saved model or of a PEFT adapter; nothing in it is changed.
        out: the folder to write; must not exist.

    Raises:
        ConfigError: SAELens is not installed; no model or tokenizer there.
        FormatError: ``out`` exists or cannot be written.
        HookpointError: no such hookpoint on this model.
        PromptError: an unreadable file, or too few texts.
    """
    out, lens = Path(out), _lens()
    loaded, tokenizer, hookpoint, limit = open_model(model, out, options, new="folder")
    trained, held = _split(_texts(Path(options.data), tokenizer, limit), options)
    skip, pad = no_content(tokenizer), padding(tokenizer)
    with unchanged_random_states(), TemporaryDirectory(prefix=".interp-", dir=out.parent) as folder:
        torch.manual_seed(options.seed)
        source = _tokens(loaded, trained, hookpoint, pad, skip, options)
        made, name = Path(folder) / "sae", options.name or out.name
        described = {"hook_name": lens_name(hookpoint), "model_name": short_name(model)}
        _train(lens, source, options, described).save_inference_model(made)
        dictionary = SparseAutoencoder.from_folder(made, hookpoint=hookpoint, name=name)
        read = _read(loaded, held, dictionary, pad, skip, options)
        made.rename(out)
    return SaeReport(
        name, hookpoint, short_name(model), out, options.architecture, options.width, len(trained), len(held),
        options.tokens // options.batch * options.batch, fraction_unexplained(read), read.l0 / int(read.tokens.sum()),
        1 - float(read.alive.float().mean()),
    )  # fmt: skip


def _lens() -> Any:
    try:
        import sae_lens
    except ImportError:
        raise ConfigError("fit sae needs sae-lens, which is not installed: pip install 'interp-rlhf[sae]'") from None
    return sae_lens


# ------------------------------------------------------------------------------------------------------------ the texts


def _texts(path: Path, tokenizer: Any, limit: int) -> list[Prompt]:
    """Every text of the file once, cut at ``limit`` tokens, both sides of a pair."""
    found: dict[str, Prompt] = {}
    for place, row in json_lines(path):
        try:
            texts = row_texts(row, tokenizer, max_length=sys.maxsize)
        except (PromptError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise PromptError(f"{place}: {error}") from None
        for prompt in (prompt for text in texts for prompt in text.prompts):
            cut = replace(
                prompt, input_ids=prompt.input_ids[:limit], completion_start=min(prompt.completion_start, limit)
            )
            if len(cut.input_ids) > 1:
                found[cut.id] = cut
    if len(found) < _TEXTS:
        raise PromptError(f"{path}: expected at least {_TEXTS} different texts, found {len(found)}")
    return list(found.values())


def _split(texts: Sequence[Prompt], options: SaeOptions) -> tuple[list[Prompt], list[Prompt]]:
    """Texts to train on and texts to read the result on; those of one prompt are never split."""
    units = sorted({text.unit for text in texts})
    order = np.random.default_rng(options.seed).permutation(len(units))
    held = {units[i] for i in order[: max(len(units) // 10, 2)]}
    if len(held) >= len(units):
        raise PromptError(f"{options.data}: expected texts of more than {len(held)} different prompts, found as many")
    return [text for text in texts if text.unit not in held], [text for text in texts if text.unit in held]


def _tokens(
    model: nn.Module, texts: Sequence[Prompt], hookpoint: str, pad: int, skip: frozenset[int], options: SaeOptions
) -> Iterator[Tensor]:
    """Batches ``[batch, d]`` of activations, drawn from a buffer that texts fill in a random order, for ever."""
    random = np.random.default_rng(options.seed + 1)
    generator = torch.Generator().manual_seed(options.seed)
    buffer, waiting = torch.empty(0), list[Prompt]()
    while True:
        parts = [buffer] if len(buffer) else []
        while sum(map(len, parts)) < options.buffer:
            if not waiting:
                waiting = [texts[i] for i in random.permutation(len(texts))]
            chosen, waiting = waiting[: options.batch_size], waiting[options.batch_size :]
            parts.append(_activations(model, chosen, hookpoint, pad, skip))
        buffer = torch.cat(parts)
        buffer = buffer[torch.randperm(len(buffer), generator=generator)]
        used = max(options.buffer // 2 // options.batch, 1) * options.batch
        yield from buffer[:used].split(options.batch)
        buffer = buffer[used:]


def _activations(model: nn.Module, texts: Sequence[Prompt], hookpoint: str, pad: int, skip: frozenset[int]) -> Tensor:
    """Activations of the content tokens of a few texts, ``[n, d]`` float32 on the CPU."""
    (batch,) = batches(texts, batch_size=len(texts), pad_token_id=pad, tokens="all", skip_ids=skip)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    value = capture(model, inputs, [hookpoint])[hookpoint].flatten(2)
    return value[batch.content_mask.to(value.device)].float().cpu()


# --------------------------------------------------------------------------------------------------------- the training


def _train(lens: Any, source: Iterator[Tensor], options: SaeOptions, described: dict[str, str]) -> Any:
    """SAELens's trainer on our activations; the scale that it trains at is folded into the weights."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata

    first = next(source)
    kinds = {"topk": "TopK", "batchtopk": "BatchTopK", "standard": "Standard", "jumprelu": "JumpReLU", "gated": "Gated"}
    kind = kinds[options.architecture]
    sparse: dict[str, dict[str, float]] = {
        "topk": {"k": options.k},
        "batchtopk": {"k": float(options.k)},
        "standard": {"l1_coefficient": options.sparsity},
        "jumprelu": {"l0_coefficient": options.sparsity},
        "gated": {"l1_coefficient": options.sparsity},
    }
    settings = getattr(lens, f"{kind}TrainingSAEConfig")(
        d_in=first.shape[1], d_sae=options.width, dtype="float32", normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(**described), **sparse[options.architecture],
    )  # fmt: skip
    steps = options.tokens // options.batch
    trainer = lens.SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * options.batch, train_batch_size_samples=options.batch,
            lr=options.lr, lr_end=options.lr / 10, lr_warm_up_steps=min(steps // 10, 1000), lr_decay_steps=steps // 5,
            n_batches_for_norm_estimate=_NORM_BATCHES, device="cuda" if torch.cuda.is_available() else "cpu",
        ),
        sae=getattr(lens, f"{kind}TrainingSAE")(settings),
        data_provider=source,
    )  # fmt: skip
    return trainer.fit()


def _read(
    model: nn.Module,
    texts: Sequence[Prompt],
    dictionary: SparseAutoencoder,
    pad: int,
    skip: frozenset[int],
    options: SaeOptions,
) -> FeatureReading:
    stream = FeatureStream(dictionary, dictionary.name, dictionary.hookpoint)
    read_prompts(
        model, texts, (), batch_size=options.batch_size, pad_token_id=pad, tokens="all", skip_ids=skip,
        observers={dictionary.hookpoint: stream},
    )  # fmt: skip
    return stream.reading()
