"""Bootstrap against SciPy, comparison directions against NumPy's covariance, calibration of the rank p."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from shape_checked import checked

from interp_rlhf.drift.concepts import comparison_drifts, cosine_band, specificity_estimates, standardised_drift
from interp_rlhf.errors import MeasurementError
from scripts.null_replicates import NULLS, replicate

nulls = checked("interp_rlhf.drift.nulls")


def test_bootstrap_interval_equals_scipys_on_the_same_data() -> None:
    values = np.random.default_rng(0).exponential(2.0, size=80)
    low, high = nulls.paired_bootstrap(torch.from_numpy(values), resamples=20_000, confidence=0.9, seed=1)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    simulation_error = 0.04 * values.std() / math.sqrt(80)  # of a percentile from 20,000 resamples, about 3 sigma
    assert low == pytest.approx(theirs.low, abs=simulation_error)
    assert high == pytest.approx(theirs.high, abs=simulation_error)


def test_bootstrap_interval_holds_the_truth_as_often_as_scipys() -> None:
    generator = np.random.default_rng(3)
    ours = theirs = 0
    for run in range(300):
        values = generator.normal(0.7, 1.0, size=40)
        low, high = nulls.paired_bootstrap(torch.from_numpy(values), resamples=400, seed=run)
        ours += low <= 0.7 <= high
        other = stats.bootstrap((values,), np.mean, n_resamples=400, method="percentile", rng=generator)
        theirs += other.confidence_interval.low <= 0.7 <= other.confidence_interval.high
    assert stats.binom.ppf(0.0005, 300, 0.93) <= ours <= stats.binom.ppf(0.9995, 300, 0.95)
    assert abs(ours - theirs) <= 9


def test_bootstrap_is_seeded_and_leaves_the_global_generators_alone() -> None:
    values = torch.linspace(0, 1, 30)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = nulls.paired_bootstrap(values, seed=4)
    assert nulls.paired_bootstrap(values, seed=4) == first != nulls.paired_bootstrap(values, seed=5)
    nulls.covariance_directions(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), 3, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_constant_values_have_an_interval_of_no_width() -> None:
    assert nulls.paired_bootstrap(torch.zeros(12)) == (0.0, 0.0)
    assert nulls.paired_bootstrap(torch.ones(13)) == (1.0, 1.0)


def test_bootstrap_of_a_statistic_draws_each_unit_with_the_right_frequency() -> None:
    seen = []
    nulls.bootstrap_statistic(lambda counts: seen.append(counts) or counts[:, 0], 25, resamples=4000, seed=6)
    counts = seen[0]
    assert counts.shape == (4000, 25) and bool((counts.sum(1) == 25).all())
    observed = np.bincount(counts[:, 0].long().numpy(), minlength=5)[:5] / 4000
    np.testing.assert_allclose(observed, stats.binom.pmf(range(5), 25, 1 / 25), atol=4 * math.sqrt(0.25 / 4000))


@pytest.mark.parametrize("drop_top", [False, True])
def test_directions_have_the_covariance_of_the_activations(drop_top: bool) -> None:
    scale = torch.tensor([3.0, 2.0, 1.5, 1.0, 0.5, 0.2])
    x0 = torch.randn(200, 6, generator=torch.Generator().manual_seed(7)) * scale + 10
    directions = nulls.covariance_directions(x0, 20_000, 8, drop_top=drop_top)
    np.testing.assert_allclose(np.linalg.norm(directions.numpy(), axis=1), 1, atol=1e-6)
    covariance = np.cov(x0.double().numpy(), rowvar=False)
    if drop_top:
        values, vectors = np.linalg.eigh(covariance)
        covariance = covariance - values[-1] * np.outer(vectors[:, -1], vectors[:, -1])
        assert float(np.abs(directions.double().numpy() @ vectors[:, -1]).max()) < 1e-6
    independent = np.random.default_rng(9).multivariate_normal(np.zeros(6), covariance, size=20_000, method="eigh")
    independent /= np.linalg.norm(independent, axis=1, keepdims=True)
    ours = directions.double().numpy()
    np.testing.assert_allclose(ours.T @ ours / 20_000, independent.T @ independent / 20_000, atol=0.02)
    np.testing.assert_allclose(ours.mean(0), 0, atol=0.03)


def test_unscaled_draws_reproduce_the_covariance_matrix() -> None:
    """Before scaling to length 1 the construction is exact: recovered from N < d, where directions stay in span."""
    x0 = torch.randn(10, 40, generator=torch.Generator().manual_seed(10))
    directions = nulls.covariance_directions(x0, 500, 11).double().numpy()
    centred = (x0 - x0.mean(0)).double().numpy()
    basis = np.linalg.svd(centred, full_matrices=False)[2][:9]
    np.testing.assert_allclose(directions @ basis.T @ basis, directions, atol=1e-6)


def test_directions_are_seeded() -> None:
    x0 = torch.randn(12, 5, generator=torch.Generator().manual_seed(12))
    assert torch.equal(nulls.covariance_directions(x0, 4, 1), nulls.covariance_directions(x0, 4, 1))
    assert not torch.equal(nulls.covariance_directions(x0, 4, 1), nulls.covariance_directions(x0, 4, 2))


def test_rank_p_against_counting_and_band_says_the_same_as_p() -> None:
    generator = np.random.default_rng(13)
    for k in (19, 200, 256):
        null = torch.from_numpy(generator.normal(size=k))
        low, high = nulls.direction_band(null, 0.95)
        for value in [*generator.normal(0, 2, size=200), low, high]:
            p = nulls.rank_p(float(value), null)
            assert p == (1 + sum(abs(x) >= abs(value) for x in null.tolist())) / (1 + k)
            assert (low <= value <= high) == (p > 0.05 + 1e-12)


def test_rank_p_is_uniform_when_a_random_perturbation_holds_no_concept_effect() -> None:
    """600 replicates; the concept is one more draw from the activations' covariance, so its rank is uniform."""
    generator = torch.Generator().manual_seed(14)
    spread = torch.logspace(0, 1, 24)
    smoothing = np.random.default_rng(15)
    k, found = 199, []
    for run in range(600):
        x0 = torch.randn(48, 24, generator=generator) * spread + 3
        xt = x0 + 0.3 * torch.randn(24, generator=generator) + 0.1 * torch.randn(48, 24, generator=generator)
        v = nulls.covariance_directions(x0, 1, 2 * run + 1)[0]
        null = comparison_drifts(x0, xt, nulls.covariance_directions(x0, k, 2 * run))
        p = nulls.rank_p(float(standardised_drift(x0, xt, v).mean()), null)
        found.append(p - smoothing.uniform() / (k + 1))  # p has steps of 1/(k + 1)
    assert stats.kstest(found, "uniform").pvalue > 0.001
    assert sum(p <= 0.05 for p in found) <= stats.binom.ppf(0.999, 600, 0.05)


