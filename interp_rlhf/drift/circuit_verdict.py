"""The verdict about a mechanism: same, relocated, different, diffuse, lost, undetermined (``docs/metrics.md``).

Numbers in, words out: neither torch nor NumPy is needed, so that a report can judge rows it read from a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, Protocol

from interp_rlhf.errors import MeasurementError

#: Share of the step-0 effect below which a behaviour is lost.
LOST_BELOW = 0.2
#: Share of the step-0 circuit's faithfulness at step 0 from which a circuit's faithfulness is high.
HIGH_FROM = 0.8

_NO_BAND = "too few random circuits for a band to compare faithfulness with"

Word = Literal["same", "relocated", "different", "diffuse", "lost", "undetermined"]
#: Words that raise an alarm.
ALARMS: tuple[Word, ...] = ("different", "diffuse", "lost")
#: Words whose effect is too small, or too little known, for its sign to be told.
_NO_SIGN: tuple[Word, ...] = ("lost", "undetermined")


@dataclass(frozen=True, slots=True)
class CircuitEvidence:
    """What a verdict rests on, all on the evaluation half of the pairs; ``None`` where a number could not be had.

    Attributes:
        start_effect: whether the interval of M(full) − M(∅) at step 0 leaves out 0.
        f_index_start: F of the step-0 circuit at step 0.
        random_high_start: upper end of the band of random circuits at step 0 (95th percentile of their F).
        effect_ratio: |M(full) − M(∅)| now, as a share of step 0's.
        f_index: F now of the step-0 circuit, node by node of the same index.
        f_matched: F now of the step-0 circuit after its nodes were matched by what they output.
        f_own: F now of the circuit extracted now.
        f_control: F now of the control task's step-0 circuit; enters the reason only.
        random_high: upper end of the band of random circuits now.
        flipped: whether M(full) − M(∅) now has the other sign than at step 0; enters the reason only.
    """

    start_effect: bool
    f_index_start: float | None
    random_high_start: float | None
    effect_ratio: float | None
    f_index: float | None
    f_matched: float | None
    f_own: float | None
    f_control: float | None
    random_high: float | None
    flipped: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """A word about the mechanism, one sentence with the numbers that led to it, and whether it is an alarm."""

    word: Word
    why: str
    alarm: bool


class Row(Protocol):
    """What is read of a metric's row: a ``Measurement`` and an ``Estimate`` both have it."""

    @property
    def value(self) -> float:
        """The number."""
        ...

    @property
    def null_high(self) -> float | None:
        """Upper end of the band."""
        ...


def circuit_evidence(start: Mapping[str, Row], now: Mapping[str, Row]) -> CircuitEvidence:
    """The evidence in the rows of one task.

    Args:
        start: metric name to its row at step 0. ``circuit/effect_ratio`` is there only where step 0 has an effect.
        now: the same at step t.
    """

    def value(rows: Mapping[str, Row], name: str) -> float | None:
        return rows[f"circuit/{name}"].value if f"circuit/{name}" in rows else None

    def high(rows: Mapping[str, Row]) -> float | None:
        return rows["circuit/faithfulness_index"].null_high if "circuit/faithfulness_index" in rows else None

    def effect(rows: Mapping[str, Row]) -> float:
        return (value(rows, "metric") or 0.0) - (value(rows, "metric_corrupt") or 0.0)

    return CircuitEvidence(
        start_effect="circuit/effect_ratio" in start,
        f_index_start=value(start, "faithfulness_index"),
        random_high_start=high(start),
        effect_ratio=value(now, "effect_ratio"),
        f_index=value(now, "faithfulness_index"),
        f_matched=value(now, "faithfulness_matched"),
        f_own=value(now, "faithfulness_own"),
        f_control=value(now, "faithfulness_control"),
        random_high=high(now),
        flipped=effect(start) * effect(now) < 0,
    )


