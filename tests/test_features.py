"""Features that drifted: sign-flip tails, the table, subspaces, health, refits, and texts whose codes are known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from shape_checked import checked
from sklearn.cluster import KMeans

from interp_rlhf.activations.feature_sums import FeatureReading, FeatureStream
from interp_rlhf.drift import sign_flip_tails as original
from interp_rlhf.drift.feature_health import Health
from interp_rlhf.errors import MeasurementError
from scripts.feature_replicates import CHANGES, SCALED, SWITCHED_ON, false_share, replicate

tails = checked("interp_rlhf.drift.sign_flip_tails")
health = checked("interp_rlhf.drift.feature_health")
features = checked("interp_rlhf.drift.features")
refit_null = checked("interp_rlhf.drift.refit_null")

#: Sizes of changes: near to normal, heavy-tailed, dominated by a few, and on lattices.
SIZES = {
    "normal": lambda g, n: np.abs(g.normal(size=n)),
    "exponential": lambda g, n: g.exponential(size=n),
    "lognormal": lambda g, n: np.exp(2 * g.normal(size=n)),
    "three large": lambda g, n: np.r_[5.0, 5.0, 6.0, np.abs(g.normal(size=n - 3))],
    "five large": lambda g, n: np.r_[g.uniform(5, 10, 5), 0.2 * np.abs(g.normal(size=n - 5))],
    "one huge": lambda g, n: np.r_[30.0, np.abs(g.normal(size=n - 1))],
    "equal": lambda g, n: np.ones(n),
    "nearly equal": lambda g, n: 1 + 0.01 * g.normal(size=n),
    "two sizes": lambda g, n: g.integers(2, 4, n).astype(float),
    "half equal": lambda g, n: np.r_[np.ones(n // 2), g.exponential(size=n - n // 2)],
}


def signed(generator: np.random.Generator, size: np.ndarray, tilt: float) -> np.ndarray:
    """Signs on sizes, positive ones the more likely the larger ``tilt``."""
    plus = 1 / (1 + np.exp(-2 * tilt * size / np.sqrt(np.square(size).sum())))
    return np.where(generator.random(len(size)) < plus, size, -size)


def every_sum(d: np.ndarray) -> np.ndarray:
    """All 2ⁿ sums ``Σ ±d_i``."""
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def chance_by_convolution(d: np.ndarray) -> float:
    """Exact p of integers, from the distribution of their sum; all terms are positive, so that small ones are exact."""
    d, chances = np.abs(d).astype(int), np.ones(1)
    for value in d:
        chances = np.convolve(chances, np.r_[0.5, np.zeros(2 * value - 1), 0.5])
    sums = np.arange(len(chances)) - d.sum()
    return chances, sums


# ------------------------------------------------------------------------------------------------------ sign-flip tails


@pytest.mark.parametrize("n", [1, 2, 5, 9, 12])
def test_few_changes_by_all_patterns(n: int) -> None:
    generator = np.random.default_rng(n)
    d = generator.normal(0.4, 1, size=(n, 12))
    d[:, ::3] = np.round(2 * d[:, ::3])  # ties and zeros
    signs = np.array(list(itertools.product((1, -1), repeat=n)))
    expected = (np.abs(signs @ d) >= np.abs(d.sum(0)) - 1e-9).mean(0)
    np.testing.assert_allclose(tails.sign_flip_p(d), expected, atol=1e-12)


def test_few_changes_by_scipy() -> None:
    d = np.random.default_rng(0).normal(0.5, 1, size=10)
    theirs = stats.permutation_test(
        (d,), lambda x, axis: np.abs(x.mean(axis)), permutation_type="samples", n_resamples=np.inf,
        alternative="greater", vectorized=True,
    )  # fmt: skip
    assert tails.sign_flip_p(d[:, None])[0] == pytest.approx(theirs.pvalue, abs=1e-12)


@pytest.mark.parametrize("n", [16, 18, 20])
@pytest.mark.parametrize("name", SIZES)
def test_approximated_and_drawn_p_by_all_patterns(name: str, n: int) -> None:
    """At the fewest texts a feature is tested on, where the approximation is at its worst."""
    generator = np.random.default_rng([n, *name.encode()])
    for tilt in (0.5, 1.0, 2.0, 3.0, 5.0):
        d = signed(generator, SIZES[name](generator, n), tilt)
        expected = float((np.abs(every_sum(d)) >= abs(d.sum()) - 1e-9).mean())
        found = float(tails.sign_flip_p(d[:, None])[0])
        low, high = (0.999, 1.001) if n == 16 else (0.9, 1.15)
        assert low * expected <= found <= high * expected, (tilt, found, expected)


def test_outermost_sums_by_all_patterns() -> None:
    """All signs alike but those of the smallest changes: a handful of a million patterns reach as far."""
    for seed in range(6):
        d = np.sort(np.random.default_rng(seed).uniform(0.3, 1.5, size=20))
        for flipped in ([0], [1], [0, 2], [3], [1, 2, 4]):
            signs = np.ones(20)
            signs[flipped] = -1
            expected = float((np.abs(every_sum(d)) >= (signs * d).sum() - 1e-9).mean())
            assert 0.9 * expected <= tails.sign_flip_p((signs * d)[:, None])[0] <= 1.2 * expected


@pytest.mark.parametrize("name", SIZES)
def test_many_changes_by_monte_carlo(name: str) -> None:
    generator = np.random.default_rng([64, *name.encode()])
    d = np.stack([signed(generator, SIZES[name](generator, 64), tilt) for tilt in (0.2, 1, 1.5, 2, 2.5)], axis=1)
    drawn = 0.0
    for _ in range(10):
        signs = 1.0 - 2.0 * generator.integers(0, 2, size=(20_000, 64))
        drawn = drawn + (np.abs(signs @ d) >= np.abs(d.sum(0)) - 1e-9).mean(0) / 10
    error = 4 * np.sqrt(drawn * (1 - drawn) / 200_000) + 1e-5
    found = tails.sign_flip_p(d)
    assert (found >= 0.95 * drawn - error).all() and (found <= 1.1 * drawn + error).all(), (found, drawn)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("n", [24, 64])
def test_far_tails_by_convolution(n: int, heavy: bool) -> None:
    """Down to 10⁻¹⁵: integers have an exact distribution, and up to a thousand of them are no lattice to speak of."""
    generator, smallest = np.random.default_rng(n), 1.0
    for tilt in (2.0, 4.0, 7.0, 12.0):
        size = np.ceil(60 * np.exp(generator.normal(size=n)) if heavy else 200 * generator.random(n))
        d = signed(generator, size, tilt)
        chances, sums = chance_by_convolution(d)
        expected = float(chances[np.abs(sums) >= abs(d.sum())].sum())
        found = float(tails.sign_flip_p(d[:, None])[0])
        assert 0.93 * expected <= found <= 1.15 * expected, (tilt, found, expected)
        smallest = min(smallest, expected)
    assert smallest < (1e-3 if heavy else 1e-5 if n == 24 else 1e-11)


def test_equal_changes_are_binomial() -> None:
    """The approximation for continuous sums would be too small by up to a half here."""
    for n, positive in ((20, 15), (40, 30), (64, 50), (200, 150)):
        d = np.r_[np.full(positive, 0.3), np.full(n - positive, -0.3)]
        expected = 2 * stats.binom.sf(positive - 1, n, 0.5)
        assert 0.98 * expected <= tails.sign_flip_p(d[:, None])[0] <= 1.15 * expected
        size, x = np.ones((1, n)), np.array([2.0 * positive - n])
        continuous = original._lugannani_rice(size, x, original._tilt(size, x))[0]
        assert continuous < 0.85 * expected


def test_p_of_random_signs_is_no_smaller_than_it_says() -> None:
    generator = np.random.default_rng(1)
    size = np.exp(1.2 * generator.normal(size=(24, 1500)))
    p = tails.sign_flip_p(np.where(generator.random(size.shape) < 0.5, size, -size))
    for alpha in (0.01, 0.05, 0.2):
        low, high = stats.binom.ppf([0.0005, 0.9995], 1500, alpha)
        assert 0.9 * low <= (p <= alpha).sum() <= high


def test_smallest_and_largest_p() -> None:
    d = np.zeros((80, 5))
    d[:, 1], d[:30, 2], d[:40, 3], d[40:, 3] = 0.1, np.linspace(0.1, 3, 30), 1.0, -1.0
    d[:2000, 4] = 1e-300
    assert tails.sign_flip_p(d).tolist() == [1.0, 2.0**-79, 2.0**-29, 1.0, 2.0**-79]
    many = tails.sign_flip_p(np.ones((1500, 1)))
    assert 0 < many[0] < 1e-290
    assert tails.sign_flip_p(np.ones((3, 0))).shape == (0,)


def test_p_depends_on_nothing_but_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    d = np.stack([signed(generator, SIZES[name](generator, 30), 1.5) for name in SIZES], axis=1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    whole = tails.sign_flip_p(d)
    np.testing.assert_array_equal(tails.sign_flip_p(d), whole)
    np.testing.assert_allclose(tails.sign_flip_p(-1e-5 * d), whole, rtol=1e-9)
    np.testing.assert_allclose(tails.sign_flip_p(d[:, ::-1])[::-1], whole, rtol=1e-12)
    np.testing.assert_allclose(tails.sign_flip_p(np.vstack([d, np.zeros((9, len(SIZES)))])), whole, rtol=1e-9)
    monkeypatch.setattr(tails, "_BLOCK", 60)
    np.testing.assert_allclose(tails.sign_flip_p(d), whole, rtol=1e-12)
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("d", [np.ones(4), np.array([[1.0], [math.nan]])])
def test_what_is_no_change_is_an_error(d: np.ndarray) -> None:
    with pytest.raises(MeasurementError, match="finite changes") as problem:
        original.sign_flip_p(d)
    assert "\n" not in str(problem.value)


# ------------------------------------------------------------------------------------------------------------ the table


def sparse_codes(generator: np.random.Generator, n: int, width: int, share: float = 0.6) -> np.ndarray:
    return (generator.exponential(size=(n, width)) * (generator.random((n, width)) < share)).astype(np.float32)


def as_reading(means: np.ndarray, **fields: object) -> FeatureReading:
    return replace(features.reading_of(torch.from_numpy(means)), **fields)


def test_the_table_by_loops() -> None:
    generator = np.random.default_rng(3)
    means = [sparse_codes(generator, 40, 30, share) for share in (0.5, 0.6)]
    means[1][:, 4] += 1
    means[0][5:, 7], means[1][5:, 7], means[0][:, 8], means[1][:, 8] = 0, 0, 0, 0
    fired = [(m != 0) * generator.uniform(0.1, 1, size=m.shape).astype(np.float32) for m in means]
    readings = [
        features.reading_of(torch.from_numpy(m), torch.from_numpy(f)) for m, f in zip(means, fired, strict=True)
    ]
    table = features.feature_table(*readings, tolerance=0.3, least=20, q=0.2)
    start, now = (m.astype(np.float64) for m in means)
    tested = [j for j in range(30) if ((start[:, j] != 0) | (now[:, j] != 0)).sum() >= 20]
    assert table.feature.tolist() == tested and table.tested == len(tested)
    assert table.silent == 1 and table.untestable == 29 - len(tested) >= 1
    for row, j in enumerate(tested):
        assert table.mean_start[row] == pytest.approx(np.mean(start[:, j]), rel=1e-12)
        assert table.mean_now[row] == pytest.approx(np.mean(now[:, j]), rel=1e-12)
        assert table.rate_start[row] == pytest.approx(np.mean(fired[0][:, j].astype(float)), rel=1e-12)
        assert table.rate_now[row] == pytest.approx(np.mean(fired[1][:, j].astype(float)), rel=1e-12)
        assert table.change[row] == pytest.approx(np.mean(now[:, j] - start[:, j]), abs=1e-12)
        pooled = math.sqrt((np.var(start[:, j], ddof=1) + np.var(now[:, j], ddof=1)) / 2)
        assert table.effect[row] == pytest.approx(table.change[row] / pooled, rel=1e-9)
        assert table.p[row] == pytest.approx(tails.sign_flip_p((now - start)[:, [j]])[0], rel=1e-9)
    m, order = len(tested), np.argsort(table.p)
    harmonic = sum(1 / i for i in range(1, m + 1))
    for rank, row in enumerate(order, start=1):
        later = [m * table.p[other] / place for place, other in enumerate(order, start=1) if place >= rank]
        assert table.bh[row] == pytest.approx(min(1, *later, 1))
        assert table.by[row] == pytest.approx(min(1, harmonic * min(later)))
    assert (table.drifted_bh == ((table.bh <= 0.2) & (np.abs(table.effect) > 0.3))).all()
    assert (table.drifted_by == ((table.by <= 0.2) & (np.abs(table.effect) > 0.3))).all()
    assert 4 in table.feature[table.drifted_by] and table.flagged_by <= table.flagged_bh < m
    least = float(np.sort(table.bh)[1])
    assert least < np.sort(table.by)[1]
    between = features.feature_table(*readings, tolerance=0.0, q=(least + float(np.sort(table.by)[1])) / 2)
    assert between.flagged_by == 1 < between.flagged_bh


def test_nothing_changed() -> None:
    codes = as_reading(sparse_codes(np.random.default_rng(4), 64, 50))
    table = features.feature_table(codes, codes, tolerance=0.0)
    assert table.tested == 50 and (table.p == 1).all() and (table.effect == 0).all() and table.flagged_bh == 0


def test_texts_count_where_a_feature_fired_at_either_time() -> None:
    start, now = np.zeros((64, 3), np.float32), np.zeros((64, 3), np.float32)
    start[:10, 0], now[10:20, 0] = 1.0, 1.0  # 20 texts, 10 each
    start[:19, 1], now[:19, 1] = 1.0, 2.0
    table = features.feature_table(as_reading(start), as_reading(now), tolerance=0.1)
    assert (table.feature.tolist(), table.untestable, table.silent) == ([0], 1, 1)
    some = torch.tensor([0, 1])
    table = features.feature_table(
        as_reading(start, features=some), as_reading(now, features=some), tolerance=0.1, least=19
    )
    assert (table.feature.tolist(), table.untestable, table.silent) == ([0, 1], 0, 0)


def test_a_small_effect_is_not_listed_however_small_its_p() -> None:
    start = np.random.default_rng(5).exponential(size=(64, 2)).astype(np.float32)
    now = start + np.array([0.05, 0.5], np.float32)
    table = features.feature_table(as_reading(start), as_reading(now), tolerance=0.1)
    assert (table.p < 1e-15).all() and table.drifted_bh.tolist() == [False, True]


def test_words_and_the_gate() -> None:
    generator = np.random.default_rng(6)
    start, now = (sparse_codes(generator, 64, 5, 1.0) for _ in range(2))
    start[:, 0], now[:, 1], start[:, 2], now[19:, 2] = 0, 0, 0, 0
    start[1:, 3] = 0  # fired once: not appeared
    shut = Health(0.1, 0.3, 5.0, 5.0, 0.0, 0.0, 0.9, False, "FVU rose")
    table = features.feature_table(as_reading(start), as_reading(now), tolerance=0.1)
    assert dict(zip(table.feature.tolist(), table.word, strict=True)) == {0: "appeared", 1: "vanished", 3: "", 4: ""}
    assert table.drifted_bh.tolist() == [True, True, True, False] and table.withheld == ""
    gated = features.feature_table(as_reading(start), as_reading(now), tolerance=0.1, health=shut)
    assert gated.withheld == "FVU rose" and (gated.p == table.p).all()
    assert (gated.flagged_bh, gated.flagged_by, set(gated.word)) == (0, 0, {""})
    ready = features.feature_table(
        as_reading(start), as_reading(now), tolerance=0.1, health=replace(shut, reliable=True, why="")
    )
    assert ready.word == table.word and ready.withheld == ""


def test_where_z_finds_something_in_many_null_runs_sign_flips_do_not() -> None:
    """64 texts, 400 features that fire on 20 of them, normal changes about 0: 25 runs."""
    generator, ours, theirs = np.random.default_rng(7), 0, 0
    for _ in range(25):
        fires = generator.random((64, 400)).argsort(0) < 20
        changes = np.where(fires, generator.normal(size=(64, 400)), 0)
        start = np.where(fires, 20.0, 0.0)
        table = features.feature_table(
            as_reading(start.astype(np.float32)), as_reading((start + changes).astype(np.float32)), tolerance=0.0
        )
        ours += bool(table.flagged_bh)
        each = changes[:, table.feature]
        nonzero = [column[column != 0] for column in each.T]
        z = np.array([column.mean() / column.std(ddof=1) * math.sqrt(len(column)) for column in nonzero])
        theirs += bool((stats.false_discovery_control(2 * stats.norm.sf(np.abs(z))) <= 0.1).any())
    assert ours <= stats.binom.ppf(0.999, 25, 0.1) < theirs, (ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 5}, "same features of one dictionary"),
        ({"features": torch.tensor([0, 1])}, "same features of one dictionary"),
        ({"tokens": torch.full((6,), 2)}, "same texts at both times"),
        ({"means": torch.full((18,), math.inf)}, "mean codes of now: expected finite numbers"),
    ],
)
def test_readings_that_do_not_belong_together(change: dict, message: str) -> None:
    start = features.reading_of(torch.ones(6, 3))
    with pytest.raises(MeasurementError, match=message) as problem:
        features.feature_table(start, replace(start, **change), tolerance=0.1)
    assert "\n" not in str(problem.value)


def test_no_feature_that_can_be_tested() -> None:
    few = features.reading_of(torch.eye(6))
    table = features.feature_table(few, few, tolerance=0.1)
    assert (table.tested, table.untestable, table.flagged_bh, table.word) == (0, 6, 0, ())


# --------------------------------------------------------------------------------------------------- subspaces, health


def test_angles_by_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(12, 6, generator=generator) * torch.logspace(-1, 1, 12)[:, None]
    means = torch.rand(2, 12, generator=generator)
    found = features.subspace_angles(decoder, *means, 3)
    spans = []
    for row in means.numpy().astype(float):
        leading = np.argsort(-row * np.linalg.norm(decoder.numpy().astype(float), axis=1))[:3]
        spans.append(np.linalg.qr(decoder.numpy().astype(float)[leading].T)[0])
    cosines = np.linalg.svd(spans[0].T @ spans[1], compute_uv=False)
    np.testing.assert_allclose(np.cos(found), np.sort(cosines), atol=1e-9)
    assert features.subspace_angles(decoder, means[0], means[0], 3).max() < 1e-7
    assert (np.diff(found) <= 0).all()


def test_the_subspace_stays_where_features_share_it_otherwise() -> None:
    """Features 0 and 1 give way to 2 and 3, which span the same plane."""
    decoder = torch.zeros(6, 5)
    decoder[0, 0], decoder[1, 1], decoder[4, 3], decoder[5, 4] = 1, 1, 1, 1
    decoder[2, :2], decoder[3, :2] = torch.tensor([0.6, 0.8]), torch.tensor([0.8, -0.6])
    start, now = torch.tensor([3.0, 3, 0, 0, 1, 1]), torch.tensor([0.0, 0, 3, 3, 1, 1])
    assert features.subspace_angles(decoder, start, now, 2).max() < 1e-7
    assert features.subspace_angles(decoder, start, torch.tensor([0.0, 0, 0, 0, 1, 1]), 2).min() > 1.57


def test_mean_codes_are_those_of_the_table() -> None:
    reading = as_reading(sparse_codes(np.random.default_rng(8), 64, 20))
    table = features.feature_table(reading, reading, tolerance=0.1)
    np.testing.assert_allclose(features.mean_codes(reading).numpy()[table.feature], table.mean_start, rtol=1e-12)


@pytest.mark.parametrize(
    ("k", "means", "message"),
    [
        (0, torch.ones(4), "k of 1 to 3, found 0"),
        (4, torch.ones(4), "k of 1 to 3, found 4"),
        (2, torch.tensor([1.0, 0, 0, 0]), "expected 2 features with a contribution at now, found 1"),
        (2, torch.ones(3), r"found \(4, 3\), \(4,\) and \(3,\)"),
    ],
)
def test_subspaces_that_there_are_not(k: int, means: torch.Tensor, message: str) -> None:
    from interp_rlhf.drift.features import subspace_angles

    with pytest.raises(MeasurementError, match=message):
        subspace_angles(torch.randn(4, 3), torch.ones(4), means, k)


class Halves:
    """Codes are the positive parts of the first two dimensions; decoding forgets the others."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :2].relu()

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.cat([z, torch.zeros(len(z), 2)], dim=1)


