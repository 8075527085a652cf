"""One self-contained HTML page about a run: opens offline, asks the network for nothing, same bytes for a run."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_rlhf.audit.texts import read_texts
from interp_rlhf.errors import FormatError, InterpError
from interp_rlhf.report import circuit_figures, figures, panels
from interp_rlhf.report.circuit_drawing import Drawing, draw_circuits
from interp_rlhf.report.circuits import WORDS, Alarm, DrawnCircuit, Mechanism, circuit_events
from interp_rlhf.report.controls import find_controls
from interp_rlhf.report.grids import CAUSES, PROBES, QUADRANT, READINGS, SHIFT, Grid, grid
from interp_rlhf.report.rows import current, latest, measurements
from interp_rlhf.report.tables import Summary, summarise
from interp_rlhf.report.verdicts import VERDICTS

if TYPE_CHECKING:
    import pandas as pd

    from interp_rlhf.audit.store import Run


#: Attributions of a drift to components that are drawn, the largest drifts first.
MOST_ATTRIBUTIONS = 12
#: Words in the name of something not measured that has to do with sampled completions.
_SAMPLED = ("shift", "rollout", "completion")


@dataclass(frozen=True)
class Chart:
    """A figure as the template needs it: an element id, words, and the JSON that the page's script reads."""

    id: str
    title: str
    height: int
    min_width: int
    json: str
    per_concept: bool


@dataclass(frozen=True)
class TaskView:
    """One task as the template needs it; ``None`` where the run has none."""

    task: str
    mechanism: Mechanism | None
    alarms: tuple[Alarm, ...]
    newest: DrawnCircuit | None
    drawing: Drawing | None
    chart: Chart | None


def write_report(run: Run, path: str | Path, *, texts: bool = False) -> Path:
    """Write the report of ``run`` to ``path``, completely or not at all, and return the path.

    Args:
        run: what ``load_run`` gives.
        path: the HTML file; its folder must exist.
        texts: also show the prompts that were read, where the run has kept them. Off by default, because reports
            are often published together with a model.

    Raises:
        InterpError: the extra ``report`` is not installed, or the file cannot be written.
        FormatError: ``run.json`` lacks what the report needs.
    """
    page = render_report(run, texts=texts)
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=".interp-", suffix=".html", dir=target.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.write(page)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InterpError(f"{target}: the report cannot be written ({error.strerror})") from None
    return target


def render_report(run: Run, *, texts: bool = False) -> str:
    """The page of :func:`write_report` as a string."""
    template = _template()
    timeline, controls = run.timeline(), find_controls(run)
    table = current(timeline)
    tolerance, confidence = _statistics(run)
    summary = summarise(table, run.events, tolerance=tolerance, confidence=confidence, controls=controls)
    concepts = _concept_order(table, summary)
    grids = _grids(timeline, concepts, summary)
    behind = [control.table for control in controls.used] if summary.controls.k else []
    context = _figures(table, concepts, summary, grids, behind) | grids | _provenance(run)
    context |= _circuits(table, run, summary.mechanisms)
    verdicts = [finding.verdict for finding in summary.findings]
    return template.render(
        summary=summary, concepts=concepts, caveat=summary.controls.caveat, texts=_texts(run) if texts else None,
        segments=sorted(int(s) for s in table["segment"].unique()), titles=figures.REPRESENTATION_TITLES,
        tally={verdict: verdicts.count(verdict) for verdict in VERDICTS}, **context,
        further_nulls=any(len(finding.nulls) > 1 for finding in summary.findings),
        shift_reasons=[m.reason for m in summary.not_measured if any(word in m.what for word in _SAMPLED)],
    )  # fmt: skip


def _template() -> Any:
    try:
        import jinja2
        import plotly.offline
    except ImportError as error:
        missing = str(error.name).split(".")[0]
        message = f"the report needs {missing}, which is not installed: pip install interp-rlhf[report]"
        raise InterpError(message) from None
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["repr"] = repr
    environment.globals["plotly_js"] = plotly.offline.get_plotlyjs()
    return environment.get_template("template.html.j2")


def _source(name: str) -> str:
    return (resources.files("interp_rlhf") / "report" / name).read_text(encoding="utf-8")