def test_rank_p_finds_a_concept_that_moved() -> None:
    generator = torch.Generator().manual_seed(16)
    x0 = torch.randn(64, 32, generator=generator)
    directions = nulls.covariance_directions(x0, 200, 17)
    v = nulls.covariance_directions(x0, 1, 18)[0]
    xt = x0 + 0.5 * v
    value = float(standardised_drift(x0, xt, v).mean())
    null = comparison_drifts(x0, xt, directions)
    assert nulls.rank_p(value, null) == 1 / 201
    assert value > nulls.direction_band(null)[1]


@pytest.mark.parametrize("name", NULLS)
def test_every_null_finds_5_percent_where_it_holds(name: str) -> None:
    """300 of the replicates that scripts/stress_nulls takes 2000 of."""
    row, passed = replicate(name, 300)
    assert passed, row


def test_replicates_tell_a_null_that_does_not_hold(monkeypatch) -> None:
    for wrong in (lambda g: g.uniform() ** 1.5, lambda g: g.uniform(0.04, 1), lambda g: 0.5 + 0.5 * g.uniform()):
        monkeypatch.setitem(NULLS, "wrong", wrong)
        assert not replicate("wrong", 300)[1]


def moved_readings(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Readings ``[64, 20]`` and later ones, which moved most along the first principal component; that component."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(64, 20, generator=generator) * torch.tensor([8.0, *[1.0] * 19]) + 3
    top = torch.eye(20)[0]
    return x0, x0 + 0.2 * torch.randn(64, 20, generator=generator) + 4 * top, top


def test_specificity_against_numpy() -> None:
    x0, xt, _ = moved_readings(20)
    v, *bank = torch.nn.functional.normalize(torch.randn(26, 20, generator=torch.Generator().manual_seed(21)), dim=1)
    without_top = nulls.covariance_directions(x0, 250, 22, drop_top=True)
    found = specificity_estimates(x0, xt, v, without_top, torch.stack(bank), 0.9)
    a, b = x0.double().numpy(), xt.double().numpy()

    def drift(w: torch.Tensor) -> float:
        w = w.double().numpy()
        return float(((b - a) @ w).mean() / (a @ w).std(ddof=1))

    for kind, directions in (("directions_without_top", without_top), ("concept_bank", bank)):
        row, null = found.pop(f"specificity/{kind}"), np.sort([abs(drift(w)) for w in directions])
        k = len(null)
        assert row.value == pytest.approx(drift(v))
        assert row.p == (1 + (null >= abs(drift(v))).sum()) / (k + 1)
        assert row.null_high == -row.null_low == pytest.approx(null[math.ceil(round(0.9 * (k + 1), 9)) - 1])
        assert (row.null_kind, row.n, row.unit, row.tier) == (kind, 64, "sd", "B")
    assert not found


def test_a_movement_along_the_common_component_is_specific_only_without_it() -> None:
    """All directions share the top component that moved; those without it have nothing of it."""
    x0, xt, top = moved_readings(23)
    v = torch.nn.functional.normalize(top + 0.3 * torch.eye(20)[1], dim=0)
    value = float(standardised_drift(x0, xt, v).mean())
    assert nulls.rank_p(value, comparison_drifts(x0, xt, nulls.covariance_directions(x0, 250, 24))) > 0.05
    without_top = nulls.covariance_directions(x0, 250, 24, drop_top=True)
    found = specificity_estimates(x0, xt, v, without_top, None)
    assert list(found) == ["specificity/directions_without_top"]
    assert found["specificity/directions_without_top"].p == 1 / 251
    assert found["specificity/directions_without_top"].null_high < value


@pytest.mark.parametrize(("b", "band"), [(18, False), (19, True)])
def test_a_small_bank_has_p_but_no_band(b: int, band: bool) -> None:
    x0, xt, top = moved_readings(25)
    row = specificity_estimates(x0, xt, top, None, torch.eye(20)[1:2].repeat(b, 1))["specificity/concept_bank"]
    assert row.p == 1 / (b + 1) and row.null_kind == "concept_bank"
    assert (row.null_high is not None) == (row.null_low is not None) == band
    assert specificity_estimates(x0, xt, top, None, None) == {}


def test_refit_band_against_numpy_and_attached_to_the_cosine() -> None:
    from interp_rlhf.drift.concepts import refit_cosine_estimate

    generator = torch.Generator().manual_seed(26)
    positive, negative = torch.randn(40, 12, generator=generator) + 0.4, torch.randn(40, 12, generator=generator)
    low, high = cosine_band(positive, negative, resamples=4000, confidence=0.9, seed=27)
    difference, drawer = (positive - negative).double().numpy(), np.random.default_rng(28)
    start, cosines = difference.mean(0), []
    for _ in range(4000):
        refit = difference[drawer.integers(0, 40, 40)].mean(0)
        cosines.append(refit @ start / np.linalg.norm(refit) / np.linalg.norm(start))
    assert low == pytest.approx(np.quantile(cosines, 0.1), abs=0.01)
    assert high == 1.0 and 0.5 < low < 0.99
    options = {"resamples": 500, "confidence": 0.9, "seed": 27}
    row = refit_cosine_estimate(positive, negative, positive + 0.1, negative, **options)
    assert (row.null_kind, row.p) == ("refit", None)
    assert (row.null_low, row.null_high) == cosine_band(positive, negative, **options)


def test_refit_band_narrows_with_pairs_and_closes_without_noise() -> None:
    generator = torch.Generator().manual_seed(29)
    noise = torch.randn(400, 12, generator=generator)
    few, many = (cosine_band(noise[:n] + 0.4, torch.zeros(n, 12))[0] for n in (20, 400))
    assert few < many < 1
    assert cosine_band(torch.ones(8, 3), torch.zeros(8, 3)) == (pytest.approx(1.0), 1.0)
    with pytest.raises(MeasurementError, match=r"sides of one shape"):
        cosine_band(torch.ones(8, 3), torch.ones(9, 3))
    with pytest.raises(MeasurementError, match="finite"):
        cosine_band(torch.ones(8, 3), torch.ones(8, 3))


def test_numeric_band_holds_every_reading_and_every_mean_of_them() -> None:
    readings = 1 - 1e-9 * torch.rand(50, generator=torch.Generator().manual_seed(19), dtype=torch.float64)
    low, high = nulls.numeric_band(1.0, readings)
    assert low <= float(readings.min()) and high >= 1.0
    assert low <= float(readings.mean()) <= high
    assert high - 1 == pytest.approx(1 - low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nulls.paired_bootstrap(torch.ones(1)), "at least 2 sampling units, found 1"),
        (lambda: nulls.paired_bootstrap(torch.tensor([1.0, math.nan])), "found 1 of 2 NaN"),
        (lambda: nulls.covariance_directions(torch.ones(5, 3), 4, 0), "of 5 prompts do not vary"),
        (lambda: nulls.direction_band(torch.ones(18), 0.95), "18 directions are too few"),
        (lambda: nulls.numeric_band(0.0, torch.empty(0)), "found none"),
    ],
)
def test_what_cannot_be_computed_is_an_error(call, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        call()


@pytest.mark.parametrize("at_rest", [0.0, 1.0, 40.0])
def test_two_readings_that_agree_by_luck_still_leave_one_rounding(at_rest: float) -> None:
    low, high = nulls.numeric_band(at_rest, torch.tensor([at_rest, at_rest]))
    nearest = np.nextafter(np.float32(max(at_rest, 1.0)), np.float32(np.inf)) - np.float32(max(at_rest, 1.0))
    assert low <= at_rest - nearest / 2 and at_rest + nearest / 2 <= high
    assert high - low < 1e-6 * max(at_rest, 1.0)