def test_health_by_numpy_from_tokens() -> None:
    generator = np.random.default_rng(9)
    x = [generator.normal(size=(10, 7, 4)).astype(np.float32) + shift for shift in (0.5, np.float32(0.7))]
    readings = []
    for tokens in x:
        stream = FeatureStream(Halves(), "halves")
        stream(range(10), torch.from_numpy(tokens), torch.ones(10, 7, dtype=torch.bool))
        readings.append(stream.reading())
    found = health.dictionary_health(*readings)
    x = [tokens.astype(np.float64) for tokens in x]
    x_hat = [np.concatenate([np.maximum(t[..., :2], 0), np.zeros((10, 7, 2))], axis=-1) for t in x]
    for value, t, t_hat in zip((found.fvu_start, found.fvu_now), x, x_hat, strict=True):
        flat = t.reshape(-1, 4)
        assert value == pytest.approx(np.square(t - t_hat).sum() / np.square(flat - flat.mean(0)).sum(), rel=1e-9)
    assert found.l0_start == pytest.approx((x[0][..., :2] > 0).sum() / 70)
    assert found.l0_now == pytest.approx((x[1][..., :2] > 0).sum() / 70)
    change, followed = x[1].mean(1) - x[0].mean(1), x_hat[1].mean(1) - x_hat[0].mean(1)
    expected = np.square(change - followed).sum() / np.square(change).sum()
    assert found.residual_share == pytest.approx(expected, rel=1e-5)
    assert health.residual_share(readings[0], readings[0]) == 0.0


