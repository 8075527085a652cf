"""From timeline rows to words and to the few scalars that go to the trainer's log. Pure; pandas at use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp_rlhf.audit.timeline import live_events
from interp_rlhf.drift.control_runs import runs_needed
from interp_rlhf.measurement import Measurement
from interp_rlhf.report.circuits import Mechanism, mechanisms_of
from interp_rlhf.report.controls import Controls
from interp_rlhf.report.rows import COST, DRIFT, REPRESENTATION, current, measurements, natural
from interp_rlhf.report.verdicts import Finding, judge

if TYPE_CHECKING:
    import pandas as pd

#: What no report of a run without control runs may leave out.
CAVEAT = (
    "No control runs were compared (same data with chosen and rejected swapped at random), "
    "so nothing here says that these preferences are the reason for a drift."
)


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
class ControlSummary:
    """What control runs there were, in numbers.

    Attributes:
        k: control runs that were compared.
        kinds: what was scrambled in them.
        needed: how many make a p of 1 − confidence possible.
        alpha: 1 − confidence.
        left_out: name and reason of control runs that were not compared.
        notes: name and what else differs in control runs that were compared.
        itself: what the run is where it is a control run itself, else empty.
    """

    k: int
    kinds: tuple[str, ...]
    needed: int
    alpha: float
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...]
    itself: str

    @property
    def smallest(self) -> float:
        """The smallest p that k control runs can give, 1/(k + 1)."""
        return 1 / (self.k + 1)

    @property
    def possible(self) -> bool:
        """Whether a concept can be called attributable at all."""
        return self.k >= self.needed

    @property
    def decides(self) -> bool:
        """Whether there is an answer to "because of the preferences?": enough control runs of a run that is none."""
        return self.possible and not self.itself

    @property
    def caveat(self) -> str:
        """One or two sentences on what this run can say about the preferences."""
        if self.itself:
            return f"This is {self.itself}. Nothing in it can be because of the preferences."
        if not self.k:
            return CAVEAT
        runs = f"{self.k} control run{'' if self.k == 1 else 's'}"
        if not self.possible:
            return (
                f"With {runs} ({', '.join(self.kinds)}) the smallest possible p is {self.smallest:.2g}; {self.needed} "
                f"are needed for {self.alpha:g}, so nothing here says that these preferences are the "
                "reason for a drift."
            )
        return (
            f"{runs} ({', '.join(self.kinds)}): smallest possible p {self.smallest:.2g}. What is called attributable "
            "is specific and drifted further than with scrambled preferences; nothing else is put down to preferences."
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run's timeline says at its last step.

    Attributes:
        step: the last measured step, ``None`` where nothing was measured.
        steps: number of measured steps, step 0 included.
        tolerance: δ in step-0 standard deviations.
        confidence: coverage of the intervals.
        moved, not_detected: findings; the strongest verdict first, then by absolute drift.
        not_measured: what has no number, and why.
        moved_without_behaviour: moved findings whose behaviour interval holds 0.
        behaviour_without_moved: not-detected findings whose behaviour interval leaves out 0.
        representation: one line per hookpoint.
        cost: the last cost row, ``None`` where cost was not recorded.
        controls: the control runs that it was compared with.
        mechanisms: one per task with circuits, alarms first.
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
    controls: ControlSummary
    mechanisms: tuple[Mechanism, ...]

    def __str__(self) -> str:
        """The console summary, see :func:`interp_rlhf.report.console.render_text`."""
        from interp_rlhf.report.console import render_text

        return render_text(self)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every concept with a drift and an interval, the strongest verdict first."""
        return self.moved + self.not_detected

    @property
    def specific(self) -> tuple[Finding, ...]:
        """Moved findings outside every band at some hookpoint where they moved, attributable ones among them."""
        return tuple(finding for finding in self.moved if finding.outside_at)

    @property
    def attributable(self) -> tuple[Finding, ...]:
        """Specific findings that drifted further than in the control runs."""
        return tuple(finding for finding in self.moved if finding.verdict == "attributable")


def summarise(
    timeline: pd.DataFrame,
    events: Sequence[Mapping[str, Any]],
    *,
    tolerance: float,
    confidence: float,
    controls: Controls | None = None,
) -> Summary:
    """Give every concept its verdict, or say why it has none (definitions: ``docs/metrics.md``).

    Args:
        timeline: Measurement columns and ``superseded``.
        events: the run's events; ``refused`` and ``failure`` become reasons, unless a later start left them behind.
        tolerance: δ in step-0 standard deviations.
        confidence: coverage of the timeline's intervals and bands.
        controls: what :func:`interp_rlhf.report.controls.find_controls` found; a run that is a control run itself is
            compared with none.
    """
    controls = controls or Controls()
    table = current(timeline)
    rows = measurements(table[(table["step"] == table["step"].max()) | (table["metric"] == COST)])
    step = int(table["step"].max()) if len(table) else None
    last = [r for r in rows if r.step == step]
    findings, missing = _concepts(table, last, step, tolerance, confidence, controls)
    costs = [r for r in rows if r.metric == COST]
    moved = tuple(f for f in findings if f.moved_at)
    not_detected = tuple(f for f in findings if not f.moved_at)
    return Summary(
        step=step,
        steps=int(table["step"].nunique()),
        tolerance=tolerance,
        confidence=confidence,
        moved=moved,
        not_detected=not_detected,
        not_measured=tuple(missing + _from_events(events)),
        moved_without_behaviour=tuple(f for f in moved if f.behaviour_changed is False),
        behaviour_without_moved=tuple(f for f in not_detected if f.behaviour_changed is True),
        representation=_representation(last),
        cost=max(costs, key=lambda r: r.step) if costs else None,
        controls=_control_summary(controls, confidence),
        mechanisms=mechanisms_of(table, () if controls.itself else controls.used),
    )


