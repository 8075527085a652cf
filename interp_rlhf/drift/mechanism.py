"""Did the mechanism behind a behaviour change? Similarity of edge scores, and faithfulness of circuits.

Edge scores come as one vector ``[E]`` over the possible edges of a graph, metrics as one value per example ``[B]``.
Structure compares edge scores between two times on disjoint halves of the pairs; function asks how much of the
behaviour a circuit carries when everything outside it is corrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Unpack

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from interp_rlhf.drift.concepts import by_unit
from interp_rlhf.drift.control_runs import rank_place
from interp_rlhf.drift.estimates import Estimate, IntervalOptions, estimate
from interp_rlhf.drift.nulls import bootstrap_statistic, finite, paired_bootstrap
from interp_rlhf.errors import MeasurementError

#: Two vectors of edge scores ``[E]`` to how alike they are.
Similarity = Callable[[Tensor, Tensor], float]


def weighted_jaccard(a: Float[Tensor, " e"], b: Float[Tensor, " e"]) -> float:
    """``Σ min(|a|, |b|) / Σ max(|a|, |b|)``, in [0, 1]; 1 where both are 0 everywhere. Blind to signs.

    Args:
        a, b: ``[E]`` scores of the same edges, same unit.

    Raises:
        MeasurementError: lengths that differ, no edges, or NaN.

    >>> weighted_jaccard(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([-2.0, 1.0, 1.0]))
    0.6
    """
    x, y = (scores.abs() for scores in _scores(a, b))
    total = float(torch.maximum(x, y).sum())
    return float(torch.minimum(x, y).sum()) / total if total > 0 else 1.0


def spearman(a: Float[Tensor, " e"], b: Float[Tensor, " e"]) -> float:
    """Spearman's rank correlation of signed scores, ties at their mean rank, in [−1, 1].

    Where all scores of a vector are equal it has no ranks: 1 if that holds for both, 0 if for one.

    Raises:
        MeasurementError: as :func:`weighted_jaccard`.

    >>> round(spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 4.0, 3.0])), 6)
    0.8
    """
    x, y = (scores.numpy() for scores in _scores(a, b))
    flat = int(np.ptp(x) == 0) + int(np.ptp(y) == 0)
    return float(flat == 2) if flat else float(stats.spearmanr(x, y).statistic)


def top_overlap(a: Float[Tensor, " e"], b: Float[Tensor, " e"], k: int) -> float:
    """Share of the k edges of largest ``|score|`` that both have, in [0, 1]. Among equals the earlier edge counts.

    Edges of score 0 are never among them: where a vector has fewer than k others, the larger of the two numbers of
    edges divides. 1 where neither has any.

    Args:
        k: at least 1.

    Raises:
        MeasurementError: as :func:`weighted_jaccard`, or k below 1.

    >>> top_overlap(torch.tensor([3.0, -2.0, 1.0, 0.0]), torch.tensor([0.0, 5.0, 0.1, 0.2]), 2)
    0.5
    """
    if k < 1:
        raise MeasurementError(f"top edges: expected at least 1, found {k}")
    first, second = (_top(scores.abs(), k) for scores in _scores(a, b))
    larger = max(len(first), len(second))
    return len(first & second) / larger if larger else 1.0


def structure_change(
    a_0: Float[Tensor, " e"],
    b_0: Float[Tensor, " e"],
    a_t: Float[Tensor, " e"],
    b_t: Float[Tensor, " e"],
    similarity: Similarity = weighted_jaccard,
) -> float:
    """How much less alike edge scores are across times than within one, always across halves of the pairs.

    ``[s(a_0, b_0) + s(a_t, b_t)] / 2 − [s(a_0, b_t) + s(b_0, a_t)] / 2``: sampling noise lowers both terms alike, so
    it is around 0 where nothing changed and exactly 0 where the scores are equal at both times.

    Args:
        a_0, b_0: ``[E]`` edge scores at step 0, from the first and the second half of the pairs.
        a_t, b_t: the same at step t, from the same halves.
        similarity: of two vectors of scores.

    >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> structure_change(x, x, y, y), structure_change(x, x, x, x)
    (1.0, 0.0)
    """
    within = similarity(a_0, b_0) + similarity(a_t, b_t)
    return (within - similarity(a_0, b_t) - similarity(a_t, b_0)) / 2


def structure_estimates(
    a_0: Float[Tensor, "ka e"],
    b_0: Float[Tensor, "kb e"],
    a_t: Float[Tensor, "ka e"],
    b_t: Float[Tensor, "kb e"],
    *,
    top: int,
    n: int,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The ``circuit/structure_*`` metrics, with intervals over blocks of pairs.

    Scores of single pairs would take ``[pairs, E]`` memory; the mean scores of K disjoint blocks of equal size take
    ``[K, E]``, and their mean is the half's score. A resample draws blocks of each half with replacement, the same
    ones at both times. Interval: value ± t·SD over resamples, t with K − 1 degrees of freedom, and the SD times
    ``√(K/(K − 1))``. Percentiles would not do: a resample holds twice the sampling noise, which makes scores of
    different halves less alike, so that its similarities lie below the value.

    What is covered is the expected value at this number of pairs (more pairs: less noise, a larger change for the
    same difference of mechanisms), and only roughly with few blocks: in simulations with K from 4 to 32, nominal
    0.95 covered in 0.9 to 1.0 of cases, too wide where K is below 8. K = 2 has t = 12.7.

    Args:
        a_0, b_0: ``[K, E]`` mean edge scores of each block at step 0, first and second half of the pairs.
        a_t, b_t: of the same blocks at step t.
        top: edges that ``circuit/structure_top`` compares: the size of the circuits.
        n: pairs in both halves together.
        resamples: an SD needs fewer than percentiles do.

    Raises:
        MeasurementError: fewer than 2 blocks in a half, shapes that do not fit, NaN.

    >>> scores = torch.tensor([[1.0, 0.0], [1.0, 0.5]])
    >>> structure_estimates(scores, scores, scores, scores, top=1, n=4)["circuit/structure_change"].value
    0.0
    """
    blocks = [finite(scores, "edge scores").double() for scores in (a_0, b_0, a_t, b_t)]
    shapes = [tuple(scores.shape) for scores in blocks]
    if any(len(shape) != 2 or shape[0] < 2 or shape[1] != shapes[0][1] for shape in shapes) or shapes[:2] != shapes[2:]:
        raise MeasurementError(
            f"edge scores: expected [K, E] with K at least 2 and the same blocks at both times, found {shapes}"
        )
    value = _structure([scores.mean(0) for scores in blocks], top)
    sizes = shapes[0][0], shapes[1][0]
    generator = np.random.default_rng(seed)
    first, second = (torch.from_numpy(generator.multinomial(k, [1 / k] * k, size=resamples) / k) for k in sizes)
    draws = [
        _structure([weights @ scores for weights, scores in zip((x, y, x, y), blocks, strict=True)], top)
        for x, y in zip(first, second, strict=True)
    ]
    few = min(sizes)
    half = stats.t.ppf((1 + confidence) / 2, few - 1) * np.sqrt(few / (few - 1)) * np.std(draws, axis=0, ddof=1)
    return {
        metric: estimate(metric, found, n, interval=(max(low, found - float(wide)), min(1.0, found + float(wide))))
        for (metric, low), found, wide in zip(_STRUCTURE.items(), value, half, strict=True)
    }