def sums(fvu: float, l0: int, fired: int = 4) -> FeatureReading:
    """100 tokens whose squares about the mean are 1000 (mean 3 in one dimension), and 5 features."""
    return FeatureReading(
        indptr=torch.tensor([0, fired]), columns=torch.arange(fired, dtype=torch.int32), means=torch.ones(fired),
        fired=torch.ones(fired), tokens=torch.tensor([100]), x_mean=torch.tensor([[3.0]]),
        x_hat_mean=torch.tensor([[3.0]]), x_sum=torch.tensor([300.0], dtype=torch.float64), error=1000 * fvu,
        power=1900.0, l0=l0, width=5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("start", "now", "why"),
    [
        ((0.2, 400), (0.249, 400), ""),
        ((0.2, 400), (0.251, 400), "FVU rose from 0.200 to 0.251, above the 0.250 allowed"),
        ((0.04, 400), (0.059, 400), ""),
        ((0.04, 400), (0.061, 400), "FVU rose from 0.040 to 0.061, above the 0.060 allowed"),
        ((0.2, 400), (0.01, 400), ""),
        ((0.2, 400), (0.2, 500), ""),
        ((0.2, 400), (0.2, 501), "L0 shifted by 25%, from 4.0 to 5.0 codes a token, above the 25% allowed"),
        ((0.2, 400), (0.2, 290), "L0 shifted by 28%, from 4.0 to 2.9 codes a token, above the 25% allowed"),
        ((0.2, 0), (0.2, 1), "L0 shifted from none, from 0.0 to 0.0 codes a token, above the 25% allowed"),
        ((1.2, 400), (0.9, 400), "FVU is 1.200 at the start: the mean activation describes the texts as well"),
        ((0.95, 400), (1.0, 400), "FVU is 1.000 now: the mean activation describes the texts as well"),
        ((0.1, 400), (0.3, 800), "FVU rose from 0.100 to 0.300, above the 0.125 allowed; L0 shifted by 100%, from"),
    ],
)
def test_the_gate(start: tuple[float, int], now: tuple[float, int], why: str) -> None:
    found = health.dictionary_health(sums(*start), sums(*now))
    assert found.why.startswith(why) and bool(found.why) == bool(why) and found.reliable == (not why)
    assert (found.fvu_start, found.fvu_now) == (pytest.approx(start[0]), pytest.approx(now[0]))
    assert found.dead_start == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": math.nan}, "only some of them read"),
        ({"x_hat_mean": None}, "only some of them read"),
        ({"power": 900.0}, "activations that vary, found squares of 0 about the mean of 100 tokens"),
        ({"error": math.inf}, "an error of inf"),
        ({"tokens": torch.tensor([99])}, "on the same texts, found"),
        ({"width": 6}, "widths 5 and 6"),
    ],
)
def test_no_health(change: dict, message: str) -> None:
    with pytest.raises(MeasurementError, match=message) as problem:
        health.dictionary_health(sums(0.2, 400), replace(sums(0.2, 400), **change))
    assert "\n" not in str(problem.value)


