"""Figures about control runs and about sampled completions (plotly, extra ``report``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from interp_rlhf.measurement import Measurement
from interp_rlhf.report.figures import BAND, COLOURS, INK, Panel, label, name_axis, new_figure
from interp_rlhf.report.grids import Grid, Line
from interp_rlhf.report.verdicts import ControlCheck, Finding

#: Grey of everything that a control run says.
CONTROL = "#7a828e"
#: Colours of the quadrant's five shares, in the order of the columns.
SHARES = ("#009e73", "#e69f00", "#d55e00", "#aa4499", "#c9ced6")
_LEGEND = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}


def control_panel(findings: Sequence[Finding]) -> Panel | None:
    """Largest |drift| (SD) of each concept beside that of every control run, one strip per concept.

    The grey area is the band of control runs, drawn where they are enough for one. ``None`` without control runs.
    """
    compared = [(finding, finding.control) for finding in findings if finding.control is not None]
    if not compared:
        return None
    ranked = sorted(compared, key=lambda pair: (pair[1].statistic, pair[0].readout))
    figure = new_figure("", height=120 + 34 * max(len(ranked), 2))
    for place, (_, check) in enumerate(ranked):
        if check.rank.possible:
            figure.add_shape(type="rect", x0=0, x1=check.rank.high, y0=place - 0.42, y1=place + 0.42, fillcolor=BAND,
                             line={"width": 0}, layer="below")  # fmt: skip
    figure.add_trace(_control_points([check for _, check in ranked]))
    for above, name in ((True, "this run, attributable"), (False, "this run, not attributable")):
        chosen = [place for place, (f, _) in enumerate(ranked) if (f.verdict == "attributable") is above]
        if chosen:
            figure.add_trace(_own_points(ranked, chosen, above, name))
    figure.update_xaxes(title="largest |drift| over hookpoints (SD of step 0)", rangemode="tozero")
    name_axis(figure, [finding.readout for finding, _ in ranked])
    figure.update_layout(showlegend=True, legend=_LEGEND)
    return Panel("This run beside its control runs", figure)


def _control_points(checks: Sequence[ControlCheck]) -> dict[str, Any]:
    """Every control run's point, spread over the height of the strip in a fixed pattern."""
    points = [
        (value, round(place + 0.6 * ((i * 0.618) % 1 - 0.5), 4))
        for place, check in enumerate(checks)
        for i, value in enumerate(check.controls)
    ]
    return {
        "type": "scatter", "mode": "markers", "name": "control runs", "x": [x for x, _ in points],
        "y": [y for _, y in points], "hovertemplate": "control run: %{x:.3f} SD<extra></extra>",
        "marker": {"symbol": "circle-open", "size": 7, "color": CONTROL, "line": {"width": 1.2}},
    }  # fmt: skip


def _own_points(
    ranked: Sequence[tuple[Finding, ControlCheck]], chosen: Sequence[int], above: bool, name: str
) -> dict[str, Any]:
    found = [ranked[place] for place in chosen]
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": [c.statistic for _, c in found], "y": list(chosen),
        "marker": {"symbol": "diamond" if above else "diamond-open", "size": 13, "color": COLOURS[0],
                   "line": {"width": 2, "color": COLOURS[0]}},
        "customdata": [[label(f.readout), f"{c.rank.p:.3g}", f"{c.family.p:.3g}"] for f, c in found],
        "hovertemplate": "%{customdata[0]}: %{x:.3f} SD<br>p = %{customdata[1]}, over all concepts %{customdata[2]}"
                         "<extra></extra>",
    }  # fmt: skip


def shift_panels(grid: Grid) -> list[Panel]:
    """Per hookpoint and concept the two parts of the shift stacked, and their sum with its interval."""
    panels = []
    for hookpoint in dict.fromkeys(line.hookpoint for line in grid.lines):
        lines = [line for line in reversed(grid.lines) if line.hookpoint == hookpoint]
        figure = new_figure("", height=130 + 34 * max(len(lines), 2))
        for metric, name, colour in (
            ("shift/text", "other text", COLOURS[4]),
            ("shift/representation", "other representation", COLOURS[0]),
        ):
            found = _column(grid, lines, metric)
            if found:
                figure.add_trace(_bars(found, name, colour, " SD"))
        totals = _column(grid, lines, "shift/total")
        if totals:
            figure.add_trace(_totals(totals))
        figure.update_xaxes(title="shift (SD of step 0)", zeroline=True, zerolinecolor=INK)
        name_axis(figure, [line.concept for line in lines])
        figure.update_layout(barmode="relative", bargap=0.45, showlegend=True, legend=_LEGEND)
        panels.append(Panel(hookpoint, figure))
    return panels


def quadrant_panel(grid: Grid) -> Panel | None:
    """Shares of the sampled completions, stacked to one, a bar per line of the table; ``None`` for an empty one."""
    if not grid:
        return None
    lines = list(reversed(grid.lines))
    figure = new_figure("", height=130 + 34 * max(len(lines), 2))
    for column, colour in zip(grid.columns, SHARES, strict=True):
        found = _column(grid, lines, column.metric)
        if found:
            figure.add_trace(_bars(found, column.title, colour, ""))
    figure.update_xaxes(title="share of completions", range=[0, 1])
    several = len({line.hookpoint for line in lines}) > 1
    name_axis(figure, [f"{line.concept} · {line.hookpoint}" if several else line.concept for line in lines])
    figure.update_layout(barmode="stack", bargap=0.4, showlegend=True, legend=_LEGEND | {"traceorder": "normal"})
    return Panel("What the sampled completions are", figure)


def _column(grid: Grid, lines: Sequence[Line], metric: str) -> list[tuple[int, Measurement]]:
    """The rows of a metric with the place of their line; lines that lack it are left out."""
    index = [column.metric for column in grid.columns].index(metric)
    cells = [(place, line.cells[index]) for place, line in enumerate(lines)]
    return [(place, row) for place, row in cells if row is not None]


def _bars(found: Sequence[tuple[int, Measurement]], name: str, colour: str, unit: str) -> dict[str, Any]:
    return {
        "type": "bar", "orientation": "h", "name": name, "x": [row.value for _, row in found],
        "y": [place for place, _ in found], "marker": {"color": colour},
        "hovertemplate": f"{name}: %{{x:.3f}}{unit}<extra></extra>",
    }  # fmt: skip


def _totals(found: Sequence[tuple[int, Measurement]]) -> dict[str, Any]:
    """Sums as diamonds; where one has no interval, none is drawn."""
    trace: dict[str, Any] = {
        "type": "scatter", "mode": "markers", "name": "total", "x": [row.value for _, row in found],
        "y": [place for place, _ in found], "hovertemplate": "total: %{x:.3f} SD<extra></extra>",
        "marker": {"symbol": "diamond", "size": 9, "color": "#ffffff", "line": {"width": 2, "color": INK}},
    }  # fmt: skip
    lows = [0.0 if row.ci_low is None else row.value - row.ci_low for _, row in found]
    highs = [0.0 if row.ci_high is None else row.ci_high - row.value for _, row in found]
    bars = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 4, "color": INK}
    return trace | {"error_x": bars | {"array": highs, "arrayminus": lows}}
