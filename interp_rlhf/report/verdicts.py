"""The four verdicts about a concept: not detected, moved, specific, attributable (``docs/metrics.md``, Verdicts)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from interp_rlhf.drift.control_runs import ControlRank, control_rank, family_rank
from interp_rlhf.measurement import Measurement
from interp_rlhf.report.controls import ControlTable, statistics
from interp_rlhf.report.rows import DRIFT, band, beyond, direction_band, natural, number, outside_band

Verdict = Literal["attributable", "specific", "moved", "not detected"]
#: From the strongest claim to the weakest; the order in which concepts are shown.
VERDICTS: tuple[Verdict, ...] = ("attributable", "specific", "moved", "not detected")

#: Metrics whose bands a specific drift lies outside of, and the words for what they are bands of.
NULLS: Mapping[str, str] = {
    DRIFT: "comparable directions",
    "specificity/directions_without_top": "directions without the top component",
    "specificity/concept_bank": "unrelated concepts",
}


@dataclass(frozen=True, slots=True)
class NullCheck:
    """One drift beside one null.

    Attributes:
        row: the row with the band; its value is the drift.
        beaten: the drift lies outside the band; without a band, that p says so. ``None`` where the null is too small
            for either, and does not count.
    """

    row: Measurement
    beaten: bool | None

    @property
    def name(self) -> str:
        """What the drift is compared with, in words."""
        return NULLS[self.row.metric]


@dataclass(frozen=True, slots=True)
class ControlCheck:
    """A concept's largest |drift| over its hookpoints beside the same of every control run.

    Attributes:
        statistic: of the run itself (SD).
        controls: of each control run (SD).
        rank: its rank among them.
        family: its rank among the largest of each control run over all concepts.
    """

    statistic: float
    controls: tuple[float, ...]
    rank: ControlRank
    family: ControlRank


@dataclass(frozen=True, slots=True)
class Finding:
    """One concept at the last step.

    Attributes:
        drift: the ``concept/drift`` row (SD) with the largest absolute value; for a concept that moved, the largest
            among the hookpoints where it moved. It is a maximum over ``read`` hookpoints, not a draw at random.
        read: hookpoints with a drift row at the last step.
        moved_at: hookpoints where the interval lies entirely beyond the tolerance, outside the numeric floor.
        outside_at: hookpoints where it also lies outside every band that it has there.
        nulls: the nulls at ``drift.hookpoint``.
        detectable: smallest absolute drift (SD) that would have been called moved at ``drift.hookpoint``:
            tolerance + half the width of the interval.
        behaviour: the ``concept/behaviour_change`` row (nats), ``None`` where behaviour was not read.
        within_floor: the shown drift lies inside the numeric floor of its hookpoint, so it is no drift.
        control: the comparison with control runs, ``None`` where there are none.
        alpha: 1 − confidence.
    """

    drift: Measurement
    read: int
    moved_at: tuple[str, ...]
    outside_at: tuple[str, ...]
    nulls: tuple[NullCheck, ...]
    detectable: float
    behaviour: Measurement | None
    within_floor: bool
    control: ControlCheck | None
    alpha: float

    @property
    def verdict(self) -> Verdict:
        """The strongest of the four that the numbers allow."""
        if not self.moved_at:
            return "not detected"
        if not self.outside_at:
            return "moved"
        above = self.control is not None and self.control.rank.possible and self.control.rank.p <= self.alpha
        return "attributable" if above else "specific"

    @property
    def not_beaten(self) -> tuple[str, ...]:
        """Nulls at the shown hookpoint whose band the drift lies inside of, in words."""
        return tuple(check.name for check in self.nulls if check.beaten is False)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Nulls at the shown hookpoint that were too small to count, in words."""
        return tuple(check.name for check in self.nulls if check.beaten is None)

    @property
    def readout(self) -> str:
        """The concept's name."""
        return self.drift.readout

    @property
    def hookpoint(self) -> str:
        """Where the shown drift was read."""
        return self.drift.hookpoint

    @property
    def value(self) -> float:
        """The shown drift, in step-0 standard deviations."""
        return self.drift.value

    @property
    def interval(self) -> tuple[float, float]:
        """Confidence interval of ``value``; findings exist only for rows that have one."""
        return number(self.drift.ci_low), number(self.drift.ci_high)

    @property
    def band(self) -> tuple[float, float] | None:
        """Band of the drifts of comparable directions, ``None`` where no directions were drawn."""
        return direction_band(self.drift)

    @property
    def p(self) -> float | None:
        """Rank among the comparable directions as a p-value; it answers "more than comparable?", not "moved?"."""
        return self.drift.p

    @property
    def outside_band(self) -> bool | None:
        """Whether the shown drift lies outside the band of comparable directions; ``None`` without one."""
        return outside_band(self.drift)

    @property
    def behaviour_changed(self) -> bool | None:
        """Whether the interval of the behaviour change leaves out 0; ``None`` where there is no interval."""
        row = self.behaviour
        if row is None or row.ci_low is None or row.ci_high is None:
            return None
        return row.ci_low > 0 or row.ci_high < 0