# --------------------------------------------------------------------------------------------------------------- refits


def inertia(x: np.ndarray, seed: int) -> float:
    """What a refit leaves unexplained: k-means stands for a dictionary whose codes are single features."""
    fit = KMeans(12, init="random", n_init=1, max_iter=20, random_state=seed).fit(x)
    return fit.inertia_ / np.square(x - x.mean(0)).sum()


def test_refits_of_nothing_changed_cover_zero_and_a_change_is_seen() -> None:
    generator, covered, seen = np.random.default_rng(10), 0, 0
    for run in range(50):
        x = generator.normal(size=(120, 6))
        frozen = [inertia(x, 100 * run + seed) for seed in range(6)]
        covered += not refit_null.refit_excess(frozen, inertia(x, 100 * run + 99)).changed
        changed = x + 3 * generator.integers(0, 2, size=(120, 1)) * np.ones(6)
        seen += refit_null.refit_excess(frozen, inertia(changed, 100 * run + 99)).changed
    assert covered >= 45 and seen >= 45


def test_the_prediction_interval_covers_as_often_as_it_says() -> None:
    draws = np.random.default_rng(11).normal(3, 2, size=(1000, 6))
    missed = sum(refit_null.refit_excess(row[:5].tolist(), row[5], confidence=0.9).changed for row in draws)
    low, high = stats.binom.ppf([0.0005, 0.9995], 1000, 0.1)
    assert low <= missed <= high