def faithfulness(
    metric: str,
    m_circuit: Float[Tensor, " b"],
    m_full: Float[Tensor, " b"],
    m_empty: Float[Tensor, " b"],
    *,
    units: Sequence[str] | None = None,
    random: Float[Tensor, " r"] | None = None,
    **options: Unpack[IntervalOptions],
) -> Estimate | None:
    """``F = (M(C) − M(∅)) / (M(full) − M(∅))``, M the mean over pairs, with a paired bootstrap interval over pairs.

    1 where the circuit carries the whole effect, 0 where it carries none; not bounded. Both differences keep the
    same pairs in every resample.

    Args:
        metric: which circuit, a ``circuit/faithfulness_*`` name.
        m_circuit: ``[B]`` the task's metric with everything outside the circuit corrupted.
        m_full: ``[B]`` with nothing corrupted, same examples.
        m_empty: ``[B]`` with everything corrupted.
        units: the pair of each example, where a pair has several; averaged first.
        random: ``[R]`` F of random circuits of the same size, for the band and the p.
        options: ``resamples``, ``confidence``, ``seed`` of the bootstrap.

    Returns:
        ``None`` where F is undefined: the interval of ``M(full) − M(∅)`` covers 0.

    Raises:
        MeasurementError: lengths that differ, fewer than 2 pairs, or NaN.

    >>> full, empty = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 1.0])
    >>> found = faithfulness(
    ...     "circuit/faithfulness_own", torch.tensor([2.0, 3.0]), full, empty, resamples=100, confidence=0.95, seed=0
    ... )
    >>> found.value, found.ci_low, found.ci_high
    (0.5, 0.5, 0.5)
    """
    circuit, full, empty = _by_pair({"circuit": m_circuit, "full": m_full, "empty": m_empty}, units)
    found = _ratio(circuit - empty, full - empty, options)
    if found is None:
        return None
    value, interval = found
    band = None if random is None else random_band(random, options["confidence"])
    p = None if random is None else random_p(value, random)
    kind = "none" if random is None else "random_circuits"
    return estimate(metric, value, len(full), interval=interval, null_kind=kind, band=band, p=p)