def _control_summary(controls: Controls, confidence: float) -> ControlSummary:
    used = () if controls.itself else controls.used
    return ControlSummary(
        k=len(used),
        kinds=tuple(sorted({control.kind for control in used})),
        needed=runs_needed(confidence),
        alpha=round(1 - confidence, 9),
        left_out=controls.left_out,
        notes=tuple((control.name, note) for control in used for note in control.notes),
        itself=controls.itself,
    )


def _concepts(
    table: pd.DataFrame,
    rows: Sequence[Measurement],
    step: int | None,
    tolerance: float,
    confidence: float,
    controls: Controls,
) -> tuple[list[Finding], list[NotMeasured]]:
    start = table["step"].min()  # not 0 where a run that had not been measured was resumed
    rows = [r for r in rows if not (r.metric == DRIFT and step == start and r.null_kind == "numeric")]
    starts = measurements(table[(table["step"] == start) & (table["null_kind"] == "numeric")])
    floors = {(r.readout, r.hookpoint): r for r in starts if r.metric == DRIFT}
    used = () if controls.itself else controls.used
    findings = judge(rows, floors, tolerance=tolerance, confidence=confidence, controls=used)
    missing = [
        NotMeasured(r.readout, r.hookpoint, step, "the drift has no interval")
        for r in rows
        if r.metric == DRIFT and (r.ci_low is None or r.ci_high is None)
    ]
    have = {f.readout for f in findings} | {m.what for m in missing}
    return findings, missing + _no_longer_read(table, have, step)


def _no_longer_read(table: pd.DataFrame, have: set[str], step: int | None) -> list[NotMeasured]:
    last = table[table["metric"] == DRIFT].groupby("readout")["step"].max()
    reasons = {
        name: "only the starting point was measured" if at == step else f"last measured at step {at}"
        for name, at in last.items()
        if name not in have
    }
    return [NotMeasured(str(name), "", step, reason) for name, reason in sorted(reasons.items())]


def _from_events(events: Sequence[Mapping[str, Any]]) -> list[NotMeasured]:
    found: list[NotMeasured] = []
    for event in live_events([e for e in events if e["event"] in ("segment", "refused", "failure")]):
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


def headline_key(row: Measurement) -> str:
    """The log key of a row: ``interp/<metric>/<readout>@<hookpoint>``, parts that are empty left out."""
    readout = f"/{row.readout}" if row.readout else ""
    return f"interp/{row.metric}{readout}{f'@{row.hookpoint}' if row.hookpoint else ''}"


def headline(rows: Iterable[Measurement], limit: int) -> dict[str, float]:
    """The at most ``limit`` scalars of one measurement that go to the trainer's log.

    Cost keeps a place of its own. Then come, until the limit: concept drift and circuits, representation, behaviour,
    staleness of the probes, drift on sampled completions. Those with hookpoints are filled one hookpoint after the
    other from the middle of the list outwards, so that a limit shortens the list of hookpoints before the list of
    concepts. Which keys are chosen depends on the set of keys only, never on values or on row order.
    """
    chosen = [r for r in rows if (r.text == "fixed" and r.reader == "policy") or r.metric == "shift/total"]
    hookpoints = sorted({row.hookpoint for row in chosen if row.hookpoint}, key=natural)
    middle_out = sorted(range(len(hookpoints)), key=lambda i: (abs(i - len(hookpoints) // 2), i))
    rank = {hookpoints[i]: place for place, i in enumerate(middle_out)} | {"": -1}
    groups = {COST: 0, DRIFT: 1} | dict.fromkeys(REPRESENTATION, 2)
    groups |= {"circuit/effect_ratio": 1, "circuit/faithfulness_index": 1}
    groups |= {"concept/behaviour_change": 3, "concept/behaviour": 4, "probe/staleness": 5, "shift/total": 6}
    keyed = sorted(
        (groups[row.metric], rank[row.hookpoint], row.metric, row.readout, headline_key(row), row.value)
        for row in chosen
        if row.metric in groups
    )
    return dict(sorted((key, value) for *_, key, value in keyed[: max(limit, 0)]))
