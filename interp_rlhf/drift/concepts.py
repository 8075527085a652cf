"""How far a concept moved: drift along its direction, how well the direction still separates, behaviour beside it.

Rows are sampling units. Several texts of one unit (completions of the same prompt) are averaged first with
:func:`by_unit`, so that an interval counts prompts, not texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp_rlhf.drift.control_runs import rank_place
from interp_rlhf.drift.estimates import Estimate, estimate
from interp_rlhf.drift.nulls import (
    bootstrap_statistic,
    direction_band,
    finite,
    numeric_band,
    paired_bootstrap,
    rank_p,
)
from interp_rlhf.errors import MeasurementError
from interp_rlhf.measurement import NullKind
from interp_rlhf.readouts.separation import auc


def by_unit(x: Float[Tensor, "n d"], units: Sequence[str]) -> Float[Tensor, "u d"]:
    """Mean over the rows of each sampling unit, in order of the unit's first row.

    Args:
        x: ``[n, d]`` one row per text.
        units: the unit each row belongs to.

    Raises:
        MeasurementError: the lengths differ.

    >>> by_unit(torch.tensor([[1.0], [5.0], [3.0]]), ["a", "b", "a"])
    tensor([[2.],
            [5.]])
    """
    if len(units) != len(x):
        raise MeasurementError(f"units: expected one per row ({len(x)}), found {len(units)}")
    place = {unit: index for index, unit in enumerate(dict.fromkeys(units))}
    rows = torch.tensor([place[unit] for unit in units], device=x.device)
    sums = x.new_zeros(len(place), x.shape[1]).index_add_(0, rows, x)
    return sums / torch.bincount(rows, minlength=len(place))[:, None]


def standardised_drift(
    x0: Float[Tensor, "n d"], xt: Float[Tensor, "n d"], v: Float[Tensor, " d"]
) -> Float[Tensor, " n"]:
    """``D_i = (X_t,i − X_0,i)·v / SD(X_0·v)``, ``[n]`` in step-0 standard deviations over prompts (n − 1 in the SD).

    Raises:
        MeasurementError: shapes that do not fit, NaN, or ``X_0·v`` that does not vary over prompts.

    >>> x0 = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    >>> standardised_drift(x0, x0 + torch.tensor([1.0, 7.0]), torch.tensor([1.0, 0.0]))
    tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """
    a, b = _readings(x0, xt, v)
    return (b - a) @ v.double().cpu() / _spread(a, v[:, None])


def comparison_drifts(
    x0: Float[Tensor, "n d"], xt: Float[Tensor, "n d"], directions: Float[Tensor, "k d"]
) -> Float[Tensor, " k"]:
    """Mean ``D`` along each comparison direction, ``[k]``, each in its own step-0 standard deviations.

    >>> x0 = torch.tensor([[0.0, 0.0], [2.0, 1.0], [4.0, 2.0]])
    >>> comparison_drifts(x0, x0 + 1, torch.eye(2))
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    a, b = _readings(x0, xt, directions[0])
    return (b - a).mean(0) @ directions.double().cpu().T / _spread(a, directions.T)