def random_faithfulness(
    m_random: Float[Tensor, "r b"],
    m_full: Float[Tensor, " b"],
    m_empty: Float[Tensor, " b"],
    units: Sequence[str] | None = None,
) -> Float[Tensor, " r"]:
    """F of each of R random circuits, ``[R]`` float64: the null of :func:`faithfulness`, which says where F is defined.

    Args:
        m_random: ``[R, B]`` the task's metric in each random circuit.
        m_full, m_empty, units: as for :func:`faithfulness`.

    Raises:
        MeasurementError: lengths that differ, NaN, or ``M(full) = M(∅)``.

    >>> random_faithfulness(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([3.0, 5.0]), torch.tensor([1.0, 1.0]))
    tensor([0.1667, 1.0000], dtype=torch.float64)
    """
    named = {"full": m_full, "empty": m_empty, **{f"random {i}": row for i, row in enumerate(m_random, 1)}}
    full, empty, *circuits = (values.mean() for values in _by_pair(named, units))
    if full == empty:
        raise MeasurementError("faithfulness: M(full) equals M(∅), a share of no effect is undefined")
    return (torch.stack(circuits) - empty) / (full - empty)


def random_band(f_random: Float[Tensor, " r"], confidence: float = 0.95) -> tuple[float, float] | None:
    """From the 5th to the 95th percentile (at confidence 0.95) of F over random circuits; it fits :func:`random_p`.

    Order statistics: above the band lies a value with ``p ≤ 1 − confidence``, and no other. ``None`` where random
    circuits are too few for any value to have such a p (fewer than 19).

    Raises:
        MeasurementError: no random circuit, or NaN.

    >>> random_band(torch.arange(1.0, 100.0))
    (5.0, 95.0)
    """
    ordered = finite(f_random, "random circuits").double().sort().values
    place = rank_place(len(ordered), confidence)
    return None if place is None else (float(ordered[len(ordered) - place]), float(ordered[place - 1]))


def random_p(value: float, f_random: Float[Tensor, " r"]) -> float:
    """One-sided rank p-value ``(1 + #{F_random ≥ F}) / (R + 1)``, never 0.

    >>> random_p(0.5, torch.tensor([0.25, -2.0, 0.5]))
    0.5
    """
    as_high = int((finite(f_random, "random circuits").double() >= value).sum())
    return (1 + as_high) / (len(f_random) + 1)


