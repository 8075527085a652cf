"""Faithfulness of circuits over steps and the parts of a direction's drift (plotly, extra ``report``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from interp_rlhf.report.circuits import FAITHFULNESS, Attribution, Mechanism, Part, signed
from interp_rlhf.report.figures import (
    BAND,
    COLOURS,
    INK,
    Panel,
    bounds,
    label,
    line_style,
    line_trace,
    mark_resumes,
    name_axis,
    new_figure,
    ribbon,
)

if TYPE_CHECKING:
    import pandas as pd

#: Bars of an attribution.
MOST_PARTS = 12


def faithfulness_panel(table: pd.DataFrame, mechanism: Mechanism) -> Panel | None:
    """Faithfulness of one task's circuits against step, with the band of random circuits; ``None`` without any."""
    rows = table[(table["readout"] == mechanism.task) & table["metric"].isin(FAITHFULNESS)].sort_values("step")
    if not len(rows):
        return None
    figure = new_figure("share of the effect (F)", height=280)
    banded = rows[(rows["metric"] == FAITHFULNESS[0]) & rows["null_low"].notna() & rows["null_high"].notna()]
    if len(banded):
        figure.add_trace(
            ribbon(banded, "null_low", "null_high", BAND, "#8a919c") | {"name": "random circuits", "showlegend": True}
        )
    titles = ("step-0 circuit, by index", "after matching", "extracted now", "control task's")
    for place, (metric, title) in enumerate(zip(FAITHFULNESS, titles, strict=True)):
        here = rows[rows["metric"] == metric]
        if len(here):
            hover = {
                "customdata": bounds(here),
                "hovertemplate": f"{title}, step %{{x}}: %{{y:.3f}}%{{customdata}}<extra></extra>",
            }
            style = line_style(place if place < 3 else len(COLOURS) - 1)
            figure.add_trace(line_trace(here, style, name=title, **hover))
    if mechanism.high_from is not None:
        figure.add_hline(mechanism.high_from, line={"color": INK, "width": 1, "dash": "dot"}, opacity=0.6)
    mark_resumes(figure, table)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.3, "x": 0, "font": {"size": 11}})
    return Panel("Faithfulness over training", figure)


def attribution_panel(attribution: Attribution) -> Panel:
    """A drift by components: bars of what activations and weights bring, a diamond with interval for their sum."""
    shown = attribution.parts[:MOST_PARTS]
    rest = attribution.rest + sum(part.change for part in attribution.parts[MOST_PARTS:])
    parts = [*shown]
    if abs(rest) > 1e-9 * max((abs(part.change) for part in shown), default=0.0):
        parts.append(Part("everything else", rest, None, None, None, None))
    parts.reverse()  # the first at the top
    split = [(y, p) for y, p in enumerate(parts) if p.activation is not None and p.weight is not None]
    whole = [(y, p) for y, p in enumerate(parts) if p.activation is None or p.weight is None]
    figure = new_figure("", height=110 + 26 * max(len(parts), 2))
    for title, values, colour, shape in (
        ("through activations", [(y, p.name, p.activation) for y, p in split], COLOURS[0], ""),
        ("through weights", [(y, p.name, p.weight) for y, p in split], COLOURS[4], "/"),
        ("not split", [(y, p.name, p.change) for y, p in whole], "#c9ced6", ""),
    ):
        if values:
            figure.add_trace(_bars(title, values, colour, shape))
    if shown:
        figure.add_trace(_totals([(y, p) for y, p in enumerate(parts) if p in shown]))
    figure.update_xaxes(title="part of the drift (SD of step 0)", zeroline=True, zerolinecolor=INK)
    name_axis(figure, [part.name for part in parts])
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "font": {"size": 11}}
    figure.update_layout(showlegend=True, barmode="relative", bargap=0.35, legend=legend)
    total = signed(attribution.total)
    return Panel(f"{attribution.readout}: {total} SD at {attribution.hookpoint}, step {attribution.step}", figure)


def _bars(title: str, values: Sequence[tuple[int, str, float | None]], colour: str, shape: str) -> dict[str, Any]:
    pattern = {"shape": shape, "fillmode": "overlay", "fgcolor": "#ffffff", "size": 6, "solidity": 0.3}
    return {
        "type": "bar", "orientation": "h", "name": title, "y": [y for y, _, _ in values],
        "x": [x for _, _, x in values], "customdata": [label(name) for _, name, _ in values],
        "marker": {"color": colour, "pattern": pattern},
        "hovertemplate": f"%{{customdata}} {title}: %{{x:+.3g}} SD<extra></extra>",
    }  # fmt: skip


def _totals(parts: Sequence[tuple[int, Part]]) -> dict[str, Any]:
    high = [0.0 if p.ci_high is None else max(p.ci_high - p.change, 0.0) for _, p in parts]
    low = [0.0 if p.ci_low is None else max(p.change - p.ci_low, 0.0) for _, p in parts]
    return {
        "type": "scatter", "mode": "markers", "name": "total, with interval", "x": [p.change for _, p in parts],
        "y": [y for y, _ in parts],
        "marker": {"symbol": "diamond", "size": 8, "color": "#ffffff", "line": {"color": INK, "width": 1.5}},
        "error_x": {"type": "data", "symmetric": False, "array": high, "arrayminus": low, "thickness": 1.5, "width": 4,
                    "color": INK},
        "customdata": [label(p.name) for _, p in parts],
        "hovertemplate": "%{customdata}: %{x:+.3g} SD<extra></extra>",
    }  # fmt: skip
