"""The probe panel: what frozen probes still see, what refitted ones see, and where the two part ways.

K probes are fitted at step 0, one per fold of contrast pairs, and frozen; each is read on its held-out fold, at step 0
and at every later step. A refit uses the same folds. Next to them stand labelled texts of the training's own domain, a
sealed probe from a file, and baselines that know the words, the length, or labels that mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp_rlhf.drift.crossfit import (
    CrossFitted,
    FoldWins,
    cross_fit,
    cross_fit_again,
    cross_fit_texts,
    fold_thresholds,
    held_scores,
    shuffled_pair_wins,
)
from interp_rlhf.drift.estimates import Estimate, estimate
from interp_rlhf.drift.nulls import bootstrap_statistic
from interp_rlhf.errors import MeasurementError
from interp_rlhf.readouts.baselines import Tokens, held_length_scores, held_token_scores
from interp_rlhf.readouts.folds import label_folds, pair_folds
from interp_rlhf.readouts.probes import LinearProbe

#: Shuffles that ``probe/baseline_shuffled`` is the mean of.
SHUFFLES = 5
#: A metric's name, whose activations were read, and the number.
Row = tuple[str, Literal["policy", "reference"], Estimate]

_Interval = Callable[[Callable[[Tensor], Tensor], int], tuple[float, float]]


@dataclass(frozen=True, slots=True, eq=False)
class OnDomainStart:
    """Labelled texts of the training's own domain at step 0.

    Attributes:
        positives: row of each positive text.
        negatives: row of each negative text.
        folds: fold of each text, for refits.
        frozen: how the frozen probes order them at step 0, mean over the probes.
    """

    positives: Tensor
    negatives: Tensor
    folds: tuple[int, ...]
    frozen: FoldWins


@dataclass(frozen=True, slots=True, eq=False)
class PanelStart:
    """What step 0 leaves behind for one concept at one hookpoint.

    Attributes:
        fitted: the frozen probes.
        folds: fold of each pair.
        frozen: how they order the held-out pairs at step 0.
        thresholds: per fold ``[K]``, the score at the false-positive rate; ``None`` where negatives are too few.
        no_recall: why there are no thresholds; empty where there are.
        staleness_band: band of ``probe/staleness``.
        baselines: ``probe/baseline_*``, constant over a run.
        on_domain: labelled texts, ``None`` where there are none.
        sealed: a probe that training never touches.
    """

    fitted: CrossFitted
    folds: tuple[int, ...]
    frozen: FoldWins
    thresholds: Tensor | None
    no_recall: str
    staleness_band: tuple[float, float]
    baselines: Mapping[str, Estimate] = field(default_factory=dict)
    on_domain: OnDomainStart | None = None
    sealed: LinearProbe | None = None

    def mean_probe(self, name: str, hookpoint: str, tokenizer: str | None = None) -> LinearProbe:
        """The folds' probes as one: mean weight, bias and threshold. For texts that none of them was fitted on."""
        threshold = None if self.thresholds is None else float(self.thresholds.mean())
        weight, bias = self.fitted.weights.mean(0).float(), float(self.fitted.biases.mean())
        return LinearProbe(name, hookpoint, weight, bias, threshold, tokenizer)


