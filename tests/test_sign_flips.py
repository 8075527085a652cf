"""Joint sign flips: exact p against SciPy, the maximum over columns by brute force, family-wise control."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from shape_checked import checked

from interp_rlhf.drift.control_runs import rank_place
from interp_rlhf.errors import MeasurementError

sign_flips = checked("interp_rlhf.drift.sign_flips")


def correlated(generator: np.random.Generator, n: int, m: int) -> np.ndarray:
    """``[n, m]`` symmetric about 0 with heavy tails, one common factor and unequal scales."""
    noise = generator.standard_t(4, size=(n, m)) + 1.5 * generator.standard_t(4, size=(n, 1))
    return noise * np.logspace(-1, 1, m)


@pytest.mark.parametrize("n", [5, 8, 10])
def test_p_of_one_column_is_scipys_over_all_flips(n: int) -> None:
    generator = np.random.default_rng(n)
    for run in range(20):
        d = generator.normal(0.4, 1.0, size=n)
        if run % 4 == 0:
            d = np.round(3 * d)  # ties
        theirs = stats.permutation_test(
            (d,), lambda x, axis: np.abs(x.mean(axis)), permutation_type="samples", n_resamples=np.inf,
            alternative="greater", vectorized=True,
        )  # fmt: skip
        found = sign_flips.max_t(torch.from_numpy(d)[:, None], flips=2**n)
        assert float(found.p[0]) == pytest.approx(theirs.pvalue, abs=1e-12)
        assert float(found.t[0]) == pytest.approx(stats.ttest_1samp(d, 0).statistic, rel=1e-9)


def test_p_of_one_column_is_scipys_within_the_error_of_drawing_flips() -> None:
    generator = np.random.default_rng(0)
    for n, shift in ((20, 0.1), (60, 0.15), (128, 0.2)):
        d = generator.normal(shift, 1.0, size=n)
        theirs = stats.permutation_test(
            (d,), lambda x, axis: np.abs(x.mean(axis)), permutation_type="samples", n_resamples=20_000,
            alternative="greater", vectorized=True, rng=1, batch=2000,
        )  # fmt: skip
        found = float(sign_flips.max_t(torch.from_numpy(d)[:, None], flips=20_000).p[0])
        error = math.sqrt(2 * theirs.pvalue * (1 - theirs.pvalue) / 20_000)
        assert found == pytest.approx(theirs.pvalue, abs=4 * error + 1e-4)


def test_the_maximum_over_columns_by_brute_force() -> None:
    d = correlated(np.random.default_rng(1), 8, 3) + np.array([0.0, 1.0, 8.0])

    def t(rows: np.ndarray) -> np.ndarray:
        return rows.mean(0) / (rows.std(0, ddof=1) / math.sqrt(8))

    flipped = [np.array(signs)[:, None] * d for signs in itertools.product((1, -1), repeat=8)]
    largest = np.array([np.abs(t(rows)).max() for rows in flipped])
    found = sign_flips.max_t(torch.from_numpy(d))
    np.testing.assert_allclose(found.t.numpy(), t(d), rtol=1e-9)
    expected = [(largest >= abs(value) - 1e-9).mean() for value in t(d)]
    np.testing.assert_allclose(found.p.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("n", "confidence"), [(7, 0.95), (9, 0.9), (40, 0.95), (40, 0.99)])
def test_the_critical_value_says_the_same_as_p(n: int, confidence: float) -> None:
    generator = np.random.default_rng(2)
    for run in range(60):
        d = torch.from_numpy(correlated(generator, n, 6) + generator.normal(0, 2, size=6) * np.logspace(-1, 1, 6))
        if run % 3 == 0:
            d = d.round()  # ties
        found = sign_flips.max_t(d, flips=399, confidence=confidence, seed=run)
        assert ((found.t.abs() > found.critical) == (found.p <= 1 - confidence + 1e-12)).all()


def test_adjusting_only_raises_p_and_more_columns_raise_it_more() -> None:
    d = torch.from_numpy(correlated(np.random.default_rng(3), 50, 12)) + 0.05
    together = sign_flips.max_t(d)
    alone = torch.cat([sign_flips.max_t(column[:, None]).p for column in d.T])
    half = sign_flips.max_t(d[:, :6]).p
    assert (together.p >= alone).all() and (together.p > alone).any()
    assert (together.p[:6] >= half).all() and (half >= alone[:6]).all()


def test_equal_columns_cost_nothing() -> None:
    """Bonferroni would charge for ten columns; the joint flips know they are one."""
    column = torch.from_numpy(np.random.default_rng(4).normal(0.3, 1, size=(40, 1)))
    found = sign_flips.max_t(column.repeat(1, 10) * torch.logspace(-3, 3, 10))
    np.testing.assert_allclose(found.p.numpy(), float(sign_flips.max_t(column).p[0]))


def test_a_planted_column_is_found_and_the_others_are_not() -> None:
    d = torch.from_numpy(correlated(np.random.default_rng(5), 64, 20))
    d[:, 13] += 1.2 * d[:, 13].std()
    found = sign_flips.max_t(d)
    assert (found.p <= 0.05).nonzero().flatten().tolist() == [13]
    assert float(found.p[13]) == 1 / 2001


def test_family_wise_errors_stay_below_alpha_beside_columns_that_moved() -> None:
    """Strong control: of ten correlated columns four did move; 300 replicates, errors among the other six."""
    generator, errors, found = np.random.default_rng(6), 0, 0
    for run in range(300):
        d = correlated(generator, 32, 10)
        d[:, :4] += 1.5 * d[:, :4].std(axis=0)
        p = sign_flips.max_t(torch.from_numpy(d), flips=399, seed=run).p
        errors += bool((p[4:] <= 0.05).any())
        found += bool((p[:4] <= 0.05).all())
    assert errors <= stats.binom.ppf(0.999, 300, 0.05)
    assert found > 250


def test_columns_without_spread() -> None:
    d = torch.zeros(40, 4, dtype=torch.float64)
    d[:, 1], d[:, 2], d[:, 3] = 0.3, -7.0, torch.linspace(-1, 1, 40, dtype=torch.float64)
    found = sign_flips.max_t(d)
    assert found.t.tolist()[0] == 0 and float(found.p[0]) == 1
    assert bool(torch.isfinite(found.t).all()) and float(found.t[1]) == -float(found.t[2]) > 1e7
    assert found.p[1:3].tolist() == [1 / 2001] * 2
    assert float(found.p[3]) == 1
    everything_zero = sign_flips.max_t(torch.zeros(40, 3))
    assert everything_zero.p.tolist() == [1, 1, 1] and everything_zero.t.tolist() == [0, 0, 0]
    only = sign_flips.max_t(torch.full((40, 1), 0.1))
    assert float(only.p[0]) == 1 / 2001 and float(only.t[0]) > only.critical
    exact = sign_flips.max_t(torch.ones(16, 1))  # no rounding at all: SD exactly 0
    assert float(exact.t[0]) == pytest.approx(math.sqrt(15) * 2**23)


def test_a_flip_that_gives_the_same_t_counts_whatever_the_order_of_summing() -> None:
    """Every pattern with one sign turned gives the same size: 11 of 2¹⁰ patterns up to sign for each of 0 and 1."""
    d = torch.full((11, 1), 0.1, dtype=torch.float64)
    d[4] = -0.1
    for order in range(11):
        found = sign_flips.max_t(d.roll(order, 0), flips=2**11)
        assert float(found.p[0]) == (1 + 11) / 2**10


def test_estimates_carry_band_and_p() -> None:
    d = torch.from_numpy(np.random.default_rng(7).normal(0.3, 1, size=(50, 3)))
    found = sign_flips.max_t(d, flips=999, confidence=0.9, seed=3)
    rows = sign_flips.drift_t_estimates(d, flips=999, confidence=0.9, seed=3)
    assert [row.value for row in rows] == found.t.tolist() and [row.p for row in rows] == found.p.tolist()
    assert {(row.null_low, row.null_high, row.ci_low) for row in rows} == {(-found.critical, found.critical, None)}
    assert {(row.null_kind, row.n, row.unit, row.tier) for row in rows} == {("sign_flip", 50, "1", "B")}


def test_too_few_prompts_for_the_confidence_leave_p_without_band() -> None:
    d = torch.from_numpy(np.random.default_rng(8).normal(5, 1, size=(5, 2)))
    found = sign_flips.max_t(d)
    assert found.critical is None and rank_place(15, 0.95) is None
    assert found.p.tolist() == [1 / 16, 1 / 16]
    assert sign_flips.drift_t_estimates(d)[0].null_high is None
    assert sign_flips.max_t(torch.cat([d, d])[:6]).critical is not None


def test_blocks_do_not_change_the_result(monkeypatch) -> None:
    d = torch.from_numpy(correlated(np.random.default_rng(9), 30, 7))
    whole = sign_flips.max_t(d, flips=1001)
    monkeypatch.setattr(sign_flips, "_BLOCK", 100)
    assert torch.equal(whole.p, sign_flips.max_t(d, flips=1001).p)


def test_signs_are_seeded_fair_and_leave_the_global_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    signs = sign_flips._signs(30, 4000, 1)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    assert not torch.equal(signs, sign_flips._signs(30, 4000, 2))
    assert signs.abs().unique().tolist() == [1]
    correlation = signs.double().T @ signs.double() / 4000 - torch.eye(30)
    assert float(correlation.abs().max()) < 5 / math.sqrt(4000)
    assert float(signs.double().mean(0).abs().max()) < 5 / math.sqrt(4000)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(1, 3), r"at least 2 prompts, found \(1, 3\)"),
        (torch.ones(5, 0), "found none"),
        (torch.tensor([[1.0], [math.nan]]), "found 1 of 2 NaN"),
    ],
)
def test_what_cannot_be_tested_is_an_error(values: torch.Tensor, message: str) -> None:
    with pytest.raises(MeasurementError, match=message) as problem:
        sign_flips.max_t(values)
    assert "\n" not in str(problem.value)
