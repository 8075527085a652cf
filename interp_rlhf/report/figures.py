"""The report's figures (plotly, extra ``report``), drawn from the rows of a timeline that are not superseded.

Every hookpoint keeps its colour, marker and dash in all figures. Concept figures hold the traces of every concept,
marked with the concept's index in ``trace.meta``; the page shows one concept at a time. Names are escaped here,
because plotly reads a small HTML dialect in its labels.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from interp_rlhf.errors import InterpError
from interp_rlhf.report.rows import COST, REPRESENTATION, natural
from interp_rlhf.report.verdicts import Finding

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

#: Colour-blind-safe (Okabe and Ito 2008), without the yellow that vanishes on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9", "#555555")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
FONT = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"
INK, GRID, BAND = "#1c2330", "#e6e9ee", "rgba(110,118,130,0.16)"

#: Axis titles of the representation metrics.
REPRESENTATION_TITLES = {
    "representation/cka": "linear CKA with step 0",
    "representation/cosine": "cosine with step 0",
    "representation/norm_ratio": "norm / norm at step 0",
    "representation/effective_rank": "effective rank",
}


@dataclass(frozen=True)
class Panel:
    """One figure with the words around it.

    Attributes:
        title: plain text above the figure.
        figure: the plotly figure.
        concepts: indices of the concepts it has traces for; empty for figures that show no single concept.
        min_width: pixels below which the figure scrolls instead of shrinking; 0 shrinks freely.
    """

    title: str
    figure: go.Figure
    concepts: tuple[int, ...] = ()
    min_width: int = 0


def drift_panels(
    table: pd.DataFrame, concepts: Sequence[str], tolerance: float, controls: Sequence[pd.DataFrame] = ()
) -> list[Panel]:
    """Drift (SD) against step, one panel per hookpoint: line, interval, band of comparable directions, ±tolerance.

    Control runs, given by their current rows, are thin grey lines behind.
    """
    rows = table[table["metric"] == "concept/drift"]
    behind = _control_lines(controls)
    panels = []
    for index, hookpoint in enumerate(hookpoints_of(table)):
        here = rows[rows["hookpoint"] == hookpoint]
        if len(here):
            figure = new_figure("drift (SD of step 0)", height=250)
            figure.add_traces([behind[name, hookpoint] | {"meta": place, "visible": place == 0}
                               for place, name in enumerate(concepts) if (name, hookpoint) in behind])  # fmt: skip
            shown = _add_concepts(figure, here, concepts, index)
            mark_resumes(figure, table)
            for level in (-tolerance, tolerance):
                figure.add_hline(level, line={"color": INK, "width": 1, "dash": "dot"}, opacity=0.5)
            panels.append(Panel(hookpoint, figure, shown))
    return panels


def behaviour_panels(table: pd.DataFrame, concepts: Sequence[str]) -> list[Panel]:
    """Behaviour gap (nats) and its change since step 0 against step, one panel each."""
    panels = []
    for metric, title, axis in (
        ("concept/behaviour", "Behaviour: gap between positive and negative", "log-prob gap (nats)"),
        ("concept/behaviour_change", "Behaviour: change since step 0", "change of the gap (nats)"),
    ):
        rows = table[table["metric"] == metric]
        if len(rows):
            figure = new_figure(axis, height=250)
            shown = _add_concepts(figure, rows, concepts, len(COLOURS) - 1)
            mark_resumes(figure, table)
            panels.append(Panel(title, figure, shown))
    return panels


def representation_panels(table: pd.DataFrame) -> list[Panel]:
    """Each representation metric against step, one line per hookpoint."""
    panels = []
    for metric in REPRESENTATION:
        rows = table[table["metric"] == metric]
        if not len(rows):
            continue
        figure = new_figure(metric.split("/")[1].replace("_", " "), height=290)
        for index, hookpoint in enumerate(hookpoints_of(table)):
            here = rows[rows["hookpoint"] == hookpoint].sort_values("step")
            if len(here):
                figure.add_trace(line_trace(here, line_style(index), name=label(hookpoint)))
        mark_resumes(figure, table)
        figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.3, "x": 0, "font": {"size": 11}})
        panels.append(Panel(metric, figure))
    return panels


def cost_panel(table: pd.DataFrame) -> Panel | None:
    """Share of the training time spent measuring, in percent, against step; ``None`` without cost rows."""
    rows = table[table["metric"] == COST].sort_values("step")
    if not len(rows):
        return None
    figure = new_figure("time spent measuring (%)", height=220)
    figure.add_trace(line_trace(rows.assign(value=100 * rows["value"]), line_style(0), name="cost"))
    mark_resumes(figure, table)
    figure.update_yaxes(rangemode="tozero")
    return Panel("Cost", figure)


def ranking_panel(findings: Sequence[Finding], tolerance: float) -> Panel | None:
    """Concepts by absolute drift at the last step: bars from 0, intervals, comparison bands; ``None`` without any."""
    if not findings:
        return None
    ranked = sorted(findings, key=lambda f: (abs(f.value), f.readout))
    figure = new_figure("", height=130 + 30 * max(len(ranked), 2))
    for place, finding in enumerate(ranked):
        if finding.band is not None:
            low, high = finding.band
            figure.add_shape(
                type="rect", x0=low, x1=high, y0=place - 0.42, y1=place + 0.42, fillcolor=BAND, line={"width": 0},
                layer="below",
            )  # fmt: skip
    for outside, name in ((True, "outside the band"), (False, "inside the band"), (None, "no band")):
        chosen = [(place, f) for place, f in enumerate(ranked) if f.outside_band is outside]
        if chosen:
            figure.add_trace(_ranking_trace(chosen, outside is True, name))
    for level in (-tolerance, tolerance):
        figure.add_vline(level, line={"color": INK, "width": 1, "dash": "dot"}, opacity=0.5)
    figure.update_xaxes(title="drift (SD of step 0)", zeroline=True, zerolinecolor=INK, rangemode="normal")
    name_axis(figure, [f.readout for f in ranked])
    figure.update_layout(
        showlegend=True,
        barmode="overlay",
        bargap=0.45,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    )
    return Panel("Largest drift over hookpoints, at the last step", figure)


def heatmap_panel(table: pd.DataFrame, concepts: Sequence[str], step: int | None) -> Panel | None:
    """Drift (SD) per concept and hookpoint at ``step``, values in the cells, ``*`` outside the comparison band."""
    rows = table[(table["metric"] == "concept/drift") & (table["step"] == step)]
    if not len(rows):
        return None
    names = [name for name in reversed(concepts) if name in set(rows["readout"])]
    where = sorted(set(rows["hookpoint"]), key=natural)
    grid: list[list[float | None]] = [[None] * len(where) for _ in names]
    text = [[""] * len(where) for _ in names]
    places = {name: i for i, name in enumerate(names)}
    outside = (rows["null_kind"] == "directions") & (
        (rows["value"] < rows["null_low"]) | (rows["value"] > rows["null_high"])
    )
    for name, hookpoint, value, out in zip(rows["readout"], rows["hookpoint"], rows["value"], outside, strict=True):
        i, j = places[name], where.index(hookpoint)
        grid[i][j], text[i][j] = float(value), f"{value:+.2f}{'*' if out else ''}".replace("-", "−")
    limit = float(rows["value"].abs().max()) or 1.0
    figure = new_figure("", height=110 + 26 * len(names))
    figure.add_heatmap(
        z=grid, text=text, texttemplate="%{text}", zmin=-limit, zmax=limit, xgap=2, ygap=2, hoverongaps=False,
        hovertemplate="%{y} · %{x}<br>%{text} SD<extra></extra>", textfont={"size": 12},
        colorscale=[[0, "#b35806"], [0.25, "#fdb863"], [0.5, "#f7f7f7"], [0.75, "#92a8d1"], [1, "#2c4f9e"]],
        colorbar={"title": {"text": "SD"}, "thickness": 10, "outlinewidth": 0},
    )  # fmt: skip
    name_axis(figure, names)
    figure.update_xaxes(
        title=None, tickvals=list(range(len(where))), ticktext=[label(h, 24) for h in where], side="top",
        showgrid=False, tickangle=0 if len(where) <= 4 else -35, ticks="",
    )  # fmt: skip
    figure.update_yaxes(showgrid=False)
    return Panel("Drift per concept and hookpoint at the last step", figure, min_width=250 + 100 * len(where))


def hookpoints_of(table: pd.DataFrame) -> list[str]:
    """Every hookpoint of the table in model order; a hookpoint's place decides its colour, marker and dash."""
    return sorted((str(name) for name in table["hookpoint"].unique() if name), key=natural)


