"""Change of mechanism against NumPy, SciPy and pandas: similarities, their change over halves, faithfulness, null."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from shape_checked import checked

from interp_rlhf.drift.estimates import METRICS
from interp_rlhf.errors import MeasurementError

plain = importlib.import_module("interp_rlhf.drift.mechanism")
mechanism = checked("interp_rlhf.drift.mechanism")

OPTIONS: dict[str, Any] = {"resamples": 1000, "confidence": 0.95, "seed": 0}
STRUCTURE = ["circuit/structure_change", "circuit/structure_jaccard", "circuit/structure_spearman"]
STRUCTURE += ["circuit/structure_top"]


def tensor(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    pairs = [sorted((abs(x), abs(y))) for x, y in zip(a, b, strict=True)]
    return sum(low for low, _ in pairs) / sum(high for _, high in pairs)


def ranked(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(pd.Series(a).rank(), pd.Series(b).rank())[0, 1])


def shared(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Of edges sorted by size, then by place; without zeros."""
    tops = [
        {i for _, i in sorted((-abs(x), i) for i, x in enumerate(scores) if x != 0)[:k]} for scores in (a, b)
    ]  # fmt: skip
    return len(tops[0] & tops[1]) / max(map(len, tops))


def scores(seed: int, e: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Two related vectors with zeros, ties and both signs."""
    generator = np.random.default_rng(seed)
    a = np.round(generator.laplace(size=e) * (generator.random(e) < 0.6), 1)
    return a, np.round(np.where(generator.random(e) < 0.7, a, generator.laplace(size=e)), 1)


# ------------------------------------------------------------------------------------------------------- similarities


@pytest.mark.parametrize("seed", range(5))
def test_similarities_are_those_of_the_definitions(seed: int) -> None:
    a, b = scores(seed)
    assert mechanism.weighted_jaccard(tensor(a), tensor(b)) == pytest.approx(jaccard(a, b), abs=1e-12)
    assert mechanism.spearman(tensor(a), tensor(b)) == pytest.approx(ranked(a, b), abs=1e-12)
    for k in (1, 5, 20, 39, 100):
        assert mechanism.top_overlap(tensor(a), tensor(b), k) == shared(a, b, k), k


def test_similarities_of_the_same_the_opposite_and_disjoint_scores() -> None:
    a = tensor([3.0, -1.0, 0.0, 0.5])
    assert [f(a, a) for f in (mechanism.weighted_jaccard, mechanism.spearman)] == [1.0, pytest.approx(1.0)]
    assert (mechanism.weighted_jaccard(a, -a), mechanism.spearman(a, -a)) == (1.0, pytest.approx(-1.0))
    assert mechanism.weighted_jaccard(a, 2 * a) == 0.5
    apart = tensor([0.0, 0.0, 7.0, 0.0])
    assert (mechanism.weighted_jaccard(a, apart), mechanism.top_overlap(a, apart, 2)) == (0.0, 0.0)


def test_similarities_without_any_scores_are_defined() -> None:
    none, some = torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 2.0])
    for similarity in (mechanism.weighted_jaccard, mechanism.spearman, lambda a, b: mechanism.top_overlap(a, b, 2)):
        assert (similarity(none, none), similarity(none, some), similarity(some, none)) == (1.0, 0.0, 0.0)


def test_the_top_takes_the_earlier_of_equal_edges_and_no_zeros() -> None:
    assert mechanism.top_overlap(torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, 0.0, 0.0]), 1) == 1.0
    assert mechanism.top_overlap(torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0]), 1) == 0.0
    assert mechanism.top_overlap(torch.tensor([5.0, 0.0, 0.0]), torch.tensor([5.0, 0.0, 0.0]), 2) == 1.0
    assert mechanism.top_overlap(torch.tensor([5.0, 0.0, 0.0]), torch.tensor([5.0, 1.0, 0.0]), 2) == 0.5


# ------------------------------------------------------------------------------------------------- structure and time


def planted(
    generator: np.random.Generator, k: tuple[int, int], start: np.ndarray, now: np.ndarray, noise: float
) -> list[torch.Tensor]:
    """Scores ``[K, E]`` of blocks a_0, b_0, a_t, b_t; noise per block, most of it shared between the times."""
    halves = []
    for blocks in k:
        common = 0.8 * generator.normal(size=(blocks, len(start)))
        halves.append(
            [m + noise * (common + 0.6 * generator.normal(size=(blocks, len(start)))) for m in (start, now)]
        )  # fmt: skip
    return [tensor(halves[half][time]) for time in (0, 1) for half in (0, 1)]


def by_hand(blocks: list[np.ndarray], top: int) -> list[float]:
    a_0, b_0, a_t, b_t = blocks

    def across(s: Any) -> float:
        return (s(a_0, b_t) + s(a_t, b_0)) / 2

    change = (jaccard(a_0, b_0) + jaccard(a_t, b_t)) / 2 - across(jaccard)
    return [change, across(jaccard), across(ranked), across(lambda a, b: shared(a, b, top))]


def test_structure_and_its_interval_by_hand() -> None:
    generator = np.random.default_rng(0)
    start = generator.laplace(size=25)
    blocks = planted(generator, (3, 5), start, np.roll(start, 1), 0.5)
    found = mechanism.structure_estimates(*blocks, top=6, n=80, resamples=50, confidence=0.9, seed=3)
    assert list(found) == STRUCTURE
    arrays = [scores.numpy() for scores in blocks]
    value = by_hand([scores.mean(0) for scores in arrays], 6)
    draws = np.random.default_rng(3)
    first, second = (draws.multinomial(k, np.full(k, 1 / k), size=50) for k in (3, 5))
    halves = [
        [np.average(scores, axis=0, weights=w) for scores, w in zip(arrays, (x, y, x, y), strict=True)]
        for x, y in zip(first, second, strict=True)
    ]
    spread = np.std([by_hand(half, 6) for half in halves], axis=0, ddof=1)
    wide = stats.t(2).isf(0.05) * math.sqrt(3 / 2) * spread
    for one, expected, half, low in zip(found.values(), value, wide, (-1, 0, -1, 0), strict=True):
        assert one.value == pytest.approx(expected, abs=1e-12)
        assert one.ci_low == pytest.approx(max(low, expected - half), abs=1e-9)
        assert one.ci_high == pytest.approx(min(1, expected + half), abs=1e-9)
        assert (one.n, one.unit, one.tier, one.null_kind, one.p) == (80, "1", "A", "none", None)


def test_intervals_of_structure_stay_in_its_range() -> None:
    generator = np.random.default_rng(2)
    up, down = (
        mechanism.structure_estimates(*planted(generator, (2, 2), start, now, noise), top=3, n=4)
        for start, now, noise in ((np.arange(20.0), np.arange(20.0), 2.0), (np.ones(20), -np.ones(20), 9.0))
    )
    assert up["circuit/structure_spearman"].ci_high == 1.0 > up["circuit/structure_spearman"].value
    assert [down[name].ci_low for name in STRUCTURE[1:]] == [0.0, -1.0, 0.0]
    assert down["circuit/structure_change"].ci_low < 0


def test_structure_change_takes_any_similarity() -> None:
    four = [tensor(scores(seed)[0]) for seed in range(4)]
    table = {(0, 1): 0.9, (2, 3): 0.7, (0, 3): 0.4, (2, 1): 0.2}

    def similarity(a: torch.Tensor, b: torch.Tensor) -> float:
        places = [next(i for i, each in enumerate(four) if each is one) for one in (a, b)]
        return table[places[0], places[1]]

    assert mechanism.structure_change(*four, similarity) == pytest.approx(0.8 - 0.3)


def test_nothing_changed_is_exactly_no_change_although_the_halves_differ() -> None:
    a, b = (planted(np.random.default_rng(seed), (4, 4), np.arange(30.0), np.arange(30.0), 9.0)[0] for seed in (0, 1))
    found = mechanism.structure_estimates(a, b, a, b, top=5, n=8)["circuit/structure_change"]
    assert (found.value, found.ci_low, found.ci_high) == (0.0, 0.0, 0.0)
    assert mechanism.weighted_jaccard(a.mean(0), b.mean(0)) < 0.9


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_intervals_of_the_change_cover_what_noise_leaves_of_it(share: float) -> None:
    """Nominal 0.95 over 80 repeats: fewer than 66 hits have a chance below 1e-4. Percentiles would fail (share 0.5)."""
    generator = np.random.default_rng(1)
    start = generator.laplace(size=40) * (generator.random(40) < 0.3)
    now = (1 - share) * start + share * generator.permutation(start)
    found = [
        plain.structure_estimates(*planted(generator, (8, 8), start, now, 0.3), top=5, n=64, resamples=30)
        for _ in range(80)
    ]
    rows = [one["circuit/structure_change"] for one in found]
    expected = np.mean([row.value for row in rows])
    assert abs(expected) < 0.01 if share == 0 else expected > 0.15
    assert sum(row.ci_low <= expected <= row.ci_high for row in rows) >= 66
    away = sum(not row.ci_low <= 0 <= row.ci_high for row in rows)
    assert away <= 14 if share == 0 else away >= 76


# ------------------------------------------------------------------------------------------------------- faithfulness


def runs(seed: int, n: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Metric in the circuit, in full and when empty; pairs share most of their noise."""
    generator = np.random.default_rng(seed)
    empty = generator.normal(size=n)
    full = empty + 2 + generator.normal(size=n)
    return empty + 0.7 * (full - empty) + 0.3 * generator.normal(size=n), full, empty


def test_faithfulness_and_its_interval_are_scipys() -> None:
    circuit, full, empty = runs(0)

    def ratio(c: np.ndarray, f: np.ndarray, e: np.ndarray, axis: int) -> np.ndarray:
        return (c.mean(axis) - e.mean(axis)) / (f.mean(axis) - e.mean(axis))

    theirs = stats.bootstrap(
        (circuit, full, empty), ratio, paired=True, vectorized=True, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    found = mechanism.faithfulness(
        "circuit/faithfulness_own", *map(tensor, (circuit, full, empty)), **(OPTIONS | {"resamples": 20_000})
    )
    assert found.value == pytest.approx(float(ratio(circuit, full, empty, 0)), abs=1e-12)
    width = theirs.high - theirs.low
    assert found.ci_low == pytest.approx(theirs.low, abs=0.04 * width)
    assert found.ci_high == pytest.approx(theirs.high, abs=0.04 * width)
    assert (found.n, found.unit, found.tier, found.null_kind, found.p) == (60, "1", "B", "none", None)


def test_faithfulness_of_everything_and_nothing() -> None:
    _, full, empty = map(tensor, runs(1))
    for circuit, expected in ((full, 1.0), (empty, 0.0)):
        found = mechanism.faithfulness("circuit/faithfulness_index", circuit, full, empty, **OPTIONS)
        assert (found.value, found.ci_low, found.ci_high) == (expected, expected, expected)


def test_faithfulness_of_a_negative_effect_is_a_share_too() -> None:
    circuit, full, empty = map(tensor, runs(2))
    found, turned = (
        mechanism.faithfulness("circuit/faithfulness_index", *(sign * x for x in (circuit, full, empty)), **OPTIONS)
        for sign in (1, -1)
    )
    assert (turned.value, turned.ci_low) == (pytest.approx(found.value), pytest.approx(found.ci_low))


def test_faithfulness_is_undefined_without_an_effect() -> None:
    generator = np.random.default_rng(3)
    full, empty = tensor(generator.normal(size=40)), tensor(generator.normal(size=40))
    assert mechanism.faithfulness("circuit/faithfulness_own", full, full, empty, **OPTIONS) is None
    few = torch.zeros(64)
    few[:5] = 1.0  # the interval leaves out 0, but some resamples draw none of the five
    low, _ = mechanism.paired_bootstrap(few, **OPTIONS)
    assert low > 0 and mechanism.faithfulness("circuit/faithfulness_own", few, few, 0 * few, **OPTIONS) is None


def test_examples_of_a_pair_are_averaged_first() -> None:
    circuit, full, empty = runs(4, n=40)
    units = [f"pair {i // 2}" for i in range(30)] + [f"pair {i}" for i in range(15, 25)]
    means = [pd.Series(x).groupby(units, sort=False).mean().to_numpy() for x in (circuit, full, empty)]
    assert len(means[0]) == 25
    found, expected = (
        mechanism.faithfulness("circuit/faithfulness_own", *map(tensor, values), units=names, **OPTIONS)
        for values, names in (((circuit, full, empty), units), (means, None))
    )
    assert (found.value, found.ci_low, found.n) == (pytest.approx(expected.value), pytest.approx(expected.ci_low), 25)
    random = mechanism.random_faithfulness(tensor([circuit, full]), tensor(full), tensor(empty), units)
    assert random.tolist() == pytest.approx([expected.value, 1.0])


# --------------------------------------------------------------------------------------------------------------- null


@pytest.mark.parametrize("r", [19, 40, 99, 100, 257])
def test_above_the_band_are_just_the_values_with_a_small_p(r: int) -> None:
    null = np.random.default_rng(r).normal(size=r)
    low, high = mechanism.random_band(tensor(null))
    for value in [*null, *(null + 1e-9), *np.linspace(-4, 4, 50)]:
        p = mechanism.random_p(float(value), tensor(null))
        assert p == (1 + np.sum(null >= value)) / (r + 1)
        assert (value > high) == (p <= 0.05)
    mirrored = mechanism.random_band(tensor(-null))
    assert (low, high) == (-mirrored[1], -mirrored[0])
    if r in (19, 99):
        assert (low, high) == pytest.approx(np.quantile(null, [0.05, 0.95], method="weibull"))


def test_no_band_of_too_few_random_circuits() -> None:
    null = torch.arange(18.0)
    assert mechanism.random_band(null) is None and mechanism.random_band(null, 0.9) is not None
    _, full, empty = map(tensor, runs(5))
    found = mechanism.faithfulness("circuit/faithfulness_own", full, full, empty, random=null, **OPTIONS)
    assert (found.null_kind, found.null_low, found.null_high, found.p) == ("random_circuits", None, None, 18 / 19)


def test_faithfulness_stands_beside_random_circuits() -> None:
    circuit, full, empty = map(tensor, runs(6))
    shares = torch.linspace(-0.3, 0.75, 99, dtype=torch.float64)
    null = mechanism.random_faithfulness(empty + shares[:, None] * (full - empty), full, empty)
    assert torch.allclose(null, shares)
    found = mechanism.faithfulness("circuit/faithfulness_matched", circuit, full, empty, random=null, **OPTIONS)
    assert (found.null_low, found.null_high) == (pytest.approx(float(shares[4])), pytest.approx(float(shares[94])))
    assert found.p == (1 + int((shares >= found.value).sum())) / 100 and 0.01 < found.p < 0.2
    narrow = mechanism.faithfulness(
        "circuit/faithfulness_matched", circuit, full, empty, random=null, **(OPTIONS | {"confidence": 0.8})
    )
    assert narrow.null_high == pytest.approx(float(shares[79])) and narrow.ci_low > found.ci_low


# ------------------------------------------------------------------------------------------------------------- effect


def test_effect_and_its_ratio() -> None:
    (_, full_0, empty_0), (_, full, empty) = runs(7), runs(8)
    full = full - 0.5 * (full - empty)
    named = map(tensor, (full, empty, full_0, empty_0))
    found = mechanism.effect_estimates(*named, **(OPTIONS | {"resamples": 20_000}))
    assert list(found) == ["circuit/metric", "circuit/metric_corrupt", "circuit/effect_ratio"]
    assert found["circuit/metric"].value == pytest.approx(full.mean())
    assert found["circuit/metric_corrupt"].value == pytest.approx(empty.mean())
    one = found["circuit/effect_ratio"]
    assert one.value == pytest.approx((full.mean() - empty.mean()) / (full_0.mean() - empty_0.mean()))
    theirs = stats.bootstrap(
        (full - empty, full_0 - empty_0), lambda x, y, axis: np.abs(x.mean(axis)) / np.abs(y.mean(axis)), paired=True,
        vectorized=True, method="percentile", n_resamples=20_000, rng=1,
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert (one.ci_low, one.ci_high) == (
        pytest.approx(theirs.low, abs=0.04 * width), pytest.approx(theirs.high, abs=0.04 * width)
    )  # fmt: skip
    mean = stats.bootstrap((full,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert found["circuit/metric"].ci_low == pytest.approx(mean.low, abs=0.04 * (mean.high - mean.low))


def test_the_ratio_is_one_at_rest_has_no_sign_and_needs_an_effect_at_the_start() -> None:
    _, full, empty = map(tensor, runs(9))
    rest = mechanism.effect_estimates(full, empty, full, empty, **OPTIONS)["circuit/effect_ratio"]
    assert (rest.value, rest.ci_low, rest.ci_high) == (1.0, 1.0, 1.0)
    turned = mechanism.effect_estimates(empty, full, full, empty, **OPTIONS)["circuit/effect_ratio"]
    assert (turned.value, turned.ci_low, turned.ci_high) == (1.0, 1.0, 1.0)
    noise = tensor(np.random.default_rng(9).normal(size=60))
    assert "circuit/effect_ratio" not in mechanism.effect_estimates(full, empty, noise, 0 * noise, **OPTIONS)
    gone = mechanism.effect_estimates(noise, 0 * noise, full, empty, **OPTIONS)["circuit/effect_ratio"]
    assert gone.ci_low >= 0 and gone.value < 0.2


def test_every_circuit_metric_but_the_cost_has_its_function_and_example() -> None:
    circuit, full, empty = map(tensor, runs(10))
    blocks = planted(np.random.default_rng(0), (2, 2), np.arange(5.0), np.arange(5.0), 1.0)
    found = mechanism.effect_estimates(full, empty, full, empty, **OPTIONS)
    found |= mechanism.structure_estimates(*blocks, top=2, n=4)
    for name in ("index", "matched", "own", "control"):
        metric = f"circuit/faithfulness_{name}"
        found[metric] = mechanism.faithfulness(metric, circuit, full, empty, random=torch.arange(20.0), **OPTIONS)
    named = {name for name in METRICS if name.startswith("circuit/")}
    assert set(found) == named - {"circuit/seconds"}
    assert all(row.null_kind in METRICS[metric].nulls for metric, row in found.items())
    public = [
        f for key, f in vars(mechanism).items() if callable(f) and getattr(f, "__module__", "").endswith("mechanism")
    ]
    assert len(public) >= 9 and all(">>>" in f.__doc__ for f in public if not f.__name__.startswith("_"))


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_says_what_is_wrong() -> None:
    x, y = torch.ones(4), torch.ones(5)
    for similarity in (plain.weighted_jaccard, plain.spearman, lambda a, b: plain.top_overlap(a, b, 1)):
        with pytest.raises(MeasurementError, match=r"same edges, found \(4,\) and \(5,\)"):
            similarity(x, y)
        with pytest.raises(MeasurementError, match="1 of 4 NaN"):
            similarity(x, torch.tensor([1.0, 2.0, math.nan, 0.0]))
        with pytest.raises(MeasurementError, match="expected values, found none"):
            similarity(torch.zeros(0), torch.zeros(0))
    with pytest.raises(MeasurementError, match="at least 1, found 0"):
        plain.top_overlap(x, x, 0)
    for blocks in ([torch.ones(1, 3)] * 4, [torch.ones(2, 3)] * 3 + [torch.ones(3, 3)], [torch.ones(2)] * 4):
        with pytest.raises(MeasurementError, match="K at least 2"):
            plain.structure_estimates(*blocks, top=1, n=4)
    with pytest.raises(MeasurementError, match="one value per example"):
        plain.faithfulness("circuit/faithfulness_own", x, x, y, **OPTIONS)
    with pytest.raises(MeasurementError, match="circuit metric, empty: expected finite"):
        plain.faithfulness("circuit/faithfulness_own", x, x, x / 0, **OPTIONS)
    with pytest.raises(MeasurementError, match="share of no effect"):
        plain.random_faithfulness(torch.ones(2, 4), x, x)
    with pytest.raises(MeasurementError, match="expected one per row"):
        plain.effect_estimates(x, x, x, x, units=["a"], **OPTIONS)
