"""Drift of concepts: planted shifts, nothing changed, and every number against NumPy, SciPy or scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from shape_checked import checked
from sklearn.metrics import roc_auc_score

from interp_rlhf.drift.nulls import covariance_directions
from interp_rlhf.errors import MeasurementError

concepts = checked("interp_rlhf.drift.concepts")


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(seed: int, d: int) -> torch.Tensor:
    v = normal(seed, d)
    return v / v.norm()


@pytest.mark.parametrize("d", [24, 300])
def test_a_planted_shift_is_recovered_at_its_layer_and_concept(d: int) -> None:
    names = ["layers.0", "layers.1", "layers.2"]
    x0 = {name: normal(i, 96, d) * torch.logspace(-0.5, 0.5, d) + 4 for i, name in enumerate(names)}
    basis = torch.linalg.qr(normal(10, d, 4)).Q.T  # four orthogonal concepts
    v = basis[2]
    spread = float((x0["layers.1"].double() @ v.double()).numpy().std(ddof=1))
    xt = {name: x.clone() for name, x in x0.items()}
    xt["layers.1"] = x0["layers.1"] + 0.37 * spread * v
    for name in names:
        comparison = covariance_directions(x0[name], 200, 0)
        for index, concept in enumerate(basis):
            found = concepts.drift_estimate(x0[name], xt[name], concept, comparison, resamples=200)
            planted = 0.37 if (name, index) == ("layers.1", 2) else 0.0
            assert found.value == pytest.approx(planted, abs=1e-4)
            assert found.ci_low - 1e-4 <= planted <= found.ci_high + 1e-4
            if planted:
                assert found.null_low < -1e-3 and found.value > found.null_high and found.p == 1 / 201


def test_nothing_changed_is_zero_with_an_interval_that_holds_zero() -> None:
    x0, v = normal(11, 40, 12) + 3, unit(12, 12)
    comparison = covariance_directions(x0, 200, 0)
    for found in (
        concepts.drift_estimate(x0, x0.clone(), v, comparison),
        concepts.drift_estimate(x0, x0.clone(), v, None),
        concepts.drift_norm_estimate(x0, x0.clone(), v),
        concepts.behaviour_change_estimate(x0[:, 0], x0[:, 0].clone()),
    ):
        assert (found.value, found.ci_low, found.ci_high) == (0.0, 0.0, 0.0)
    assert concepts.drift_estimate(x0, x0.clone(), v, comparison).p == 1.0
    cosine = concepts.refit_cosine_estimate(x0, -x0, x0.clone(), -x0)
    assert (cosine.value, cosine.ci_low, cosine.ci_high) == (1.0, 1.0, 1.0)


def test_drift_against_numpy_and_scipy() -> None:
    x0 = normal(13, 64, 20) * 2 + 1
    xt, v = x0 + 0.2 + 0.5 * normal(14, 64, 20), unit(15, 20)
    comparison = covariance_directions(x0, 256, 1)
    a, b, w, c = (t.double().numpy() for t in (x0, xt, v, comparison))
    d = (b - a) @ w / (a @ w).std(ddof=1)
    null = ((b - a) @ c.T / (a @ c.T).std(axis=0, ddof=1)).mean(0)
    np.testing.assert_allclose(concepts.standardised_drift(x0, xt, v).numpy(), d, rtol=1e-9)
    np.testing.assert_allclose(concepts.comparison_drifts(x0, xt, comparison).numpy(), null, rtol=1e-6)
    found = concepts.drift_estimate(x0, xt, v, comparison, resamples=10_000, confidence=0.9)
    theirs = stats.bootstrap((d,), np.mean, n_resamples=10_000, confidence_level=0.9, method="percentile", rng=0)
    tolerance = 0.06 * d.std() / 8
    assert found.value == pytest.approx(d.mean())
    assert found.ci_low == pytest.approx(theirs.confidence_interval.low, abs=tolerance)
    assert found.ci_high == pytest.approx(theirs.confidence_interval.high, abs=tolerance)
    assert found.p == (1 + (np.abs(null) >= abs(d.mean())).sum()) / 257
    assert found.null_high == -found.null_low == pytest.approx(np.sort(np.abs(null))[math.ceil(0.9 * 257) - 1])
    assert (found.null_kind, found.n, found.tier, found.unit) == ("directions", 64, "B", "sd")
    norm = concepts.drift_norm_estimate(x0, xt, v)
    assert norm.value == pytest.approx(((b - a) @ w).mean() / np.linalg.norm(a, axis=1).mean())


def test_without_comparison_the_band_is_the_numeric_floor() -> None:
    x0, v = normal(16, 30, 8), unit(17, 8)
    again = x0 + 1e-6 * normal(18, 30, 8)
    found = concepts.drift_estimate(x0, again, v, None)
    assert (found.null_kind, found.p) == ("numeric", None)
    assert found.null_low <= found.value <= found.null_high
    assert found.null_high == pytest.approx(float(concepts.standardised_drift(x0, again, v).abs().max()))


def test_drift_interval_coverage() -> None:
    v, covered = unit(19, 6), 0
    for run in range(300):
        x0 = normal(2000 + run, 50, 6)
        scale = float((x0 @ v).std())
        xt = x0 + scale * (0.3 * v + 0.4 * normal(9000 + run, 50, 6))  # mean D is 0.3 by construction
        found = concepts.drift_estimate(x0, xt, v, None, resamples=300, seed=run)
        covered += found.ci_low <= 0.3 <= found.ci_high
    assert stats.binom.ppf(0.0005, 300, 0.93) <= covered <= stats.binom.ppf(0.9995, 300, 0.955)


def test_rows_of_a_unit_are_averaged_and_counted_once() -> None:
    x = normal(20, 12, 5)
    units = [f"pair-{i % 4}" for i in range(12)]
    averaged = concepts.by_unit(x, units)
    np.testing.assert_allclose(averaged.numpy(), x.numpy().reshape(3, 4, 5).mean(0), atol=1e-6)
    twice = concepts.by_unit(x.repeat_interleave(2, 0), [str(i) for i in range(12) for _ in (0, 1)])
    v, moved = unit(21, 5), x + 0.1 * normal(22, 12, 5)
    doubled = concepts.by_unit(moved.repeat_interleave(2, 0), [str(i) for i in range(12) for _ in (0, 1)])
    assert concepts.drift_estimate(twice, doubled, v, None) == concepts.drift_estimate(x, moved, v, None)


def test_auc_estimate_against_scikit_learn_resampled_by_pairs() -> None:
    positive, negative = normal(23, 60) + 0.8, normal(24, 60)
    labels = [1] * 60 + [0] * 60
    found = concepts.auc_estimate(positive, negative, resamples=3000)
    assert found.value == pytest.approx(roc_auc_score(labels, torch.cat([positive, negative]).numpy()))
    generator, replicates = np.random.default_rng(25), []
    for _ in range(1500):
        drawn = generator.integers(0, 60, 60)
        replicates.append(roc_auc_score(labels, np.concatenate([positive.numpy()[drawn], negative.numpy()[drawn]])))
    np.testing.assert_allclose((found.ci_low, found.ci_high), np.quantile(replicates, [0.025, 0.975]), atol=0.012)
    assert (found.null_kind, found.null_low, found.n, found.unit) == ("none", None, 60, "1")


def test_refit_cosine_of_a_rotated_concept() -> None:
    axis, other = torch.linalg.qr(normal(26, 10, 2)).Q.T
    noise = 0.05 * normal(27, 50, 10)
    turned = math.cos(0.6) * axis + math.sin(0.6) * other
    found = concepts.refit_cosine_estimate(noise + axis, noise - axis, noise + turned, noise - turned)
    assert found.value == pytest.approx(math.cos(0.6), abs=1e-5)
    assert found.ci_low == pytest.approx(found.ci_high, abs=1e-5)


def test_refit_cosine_against_numpy_resampled_by_pairs() -> None:
    sides = [normal(s, 30, 6) + shift for s, shift in ((30, 0.5), (31, 0.0), (32, 0.4), (33, -0.3))]
    p0, n0, pt, nt = (side.double().numpy() for side in sides)

    def cosine(rows: np.ndarray) -> float:
        a, b = (p0 - n0)[rows].mean(0), (pt - nt)[rows].mean(0)
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    found = concepts.refit_cosine_estimate(*sides, resamples=4000)
    generator = np.random.default_rng(34)
    theirs = np.quantile([cosine(generator.integers(0, 30, 30)) for _ in range(4000)], [0.025, 0.975])
    assert found.value == pytest.approx(cosine(np.arange(30)))
    np.testing.assert_allclose((found.ci_low, found.ci_high), theirs, atol=0.04)


def test_behaviour_and_its_paired_change() -> None:
    gap_0 = 5 * normal(35, 40)
    gap_t = gap_0 + 0.5 + 0.1 * normal(36, 40)
    now, change = concepts.behaviour_estimate(gap_t), concepts.behaviour_change_estimate(gap_0, gap_t)
    assert now.value == pytest.approx(float(gap_t.mean()), abs=1e-6)
    assert change.value == pytest.approx(float(gap_t.mean() - gap_0.mean()), abs=1e-5)
    assert change.ci_high - change.ci_low < 0.1 < 1 < now.ci_high - now.ci_low  # paired: pair-to-pair spread cancels
    assert (now.unit, now.tier, change.unit, change.n) == ("nats", "A", "nats", 40)


@pytest.mark.parametrize(
    ("held", "low", "baseline", "refused"),
    [
        (0.9, 0.8, 0.7, None),
        (0.9, 0.5, 0.2, "chance"),
        (0.9, math.nan, 0.2, "chance"),
        (0.9, 0.8, 0.9, "bag-of-tokens"),
        (0.9, 0.8, math.nan, "bag-of-tokens"),
    ],
)
def test_admission(held: float, low: float, baseline: float, refused: str | None) -> None:
    reason = concepts.admit(held, low, baseline)
    assert reason is None if refused is None else refused in reason


X = normal(37, 10, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: concepts.standardised_drift(torch.ones(10, 4), X, torch.ones(4)), "do not vary"),
        (lambda: concepts.standardised_drift(X, X * math.nan, torch.ones(4)), "40 of 40 NaN"),
        (lambda: concepts.drift_estimate(X, X, torch.full((4,), math.inf), None), "direction"),
        (lambda: concepts.by_unit(X, ["a"]), r"one per row \(10\), found 1"),
        (lambda: concepts.refit_cosine_estimate(X, X, X, X), "do not differ"),
        (lambda: concepts.behaviour_estimate(torch.tensor([1.0, math.nan])), "NaN"),
    ],
)
def test_what_cannot_be_measured_is_an_error(call, message: str) -> None:
    with pytest.raises(MeasurementError, match=message) as problem:
        call()
    assert "\n" not in str(problem.value)


def test_wrong_shapes_are_named() -> None:
    from interp_rlhf.drift.concepts import auc_estimate, standardised_drift  # without run-time shape checks

    with pytest.raises(MeasurementError, match=r"found \(10, 4\), \(10, 4\) and \(5,\)"):
        standardised_drift(X, X, torch.ones(5))
    with pytest.raises(MeasurementError, match=r"concept/auc: .* \(2,\) and \(3,\)"):
        auc_estimate(torch.ones(2), torch.ones(3))