def label(name: str, width: int = 30) -> str:
    """A name as plotly may show it: shortened, without markup and without hover-template syntax."""
    short = name if len(name) <= width else f"{name[: width - 1]}…"
    return html.escape(short, quote=False).replace("%", "&#37;")


def new_figure(y_title: str, *, height: int) -> go.Figure:
    """An empty figure in the page's style.

    Raises:
        InterpError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise InterpError("the report needs plotly, which is not installed: pip install interp-rlhf[report]") from None
    axis = {"gridcolor": GRID, "linecolor": "#9aa3af", "ticks": "outside", "tickcolor": "#9aa3af", "automargin": True}
    return go.Figure(
        layout={
            "template": go.layout.Template(),
            "height": height,
            "font": {"family": FONT, "color": INK, "size": 12},
            "margin": {"l": 8, "r": 12, "t": 10, "b": 8},
            "paper_bgcolor": "#ffffff",
            "plot_bgcolor": "#ffffff",
            "showlegend": False,
            "hoverlabel": {"bgcolor": "#ffffff", "bordercolor": "#9aa3af", "font": {"color": INK}},
            "xaxis": axis | {"title": {"text": "optimizer step", "standoff": 6}, "zeroline": False, "showgrid": False},
            "yaxis": axis | {"title": {"text": y_title, "standoff": 6}, "zeroline": True, "zerolinecolor": "#b6bdc8"},
        }
    )  # fmt: skip


def line_style(index: int) -> dict[str, Any]:
    """Colour, dash and marker of the line at this place; the same in all figures."""
    return {
        "line": {"color": COLOURS[index % len(COLOURS)], "width": 2, "dash": DASHES[index % len(DASHES)]},
        "marker": {"symbol": MARKERS[index % len(MARKERS)], "size": 6, "color": COLOURS[index % len(COLOURS)]},
    }


def line_trace(rows: pd.DataFrame, style: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The rows' values against their steps."""
    mode = "lines+markers" if len(rows) <= 60 else "lines"
    return {"type": "scatter", "mode": mode, "x": _steps(rows), "y": _floats(rows["value"]), **style, **more}