def circuit_verdict(evidence: CircuitEvidence) -> Verdict:
    """Judge one task's mechanism at one step (``docs/metrics.md``, Verdicts about a mechanism).

    F is high from 0.8 of F_index(0) on, and above the band of random circuits. Questions are asked in order: is the
    effect still there, is the step-0 circuit high by index, is it after matching, is the circuit extracted now? A
    number that the order needs and does not have makes the verdict ``undetermined``.

    Raises:
        MeasurementError: a number that is NaN or infinite.

    >>> evidence = CircuitEvidence(True, 0.9, 0.1, 1.1, 0.2, 0.85, 0.9, 0.05, 0.15)
    >>> circuit_verdict(evidence).word
    'relocated'
    >>> circuit_verdict(evidence).why
    'The step-0 circuit carries 0.20 of the effect by index, but 0.85 once its nodes are matched by what they output \
(high from 0.72 on).'
    """
    _check(evidence)
    found = _of_effect(evidence) or _of_start(evidence) or _of_circuits(evidence)
    sign = " The effect has the opposite sign of step 0's." if evidence.flipped and found[0] not in _NO_SIGN else ""
    return Verdict(found[0], found[1] + sign, found[0] in ALARMS)


def _of_effect(e: CircuitEvidence) -> tuple[Word, str] | None:
    if not e.start_effect:
        return "undetermined", "At step 0 corrupting every edge changes the metric by no more than chance."
    if e.effect_ratio is None:
        return "undetermined", "The effect of corrupting every edge was not measured."
    if e.effect_ratio < LOST_BELOW:
        return "lost", (
            f"Corrupting every edge changes the metric by {e.effect_ratio:.2f} of what it did at step 0 "
            f"(lost below {LOST_BELOW})."
        )
    return None


def _of_start(e: CircuitEvidence) -> tuple[Word, str] | None:
    if e.f_index_start is None:
        return "undetermined", "The faithfulness of the step-0 circuit at step 0 was not measured."
    if e.random_high_start is None:
        return "undetermined", f"At step 0 there are {_NO_BAND}."
    if e.f_index_start <= max(e.random_high_start, 0.0):
        return "undetermined", (
            f"No faithful circuit was found at step 0: it carries {e.f_index_start:.2f} of the effect, "
            f"random ones up to {e.random_high_start:.2f}."
        )
    return None


def _of_circuits(e: CircuitEvidence) -> tuple[Word, str]:
    """The words that compare circuits; F_index(0) is there and positive."""
    if e.f_index is None:
        return "undetermined", (
            "Corrupting every edge changes the metric by no more than chance now (the interval covers 0), or the "
            "faithfulness of the step-0 circuit was not measured."
        )
    if e.random_high is None:
        return "undetermined", f"Now there are {_NO_BAND}."
    least, random_high = HIGH_FROM * (e.f_index_start or 0.0), e.random_high

    def high(f: float) -> bool:
        return f >= least and f > random_high

    limit = f"high from {least:.2f} on" if least > random_high else f"high above the random circuits' {random_high:.2f}"
    if high(e.f_index):
        control = ""
        if e.f_control is not None and high(e.f_control):
            control = f"; so does the control task's, with {e.f_control:.2f}: the circuit is not specific to the task"
        return "same", f"The step-0 circuit still carries {e.f_index:.2f} of the effect ({limit}){control}."
    if e.f_matched is None:
        return "undetermined", _unknown(e.f_index, limit, "after matching its nodes")
    if high(e.f_matched):
        return "relocated", (
            f"The step-0 circuit carries {e.f_index:.2f} of the effect by index, but {e.f_matched:.2f} once its nodes "
            f"are matched by what they output ({limit})."
        )
    if e.f_own is None:
        return "undetermined", _unknown(max(e.f_index, e.f_matched), limit, "of the circuit extracted now")
    both = f"{e.f_index:.2f} of the effect by index and {e.f_matched:.2f} after matching"
    if high(e.f_own):
        return "different", f"The step-0 circuit carries {both}, the one extracted now {e.f_own:.2f} ({limit})."
    return "diffuse", (
        f"No circuit of this size carries the effect: the step-0 one {both}, the one extracted now {e.f_own:.2f} "
        f"({limit})."
    )


def _unknown(found: float, limit: str, what: str) -> str:
    return f"The step-0 circuit carries {found:.2f} of the effect ({limit}), but the faithfulness {what} is missing."


def _check(evidence: CircuitEvidence) -> None:
    for field in fields(evidence):
        value = getattr(evidence, field.name)
        if value is not None and not math.isfinite(value):
            raise MeasurementError(f"circuit evidence: {field.name}: expected a finite number, found {value}")
