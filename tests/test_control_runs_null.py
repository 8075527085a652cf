"""Rank among control runs: by brute force, uniform for exchangeable runs, and without torch."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from interp_rlhf.drift.control_runs import control_rank, family_rank, rank_place, runs_needed
from interp_rlhf.errors import MeasurementError


def test_rank_by_brute_force() -> None:
    generator = np.random.default_rng(0)
    for k in (1, 3, 18, 19, 20, 100):
        controls = generator.normal(size=k).round(1).tolist()  # rounded: ties
        for value in [*generator.normal(0, 2, size=50).round(1), 0.0, 10.0, *controls, *(c + 0.05 for c in controls)]:
            found = control_rank(float(value), controls)
            assert found.k == k
            assert found.p == (1 + sum(abs(c) >= abs(value) for c in controls)) / (k + 1)
            assert found.smallest == 1 / (k + 1) <= found.p
            assert control_rank(10.0, controls).p == found.smallest
            assert found.low == -found.high
            if found.possible:
                assert (found.low <= value <= found.high) == (found.p > 0.05 + 1e-12)
            else:
                assert found.high == max(abs(c) for c in controls)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9, 0.95, 0.975, 0.99, 0.999])
def test_needed_is_the_first_number_of_runs_that_can_reach_the_confidence(confidence: float) -> None:
    needed = next(k for k in range(1, 2000) if 1 / (k + 1) <= 1 - confidence + 1e-12)
    assert runs_needed(confidence) == needed
    for k in range(1, needed + 3):
        found = control_rank(1.0, [0.5] * k, confidence=confidence)
        assert found.possible == (k >= needed) == (rank_place(k, confidence) is not None)
        assert found.needed == needed


def test_nineteen_runs_for_95_percent() -> None:
    assert control_rank(1.0, [0.0] * 18).possible is False
    assert control_rank(1.0, [0.0] * 19).possible is True
    assert control_rank(1.0, [0.0] * 19).p == 0.05


def test_p_is_uniform_for_exchangeable_runs() -> None:
    """20 runs with the same heavy-tailed law, also sharing what the data does to all of them; any may be the one."""
    generator = np.random.default_rng(1)
    ranks = []
    for _ in range(2000):
        runs = generator.standard_t(3, size=20) + generator.normal()
        ranks.append(round(20 * control_rank(runs[0], runs[1:].tolist()).p))
    assert stats.chisquare(np.bincount(ranks, minlength=21)[1:]).pvalue > 0.001
    assert stats.binom.ppf(0.0005, 2000, 0.05) <= ranks.count(1) <= stats.binom.ppf(0.9995, 2000, 0.05)


def test_a_family_by_brute_force() -> None:
    generator = np.random.default_rng(2)
    names = ["a", "b", "c", "d"]
    values = dict(zip(names, generator.normal(0, 2, size=4).tolist(), strict=True))
    controls = [dict(zip(names, generator.normal(size=4).tolist(), strict=True)) for _ in range(25)]
    found = family_rank(values, controls)
    assert list(found) == names
    for name in names:
        as_large = sum(any(abs(control[other]) >= abs(values[name]) for other in names) for control in controls)
        assert found[name].p == (1 + as_large) / 26
        assert found[name].p >= control_rank(values[name], [control[name] for control in controls]).p
    assert len({(rank.low, rank.high) for rank in found.values()}) == 1


def test_family_wise_errors_are_exact_and_a_moved_readout_does_not_spoil_the_others() -> None:
    generator = np.random.default_rng(3)
    names = [str(i) for i in range(8)]
    smallest, errors = [], 0
    for _ in range(1000):
        runs = generator.normal(size=(20, 8)) + generator.normal(size=(20, 1))
        controls = [dict(zip(names, run, strict=True)) for run in runs[1:].tolist()]
        values = dict(zip(names, runs[0].tolist(), strict=True))
        smallest.append(round(20 * min(rank.p for rank in family_rank(values, controls).values())))
        moved = family_rank(values | {"0": 30.0}, controls)
        assert moved["0"].p == 0.05
        errors += any(moved[name].p <= 0.05 for name in names[1:])
    assert stats.chisquare(np.bincount(smallest, minlength=21)[1:]).pvalue > 0.001
    assert errors <= stats.binom.ppf(0.999, 1000, 0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: control_rank(1.0, []), "at least 1, found none"),
        (lambda: control_rank(1.0, [1.0, math.nan]), "found 1 of 3 NaN"),
        (lambda: control_rank(math.inf, [1.0]), "found 1 of 2 NaN or infinite"),
        (lambda: family_rank({}, [{}]), "readouts to rank, found none"),
        (lambda: family_rank({"a": 1.0}, []), "at least 1, found none"),
        (lambda: family_rank({"a": 1.0}, [{"a": 1.0}, {"b": 1.0}]), "control run 2: .* differs in 'a'"),
        (lambda: family_rank({"a": 1.0}, [{"a": 1.0, "b": 2.0}]), "control run 1: .* differs in 'b'"),
        (lambda: family_rank({"a": 1.0, "b": 1.0}, [{"a": 1.0, "b": math.nan}]), "NaN"),
    ],
)
def test_what_cannot_be_ranked_is_an_error(call, message: str) -> None:
    with pytest.raises(MeasurementError, match=message) as problem:
        call()
    assert "\n" not in str(problem.value)


def test_it_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, interp_rlhf.drift.control_runs\n"
        "print({*sys.modules} & {'torch', 'transformers', 'numpy', 'jaxtyping'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr
