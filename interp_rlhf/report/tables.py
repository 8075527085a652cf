"""From timeline rows to words and to the few scalars that go to the trainer's log. Pure; pandas at use."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from interp_rlhf.audit.timeline import live_events
from interp_rlhf.measurement import COLUMNS, Measurement

if TYPE_CHECKING:
    import pandas as pd

#: Representation metrics in the order they are shown.
REPRESENTATION: tuple[str, ...] = (
    "representation/cka",
    "representation/cosine",
    "representation/norm_ratio",
    "representation/effective_rank",
)
#: Share of the wall-clock time since the start of training that measuring took.
COST = "cost_fraction"

#: What no report of a single run may leave out.
CAVEAT = (
    "No control runs were compared (same data with chosen and rejected swapped at random), "
    "so nothing here says that these preferences are the reason for a drift."
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One concept at the last step.

    Attributes:
        drift: the ``concept/drift`` row (SD) with the largest absolute value; for a concept that moved, the largest
            among the hookpoints where it moved. It is a maximum over ``read`` hookpoints, not a draw at random.
        read: hookpoints with a drift row at the last step.
        moved_at: hookpoints where the interval lies entirely beyond the tolerance.
        outside_at: hookpoints where it also lies outside the band of comparable directions.
        detectable: smallest absolute drift (SD) that would have been called moved at ``drift.hookpoint``:
            tolerance + half the width of the interval.
        behaviour: the ``concept/behaviour_change`` row (nats), ``None`` where behaviour was not read.
        within_floor: the shown drift lies inside the numeric floor of its hookpoint, so it is no drift.
    """

    drift: Measurement
    read: int
    moved_at: tuple[str, ...]
    outside_at: tuple[str, ...]
    detectable: float
    behaviour: Measurement | None
    within_floor: bool

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
        return _number(self.drift.ci_low), _number(self.drift.ci_high)

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
        """Whether the shown drift lies outside the band; ``None`` where there is no band."""
        return outside_band(self.drift)

    @property
    def behaviour_changed(self) -> bool | None:
        """Whether the interval of the behaviour change leaves out 0; ``None`` where there is no interval."""
        row = self.behaviour
        if row is None or row.ci_low is None or row.ci_high is None:
            return None
        return row.ci_low > 0 or row.ci_high < 0


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """Something that was asked for and has no number, with the reason in one line."""

    what: str
    hookpoint: str
    step: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class RepresentationLine:
    """The representation metrics of one hookpoint at the last step, in the order of ``REPRESENTATION``."""

    hookpoint: str
    rows: tuple[Measurement, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run's timeline says at its last step.

    Attributes:
        step: the last measured step, ``None`` where nothing was measured.
        steps: number of measured steps, step 0 included.
        tolerance: δ in step-0 standard deviations.
        confidence: coverage of the intervals.
        moved, not_detected: findings; those outside the band of comparable directions first, then by absolute drift.
        not_measured: what has no number, and why.
        moved_without_behaviour: moved findings whose behaviour interval holds 0.
        behaviour_without_moved: not-detected findings whose behaviour interval leaves out 0.
        representation: one line per hookpoint.
        cost: the last cost row, ``None`` where cost was not recorded.
    """

    step: int | None
    steps: int
    tolerance: float
    confidence: float
    moved: tuple[Finding, ...]
    not_detected: tuple[Finding, ...]
    not_measured: tuple[NotMeasured, ...]
    moved_without_behaviour: tuple[Finding, ...]
    behaviour_without_moved: tuple[Finding, ...]
    representation: tuple[RepresentationLine, ...]
    cost: Measurement | None

    def __str__(self) -> str:
        """The console summary, see :func:`interp_rlhf.report.console.render_text`."""
        from interp_rlhf.report.console import render_text

        return render_text(self)

    @property
    def specific(self) -> tuple[Finding, ...]:
        """Moved findings outside the band of comparable directions at some hookpoint where they moved."""
        return tuple(finding for finding in self.moved if finding.outside_at)


def summarise(
    timeline: pd.DataFrame, events: Sequence[Mapping[str, Any]], *, tolerance: float, confidence: float
) -> Summary:
    """Sort every concept into moved, not detected and not measured (definitions: ``docs/metrics.md``).

    Args:
        timeline: Measurement columns and ``superseded``.
        events: the run's events; ``refused`` and ``failure`` become reasons, unless a later start left them behind.
        tolerance: δ in step-0 standard deviations.
        confidence: coverage of the timeline's intervals, for the wording.
    """
    table = current(timeline)
    rows = measurements(table[(table["step"] == table["step"].max()) | (table["metric"] == COST)])
    step = int(table["step"].max()) if len(table) else None
    moved, not_detected, missing = _sort_concepts(table, [r for r in rows if r.step == step], step, tolerance)
    costs = [r for r in rows if r.metric == COST]
    return Summary(
        step=step,
        steps=int(table["step"].nunique()),
        tolerance=tolerance,
        confidence=confidence,
        moved=moved,
        not_detected=not_detected,
        not_measured=tuple(missing + _from_events(live_events(events))),
        moved_without_behaviour=tuple(f for f in moved if f.behaviour_changed is False),
        behaviour_without_moved=tuple(f for f in not_detected if f.behaviour_changed is True),
        representation=_representation([r for r in rows if r.step == step]),
        cost=max(costs, key=lambda r: r.step) if costs else None,
    )


def current(timeline: pd.DataFrame) -> pd.DataFrame:
    """The rows that count: not superseded by a resumed segment, the policy on fixed text."""
    keep = ~timeline["superseded"].astype(bool) & (timeline["text"] == "fixed") & (timeline["reader"] == "policy")
    return timeline[keep]


def measurements(table: pd.DataFrame) -> list[Measurement]:
    """Table rows as records, missing numbers as ``None``; the inverse of ``Measurement.as_row``."""
    optional = ("ci_low", "ci_high", "null_low", "null_high", "p")
    rows = cast("list[dict[str, Any]]", table[list(COLUMNS)].to_dict("records"))
    for row in rows:
        row.update({name: None for name in optional if math.isnan(_number(row[name]))})
    return [Measurement(**row) for row in rows]


def direction_band(row: Measurement) -> tuple[float, float] | None:
    """The band of comparable directions of a row, ``None`` where its band is of another kind or absent."""
    if row.null_kind != "directions" or row.null_low is None or row.null_high is None:
        return None
    return (row.null_low, row.null_high)


def outside_band(row: Measurement) -> bool | None:
    """Whether the value lies outside the band of comparable directions, ``None`` without such a band."""
    band = direction_band(row)
    return None if band is None else not band[0] <= row.value <= band[1]


def beyond(row: Measurement, tolerance: float) -> bool:
    """Whether the whole interval lies beyond ±tolerance, on one side."""
    return (row.ci_low is not None and row.ci_low > tolerance) or (row.ci_high is not None and row.ci_high < -tolerance)


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name))


def headline_key(row: Measurement) -> str:
    """The log key of a row: ``interp/<metric>/<readout>@<hookpoint>``, parts that are empty left out."""
    readout = f"/{row.readout}" if row.readout else ""
    return f"interp/{row.metric}{readout}{f'@{row.hookpoint}' if row.hookpoint else ''}"


def headline(rows: Iterable[Measurement], limit: int) -> dict[str, float]:
    """The at most ``limit`` scalars of one measurement that go to the trainer's log.

    Cost keeps a place of its own. Then come, until the limit: concept drift, representation, behaviour. Drift and
    representation are filled one hookpoint after the other from the middle of the list outwards, so that a limit
    shortens the list of hookpoints before the list of concepts. Which keys are chosen depends on the set of keys
    only, never on values or on row order.
    """
    chosen = [row for row in rows if row.text == "fixed" and row.reader == "policy"]
    hookpoints = sorted({row.hookpoint for row in chosen if row.hookpoint}, key=natural)
    middle_out = sorted(range(len(hookpoints)), key=lambda i: (abs(i - len(hookpoints) // 2), i))
    rank = {hookpoints[i]: place for place, i in enumerate(middle_out)} | {"": -1}
    groups = {COST: 0, "concept/drift": 1} | dict.fromkeys(REPRESENTATION, 2)
    groups |= {"concept/behaviour_change": 3, "concept/behaviour": 4}
    keyed = sorted(
        (groups[row.metric], rank[row.hookpoint], row.metric, row.readout, headline_key(row), row.value)
        for row in chosen
        if row.metric in groups
    )
    return dict(sorted((key, value) for *_, key, value in keyed[: max(limit, 0)]))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _sort_concepts(
    table: pd.DataFrame, rows: Sequence[Measurement], step: int | None, tolerance: float
) -> tuple[tuple[Finding, ...], tuple[Finding, ...], list[NotMeasured]]:
    drifts: dict[str, list[Measurement]] = defaultdict(list)
    missing: list[NotMeasured] = []
    start = table["step"].min()  # not 0 where a run that had not been measured was resumed
    for row in (r for r in rows if r.metric == "concept/drift"):
        if step == start and row.null_kind == "numeric":
            continue
        if row.ci_low is None or row.ci_high is None:
            missing.append(NotMeasured(row.readout, row.hookpoint, step, "the drift has no interval"))
        else:
            drifts[row.readout].append(row)
    changes = {r.readout: r for r in rows if r.metric == "concept/behaviour_change"}
    starts = measurements(table[(table["step"] == start) & (table["null_kind"] == "numeric")])
    floors = {(r.readout, r.hookpoint): r for r in starts if r.metric == "concept/drift"}
    findings = [_finding(group, changes.get(name), floors, tolerance) for name, group in drifts.items()]
    order = sorted(findings, key=lambda f: (not f.outside_at, -abs(f.value), f.readout))
    missing += _no_longer_read(table, set(drifts) | {m.what for m in missing}, step)
    return tuple(f for f in order if f.moved_at), tuple(f for f in order if not f.moved_at), missing


def _finding(
    rows: Sequence[Measurement],
    behaviour: Measurement | None,
    floors: Mapping[tuple[str, str], Measurement],
    tolerance: float,
) -> Finding:
    def still(row: Measurement) -> bool:
        floor = floors.get((row.readout, row.hookpoint))
        return floor is not None and _number(floor.null_low) <= row.value <= _number(floor.null_high)

    rows = sorted(rows, key=lambda r: natural(r.hookpoint))
    moved = [row for row in rows if beyond(row, tolerance) and not still(row)]
    shown = max(moved or rows, key=lambda r: abs(r.value))
    return Finding(
        drift=shown,
        read=len(rows),
        moved_at=tuple(row.hookpoint for row in moved),
        outside_at=tuple(row.hookpoint for row in moved if outside_band(row)),
        detectable=tolerance + (_number(shown.ci_high) - _number(shown.ci_low)) / 2,
        behaviour=behaviour,
        within_floor=still(shown),
    )


def _no_longer_read(table: pd.DataFrame, have: set[str], step: int | None) -> list[NotMeasured]:
    last = table[table["metric"] == "concept/drift"].groupby("readout")["step"].max()
    reasons = {
        name: "only the starting point was measured" if at == step else f"last measured at step {at}"
        for name, at in last.items()
        if name not in have
    }
    return [NotMeasured(str(name), "", step, reason) for name, reason in sorted(reasons.items())]


def _from_events(events: Sequence[Mapping[str, Any]]) -> list[NotMeasured]:
    found: list[NotMeasured] = []
    for event in events:
        if event["event"] == "refused":
            found.append(NotMeasured(event["readout"], event.get("hookpoint") or "", None, event["reason"]))
        elif event["event"] == "failure":
            found.append(NotMeasured(event["what"], "", event["step"], event["reason"]))
    return list(dict.fromkeys(found))  # a resumed run refuses what was refused before


def _representation(rows: Sequence[Measurement]) -> tuple[RepresentationLine, ...]:
    by_hookpoint: dict[str, list[Measurement]] = defaultdict(list)
    for row in rows:
        if row.metric in REPRESENTATION:
            by_hookpoint[row.hookpoint].append(row)
    return tuple(
        RepresentationLine(name, tuple(sorted(by_hookpoint[name], key=lambda r: REPRESENTATION.index(r.metric))))
        for name in sorted(by_hookpoint, key=natural)
    )