def _steps(rows: pd.DataFrame) -> Any:
    steps = rows["step"].to_numpy("int64")
    return steps.astype("int16" if steps.max() < 2**15 else "float64")


def _floats(column: pd.Series) -> Any:
    return column.to_numpy("float32")


def _add_concepts(figure: go.Figure, rows: pd.DataFrame, concepts: Sequence[str], style: int) -> tuple[int, ...]:
    by_concept = dict(list(rows.groupby("readout", sort=False)))
    traces: list[dict[str, Any]] = []
    shown = [index for index, name in enumerate(concepts) if name in by_concept]
    for index in shown:
        here = by_concept[concepts[index]].sort_values("step")
        banded = here[(here["null_kind"] == "directions") & here["null_low"].notna() & here["null_high"].notna()]
        bounded = here[here["ci_low"].notna() & here["ci_high"].notna()]
        marked = {"meta": index, "visible": index == 0}
        if len(banded):
            traces.append(ribbon(banded, "null_low", "null_high", BAND, "#8a919c") | marked)
        if len(bounded):
            colour = _transparent(COLOURS[style % len(COLOURS)])
            traces.append(ribbon(bounded, "ci_low", "ci_high", colour, colour) | marked)
        hover = {"hovertemplate": "step %{x}: %{y:.3f}%{customdata}<extra></extra>", "customdata": bounds(here)}
        traces.append(line_trace(here, line_style(style), **hover) | marked)
    figure.add_traces(traces)
    return tuple(shown)


def _control_lines(controls: Sequence[pd.DataFrame]) -> dict[tuple[str, str], dict[str, Any]]:
    """One trace per concept and hookpoint with the lines of all control runs, NaN between two of them."""
    import numpy as np

    pieces: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
    for control in controls:
        drifts = control[control["metric"] == "concept/drift"].sort_values("step")
        for (readout, hookpoint), rows in drifts.groupby(["readout", "hookpoint"], sort=False):
            steps, values = _steps(rows), _floats(rows["value"])
            piece = (np.append(steps, steps[-1:]), np.append(values, np.float32("nan")))
            pieces.setdefault((str(readout), str(hookpoint)), []).append(piece)
    line = {"color": "rgba(90,98,110,0.45)", "width": 0.8}
    return {
        place: {
            "type": "scatter", "mode": "lines", "name": "control runs", "hoverinfo": "skip", "line": line,
            "connectgaps": False,
            "x": np.concatenate([x for x, _ in found]), "y": np.concatenate([y for _, y in found]),
        }
        for place, found in pieces.items()
    }  # fmt: skip


