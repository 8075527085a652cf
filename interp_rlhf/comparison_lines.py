"""A comparison in words: what each moved, and where they differ on the same prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interp_rlhf.comparison import Comparison
    from interp_rlhf.report.tables import Finding


def comparison_lines(found: Comparison) -> Iterator[str]:
    """What ``interp-rlhf compare`` prints, a line each."""
    against = "each against its own step 0" if found.start is None else f"against step 0 = {found.start}"
    yield f"interp_rlhf: {len(found.timelines)} beside each other, {against}; drift in standard deviations (SD) of it;"
    yield "* = specific: outside the bands of comparable directions; ** = attributable: also beyond the control runs."
    for name, summary in found.summaries.items():
        yield f"{name} (step {summary.step}):" if summary.step is not None else f"{name}: nothing was measured"
        yield f"  {summary.controls.caveat}"
        for title, findings in (("moved", summary.moved), ("not detected", summary.not_detected)):
            yield f"  {title}: {'none' if not findings else ''}".rstrip()
            yield from (_finding(finding) for finding in findings)
        for mechanism in summary.mechanisms:
            said = f"{mechanism.word or 'not judged'}. {mechanism.why} {mechanism.against_controls}"
            yield f"  mechanism of {mechanism.task}: {said}".rstrip()
    if found.differences:
        yield "Differences on the same prompts (other - first), intervals that leave out 0 marked !:"
    for d in found.differences:
        mark, place = "!" if d.leaves_out_zero else " ", f"{d.readout} at {d.hookpoint}"
        yield f"  {mark} {d.other} - {d.first}: {d.value:+.2f} SD [{d.ci_low:+.2f}, {d.ci_high:+.2f}]  {place}"
    yield from (f"Not compared: {reason}" for reason in found.not_compared)
    if found.controls:
        yield f"Control runs beside: {', '.join(found.controls)}"
    yield "Nothing here says why they differ from each other."


def _finding(finding: Finding) -> str:
    low, high = finding.interval
    mark = {"attributable": "**", "specific": " *"}.get(finding.verdict, "  ")
    detectable = "" if finding.moved_at else f"  (smallest detectable {finding.detectable:.2f})"
    number = f"{finding.value:+.2f} SD [{low:+.2f}, {high:+.2f}]"
    return f"  {mark} {finding.readout}  {number}  {finding.hookpoint}{detectable}"
