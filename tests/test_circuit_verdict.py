"""The verdict about a mechanism: the table of docs/metrics.md row by row, its edges, and what is missing."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from interp_rlhf.drift.circuit_verdict import (
    ALARMS,
    HIGH_FROM,
    LOST_BELOW,
    CircuitEvidence,
    circuit_evidence,
    circuit_verdict,
)
from interp_rlhf.drift.estimates import estimate
from interp_rlhf.errors import MeasurementError

#: A faithful circuit at step 0, high from 0.8 on, that carries nothing now, while the effect is all there.
NOTHING = CircuitEvidence(
    start_effect=True, f_index_start=1.0, random_high_start=0.1, effect_ratio=1.0,
    f_index=0.1, f_matched=0.2, f_own=0.3, f_control=0.0, random_high=0.15,
)  # fmt: skip


def word(**changes: Any) -> str:
    return circuit_verdict(replace(NOTHING, **changes)).word


# fmt: off
TABLE = [
    ({}, "diffuse", True),
    ({"f_own": 0.9}, "different", True),
    ({"f_matched": 0.9}, "relocated", False),
    ({"f_matched": 0.9, "f_own": 0.9}, "relocated", False),
    ({"f_index": 0.9}, "same", False),
    ({"f_index": 0.9, "f_matched": 0.9, "f_own": 0.9}, "same", False),
    ({"effect_ratio": 0.1}, "lost", True),
    ({"effect_ratio": 0.1, "f_index": 0.9}, "lost", True),
    ({"effect_ratio": 0.0, "f_index": None, "f_matched": None, "f_own": None, "random_high": None}, "lost", True),
    ({"effect_ratio": 0.1, "f_index_start": 0.05}, "lost", True),
    ({"effect_ratio": 3.0, "f_index": 1.4}, "same", False),
    ({"start_effect": False}, "undetermined", False),
    ({"start_effect": False, "effect_ratio": 0.1, "f_index": 0.9}, "undetermined", False),
    ({"f_index_start": 0.05, "f_index": 0.9}, "undetermined", False),
    ({"f_index_start": -0.5, "random_high_start": -1.0, "f_index": -0.2, "random_high": -0.9}, "undetermined", False),
]
# fmt: on


@pytest.mark.parametrize(("changes", "expected", "alarm"), TABLE)
def test_the_table(changes: dict[str, Any], expected: str, alarm: bool) -> None:
    found = circuit_verdict(replace(NOTHING, **changes))
    assert (found.word, found.alarm) == (expected, alarm)
    assert re.fullmatch(r"[A-Z].*\.", found.why) and "None" not in found.why and ". " not in found.why


@pytest.mark.parametrize(
    ("name", "expected"), [("f_index", "same"), ("f_matched", "relocated"), ("f_own", "different")]
)  # fmt: skip
def test_high_is_from_four_fifths_of_the_start_on_and_above_random_circuits(name: str, expected: str) -> None:
    start = {"f_index_start": 0.5}
    assert word(**start, **{name: 0.4}) == expected
    assert word(**start, **{name: math.nextafter(0.4, 0)}) == "diffuse"
    assert word(**start, **{name: 0.45}, random_high=0.45) == "diffuse"
    assert word(**start, **{name: 0.45}, random_high=math.nextafter(0.45, 0)) == expected


def test_lost_is_below_a_fifth_of_the_start() -> None:
    assert (word(effect_ratio=0.2), word(effect_ratio=math.nextafter(0.2, 0))) == ("diffuse", "lost")


def test_a_circuit_no_better_than_random_ones_at_the_start_is_none() -> None:
    assert word(f_index_start=0.4, random_high_start=0.4, f_index=0.9) == "undetermined"
    assert word(f_index_start=math.nextafter(0.4, 1), random_high_start=0.4, f_index=0.9) == "same"
    assert word(f_index_start=0.0, random_high_start=-0.5, f_index=0.9) == "undetermined"


# fmt: off
MISSING = [
    ({"effect_ratio": None}, "effect"),
    ({"f_index_start": None}, "at step 0 was not measured"),
    ({"random_high_start": None}, "At step 0 there are too few random circuits"),
    ({"f_index": None}, "no more than chance now"),
    ({"f_index": None, "random_high": None}, "no more than chance now"),
    ({"random_high": None}, "Now there are too few random circuits"),
    ({"f_matched": None, "f_own": 0.9}, "after matching its nodes is missing"),
    ({"f_own": None}, "of the circuit extracted now is missing"),
]
# fmt: on


@pytest.mark.parametrize(("changes", "why"), MISSING)
def test_a_number_that_is_needed_and_missing_leaves_it_undetermined(changes: dict[str, Any], why: str) -> None:
    found = circuit_verdict(replace(NOTHING, **changes))
    assert (found.word, found.alarm) == ("undetermined", False) and why in found.why


def test_numbers_that_are_not_needed_may_be_missing() -> None:
    assert word(f_index=0.9, f_matched=None, f_own=None, f_control=None) == "same"
    assert word(f_matched=0.9, f_own=None, f_control=None) == "relocated"
    assert word(f_control=None) == "diffuse"


def test_reasons_give_the_numbers() -> None:
    def why(**changes: Any) -> str:
        return circuit_verdict(replace(NOTHING, **changes)).why

    assert why(effect_ratio=0.13) == (
        "Corrupting every edge changes the metric by 0.13 of what it did at step 0 (lost below 0.2)."
    )
    assert why(f_index=0.87) == "The step-0 circuit still carries 0.87 of the effect (high from 0.80 on)."
    assert all(number in why(f_matched=0.86) for number in ("0.10", "0.86", "0.80"))
    assert all(number in why(f_own=0.85) for number in ("0.10", "0.20", "0.85", "0.80"))
    assert all(number in why() for number in ("0.10", "0.20", "0.30", "0.80"))
    assert "high above the random circuits' 0.90" in why(random_high=0.9)
    assert all(number in why(f_index_start=0.07) for number in ("0.07", "0.10"))


def test_a_control_circuit_that_does_as_well_is_named() -> None:
    same = replace(NOTHING, f_index=0.9)
    found = circuit_verdict(replace(same, f_control=0.81))
    assert found.word == "same" and "0.81" in found.why and "not specific" in found.why
    assert "specific" not in circuit_verdict(replace(same, f_control=0.79)).why


@pytest.mark.parametrize("name", [field.name for field in fields(CircuitEvidence) if field.name != "start_effect"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_verdict_from_numbers_that_are_none(name: str, bad: float) -> None:
    with pytest.raises(MeasurementError, match=f"circuit evidence: {name}: expected a finite number, found {bad}"):
        circuit_verdict(replace(NOTHING, **{name: bad}))


def test_evidence_is_read_from_rows() -> None:
    def rows(**values: float) -> dict[str, Any]:
        return {
            f"circuit/{name}": estimate(f"circuit/{name}", value, 9, band=(-9.0, value / 2))
            for name, value in values.items()
        }

    start = rows(effect_ratio=1.0, faithfulness_index=0.9, faithfulness_matched=0.8, faithfulness_own=0.7)
    now = rows(effect_ratio=0.6, faithfulness_index=0.5, faithfulness_matched=0.4, faithfulness_own=0.3)
    now |= rows(faithfulness_control=0.2)
    expected = CircuitEvidence(True, 0.9, 0.45, 0.6, 0.5, 0.4, 0.3, 0.2, 0.25)
    assert circuit_evidence(start, now) == expected
    assert circuit_evidence({}, {}) == CircuitEvidence(False, *[None] * 8)
    assert not circuit_evidence({}, now).start_effect and circuit_evidence(start, {}).start_effect


def test_the_page_has_the_thresholds_and_the_words(repository: Path) -> None:
    page = (repository / "docs" / "metrics.md").read_text(encoding="utf-8")
    thresholds = page.partition("## Thresholds")[2].partition("\n## ")[0]
    assert f"| lost: `circuit/effect_ratio` below | {LOST_BELOW} |" in thresholds
    assert re.search(rf"^\| high faithfulness: .* \| {HIGH_FROM} \|", thresholds, flags=re.M)
    table = page.partition("### Verdicts about a mechanism")[2].partition("\n###")[0]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines() if line.startswith("|")]
    assert {row[0] for row in rows[2:]} == {expected for _, expected, _ in TABLE}
    assert {row[0] for row in rows[2:] if row[2] == "yes"} == set(ALARMS)


def test_a_verdict_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, interp_rlhf.drift.circuit_verdict; print({*sys.modules} & {'torch', 'numpy', 'pydantic'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
