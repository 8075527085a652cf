"""The probe panel: planted rotation and erasure, nothing changed, and every number against scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import norm
from shape_checked import checked
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from interp_rlhf.drift.estimates import METRICS, Estimate
from interp_rlhf.errors import ConfigError, MeasurementError, PromptError
from interp_rlhf.readouts.folds import label_folds, pair_folds
from interp_rlhf.readouts.probes import LinearProbe

crossfit = checked("interp_rlhf.drift.crossfit")
panel = checked("interp_rlhf.drift.panel")

Sides = tuple[torch.Tensor, torch.Tensor]


def classes(n: int, d: int, distance: float, seed: int = 0) -> Sides:
    """Unit-variance isotropic classes whose means are ``distance`` apart along axis 0."""
    x = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed))
    x[0, :, 0] += distance / 2
    x[1, :, 0] -= distance / 2
    return x[0] + 3, x[1] + 3


def both(sides: Sides, change: Callable[[torch.Tensor], torch.Tensor]) -> Sides:
    return change(sides[0]), change(sides[1])


def rotated(phi: float, d: int) -> Callable[[torch.Tensor], torch.Tensor]:
    turn = torch.eye(d)
    turn[:2, :2] = torch.tensor([[math.cos(phi), math.sin(phi)], [-math.sin(phi), math.cos(phi)]])
    return lambda x: (x - 3) @ turn + 3


def names(n: int) -> list[str]:
    return [f"g{i}" for i in range(n)]


def by_name(rows: list) -> dict[str, Estimate]:
    return {metric: found for metric, reader, found in rows if reader == "policy"}


def start(sides: Sides, **changes):
    return panel.start_panel(*sides, names(len(sides[0])), **{"refits": 2, "resamples": 100, **changes})


def sklearn_scores(fit_on: np.ndarray, labels: np.ndarray, read: np.ndarray) -> np.ndarray:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-13, max_iter=10_000))
    return model.fit(fit_on, labels).decision_function(read)


def sklearn_panel(fitted: Sides, read: Sides, folds: list[int]) -> tuple[float, np.ndarray, np.ndarray]:
    """AUC and held-out scores of the same cross-fit, step by step with scikit-learn."""
    fp, fn, rp, rn = (x.double().numpy() for x in (*fitted, *read))
    own, value = np.array(folds), 0.0
    scores = np.zeros((2, len(own)))
    for fold in set(folds):
        out, held = own != fold, own == fold
        labels = np.r_[np.ones(out.sum()), np.zeros(out.sum())]
        found = sklearn_scores(np.r_[fp[out], fn[out]], labels, np.r_[rp[held], rn[held]])
        truth = np.r_[np.ones(held.sum()), np.zeros(held.sum())]
        value += held.sum() / len(own) * roc_auc_score(truth, found)
        scores[:, held] = found.reshape(2, -1)
    return value, scores[0], scores[1]


# ------------------------------------------------------------------------------------------------------- ground truth


@pytest.mark.parametrize("phi", [0.0, 0.6, 1.2, math.pi / 2])
def test_a_rotated_concept_axis_blinds_the_frozen_probes_only(phi: float) -> None:
    n, d, distance = 2000, 16, 1.5
    sides = classes(n, d, distance)
    begun = start(sides)
    rows = by_name(panel.panel_estimates(begun, *both(sides, rotated(phi, d)), resamples=200))
    refit, frozen = norm.cdf(distance / math.sqrt(2)), norm.cdf(math.cos(phi) * distance / math.sqrt(2))
    error = 0.025  # 3 standard errors: √(AUC·(1 − AUC)/n·…) is below 0.0085 at n = 2000 and AUC 0.5
    assert rows["probe/auc_refit"].value == pytest.approx(refit, abs=error)
    assert rows["probe/auc"].value == pytest.approx(frozen, abs=error)
    assert rows["probe/staleness"].value == pytest.approx(refit - frozen, abs=error)
    assert rows["probe/obfuscation_gap"].value == pytest.approx(refit - frozen, abs=error)
    assert rows["probe/obfuscation_excess"].value == pytest.approx(refit - frozen, abs=error)
    threshold = norm.isf(0.2)  # of negatives at the probe's own axis, in SD of the projection
    recall = norm.sf(threshold - (distance / 2) * (1 + math.cos(phi)))
    assert rows["probe/recall"].value == pytest.approx(recall, abs=0.05)
    if phi:
        assert rows["probe/staleness"].value > rows["probe/staleness"].null_high
        assert rows["probe/staleness"].ci_low > 0


def test_an_erased_concept_is_lost_to_both_and_is_no_staleness() -> None:
    sides = classes(2000, 16, 2.0)
    begun = start(sides)

    def erase(x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(len(x), generator=torch.Generator().manual_seed(int(x.sum().abs())))
        return torch.cat([noise[:, None] + 3, x[:, 1:]], 1)

    rows = by_name(panel.panel_estimates(begun, *both(sides, erase), resamples=100))
    assert rows["probe/auc"].value == pytest.approx(0.5, abs=0.03)
    assert rows["probe/auc_refit"].value == pytest.approx(0.5, abs=0.03)
    assert rows["probe/staleness"].value == pytest.approx(0.0, abs=0.03)
    assert rows["probe/obfuscation_gap"].value == pytest.approx(norm.cdf(2 / math.sqrt(2)) - 0.5, abs=0.04)
    assert rows["probe/obfuscation_excess"].value == pytest.approx(0.0, abs=0.03)
    assert rows["probe/recall"].value == pytest.approx(norm.sf(norm.isf(0.2) - 1.0), abs=0.05)


@pytest.mark.parametrize("d", [8, 200])
def test_nothing_changed_is_exactly_zero(d: int) -> None:
    sides = classes(60, d, 1.0)
    on = torch.cat(classes(20, d, 1.0, seed=1))
    begun = start(sides, on_domain=(on, [True] * 20 + [False] * 20))
    rows = panel.panel_estimates(begun, *both(sides, torch.clone), on_domain=on.clone(), resamples=100)
    found = by_name(rows)
    for metric in ("staleness", "obfuscation_gap", "obfuscation_excess", "concept_drift"):
        row = found[f"probe/{metric}"]
        assert (row.value, row.ci_low, row.ci_high) == (0.0, 0.0, 0.0), metric
    assert found["probe/staleness"].null_low <= 0 <= found["probe/staleness"].null_high
    assert found["probe/auc"].value == found["probe/auc_refit"].value
    (reference,) = (row for metric, reader, row in rows if reader == "reference")
    assert reference == found["probe/auc"]


def test_unrelated_sides_are_chance_for_probes_and_shuffled_labels() -> None:
    sides = classes(400, 8, 0.0)
    begun = start(sides, refits=20)
    rows = by_name(panel.panel_estimates(begun, *sides, resamples=200))
    # cross-validation of nothing falls below one half: what the fit's pairs lean to by chance, the held-out ones do not
    assert rows["probe/auc"].value == pytest.approx(0.5, abs=0.1)
    assert rows["probe/baseline_shuffled"].value == pytest.approx(0.5, abs=0.02)
    clear = start(classes(400, 8, 4.0), refits=20)
    assert clear.frozen.value > 0.99
    assert clear.baselines["probe/baseline_shuffled"].value == pytest.approx(0.5, abs=0.03)


# ------------------------------------------------------------------------------------------------------- scikit-learn


@pytest.mark.parametrize("d", [10, 150])
def test_every_number_is_scikit_learns(d: int) -> None:
    n = 75
    sides, now = classes(n, d, 1.0), both(classes(n, d, 0.7, seed=5), rotated(0.5, d))
    groups = [f"g{i // 3}" for i in range(n)]
    begun = panel.start_panel(*sides, groups, k=5, refits=3, resamples=100, seed=7)
    folds = pair_folds(groups, 5, 7)
    assert list(begun.folds) == folds
    rows = by_name(panel.panel_estimates(begun, *now, resamples=100))
    start_auc, _, negative_0 = sklearn_panel(sides, sides, folds)
    frozen, positive_t, _ = sklearn_panel(sides, now, folds)
    refit, _, _ = sklearn_panel(now, now, folds)
    expected = {
        "probe/auc": frozen,
        "probe/auc_refit": refit,
        "probe/staleness": refit - frozen,
        "probe/obfuscation_gap": start_auc - frozen,
        "probe/obfuscation_excess": (start_auc - frozen) - (start_auc - refit),
    }
    for metric, value in expected.items():
        assert rows[metric].value == pytest.approx(value, abs=1e-6), metric
        assert rows[metric].ci_low <= value <= rows[metric].ci_high
        assert rows[metric].n == n
    band = [sklearn_panel(sides, sides, pair_folds(groups, 5, 8 + i))[0] - start_auc for i in range(3)]
    low, high = np.quantile(band, [0.025, 0.975])
    assert begun.staleness_band == pytest.approx((min(low, 0), max(high, 0)), abs=1e-6)
    own, seen = np.array(folds), np.zeros(n, dtype=bool)
    for fold in range(5):
        held = negative_0[own == fold]
        candidates = [t for t in sorted(held) if (held > t).mean() <= 0.2]
        seen |= (own == fold) & (positive_t > candidates[0])
    assert rows["probe/recall"].value == pytest.approx(seen.mean(), abs=1e-9)


def test_on_domain_numbers_are_scikit_learns() -> None:
    n, d = 60, 12
    sides, now = classes(n, d, 1.0), both(classes(n, d, 1.0), rotated(0.3, d))
    labels = [i % 3 == 0 for i in range(50)]  # unpaired: more negatives than positives
    marks = np.array(labels)
    on_0, on_t = (torch.randn(50, d, generator=torch.Generator().manual_seed(s)) for s in (8, 9))
    on_0[:, 0] += 1.5 * torch.tensor(labels)
    on_t[:, 1] += 1.5 * torch.tensor(labels)
    begun = start(sides, on_domain=(on_0, labels), seed=2)
    rows = by_name(panel.panel_estimates(begun, *now, on_domain=on_t, resamples=200))

    def frozen_auc(x: torch.Tensor) -> float:
        p, m, own = sides[0].double().numpy(), sides[1].double().numpy(), np.array(begun.folds)
        values = []
        for fold in range(5):
            out = own != fold
            truth = np.r_[np.ones(out.sum()), np.zeros(out.sum())]
            values.append(roc_auc_score(marks, sklearn_scores(np.r_[p[out], m[out]], truth, x.double().numpy())))
        return float(np.mean(values))

    own, x = np.array(label_folds(labels, 5, 2)), on_t.double().numpy()
    refit = 0.0
    for fold in range(5):
        found = sklearn_scores(x[own != fold], marks[own != fold], x[own == fold])
        refit += (own == fold).mean() * roc_auc_score(marks[own == fold], found)
    off = sklearn_panel(sides, now, list(begun.folds))[0] - sklearn_panel(sides, sides, list(begun.folds))[0]
    assert rows["probe/auc_on"].value == pytest.approx(frozen_auc(on_t), abs=1e-6)
    assert rows["probe/auc_on_refit"].value == pytest.approx(refit, abs=1e-6)
    expected = frozen_auc(on_t) - frozen_auc(on_0) - off
    assert rows["probe/concept_drift"].value == pytest.approx(expected, abs=1e-6)
    assert rows["probe/concept_drift"].ci_low < expected < rows["probe/concept_drift"].ci_high
    assert (rows["probe/auc_on"].n, rows["probe/concept_drift"].n) == (50, 110)


def test_the_sealed_probe_is_read_over_all_pairs() -> None:
    sides = classes(40, 6, 1.0)
    sealed = LinearProbe("sealed", "layers.1.resid_post", torch.arange(6.0), 0.3)
    rows = by_name(panel.panel_estimates(start(sides, sealed=sealed), *sides, resamples=100))
    truth, x = np.r_[np.ones(40), np.zeros(40)], torch.cat(sides).numpy()
    assert rows["probe/sealed_auc"].value == pytest.approx(roc_auc_score(truth, x @ np.arange(6.0)), abs=1e-9)
    with pytest.raises(ConfigError, match=r"'sealed' at layers.1.resid_post: expected 6 dimensions, found 5"):
        start(sides, sealed=LinearProbe("sealed", "layers.1.resid_post", torch.ones(5), 0.0))


# ---------------------------------------------------------------------------------------------------------- intervals


def test_intervals_are_a_bootstrap_written_out() -> None:
    rng = np.random.default_rng(0)
    folds = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    positive, negative = rng.normal(0.5, 1, 10).round(1), rng.normal(size=10).round(1)
    wins = crossfit.FoldWins.of(torch.tensor(positive), torch.tensor(negative), folds, folds)
    for _ in range(20):
        drawn = rng.integers(0, 10, 10)
        value = 0.0
        for fold in range(3):
            rows = [i for i in drawn if folds[i] == fold]
            if rows:
                truth = np.r_[np.ones(len(rows)), np.zeros(len(rows))]
                value += len(rows) / 10 * roc_auc_score(truth, np.r_[positive[rows], negative[rows]])
        counts = torch.from_numpy(np.bincount(drawn, minlength=10).astype(float))[None]
        assert wins.by_pair(counts).item() == pytest.approx(value, abs=1e-12)


def test_intervals_cover_the_drop_they_measure() -> None:
    """95 % intervals of the gap under a planted rotation, 40 populations: 33 or more hold it (binomial, 0.1 %)."""
    d, distance, phi, covered = 4, 2.0, 1.0, 0
    for seed in range(40):
        sides = classes(100, d, distance, seed=100 + seed)
        # the same pairs read by probes of the true axis: what is left random is the draw of pairs
        axis = crossfit.CrossFitted(torch.eye(1, d, dtype=torch.float64).repeat(2, 1), torch.zeros(2).double())
        folds = [i % 2 for i in range(100)]
        wins = [
            crossfit.FoldWins.of(*crossfit.held_scores(axis, *read, folds), folds, folds)
            for read in (sides, both(sides, rotated(phi, d)))
        ]
        low, high = panel.bootstrap_statistic((wins[0] - wins[1]).by_pair, 100, resamples=400, seed=seed)
        truth = norm.cdf(distance / math.sqrt(2)) - norm.cdf(math.cos(phi) * distance / math.sqrt(2))
        covered += low <= truth <= high
    assert covered >= 33


# ------------------------------------------------------------------------------------------------- recall, mean, forms


def test_recall_needs_enough_negatives_and_says_so() -> None:
    message = "recall at a false-positive rate of 0.2 needs at least 50 held-out negatives, found 30"
    sides = classes(30, 6, 1.0)
    begun = start(sides)
    assert begun.thresholds is None and begun.no_recall == message
    assert "probe/recall" not in by_name(panel.panel_estimates(begun, *sides, resamples=100))
    with pytest.raises(MeasurementError, match=message):
        crossfit.fold_thresholds(torch.arange(30.0), [0, 1] * 15, 0.2)
    assert start(classes(50, 6, 1.0)).no_recall == ""


def test_a_positive_at_the_threshold_is_not_above_it() -> None:
    sides = classes(60, 6, 1.0)
    begun = start(sides)
    same = panel.panel_estimates(begun, sides[1], sides[1].flip(0), resamples=100)  # positives that read as negatives
    own = np.array(begun.folds)
    assert by_name(same)["probe/recall"].value == sum(int(0.2 * (own == fold).sum()) for fold in range(5)) / 60


@pytest.mark.parametrize("fpr", [0.1, 0.2, 0.29, 0.3])
def test_thresholds_are_the_smallest_that_keep_the_rate(fpr: float) -> None:
    scores = np.random.default_rng(3).normal(size=100).round(1)  # ties
    folds = [i % 3 for i in range(100)]
    found = crossfit.fold_thresholds(torch.tensor(scores), folds, fpr)
    for fold, threshold in enumerate(found.tolist()):
        own = scores[np.array(folds) == fold]
        assert threshold == min(t for t in own if (own > t).sum() <= fpr * len(own) + 1e-9)


def test_the_mean_probe_scores_the_mean_of_the_folds() -> None:
    sides = classes(60, 7, 1.5)
    begun = start(sides)
    probe = begun.mean_probe("honesty", "layers.2.resid_post", "a" * 64)
    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(probe.score(x), begun.fitted.all_scores(x).mean(0).float(), atol=1e-4, rtol=1e-4)
    assert probe.threshold == pytest.approx(float(begun.thresholds.mean()))
    assert (probe.name, probe.hookpoint, probe.tokenizer) == ("honesty", "layers.2.resid_post", "a" * 64)


def test_rows_are_metrics_of_the_table() -> None:
    sides, on = classes(60, 6, 1.0), torch.cat(classes(10, 6, 1.0))
    folds = pair_folds(names(60), 5, 0)
    texts = panel.text_baselines([[1, 2]] * 60, [[3]] * 60, folds, resamples=100)
    sealed = LinearProbe("s", "layers.1.resid_post", torch.ones(6), 0.0)
    begun = start(sides, on_domain=(on, [True] * 10 + [False] * 10), sealed=sealed, baselines=texts)
    rows = panel.panel_estimates(begun, *sides, on_domain=on, resamples=100)
    assert {metric for metric, _, _ in rows} == {metric for metric in METRICS if metric.startswith("probe/")}
    keys = [(metric, reader) for metric, reader, _ in rows]
    assert len(set(keys)) == len(keys) and ("probe/auc", "reference") in keys
    for metric, _, row in rows:
        assert row.null_kind in METRICS[metric].nulls and (row.tier, row.unit) == ("C", "1")
        assert row.ci_low is not None and row.ci_low <= row.ci_high


def test_the_same_input_gives_the_same_rows_and_no_global_draw() -> None:
    sides, state = classes(40, 50, 1.0), (torch.get_rng_state(), np.random.get_state()[1].copy())
    first, second = (panel.panel_estimates(start(sides), *sides, resamples=100) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


def test_what_does_not_fit_is_refused() -> None:
    sides, on = classes(40, 6, 1.0), torch.cat(classes(10, 6, 1.0))
    begun = start(sides)
    with pytest.raises(MeasurementError, match=r"expected one per row \(39\), found 40"):
        panel.panel_estimates(begun, sides[0][:39], sides[1][:39])
    with pytest.raises(MeasurementError, match=r"expected readings \[n, 6\], found \(40, 5\)"):
        panel.panel_estimates(begun, sides[0][:, :5], sides[1][:, :5])
    with pytest.raises(MeasurementError, match="found one of them"):
        panel.panel_estimates(begun, *sides, on_domain=on)
    with pytest.raises(PromptError, match="found 20 positive and 0 negative"):
        start(sides, on_domain=(on, [True] * 20))
    with pytest.raises(MeasurementError, match="expected a label for each of 20, found 3"):
        start(sides, on_domain=(on, [True, False, True]))
    broken = sides[0].clone()
    broken[3, 2] = float("nan")
    with pytest.raises(MeasurementError, match="expected finite"):
        panel.panel_estimates(begun, broken, sides[1])
    with pytest.raises(MeasurementError, match="expected both sides in every fold"):
        crossfit.FoldWins.of(torch.ones(2), torch.ones(2), [0, 1], [0, 0])
    with pytest.raises(MeasurementError, match="found none in fold 1"):
        crossfit.cross_fit(*sides, [0, 2] * 20)
