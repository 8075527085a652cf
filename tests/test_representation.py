"""Representation metrics against NumPy from the definitions, planted cases, unrelated data and resampled truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from shape_checked import checked

from interp_rlhf.drift.estimates import METRICS
from interp_rlhf.errors import MeasurementError

rep = checked("interp_rlhf.drift.representation")
REPRESENTATION = [name for name in METRICS if name.startswith("representation/")]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hsic_from_definition(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Song et al. 2012 as sums over distinct indices, without matrix shortcuts."""
    n = len(k)
    one = two = four = 0.0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                if len({i, j, q}) == 3:
                    two += k[i, j] * l[i, q]
                    four += sum(k[i, j] * l[q, r] for r in range(n) if r not in (i, j, q))
            if i != j:
                one += k[i, j] * l[i, j]
    return one / (n * (n - 1)) + four / math.perm(n, 4) - 2 * two / math.perm(n, 3)


def cka_from_definition(x: np.ndarray, y: np.ndarray) -> float:
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return hsic_from_definition(k, l) / math.sqrt(hsic_from_definition(k, k) * hsic_from_definition(l, l))


def biased_cka(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def effective_rank_from_svd(x: np.ndarray) -> float:
    sigma = np.linalg.svd(x - x.mean(0), compute_uv=False)
    share = sigma[sigma > 1e-7 * sigma.max()] / sigma.sum()
    return float(np.exp(stats.entropy(share)))


def everything(x0: torch.Tensor, xt: torch.Tensor, **options):
    floor = rep.representation_floor(x0, x0)
    return rep.representation_estimates(x0, xt, floor=floor, **options)


@pytest.mark.parametrize("d", [3, 40])
def test_cka_is_the_ratio_of_unbiased_hsics(d: int) -> None:
    x, noise = normal(0, 9, d) + 2, normal(1, 9, d)
    y = 0.5 * x + noise
    assert rep.debiased_cka(x, y) == pytest.approx(
        cka_from_definition(x.double().numpy(), y.double().numpy()), abs=1e-9
    )


@pytest.mark.parametrize("shape", [(16, 4), (128, 64), (24, 300)])
def test_nothing_changed_is_exactly_one(shape: tuple[int, int]) -> None:
    x = normal(2, *shape) * torch.logspace(-3, 3, shape[1]) + 5
    found = everything(x, x.clone())
    for name in ("representation/cka", "representation/cosine", "representation/norm_ratio"):
        assert (found[name].value, found[name].ci_low, found[name].ci_high) == (1.0, 1.0, 1.0), name
        assert (found[name].null_low, found[name].null_high) == pytest.approx((1.0, 1.0), abs=1.2e-7), name
    rank = found["representation/effective_rank"]
    assert rank.value == rep.effective_rank(x)
    assert (rank.null_low, rank.null_high) == pytest.approx((rank.value, rank.value), rel=1.2e-7)


def test_cka_does_not_see_rotation_scale_or_shift_and_sees_distortion() -> None:
    x = normal(3, 48, 20)
    rotation = torch.linalg.qr(normal(4, 20, 20)).Q
    assert rep.debiased_cka(x, 3 * x @ rotation + 7) == pytest.approx(1, abs=1e-5)
    assert rep.debiased_cka(x, x * torch.linspace(0.1, 3, 20)) < 0.95


def test_cka_of_unrelated_data_is_centred_on_zero_where_the_plug_in_estimator_is_not() -> None:
    pairs = [(normal(2 * s, 32, 256), normal(2 * s + 1, 32, 256)) for s in range(100, 200)]
    debiased = np.array([rep.debiased_cka(x, y) for x, y in pairs])
    plug_in = np.array([biased_cka(x.numpy(), y.numpy()) for x, y in pairs])
    assert abs(debiased.mean()) < 4 * debiased.std(ddof=1) / 10 < 0.02
    assert plug_in.min() > 0.7


def test_delete_one_cka_equals_computing_it_anew_without_each_prompt() -> None:
    x, noise = normal(5, 20, 30), normal(6, 20, 30)
    y = x + noise
    anew = [rep.debiased_cka(*(torch.cat([z[:i], z[i + 1 :]]) for z in (x, y))) for i in range(20)]
    torch.testing.assert_close(rep._delete_one_cka(x, y), torch.tensor(anew, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(40, 12), (20, 90)])
def test_effective_rank_equals_the_svd_definition(shape: tuple[int, int]) -> None:
    x = normal(7, *shape) * torch.logspace(-2, 1, shape[1]) + 3
    assert rep.effective_rank(x) == pytest.approx(effective_rank_from_svd(x.double().numpy()), rel=1e-6)
    assert 1 <= rep.effective_rank(x) <= min(shape[0] - 1, shape[1])


def test_effective_rank_of_known_spectra() -> None:
    hadamard = torch.tensor([[1.0, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]])
    assert rep.effective_rank(hadamard) == pytest.approx(3, abs=1e-9)
    assert rep.effective_rank(hadamard[:, :1] * torch.ones(1, 6)) == pytest.approx(1, abs=1e-6)


def test_influence_is_the_derivative_with_respect_to_prompt_weights() -> None:
    x = normal(8, 30, 6).double()
    rank, influence = rep._rank_and_influence(x)

    def weighted(i: int, step: float) -> float:
        w = np.ones(30)
        w[i] += step
        a = x.numpy()
        centred = np.sqrt(w)[:, None] * (a - np.average(a, axis=0, weights=w))
        return float(np.exp(stats.entropy(np.linalg.svd(centred, compute_uv=False))))

    numeric = [(weighted(i, 1e-5) - weighted(i, -1e-5)) / 2e-5 for i in range(30)]
    assert rank == pytest.approx(weighted(0, 0.0))
    np.testing.assert_allclose(influence.numpy(), numeric, atol=1e-6)


@pytest.mark.parametrize("metric", ["representation/cka", "representation/effective_rank"])
def test_jackknife_intervals_hold_the_value_of_large_samples(metric: str) -> None:
    mixing, scale = normal(9, 8, 8) * 0.3, torch.logspace(-0.5, 0.5, 8)

    def sample(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = normal(seed, n, 8) * scale
        return x, x + x @ mixing + 0.3 * normal(seed + 50_000, n, 8)

    runs = [everything(*sample(1000 + s, 64), resamples=100)[metric] for s in range(200)]
    if metric == "representation/cka":
        truth = rep.debiased_cka(*sample(1, 1500))
    else:  # biased at finite N: the interval is about the value expected at this N
        truth = float(np.mean([run.value for run in runs]))
    covered = sum(run.ci_low <= truth <= run.ci_high for run in runs)
    assert stats.binom.ppf(0.0005, 200, 0.90) <= covered
    assert max(run.ci_high - run.ci_low for run in runs) < 3


def test_cosine_and_norm_ratio_against_numpy_and_planted_values() -> None:
    x, noise = normal(10, 25, 7) + 1, normal(11, 25, 7)
    y = x + noise
    a, b = x.double().numpy(), y.double().numpy()
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(rep.same_prompt_cosine(x, y).numpy(), (a * b).sum(1) / (lengths[0] * lengths[1]))
    np.testing.assert_allclose(rep.norm_ratio(x, y).numpy(), lengths[1] / lengths[0])
    doubled = everything(x, -2 * x)
    assert doubled["representation/cosine"].value == -1
    assert doubled["representation/norm_ratio"].value == 2


def test_floor_holds_the_second_reading_and_not_a_real_change() -> None:
    x = normal(12, 40, 16) + 1
    again, moved = x + 1e-6 * normal(13, 40, 16), x + 0.1 * normal(14, 40, 16)
    floor = rep.representation_floor(x, again)
    assert list(floor) == REPRESENTATION
    for name in REPRESENTATION:
        low, high = floor[name]
        at_rest = rep.representation_estimates(x, again, floor=floor)[name]
        after = rep.representation_estimates(x, moved, floor=floor)[name]
        assert low <= at_rest.value <= high, name
        assert not low <= after.value <= high, name
        assert (after.null_low, after.null_high) == floor[name]


def test_estimates_carry_everything_a_row_needs_and_leave_the_global_generators_alone() -> None:
    x = normal(15, 20, 6)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    found = everything(x, x + 0.1 * normal(16, 20, 6), resamples=100)
    assert list(found) == REPRESENTATION
    for name, value in found.items():
        assert value.ci_low <= value.value <= value.ci_high
        assert (value.null_kind, value.tier, value.unit, value.n, value.p) == ("numeric", "A", "1", 20, None), name
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert everything(x, x + 0.1 * normal(16, 20, 6), resamples=100) == found


@pytest.mark.parametrize(
    ("x0", "xt", "message"),
    [
        (torch.ones(6, 3), torch.ones(6, 3), "do not"),
        (normal(1, 6, 3), torch.full((6, 3), math.nan), "18 of 18 NaN"),
        (normal(1, 3, 3), normal(2, 3, 3), "at least 4 prompts, found 3"),
    ],
)
def test_what_cannot_be_measured_is_an_error(x0: torch.Tensor, xt: torch.Tensor, message: str) -> None:
    with pytest.raises(MeasurementError, match=message) as problem:
        rep.debiased_cka(x0, xt)
    assert "\n" not in str(problem.value)


def test_zero_readings_and_wrong_shapes_are_errors() -> None:
    with pytest.raises(MeasurementError, match="found 1 that are 0"):
        rep.same_prompt_cosine(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.ones(2, 2))
    with pytest.raises(Exception, match="xt"):  # jaxtyping in this copy; MeasurementError in the plain one
        rep.norm_ratio(torch.ones(2, 2), torch.ones(3, 2))
    from interp_rlhf.drift.representation import norm_ratio

    with pytest.raises(MeasurementError, match=r"found \(2, 2\) and \(3, 2\)"):
        norm_ratio(torch.ones(2, 2), torch.ones(3, 2))