def ribbon(rows: pd.DataFrame, low: str, high: str, fill: str, edge: str) -> dict[str, Any]:
    """The area between two columns against the rows' steps."""
    import numpy as np

    steps, lows, highs = _steps(rows), _floats(rows[low]), _floats(rows[high])
    trace: dict[str, Any] = {"type": "scatter", "mode": "lines", "hoverinfo": "skip"}
    trace |= {"x": np.concatenate([steps, steps[::-1]]), "y": np.concatenate([lows, highs[::-1]])}
    if len(rows) == 1:  # an area without width would not be seen
        return trace | {"line": {"color": fill, "width": 12}}
    return trace | {"fill": "toself", "fillcolor": fill, "line": {"color": edge, "width": 0.6, "dash": "dot"}}


def bounds(rows: pd.DataFrame) -> list[str]:
    """Each row's interval as its hover text ends, empty where it has none."""
    return [
        "" if low != low or high != high else f" [{low:.3f}, {high:.3f}]"
        for low, high in zip(rows["ci_low"].astype(float), rows["ci_high"].astype(float), strict=True)
    ]


def _transparent(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.22)"


def _ranking_trace(chosen: Sequence[tuple[int, Finding]], filled: bool, name: str) -> dict[str, Any]:
    values = [f.value for _, f in chosen]
    return {
        "type": "bar", "orientation": "h", "name": name, "x": values, "y": [place for place, _ in chosen],
        "marker": {"color": COLOURS[0] if filled else "#ffffff", "line": {"color": COLOURS[0], "width": 1.5}},
        "error_x": {
            "type": "data", "symmetric": False, "thickness": 1.5, "width": 4, "color": INK,
            "array": [f.interval[1] - f.value for _, f in chosen],
            "arrayminus": [f.value - f.interval[0] for _, f in chosen],
        },
        "customdata": [[label(f.readout), label(f.hookpoint), *(f"{x:.3f}" for x in f.interval)] for _, f in chosen],
        "hovertemplate": "%{customdata[0]} at %{customdata[1]}<br>%{x:.3f} SD [%{customdata[2]}, %{customdata[3]}]"
        "<extra></extra>",
    }  # fmt: skip


def name_axis(figure: go.Figure, names: Sequence[str]) -> None:
    """Names along the y axis, the first one at the bottom."""
    figure.update_yaxes(
        title=None, tickvals=list(range(len(names))), ticktext=[label(name) for name in names],
        range=[-0.6, len(names) - 0.4], zeroline=False, showgrid=False, ticks="",
    )  # fmt: skip


def mark_resumes(figure: go.Figure, table: pd.DataFrame) -> None:
    """A dashed vertical line where each segment ended."""
    last = table.groupby("segment")["step"].max().sort_index()
    for before, _ in pairwise(last.index):
        figure.add_vline(
            float(last[before]), line={"color": INK, "width": 1, "dash": "dash"},
            annotation={"text": "resumed", "font": {"size": 10}, "textangle": -90, "yanchor": "top", "xanchor": "left"},
        )  # fmt: skip


def drift_ranges(
    table: pd.DataFrame, concepts: Sequence[str], tolerance: float, controls: Sequence[pd.DataFrame] = ()
) -> list[tuple[float, float]]:
    """One y-range per concept, shared by its drift panels so that hookpoints can be compared by eye."""
    import pandas as pd

    everything = pd.concat([table, *controls]) if controls else table
    rows = everything[everything["metric"] == "concept/drift"]
    columns = ["value", "ci_low", "ci_high", "null_low", "null_high"]
    lows = rows[columns].astype(float).min(axis=1).groupby(rows["readout"]).min().to_dict()
    highs = rows[columns].astype(float).max(axis=1).groupby(rows["readout"]).max().to_dict()
    ranges = []
    for name in concepts:
        low, high = min(lows.get(name, 0.0), -tolerance), max(highs.get(name, 0.0), tolerance)
        pad = 0.06 * (high - low) or 0.1
        ranges.append((low - pad, high + pad))
    return ranges