def effect_estimates(
    m_full: Float[Tensor, " b"],
    m_empty: Float[Tensor, " b"],
    m_full_0: Float[Tensor, " b"],
    m_empty_0: Float[Tensor, " b"],
    *,
    units: Sequence[str] | None = None,
    **options: Unpack[IntervalOptions],
) -> dict[str, Estimate]:
    """``circuit/metric``, ``circuit/metric_corrupt`` and ``circuit/effect_ratio``, with bootstrap intervals over pairs.

    The ratio is ``|M(full) − M(∅)|`` over the same at step 0 (paired); blind to its sign, and above 0 by chance
    where nothing is left of the effect. There is none where step 0 has no effect: the interval of its
    ``M(full) − M(∅)`` covers 0.

    Args:
        m_full, m_empty: ``[B]`` the task's metric with nothing and with everything corrupted, step t.
        m_full_0, m_empty_0: the same examples at step 0.
        units, options: as for :func:`faithfulness`.

    Raises:
        MeasurementError: lengths that differ, fewer than 2 pairs, or NaN.

    >>> full, empty = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 1.0])
    >>> found = effect_estimates(full / 2, empty / 2, full, empty, resamples=100, confidence=0.95, seed=0)
    >>> [one.value for one in found.values()]
    [2.0, 0.5, 0.5]
    """
    named = {"full": m_full, "empty": m_empty, "full at step 0": m_full_0, "empty at step 0": m_empty_0}
    full, empty, full_0, empty_0 = _by_pair(named, units)
    n = len(full)
    found = {
        metric: estimate(metric, float(values.mean()), n, interval=paired_bootstrap(values, **options))
        for metric, values in (("circuit/metric", full), ("circuit/metric_corrupt", empty))
    }
    ratio = _ratio(full - empty, full_0 - empty_0, options, absolute=True)
    if ratio is not None:
        found["circuit/effect_ratio"] = estimate("circuit/effect_ratio", ratio[0], n, interval=ratio[1])
    return found


#: Metrics of structure in the order of :func:`_structure`, and the least value each can have.
_STRUCTURE: Mapping[str, float] = {
    "circuit/structure_change": -1.0,
    "circuit/structure_jaccard": 0.0,
    "circuit/structure_spearman": -1.0,
    "circuit/structure_top": 0.0,
}


def _structure(halves: Sequence[Tensor], top: int) -> tuple[float, float, float, float]:
    """The change, then the similarities across times, from ``[E]`` scores in the order a_0, b_0, a_t, b_t."""
    a_0, b_0, a_t, b_t = halves

    def across(similarity: Similarity) -> float:
        return (similarity(a_0, b_t) + similarity(a_t, b_0)) / 2

    change = structure_change(a_0, b_0, a_t, b_t)
    return change, across(weighted_jaccard), across(spearman), across(lambda x, y: top_overlap(x, y, top))


def _scores(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 1 or a.shape != b.shape:
        raise MeasurementError(
            f"edge scores: expected two vectors [E] of the same edges, found {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return finite(a, "edge scores").double(), finite(b, "edge scores").double()


def _top(sizes: Tensor, k: int) -> set[int]:
    least = sizes.topk(min(k, len(sizes))).values[-1]
    above, equal = ((mask & (sizes > 0)).nonzero().flatten().tolist() for mask in (sizes > least, sizes == least))
    return {*above, *equal[: k - len(above)]}


def _by_pair(named: Mapping[str, Tensor], units: Sequence[str] | None) -> list[Tensor]:
    """Each metric as one value per pair, ``[n]`` float64."""
    shapes = {name: tuple(values.shape) for name, values in named.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) != 1:
        raise MeasurementError(f"circuit metric: expected one value per example [B] for each, found {shapes}")
    values = [finite(each, f"circuit metric, {name}").double() for name, each in named.items()]
    return values if units is None else [by_unit(each[:, None], units)[:, 0] for each in values]


def _ratio(
    over: Tensor, under: Tensor, options: IntervalOptions, *, absolute: bool = False
) -> tuple[float, tuple[float, float]] | None:
    """Mean over mean with its interval, pairs drawn jointly; ``None`` where the interval of the lower mean covers 0.

    Also ``None`` where some resample's lower mean is exactly 0: then only a handful of pairs has any effect.
    """
    n = len(under)
    low, high = paired_bootstrap(under, **options)
    everything: IntervalOptions = {**options, "confidence": 1.0}
    nearest, _ = bootstrap_statistic(lambda counts: (counts @ under).abs(), n, **everything)
    if low <= 0 <= high or nearest == 0:
        return None

    def ratio(counts: Tensor) -> Tensor:
        ratios = (counts @ over) / (counts @ under)
        return ratios.abs() if absolute else ratios

    return float(ratio(torch.ones(1, n, dtype=torch.float64))), bootstrap_statistic(ratio, n, **options)
