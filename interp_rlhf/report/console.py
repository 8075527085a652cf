"""The console summary at the end of training: a :class:`Summary` in plain language."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from interp_rlhf.report.circuits import Mechanism
from interp_rlhf.report.tables import NotMeasured, Summary
from interp_rlhf.report.verdicts import VERDICTS, Finding, Verdict


def render_text(summary: Summary, *, limit: int = 6) -> str:
    """The console summary at the end of training: plain language, about thirty lines at most.

    Args:
        limit: lines per section; the rest is counted.
    """
    if summary.step is None:
        return "\n".join(["interp_rlhf: nothing was measured.", *_missing_lines(summary, limit)])
    percent = f"{100 * summary.confidence:g} %"
    lines = [
        f"interp_rlhf: {summary.steps} measurements, the last at step {summary.step}.",
        f"Drift: standard deviations (SD) of step 0, {percent} intervals, at the hookpoint where it is largest.",
    ]
    for verdict in VERDICTS:
        findings = [f for f in summary.findings if f.verdict == verdict]
        if findings or verdict in ("moved", "not detected"):
            lines += _section(_title(verdict, summary), findings, limit)
    for title, rows in (
        ("Representation moved, no change of behaviour detected", summary.moved_without_behaviour),
        ("Behaviour changed, no drift detected", summary.behaviour_without_moved),
    ):
        if rows:
            more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
            lines.append(f"{title}: {', '.join(f.readout for f in rows[:limit])}{more}.")
    lines += _mechanism_lines(summary, limit)
    lines += _missing_lines(summary, limit)
    lines += _control_lines(summary, limit)
    lines += _representation_lines(summary)
    if summary.cost is not None:
        lines.append(f"Measuring took {100 * summary.cost.value:.1f} % of the time.")
    lines.append("After almost any training most directions move; only specific ones moved more than comparable ones.")
    return "\n".join([*lines, summary.controls.caveat])


def _title(verdict: Verdict, summary: Summary) -> str:
    delta = f"±{summary.tolerance:g} SD"
    return {
        "attributable": "Attributable to the preferences (specific, and further than in the control runs)",
        "specific": f"Specific (moved beyond {delta}, and further than everything it was compared with)",
        "moved": f"Moved beyond {delta} on these texts, but not specific",
        "not detected": "Not detected",
    }[verdict]


def _section(title: str, findings: Sequence[Finding], limit: int) -> list[str]:
    if not findings:
        return [f"{title}: none."]
    names = max(len(finding.readout) for finding in findings[:limit])
    where = max(len(finding.hookpoint) for finding in findings[:limit])
    lines = [f"{title}:", *(_finding_line(finding, min(names, 28), where) for finding in findings[:limit])]
    return lines + ([f"    … and {len(findings) - limit} more"] if len(findings) > limit else [])


def _finding_line(finding: Finding, names: int, where: int) -> str:
    low, high = finding.interval
    number = f"{finding.value:+.2f} SD [{low:+.2f}, {high:+.2f}]"
    text = f"  {finding.readout:<{names}}  {number}  {finding.hookpoint:<{where}}{_because(finding)}"
    if finding.behaviour is not None:
        changed = {True: "changed", False: "no change detected", None: "no interval"}[finding.behaviour_changed]
        text += f"  behaviour {finding.behaviour.value:+.2f} nats, {changed}"
    return text.rstrip()


def _because(finding: Finding) -> str:
    """Why the verdict is no stronger, or what carries it."""
    check = finding.control
    if finding.verdict == "not detected":
        floor = "no drift: inside the numeric floor; " if finding.within_floor else ""
        return f"  ({floor}smallest detectable {finding.detectable:.2f})"
    if finding.verdict == "moved":
        few = len(finding.not_beaten) < len(finding.nulls)
        like = f"like {' and '.join(finding.not_beaten) if few else 'everything it was compared with'}"
        return f"  ({like if finding.not_beaten else 'nothing to compare it with'})"
    if check is None:
        return ""
    return f"  (p = {check.rank.p:.2g} against {_runs(check.rank.k)}, {check.family.p:.2g} over all concepts)"


def _mechanism_lines(summary: Summary, limit: int) -> list[str]:
    """One line per task, alarms first."""
    found = summary.mechanisms
    if not found:
        return []
    lines = [_mechanism_line(mechanism, summary.step) for mechanism in found[:limit]]
    more = [f"  … and {len(found) - limit} more"] if len(found) > limit else []
    return ["Mechanisms behind tasks, against the start:", *lines, *more]


def _mechanism_line(mechanism: Mechanism, step: int | None) -> str:
    word = f"{'ALARM: ' if mechanism.alarm else ''}{mechanism.word}. " if mechanism.word else ""
    when = "" if mechanism.step == step else f" (step {mechanism.step})"
    return f"  {mechanism.task}{when}: {word}{mechanism.why} {mechanism.against_controls}".rstrip()


def _runs(k: int) -> str:
    return f"{k} control run{'' if k == 1 else 's'}"


def _control_lines(summary: Summary, limit: int) -> list[str]:
    left_out = summary.controls.left_out
    if not left_out:
        return []
    lines = ["Control runs left out:", *(f"  {name}: {reason}" for name, reason in left_out[:limit])]
    return lines + ([f"  … and {len(left_out) - limit} more"] if len(left_out) > limit else [])


def _missing_lines(summary: Summary, limit: int) -> list[str]:
    """One line per concept, with the reason at the first of its hookpoints; beyond the limit names only."""
    if not summary.not_measured:
        return ["Not measured: nothing was left out."]
    groups: dict[tuple[str, str], list[NotMeasured]] = defaultdict(list)
    for item in summary.not_measured:
        groups[item.what, "" if item.hookpoint else item.reason].append(item)
    found = list(groups.values())
    lines = ["Not measured:", *(_missing_line(group) for group in found[:limit])]
    rest = sorted({group[0].what or "all" for group in found[limit:]})
    return lines + ([f"  … and {', '.join(rest)}"] if rest else [])


def _missing_line(group: Sequence[NotMeasured]) -> str:
    first = group[0]
    place = f" at {first.hookpoint}" if first.hookpoint else ""
    more = f" (and at {len(group) - 1} more)" if len(group) > 1 and first.hookpoint else ""
    return f"  {first.what or 'all'}{place}: {first.reason}{more}"


def _representation_lines(summary: Summary) -> list[str]:
    lines = []
    for line in summary.representation[-4:]:
        numbers = ", ".join(f"{row.metric.split('/')[1].replace('_', ' ')} {row.value:.3f}" for row in line.rows)
        lines.append(f"Representation at {line.hookpoint}: {numbers}.")
    return lines