def drift_estimate(
    x0: Float[Tensor, "n d"],
    xt: Float[Tensor, "n d"],
    v: Float[Tensor, " d"],
    comparison: Float[Tensor, "k d"] | None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """``concept/drift``: mean ``D`` with a paired bootstrap interval, band and rank p of the comparison directions.

    Args:
        x0, xt: ``[n, d]`` readings of the same sampling units.
        v: ``[d]`` the concept's direction.
        comparison: ``[k, d]`` directions of :func:`~interp_rlhf.drift.nulls.covariance_directions`. ``None`` where
            ``xt`` is a second reading of the step-0 weights: the band then is the numeric floor
            ``±max |D_i|`` (no drift of a later step inside it counts) and there is no p.

    The SD is a fixed unit of these prompts: the interval does not carry its sampling error (about 1/√(2n) of the
    value).

    >>> x0, v = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]), torch.tensor([1.0, 0.0])
    >>> found = drift_estimate(x0, x0 + torch.tensor([1.0, 7.0]), v, None)
    >>> found.value, found.ci_low, found.n, found.unit
    (0.5, 0.5, 3, 'sd')
    """
    d = standardised_drift(x0, xt, v)
    value = float(d.mean())
    interval = paired_bootstrap(d, resamples=resamples, confidence=confidence, seed=seed)
    if comparison is None:
        band = numeric_band(0.0, d)
        return estimate("concept/drift", value, len(d), interval=interval, null_kind="numeric", band=band)
    null = comparison_drifts(x0, xt, comparison)
    band, p = direction_band(null, confidence), rank_p(value, null)
    return estimate("concept/drift", value, len(d), interval=interval, null_kind="directions", band=band, p=p)


def drift_norm_estimate(
    x0: Float[Tensor, "n d"],
    xt: Float[Tensor, "n d"],
    v: Float[Tensor, " d"],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """``concept/drift_norm``: mean ``(X_t − X_0)·v`` over the mean length of ``X_0``, comparable between layers.

    Raises:
        MeasurementError: as :func:`standardised_drift`, or step-0 readings that are all 0.

    >>> x0 = torch.tensor([[3.0, 4.0], [4.0, 3.0]])
    >>> drift_norm_estimate(x0, x0 + torch.tensor([1.0, 7.0]), torch.tensor([1.0, 0.0])).value
    0.2
    """
    a, b = _readings(x0, xt, v)
    length = float(a.norm(dim=1).mean())
    if length == 0:
        raise MeasurementError("concept/drift_norm: expected step-0 readings of non-zero length, found only 0")
    moved = (b - a) @ v.double().cpu() / length
    interval = paired_bootstrap(moved, resamples=resamples, confidence=confidence, seed=seed)
    return estimate("concept/drift_norm", float(moved.mean()), len(moved), interval=interval)


def auc_estimate(
    positive: Float[Tensor, " n"],
    negative: Float[Tensor, " n"],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """``concept/auc`` on held-out pairs, with a bootstrap interval over pairs (a pair is drawn or not as a whole).

    Args:
        positive, negative: ``[n]`` projections of the two sides of pair i.

    Raises:
        MeasurementError: the lengths differ, fewer than 2 pairs, or NaN.

    >>> auc_estimate(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])).value
    0.875
    """
    n = _pairs("concept/auc", positive, negative)
    a, b = finite(positive, "positive scores"), finite(negative, "negative scores")
    wins = (a[:, None] > b[None, :]).double() + 0.5 * (a[:, None] == b[None, :]).double()
    interval = bootstrap_statistic(
        lambda counts: ((counts @ wins) * counts).sum(1) / n**2,
        n, resamples=resamples, confidence=confidence, seed=seed,
    )  # fmt: skip
    return estimate("concept/auc", auc(positive, negative), n, interval=interval)


def refit_cosine_estimate(
    positive_0: Float[Tensor, "n d"],
    negative_0: Float[Tensor, "n d"],
    positive_t: Float[Tensor, "n d"],
    negative_t: Float[Tensor, "n d"],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """``concept/cosine``: cosine of the direction refitted on the same pairs to the step-0 one.

    Both directions are differences in means over the same pairs. A resample refits both on the pairs it drew: with
    the step-0 direction held fixed, noise in the refit alone would put the interval below 1 even where nothing
    changed. Exactly 1 with the interval (1, 1) where nothing changed. The band is :func:`cosine_band` of step 0.

    Raises:
        MeasurementError: shapes that differ, NaN, or a difference in means of length 0.

    >>> zero, start = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> found = refit_cosine_estimate(start, zero, start.flip(1), zero)  # turned by a right angle
    >>> found.value, found.ci_low, found.ci_high
    (0.0, 0.0, 0.0)
    """
    n = _pairs("concept/cosine", positive_0, negative_0, positive_t, negative_t)
    start, now = (
        finite(p, "positive readings").double() - finite(q, "negative readings").double()
        for p, q in ((positive_0, negative_0), (positive_t, negative_t))
    )
    cross, own_0, own_t = start @ now.T, start @ start.T, now @ now.T

    def cosines(counts: Tensor) -> Tensor:
        dot, square_0, square_t = (((counts @ gram) * counts).sum(1) for gram in (cross, own_0, own_t))
        return (dot / (square_0 * square_t).sqrt()).clamp(-1, 1)

    value = float(cosines(torch.ones(1, n, dtype=torch.float64)))
    if not math.isfinite(value):
        raise MeasurementError(f"concept/cosine: the positive and negative means of {n} pairs do not differ")
    options = {"resamples": resamples, "confidence": confidence, "seed": seed}
    interval = bootstrap_statistic(cosines, n, **options)
    band = cosine_band(positive_0, negative_0, **options)
    return estimate("concept/cosine", value, n, interval=interval, null_kind="refit", band=band)


def behaviour_estimate(
    gap_t: Float[Tensor, " n"], *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """``concept/behaviour``: mean gap ``log p(positive) − log p(negative)`` on held-out pairs, nats.

    Args:
        gap_t: ``[n]`` gap of the summed completion log-probabilities of each pair.

    >>> behaviour_estimate(torch.tensor([1.0, 2.0])).value
    1.5
    """
    interval = paired_bootstrap(gap_t, resamples=resamples, confidence=confidence, seed=seed)
    return estimate("concept/behaviour", float(gap_t.double().mean()), len(gap_t), interval=interval)


def behaviour_change_estimate(
    gap_0: Float[Tensor, " n"],
    gap_t: Float[Tensor, " n"],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """``concept/behaviour_change``: mean over pairs of the gap now minus the same pair's gap at step 0, nats.

    >>> found = behaviour_change_estimate(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5]))
    >>> found.value, found.ci_low, found.ci_high  # paired: the spread over pairs cancels
    (0.5, 0.5, 0.5)
    """
    n = _pairs("concept/behaviour_change", gap_0, gap_t)
    change = gap_t.double() - gap_0.double()
    interval = paired_bootstrap(change, resamples=resamples, confidence=confidence, seed=seed)
    return estimate("concept/behaviour_change", float(change.mean()), n, interval=interval)


def admit(auc_held: float, auc_low: float, auc_baseline: float) -> str | None:
    """Why a concept is refused on this model at this hookpoint; ``None`` where it is admitted.

    Args:
        auc_held: AUC of the step-0 direction on held-out pairs.
        auc_low: lower bootstrap bound of it; has to be above 0.5.
        auc_baseline: AUC of a bag-of-tokens classifier on the same split; has to be below ``auc_held``.

    >>> admit(0.9, 0.8, 0.7)
    >>> admit(0.6, 0.45, 0.5)
    'held-out AUC 0.600 is not better than chance (lower bound 0.450)'
    >>> admit(0.8, 0.7, 0.95)
    'held-out AUC 0.800 does not beat the bag-of-tokens baseline 0.950'
    """
    if not auc_low > 0.5:
        return f"held-out AUC {auc_held:.3f} is not better than chance (lower bound {auc_low:.3f})"
    if not auc_held > auc_baseline:
        return f"held-out AUC {auc_held:.3f} does not beat the bag-of-tokens baseline {auc_baseline:.3f}"
    return None


def cosine_band(
    positive: Float[Tensor, "n d"],
    negative: Float[Tensor, "n d"],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Band ``refit`` of ``concept/cosine``: cosine of step-0 refits on resampled pairs to the step-0 direction.

    A reliability ceiling: so far a direction turns by the choice of pairs alone. It is no null of drift, since pairs
    that did not change have a cosine of exactly 1.

    Args:
        positive, negative: ``[n, d]`` step-0 readings of the two sides of pair i.

    Returns:
        ``(low, 1)``: a share ``confidence`` of the refits lies within.

    Raises:
        MeasurementError: shapes that differ, fewer than 2 pairs, NaN, or a difference in means of length 0.

    >>> cosine_band(torch.eye(3) + 1, torch.ones(3, 3))[1]
    1.0
    """
    n = _pairs("concept/cosine", positive, negative)
    difference = finite(positive, "positive readings").double() - finite(negative, "negative readings").double()
    gram = difference @ difference.T
    to_all, square_all = gram.sum(1), gram.sum()

    def cosines(counts: Tensor) -> Tensor:
        squares = ((counts @ gram) * counts).sum(1)
        return (counts @ to_all / (squares * square_all).sqrt()).clamp(-1, 1)

    # The lower end of the two-sided interval that leaves out 1 − confidence below.
    low, _ = bootstrap_statistic(cosines, n, resamples=resamples, confidence=2 * confidence - 1, seed=seed)
    return low, 1.0


def specificity_estimates(
    x0: Float[Tensor, "n d"],
    xt: Float[Tensor, "n d"],
    v: Float[Tensor, " d"],
    without_top: Float[Tensor, "k d"] | None,
    bank: Float[Tensor, "b d"] | None,
    confidence: float = 0.95,
) -> dict[str, Estimate]:
    """``specificity/…``: mean ``D`` along ``v`` beside other comparison directions than those of ``concept/drift``.

    Args:
        x0, xt: ``[n, d]`` readings of the same sampling units.
        v: ``[d]`` the concept's direction.
        without_top: ``[k, d]`` directions of :func:`~interp_rlhf.drift.nulls.covariance_directions`, ``drop_top``.
        bank: ``[b, d]`` directions of real, unrelated concepts; ``v`` is not one of them.
        confidence: of the bands, in (0, 1).

    Returns:
        Metric to estimate, without the metrics whose directions are ``None``. No band, but a p, where there are too
        few directions for the confidence (19 for 0.95).

    Raises:
        MeasurementError: as :func:`standardised_drift`.

    >>> x0 = torch.tensor([[0.0, 0.0], [2.0, 1.0], [4.0, 2.0]])
    >>> found = specificity_estimates(x0, x0 + 1, torch.tensor([0.0, 1.0]), None, torch.eye(2)[:1])
    >>> [(metric, row.value, row.p, row.null_high) for metric, row in found.items()]
    [('specificity/concept_bank', 1.0, 0.5, None)]
    """
    value, found = float(standardised_drift(x0, xt, v).mean()), {}
    nulls: tuple[tuple[NullKind, Tensor | None], ...] = (
        ("directions_without_top", without_top),
        ("concept_bank", bank),
    )
    for kind, directions in nulls:
        if directions is not None:
            null = comparison_drifts(x0, xt, directions)
            band = None if rank_place(len(null), confidence) is None else direction_band(null, confidence)
            metric, p = f"specificity/{kind}", rank_p(value, null)
            found[metric] = estimate(metric, value, len(x0), null_kind=kind, band=band, p=p)
    return found


def _readings(x0: Tensor, xt: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if x0.ndim != 2 or x0.shape != xt.shape or v.shape != x0.shape[1:]:
        raise MeasurementError(
            f"concept: expected readings [n, d] twice and a direction [d], found {tuple(x0.shape)}, "
            f"{tuple(xt.shape)} and {tuple(v.shape)}"
        )
    finite(v, "direction")
    return finite(x0, "step-0 readings").double(), finite(xt, "readings").double()


def _spread(x0: Tensor, directions: Tensor) -> Tensor:
    """SD over rows of ``x0 @ directions``: ``[k]`` for directions ``[d, k]``."""
    centred = x0 - x0.mean(0)
    spread = (centred @ directions.double().cpu()).std(0)
    if len(x0) < 2 or not bool((spread > 1e-12 * x0.norm()).all()):
        raise MeasurementError(f"concept/drift: the step-0 projections of {len(x0)} prompts do not vary (SD 0)")
    return spread


def _pairs(metric: str, *sides: Tensor) -> int:
    shapes = {tuple(side.shape) for side in sides}
    if len(shapes) != 1:
        raise MeasurementError(f"{metric}: expected sides of one shape, found {' and '.join(map(str, sorted(shapes)))}")
    return len(sides[0])