def _statistics(run: Run) -> tuple[float, float]:
    try:
        statistics = run.info["config"]["statistics"]
        return float(statistics["tolerance"]), float(statistics["confidence"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        place = Path(run.path) / "run.json"
        raise FormatError(f"{place}: config.statistics needs tolerance and confidence, found {error}") from None


def _concept_order(table: pd.DataFrame, summary: Summary) -> list[str]:
    """Concepts by absolute drift at the end, then those without a drift there; the picker's and heatmap's order."""
    ranked = sorted((*summary.moved, *summary.not_detected), key=lambda f: (-abs(f.value), f.readout))
    names = [finding.readout for finding in ranked]
    metrics = ("concept/drift", "concept/behaviour", "concept/behaviour_change")
    rest = set(table.loc[table["metric"].isin(metrics), "readout"]) - set(names)
    return [*names, *sorted(rest)]


def _grids(timeline: pd.DataFrame, concepts: Sequence[str], summary: Summary) -> dict[str, Grid]:
    table = current(timeline)
    return {
        "readings": grid(measurements(table[table["step"] == summary.step]), READINGS, concepts),
        "probes": grid(latest(timeline, "probe"), PROBES, concepts),
        "shift": grid(latest(timeline, "shift"), SHIFT, concepts, keep=True),
        "causes": grid([*latest(timeline, "component"), *latest(timeline, "causal")], CAUSES, concepts),
        "quadrant": grid(latest(timeline, "quadrant"), QUADRANT, concepts, keep=True),
    }


def _figures(
    table: pd.DataFrame,
    concepts: Sequence[str],
    summary: Summary,
    grids: Mapping[str, Grid],
    controls: Sequence[pd.DataFrame],
) -> dict[str, Any]:
    findings = summary.findings
    single = {
        "ranking": figures.ranking_panel(findings, summary.tolerance),
        "heatmap": figures.heatmap_panel(table, concepts, summary.step) if findings else None,
        "controls": panels.control_panel(findings),
        "quadrant": panels.quadrant_panel(grids["quadrant"]),
        "cost": figures.cost_panel(table),
    }
    groups = {
        "drift": figures.drift_panels(table, concepts, summary.tolerance, controls),
        "behaviour": figures.behaviour_panels(table, concepts),
        "shift": panels.shift_panels(grids["shift"]),
        "representation": figures.representation_panels(table),
    }
    ranges = figures.drift_ranges(table, concepts, summary.tolerance, controls)
    return {
        "single": {name: _chart(name, panel) for name, panel in single.items() if panel is not None},
        "groups": {name: [_chart(f"{name}-{i}", p) for i, p in enumerate(group)] for name, group in groups.items()},
        "ranges": _script_json(json.dumps([[round(low, 6), round(high, 6)] for low, high in ranges])),
    }


def _circuits(table: pd.DataFrame, run: Run, mechanisms: Sequence[Mechanism]) -> dict[str, Any]:
    """What the section on mechanisms shows, and what of it could not be drawn."""
    found = circuit_events(run.events)
    problems, views = list(found.problems), []
    judged = {mechanism.task: mechanism for mechanism in mechanisms}
    for place, task in enumerate(dict.fromkeys((*judged, *found.circuits))):
        circuits, drawing = found.circuits.get(task, ()), None
        try:
            drawing = draw_circuits(circuits) if circuits else None
        except FormatError as error:
            problems.append(str(error))
        panel = circuit_figures.faithfulness_panel(table, judged[task]) if task in judged else None
        chart = _chart(f"faithfulness-{place}", panel) if panel else None
        alarms = tuple(alarm for alarm in found.alarms if alarm.task == task)
        views.append(TaskView(task, judged.get(task), alarms, circuits[-1] if circuits else None, drawing, chart))
    drawn = found.attributions[:MOST_ATTRIBUTIONS]
    parts = [_chart(f"components-{i}", circuit_figures.attribution_panel(a)) for i, a in enumerate(drawn)]
    return {
        "tasks": views, "mechanism_words": WORDS, "alarms": found.alarms, "attributions": parts,
        "circuit_problems": problems,
        "undrawn": [f"{a.readout} at {a.hookpoint}" for a in found.attributions[len(drawn):]],
    }  # fmt: skip


def _chart(name: str, panel: figures.Panel) -> Chart:
    text = panel.figure.to_json(engine="json")
    layout: Any = panel.figure.layout
    return Chart(
        f"fig-{name}",
        panel.title,
        int(layout["height"]),
        panel.min_width,
        _script_json(text),
        bool(panel.concepts),
    )


def _script_json(text: str) -> Any:
    """JSON that cannot end the ``<script>`` element it stands in."""
    import markupsafe

    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return markupsafe.Markup(text)


def _provenance(run: Run) -> dict[str, Any]:
    facts: list[tuple[str, str]] = []
    blocks: list[tuple[str, str]] = []
    for key, value in run.info.items():
        flat = value if isinstance(value, Mapping) else {"": value}
        if any(isinstance(part, Mapping | list | tuple) for part in flat.values()):
            blocks.append((key, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str)))
        else:
            named = {f"{key} {name}".strip().replace("_", " "): part for name, part in flat.items()}
            facts += [(name, str(part)) for name, part in named.items() if part not in (None, "")]
    model = run.info.get("model")
    name = (model.get("name") or model.get("class")) if isinstance(model, Mapping) else model
    notes = [event["text"] for event in run.events if event["event"] == "note"]
    return {
        "model": name or "", "trainer": run.info.get("trainer") or "", "facts": facts, "blocks": blocks,
        "notes": notes, "snapshots": list(run.snapshots),
    }  # fmt: skip


def _texts(run: Run) -> list[dict[str, Any]]:
    """The texts that the newest start kept, without the files that hold token ids."""
    told = [str(event["texts"]) for event in run.events if event["event"] == "texts"]
    names = dict.fromkeys(file.partition("-")[2].removesuffix(".jsonl") for file in told)
    wanted = [name for name in names if name not in ("plan", "completions")]
    return [line for name in wanted for line in read_texts(Path(run.path).parent, run.events, name)]
