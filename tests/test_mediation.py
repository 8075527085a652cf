"""Causal shares whose truth is known, against NumPy: all of it, none of it, 0.6 of it; intervals that cover."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from shape_checked import checked
from torch import Tensor

from interp_rlhf.activations.restoring import moved
from interp_rlhf.causal import random_directions
from interp_rlhf.drift.estimates import METRICS
from interp_rlhf.errors import MeasurementError

plain = importlib.import_module("interp_rlhf.drift.mediation")
mediation = checked("interp_rlhf.drift.mediation")

OPTIONS: dict[str, Any] = {"resamples": 500, "confidence": 0.95, "seed": 0}
D = 64


def units(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two orthogonal directions and streams ``[n, 5, d]``."""
    generator = torch.Generator().manual_seed(seed)
    v, w = torch.linalg.qr(torch.randn(D, 2, generator=generator))[0].T
    return torch.stack([v, w]), torch.randn(n, 5, D, generator=generator)


def share(behaviour: Callable[[Tensor], Tensor], start: Tensor, now: Tensor, v: Tensor, k: int = 40) -> Any:
    """What :func:`interp_rlhf.causal.causal_share` does, with streams in the place of models."""
    there = torch.ones(start.shape[:2], dtype=torch.bool)
    along = [v, *random_directions(k, D, seed=1)]
    restored = torch.stack([behaviour(now) - behaviour(moved(now, v, start @ v, w, there)) for w in along], 1)
    injected = torch.stack([behaviour(moved(start, v, now @ v, w, there)) - behaviour(start) for w in along], 1)
    change = behaviour(now) - behaviour(start)
    assert mediation.no_share(change, **OPTIONS) is None
    ones = torch.ones(len(start))
    return mediation.with_shares(
        change, restored, injected, mediation.nll_change_estimate(ones, ones, ones, **OPTIONS), **OPTIONS
    )


def test_a_behaviour_of_the_component_alone_is_all_its() -> None:
    (v, w), start = units(60)
    now = start + (1.5 + 0.3 * torch.randn(60, 5, 1)) * v + 2.0 * w
    found = share(lambda h: torch.sigmoid(h @ v).mean(1), start, now, v)
    for each in (found.share, found.injected):
        assert (each.value, each.ci_low, each.ci_high) == pytest.approx((1, 1, 1), abs=1e-5)
        assert each.null_high < 0.5 and each.p == pytest.approx(1 / 41)
    assert found.random_restored.mean() == pytest.approx(0, abs=0.1)


def test_a_behaviour_independent_of_the_component_owes_it_nothing() -> None:
    (v, w), start = units(60)
    now = start + 1.5 * v + torch.randn(60, 5, 1, generator=torch.Generator().manual_seed(3)).abs() * w
    found = share(lambda h: torch.sigmoid(h @ w).mean(1), start, now, v)
    for each in (found.share, found.injected):
        assert each.value == pytest.approx(0, abs=1e-5) and each.ci_low <= 1e-6 and each.ci_high >= -1e-6
        assert each.null_low < each.value < each.null_high and each.p > 0.5


def test_a_mixture_gets_its_weights() -> None:
    """0.6 of the behaviour along v and 0.4 along w, both moved alike up to chance."""
    (v, w), start = units(200)
    by = 1 + 0.4 * torch.randn(2, 200, 5, 1, generator=torch.Generator().manual_seed(5))
    now = start + by[0] * v + by[1] * w

    def behaviour(h: Tensor) -> Tensor:
        return 0.6 * torch.sigmoid(h @ v).mean(1) + 0.4 * torch.sigmoid(h @ w).mean(1)

    for along, expected in ((v, 0.6), (w, 0.4)):
        found = share(behaviour, start, now, along)
        assert found.share.value == pytest.approx(expected, abs=0.05)
        assert found.injected.value == pytest.approx(expected, abs=0.05)
        assert found.share.ci_low < expected < found.share.ci_high


def test_restored_and_injected_differ_where_the_component_acts_with_another() -> None:
    """B = (h·v)(h·w), both from 1 to 3: taking v's part away undoes 6 of 8, giving it alone brings 2 of 8."""
    (v, w), _ = units(1)
    start = (v + w).expand(4, 5, D)
    found = share(lambda h: ((h @ v) * (h @ w)).mean(1), start, 3 * start, v)
    assert (found.share.value, found.injected.value) == pytest.approx((0.75, 0.25), abs=1e-5)