def judge(
    rows: Sequence[Measurement],
    floors: Mapping[tuple[str, str], Measurement],
    *,
    tolerance: float,
    confidence: float,
    controls: Sequence[ControlTable] = (),
) -> list[Finding]:
    """A finding for every concept that has drift rows with an interval, strongest verdict first, then by |drift|.

    Args:
        rows: the current rows of the last step, of all metrics.
        floors: by concept and hookpoint the drift rows of the start, whose bands are the numeric floor.
        tolerance: δ (SD).
        confidence: coverage of intervals and bands; α is what is left.
        controls: control runs of the same last step.
    """
    drifts: dict[str, list[Measurement]] = defaultdict(list)
    for row in rows:
        if row.metric == DRIFT and row.ci_low is not None and row.ci_high is not None:
            drifts[row.readout].append(row)
    alpha = round(1 - confidence, 9)
    nulls: dict[tuple[str, str], list[NullCheck]] = defaultdict(list)
    for row in sorted((r for r in rows if r.metric in NULLS), key=lambda r: list(NULLS).index(r.metric)):
        if row.metric != DRIFT or row.null_kind == "directions":
            nulls[row.readout, row.hookpoint].append(NullCheck(row, beaten(row, alpha)))
    checks = _against_controls(drifts, controls, confidence)
    changes = {r.readout: r for r in rows if r.metric == "concept/behaviour_change"}
    findings = [
        _finding(group, nulls, floors, changes.get(name), checks.get(name), tolerance, alpha)
        for name, group in drifts.items()
    ]
    return sorted(findings, key=lambda f: (VERDICTS.index(f.verdict), -abs(f.value), f.readout))


def beaten(row: Measurement, alpha: float) -> bool | None:
    """Whether a row's value stands out from its null: outside the band, or p ≤ α where there is no band.

    ``None`` where there is no band and p is larger: a null has a band wherever a p ≤ α is possible, so this one was
    too small to be beaten.
    """
    limits = band(row)
    if limits is not None:
        return not limits[0] <= row.value <= limits[1]
    return True if row.p is not None and row.p <= alpha else None


def _against_controls(
    drifts: Mapping[str, Sequence[Measurement]], controls: Sequence[ControlTable], confidence: float
) -> dict[str, ControlCheck]:
    if not controls or not drifts:
        return {}
    found = statistics(controls, {name: [row.hookpoint for row in rows] for name, rows in drifts.items()})
    values = {name: max(abs(row.value) for row in rows) for name, rows in drifts.items()}
    by_run = [{name: found[name][i] for name in values} for i in range(len(controls))]
    families = family_rank(values, by_run, confidence=confidence)
    return {
        name: ControlCheck(value, found[name], control_rank(value, found[name], confidence=confidence), families[name])
        for name, value in values.items()
    }


def _finding(
    rows: Sequence[Measurement],
    nulls: Mapping[tuple[str, str], Sequence[NullCheck]],
    floors: Mapping[tuple[str, str], Measurement],
    behaviour: Measurement | None,
    control: ControlCheck | None,
    tolerance: float,
    alpha: float,
) -> Finding:
    def still(row: Measurement) -> bool:
        floor = floors.get((row.readout, row.hookpoint))
        return floor is not None and number(floor.null_low) <= row.value <= number(floor.null_high)

    def specific(row: Measurement) -> bool:
        counted = [check.beaten for check in nulls.get((row.readout, row.hookpoint), ()) if check.beaten is not None]
        return bool(counted) and all(counted)

    rows = sorted(rows, key=lambda r: natural(r.hookpoint))
    moved = [row for row in rows if beyond(row, tolerance) and not still(row)]
    shown = max(moved or rows, key=lambda r: abs(r.value))
    return Finding(
        drift=shown,
        read=len(rows),
        moved_at=tuple(row.hookpoint for row in moved),
        outside_at=tuple(row.hookpoint for row in moved if specific(row)),
        nulls=tuple(nulls.get((shown.readout, shown.hookpoint), ())),
        detectable=tolerance + (number(shown.ci_high) - number(shown.ci_low)) / 2,
        behaviour=behaviour,
        within_floor=still(shown),
        control=control,
        alpha=alpha,
    )
