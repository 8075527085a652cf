"""Was it the preferences? The rank of a run among control runs, which trained on the same data without them.

Numbers in, numbers out: neither torch nor NumPy is needed, so that a report can rank rows it read from a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from interp_rlhf.errors import MeasurementError


@dataclass(frozen=True, slots=True)
class ControlRank:
    """Where one value lies among the same readout's values in k control runs, by size (signs are ignored).

    Attributes:
        k: control runs.
        p: ``(1 + #{|control| ≥ |value|}) / (k + 1)``, never 0.
        smallest: ``1/(k + 1)``, the least p that k control runs can give.
        needed: control runs from which on p can be ``1 − confidence`` or less (19 for 0.95).
        possible: whether k is that many.
        low, high: where ``possible``, the band ``±m`` outside which p is ``1 − confidence`` or less; with fewer
            control runs ``m`` is the largest of them, and being outside proves nothing at that confidence.
    """

    k: int
    p: float
    smallest: float
    needed: int
    possible: bool
    low: float
    high: float


def control_rank(value: float, controls: Sequence[float], *, confidence: float = 0.95) -> ControlRank:
    """Rank of ``value`` among control runs; exact if run and controls are exchangeable (Phipson & Smyth 2010).

    Args:
        value: the run's number, for example a mean D in SD.
        controls: the same number in each control run, same unit.
        confidence: in (0, 1).

    Raises:
        MeasurementError: no control run, or a number that is NaN or infinite.

    >>> found = control_rank(-3.0, [1.0, -2.0, 0.5])
    >>> found.p, found.needed, found.possible, found.high
    (0.25, 19, False, 2.0)
    """
    k = len(controls)
    if k == 0:
        raise MeasurementError("control runs: expected at least 1, found none")
    bad = sum(not math.isfinite(number) for number in (value, *controls))
    if bad:
        raise MeasurementError(f"control runs: expected finite numbers, found {bad} of {k + 1} NaN or infinite")
    sizes = sorted(abs(control) for control in controls)
    place = rank_place(k, confidence)
    half = float(sizes[-1 if place is None else place - 1])
    p = (1 + sum(size >= abs(value) for size in sizes)) / (k + 1)
    return ControlRank(k, p, 1 / (k + 1), runs_needed(confidence), place is not None, -half, half)


def family_rank(
    values: Mapping[str, float], controls: Sequence[Mapping[str, float]], *, confidence: float = 0.95
) -> dict[str, ControlRank]:
    """Rank of each readout's value among the largest ``|value|`` over all readouts of each control run.

    The chance that any readout reaches ``p ≤ α`` is at most α where no readout was moved by the preferences
    (single-step maxT, Westfall & Young 1993). The readouts have to share a unit (SD).

    Args:
        values: readout to number of the run.
        controls: the same of each control run.

    Raises:
        MeasurementError: as :func:`control_rank`, no readout, or a control run with other readouts.

    >>> found = family_rank({"a": 3.0, "b": 1.0}, [{"a": 0.1, "b": -2.0}, {"a": 0.2, "b": 0.5}])
    >>> {name: round(rank.p, 3) for name, rank in found.items()}
    {'a': 0.333, 'b': 0.667}
    """
    if not values:
        raise MeasurementError("control runs: expected readouts to rank, found none")
    for number, control in enumerate(controls, 1):
        other = sorted(values.keys() ^ control.keys())
        if other:
            raise MeasurementError(f"control run {number}: expected the run's own readouts, differs in {other[0]!r}")
    largest = [_largest(control) for control in controls]
    return {name: control_rank(value, largest, confidence=confidence) for name, value in values.items()}


def runs_needed(confidence: float) -> int:
    """The least k at which ``1/(k + 1) ≤ 1 − confidence``.

    >>> [runs_needed(confidence) for confidence in (0.9, 0.95, 0.99)]
    [9, 19, 99]
    """
    return math.ceil(round(confidence / (1 - confidence), 9))


def rank_place(k: int, confidence: float) -> int | None:
    """The place, from 1, of the size that a value has to exceed for a rank p of ``1 − confidence`` or less.

    Args:
        k: sizes that the value is ranked among, sorted upwards.
        confidence: in (0, 1).

    Returns:
        ``⌈confidence·(k + 1)⌉``; ``None`` where k is too small for any value to have such a p.

    >>> rank_place(19, 0.95), rank_place(18, 0.95), rank_place(199, 0.95)
    (19, None, 190)
    """
    place = math.ceil(round(confidence * (k + 1), 9))
    return place if place <= k else None


def _largest(control: Mapping[str, float]) -> float:
    """Largest size of a control run's readouts; NaN where one is NaN, which ``max`` alone would hide."""
    return math.nan if any(math.isnan(value) for value in control.values()) else max(map(abs, control.values()))