def test_numbers_are_numpys() -> None:
    generator = np.random.default_rng(0)
    change, effect = generator.normal(2, 1, 30), generator.normal(1, 1, 30)
    random, tokens = generator.normal(0, 1, (39, 30)), generator.integers(1, 9, 30).astype(float)
    found = mediation.share_estimate(
        "causal/share_injected", *map(torch.from_numpy, (effect, change, random)), **OPTIONS
    )
    drawn = np.random.default_rng(0).integers(0, 30, size=(500, 30))
    ratios = effect[drawn].mean(1) / change[drawn].mean(1)
    null = random.mean(1) / change.mean()
    assert found.value == pytest.approx(effect.mean() / change.mean())
    assert (found.ci_low, found.ci_high) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])))
    assert found.null_high == pytest.approx(np.sort(abs(null))[37]) and found.null_low == -found.null_high
    assert found.p == pytest.approx((1 + (abs(null) >= abs(found.value)).sum()) / 40)
    assert (found.n, found.null_kind) == (30, "random_directions")

    before, after = generator.gamma(3, 1, 30), generator.gamma(4, 1, 30)
    found = mediation.nll_change_estimate(*map(torch.from_numpy, (before, after, tokens)), **OPTIONS)
    per_token = (after - before)[drawn].sum(1) / tokens[drawn].sum(1)
    assert found.value == pytest.approx((after - before).sum() / tokens.sum())
    assert (found.ci_low, found.ci_high) == pytest.approx(tuple(np.quantile(per_token, [0.025, 0.975])))


def test_intervals_cover_the_share() -> None:
    generator, inside, rounds = np.random.default_rng(1), 0, 200
    for index in range(rounds):
        change = generator.normal(1, 1, 40)
        effect = 0.6 * change + generator.normal(0, 0.5, 40)
        row = mediation.share_estimate(
            "causal/share_restored", torch.from_numpy(effect), torch.from_numpy(change), torch.zeros(20, 40),
            **{**OPTIONS, "seed": index, "resamples": 200},
        )  # fmt: skip
        inside += row.ci_low <= 0.6 <= row.ci_high
    assert 0.88 <= inside / rounds <= 0.99


def test_no_share_of_what_did_not_change() -> None:
    generator = torch.Generator().manual_seed(0)
    reason = mediation.no_share(torch.randn(50, generator=generator), **OPTIONS)
    assert "an interval that covers 0" in reason
    assert "covers 0" in mediation.no_share(torch.zeros(5), **OPTIONS)
    few = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert "(3 of 6 units unchanged)" in mediation.no_share(few, **OPTIONS)
    assert mediation.no_share(torch.randn(50, generator=generator) - 2, **OPTIONS) is None
    nll = mediation.nll_change_estimate(torch.ones(2), torch.ones(2), torch.ones(2), **OPTIONS)
    found = mediation.without_shares("reason", torch.tensor([1.0, -1.0]), nll, **OPTIONS)
    assert found.share is None and found.injected is None and found.reason == "reason"
    assert found.change == 0 and found.change_interval == (-1, 1) and found.n == 2
    assert list(found.rows()) == ["causal/nll_change"]


def test_rows_are_the_metrics_of_the_page() -> None:
    (v, _), start = units(10)
    found = share(lambda h: (h @ v).mean(1), start, start + v, v, k=20).rows()
    assert list(found) == [metric for metric in METRICS if metric.startswith("causal/")]
    for metric, row in found.items():
        known = METRICS[metric]
        assert (row.unit, row.tier) == (known.unit, known.tier) and row.null_kind in known.nulls


def test_too_few_directions_for_a_confidence_give_no_band() -> None:
    change = torch.arange(1.0, 6.0)
    row = mediation.share_estimate(
        "causal/share_restored", change, change, torch.zeros(20, 5), **{**OPTIONS, "confidence": 0.99}
    )
    assert row.null_high is None and row.p == pytest.approx(1 / 21)


def test_shapes_and_numbers_that_do_not_fit_are_refused() -> None:
    three, two, nan = torch.ones(3), torch.ones(2), torch.tensor([1.0, float("nan"), 1.0])
    with pytest.raises(MeasurementError, match=r"causal/share_restored: expected effects \[n\]"):
        plain.share_estimate("causal/share_restored", three, two, torch.ones(20, 3), **OPTIONS)
    with pytest.raises(MeasurementError, match="causal share: expected finite numbers"):
        plain.share_estimate("causal/share_restored", nan, three, torch.ones(20, 3), **OPTIONS)
    with pytest.raises(MeasurementError, match="random directions: expected finite"):
        plain.share_estimate("causal/share_restored", three, three, nan.expand(20, 3), **OPTIONS)
    with pytest.raises(MeasurementError, match="expected at least 2 sampling units, found 1"):
        plain.no_share(torch.ones(1), **OPTIONS)
    with pytest.raises(MeasurementError, match=r"predicted token in each of 3 units, found \[1.0, 0.0, 1.0\]"):
        plain.nll_change_estimate(three, three, torch.tensor([1.0, 0.0, 1.0]), **OPTIONS)