def text_baselines(
    positive: Sequence[Tokens],
    negative: Sequence[Tokens],
    folds: Sequence[int],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """``probe/baseline_tokens`` and ``probe/baseline_length``; the same at every hookpoint.

    Args:
        positive, negative: token ids of the two completions of pair i.
        folds: fold of each pair, as the probes have them.

    >>> found = text_baselines([[1], [1, 2]], [[3, 3], [3, 2, 3]], [0, 1], resamples=100)
    >>> {metric: row.value for metric, row in found.items()}
    {'probe/baseline_tokens': 1.0, 'probe/baseline_length': 1.0}
    """
    interval = partial(bootstrap_statistic, resamples=resamples, confidence=confidence, seed=seed)
    scores = {
        "probe/baseline_tokens": held_token_scores(positive, negative, folds, folds),
        "probe/baseline_length": held_length_scores(positive, negative, folds, folds),
    }
    return {name: _by_pair(name, FoldWins.of(*sides, folds, folds), interval) for name, sides in scores.items()}


def start_panel(
    positive: Float[Tensor, "n d"],
    negative: Float[Tensor, "n d"],
    groups: Sequence[str],
    *,
    k: int = 5,
    fpr: float = 0.2,
    refits: int = 20,
    baselines: Mapping[str, Estimate] | None = None,
    on_domain: tuple[Float[Tensor, "m d"], Sequence[bool]] | None = None,
    sealed: LinearProbe | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PanelStart:
    """Fit and freeze the probes of one concept at one hookpoint.

    The folds are ``pair_folds(groups, k, seed)``; refits of step 0 use the seeds after it.

    Args:
        positive, negative: ``[n, d]`` step-0 readings of the two sides of pair i.
        groups: group of each pair, never split between folds.
        k: folds.
        fpr: false-positive rate at which recall is read.
        refits: refits of step 0 for the band of ``probe/staleness``.
        baselines: of :func:`text_baselines`; the shuffled one is added.
        on_domain: step-0 readings ``[m, d]`` of labelled texts, and their labels.
        sealed: a probe from a file.

    Raises:
        MeasurementError: fewer than 2 groups, or readings that are not finite.
        PromptError: on-domain labels of one class.
        ConfigError: the sealed probe has another width.
    """
    folds = tuple(pair_folds(groups, k, seed))
    if sealed is not None:
        sealed.check(positive.shape[1])
    interval = partial(bootstrap_statistic, resamples=resamples, confidence=confidence, seed=seed)
    fitted = cross_fit(positive, negative, folds)
    scores = held_scores(fitted, positive, negative, folds)
    frozen = FoldWins.of(*scores, folds, folds)
    try:
        thresholds, no_recall = fold_thresholds(scores[1], folds, fpr), ""
    except MeasurementError as reason:
        thresholds, no_recall = None, str(reason)
    shuffled = shuffled_pair_wins(positive, negative, folds, shuffles=SHUFFLES, seed=seed)
    name = "probe/baseline_shuffled"
    return PanelStart(
        fitted=fitted,
        folds=folds,
        frozen=frozen,
        thresholds=thresholds,
        no_recall=no_recall,
        staleness_band=_refit_band(
            positive, negative, [pair_folds(groups, k, seed + 1 + i) for i in range(refits)], frozen.value, confidence
        ),
        baselines={**(baselines or {}), name: _by_pair(name, shuffled, interval)},
        on_domain=None if on_domain is None else _start_on_domain(*on_domain, fitted, k, seed),
        sealed=sealed,
    )


def panel_estimates(
    start: PanelStart,
    positive: Float[Tensor, "n d"],
    negative: Float[Tensor, "n d"],
    *,
    on_domain: Float[Tensor, "m d"] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Row]:
    """All rows of one measurement, of step 0 itself as of any later step.

    An AUC is the mean of the folds' AUCs weighted by their pairs, since probes of different folds share no scale
    (:class:`~interp_rlhf.drift.crossfit.FoldWins`). Intervals resample pairs (texts on-domain), both times and both
    kinds of probe with the same draws, so that a difference is paired; the probes themselves stay as they are.
    On fixed texts the obfuscation excess equals the staleness, since a refit of step 0 gives the frozen probes.

    Args:
        start: of :func:`start_panel`.
        positive, negative: ``[n, d]`` readings now of the same pairs.
        on_domain: ``[m, d]`` readings now of the same labelled texts, where ``start`` has them.

    Returns:
        Metric, reader and estimate. Without thresholds there is no ``probe/recall``: ``start.no_recall`` says why.

    Raises:
        MeasurementError: readings of other pairs or another width, or not finite; on-domain readings on one side only.
    """
    if (on_domain is None) != (start.on_domain is None):
        raise MeasurementError("probe panel: expected on-domain readings both at step 0 and now, found one of them")
    folds, frozen_0 = start.folds, start.frozen
    interval = partial(bootstrap_statistic, resamples=resamples, confidence=confidence, seed=seed)
    scores = held_scores(start.fitted, positive, negative, folds)
    frozen = FoldWins.of(*scores, folds, folds)
    refit = FoldWins.of(*held_scores(cross_fit(positive, negative, folds), positive, negative, folds), folds, folds)
    wins = {
        "probe/auc": frozen,
        "probe/auc_refit": refit,
        "probe/staleness": refit - frozen,
        "probe/obfuscation_gap": frozen_0 - frozen,
        "probe/obfuscation_excess": (frozen_0 - frozen) - (frozen_0 - refit),
    }
    if start.sealed is not None:
        wins["probe/sealed_auc"] = FoldWins.of(start.sealed.score(positive), start.sealed.score(negative))
    bands = {"probe/staleness": start.staleness_band}
    rows: list[Row] = [
        (metric, "policy", _by_pair(metric, found, interval, bands.get(metric))) for metric, found in wins.items()
    ]
    rows.append(("probe/auc", "reference", _by_pair("probe/auc", frozen_0, interval)))
    if start.thresholds is not None:
        hits = (scores[0] > start.thresholds[torch.tensor(folds)]).double()
        found = estimate("probe/recall", float(hits.mean()), len(hits), interval=interval(_mean_of(hits), len(hits)))
        rows.append(("probe/recall", "policy", found))
    if on_domain is not None and start.on_domain is not None:
        rows += _on_domain_rows(start.on_domain, start.fitted, on_domain, frozen - frozen_0, interval)
    return [*rows, *((metric, "policy", found) for metric, found in start.baselines.items())]


def _mean_of(values: Float[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    return lambda counts: counts @ values / len(values)


def _by_pair(metric: str, wins: FoldWins, interval: _Interval, band: tuple[float, float] | None = None) -> Estimate:
    n, kind = len(wins.matrix), "none" if band is None else "refit"
    return estimate(metric, wins.value, n, interval=interval(wins.by_pair, n), null_kind=kind, band=band)


def _refit_band(
    positive: Tensor, negative: Tensor, foldings: Sequence[Sequence[int]], frozen: float, confidence: float
) -> tuple[float, float]:
    """Quantiles of ``AUC_refit − AUC_frozen`` over refits of step 0 with other folds; always holds 0, its rest."""
    values = []
    for folds, refitted in zip(foldings, cross_fit_again(positive, negative, foldings), strict=True):
        scores = held_scores(refitted, positive, negative, folds)
        values.append(FoldWins.of(*scores, folds, folds).value - frozen)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return min(float(low), 0.0), max(float(high), 0.0)


def _start_on_domain(
    x: Float[Tensor, "m d"], labels: Sequence[bool], fitted: CrossFitted, k: int, seed: int
) -> OnDomainStart:
    if len(x) != len(labels):
        raise MeasurementError(f"on-domain texts: expected a label for each of {len(x)}, found {len(labels)}")
    folds = tuple(label_folds(labels, k, seed))
    marks = torch.tensor([bool(label) for label in labels])
    positives, negatives = marks.nonzero().flatten(), (~marks).nonzero().flatten()
    return OnDomainStart(positives, negatives, folds, _mean_wins(fitted, x[positives], x[negatives]))


def _mean_wins(fitted: CrossFitted, positive: Tensor, negative: Tensor) -> FoldWins:
    """Wins on texts that no probe was fitted on: each probe reads all of them, mean over the probes."""
    each = [FoldWins.of(*pair) for pair in zip(fitted.all_scores(positive), fitted.all_scores(negative), strict=True)]
    mean = torch.stack([wins.matrix for wins in each]).mean(0)
    return FoldWins(mean, each[0].positive_folds, each[0].negative_folds)


def _on_domain_rows(
    start: OnDomainStart, fitted: CrossFitted, x: Tensor, moved_off: FoldWins, interval: _Interval
) -> list[Row]:
    """``probe/auc_on``, ``probe/auc_on_refit`` and ``probe/concept_drift``; ``moved_off``: frozen wins now − step 0."""
    if len(x) != len(start.folds):
        raise MeasurementError(f"on-domain texts: expected readings of {len(start.folds)}, found {len(x)}")
    p, m = start.positives, start.negatives
    frozen = _mean_wins(fitted, x[p], x[m])
    labels = torch.zeros(len(x), dtype=torch.bool).index_fill(0, p, True)
    scores = cross_fit_texts(x, labels, start.folds).held(x, start.folds)
    own = torch.tensor(start.folds)
    refit = FoldWins.of(scores[p], scores[m], own[p].tolist(), own[m].tolist())
    rows: list[Row] = [
        (metric, "policy", estimate(metric, wins.value, len(x), interval=interval(wins.by_text, len(x))))
        for metric, wins in (("probe/auc_on", frozen), ("probe/auc_on_refit", refit))
    ]
    moved_on, pairs = frozen - start.frozen, len(moved_off.matrix)

    def drift(counts: Tensor) -> Tensor:
        return moved_on.by_text(counts[:, pairs:]) - moved_off.by_pair(counts[:, :pairs])

    metric, n = "probe/concept_drift", pairs + len(x)
    value = moved_on.value - moved_off.value
    return [*rows, (metric, "policy", estimate(metric, value, n, interval=interval(drift, n)))]