def test_the_interval_by_hand() -> None:
    found = refit_null.refit_excess([2.0, 4.0, 4.0, 6.0, 4.0], 9.0)
    assert (found.excess, found.refits, found.sd) == (5.0, 5, pytest.approx(math.sqrt(2)))
    assert found.high - found.excess == pytest.approx(2.7764451 * math.sqrt(2) * math.sqrt(1.2))
    assert found.excess - found.low == pytest.approx(found.high - found.excess)
    equal = refit_null.refit_excess([0.1] * 7, 0.1)
    assert not equal.changed and equal.high < 1e-10 and refit_null.refit_excess([0.1] * 7, 0.1001).changed


@pytest.mark.parametrize(
    ("frozen", "value", "confidence", "message"),
    [
        ([1.0] * 4, 1.0, 0.95, "at least 5 refits, found 4"),
        ([1.0] * 5, math.nan, 0.95, "finite numbers"),
        ([1.0, 1.0, 1.0, 1.0, math.inf], 1.0, 0.95, "finite numbers"),
        ([1.0] * 5, 1.0, 1.0, r"confidence in \(0, 1\)"),
    ],
)
def test_no_refit_null(frozen: list[float], value: float, confidence: float, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        refit_null.refit_excess(frozen, value, confidence=confidence)


# --------------------------------------------------------------------------------- known codes, what is found (seeded)


def test_known_codes_the_two_changed_features_and_no_other() -> None:
    outcomes = [replicate("two features", "codes known", seed) for seed in range(8)]
    assert all({SCALED, SWITCHED_ON} <= o.listed and o.appeared == {SWITCHED_ON} for o in outcomes)
    assert np.mean([false_share(o.rejected) for o in outcomes]) <= 0.2
    assert all(o.untestable > 20 for o in outcomes)


def test_nothing_changed_nothing_listed() -> None:
    for encoder in ("codes known", "JumpReLU, fitted"):
        outcomes = [replicate("none", encoder, seed) for seed in range(10)]
        assert sum(bool(o.rejected) for o in outcomes) <= stats.binom.ppf(0.999, 10, 0.1)
        assert sum(bool(o.listed) for o in outcomes) <= 3 and all(o.reliable for o in outcomes)


@pytest.mark.parametrize("encoder", ["JumpReLU, fitted", "TopK, tied"])
def test_an_encoder_finds_the_two_and_the_gate_stays_open(encoder: str) -> None:
    outcomes = [replicate("two features", encoder, seed) for seed in range(6)]
    assert sum(SCALED in o.listed for o in outcomes) == 6 and sum(SWITCHED_ON in o.listed for o in outcomes) >= 4
    assert all(o.reliable for o in outcomes)


@pytest.mark.parametrize("encoder", ["JumpReLU, fitted", "TopK, tied"])
def test_a_change_outside_the_dictionary_closes_the_gate_and_no_feature_is_blamed(encoder: str) -> None:
    for seed in range(4):
        found = replicate(CHANGES[2], encoder, seed)
        assert not found.reliable and not found.listed and not found.listed_by and not found.appeared
        assert len(found.ungated) > 20  # what would have been blamed
