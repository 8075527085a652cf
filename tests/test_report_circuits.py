"""Circuits in the report: verdicts from rows, drawings and attributions from events, and events that are no good."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_run import (
    ENDINGS,
    HOOKPOINTS,
    SyntheticRun,
    circuit_event,
    circuit_rows,
    components_event,
    control_rows,
    make_run,
    row,
    store_run,
    with_circuits,
)

from interp_rlhf.audit.store import load_run
from interp_rlhf.drift.circuit_verdict import circuit_evidence, circuit_verdict
from interp_rlhf.errors import FormatError
from interp_rlhf.report.circuit_drawing import MOST_EDGES, Drawing, draw_circuits
from interp_rlhf.report.circuit_figures import attribution_panel, faithfulness_panel
from interp_rlhf.report.circuits import (
    Mechanism,
    circuit_events,
    mechanisms_of,
    parse_node,
    read_attribution,
    read_circuit,
)
from interp_rlhf.report.console import render_text
from interp_rlhf.report.controls import ControlTable, find_controls
from interp_rlhf.report.html import render_report
from interp_rlhf.report.rows import current
from interp_rlhf.report.tables import summarise

pytest.importorskip("plotly", reason="the report needs the extra 'report'")
pytest.importorskip("jinja2", reason="the report needs the extra 'report'")

HOSTILE = '<b>bold</b><img src=x onerror="alert(1)">%{x}</script><script>alert(2)</script>'
SVG = re.compile(r"<svg viewBox=[^>]*role=\"img\".*?</svg>", re.DOTALL)


def table_of(rows: Any, superseded: Any = ()) -> pd.DataFrame:
    return current(SyntheticRun(Path("run"), {}, rows, superseded or [False] * len(rows)).timeline())


def one_of(rows: Any, superseded: Any = ()) -> Mechanism:
    (found,) = mechanisms_of(table_of(rows, superseded))
    return found


def drawing_of(*events: dict[str, Any]) -> Drawing:
    return draw_circuits([read_circuit(event) for event in events])


# -------------------------------------------------------------------------------------------------------------- verdict


@pytest.mark.parametrize("word", ENDINGS)
def test_a_verdict_is_made_from_the_first_and_the_last_rows(word: str) -> None:
    rows = [*circuit_rows("t", 0), *circuit_rows("t", 20), *circuit_rows("t", 40, **ENDINGS[word])]
    found = one_of(rows)
    assert (found.word, found.start_step, found.step) == (word, 0, 40)
    assert found.alarm is (word in ("different", "diffuse", "lost"))
    start, now = ({r.metric: r for r in rows if r.step == step} for step in (0, 40))
    assert found.why == circuit_verdict(circuit_evidence(start, now)).why
    assert found.high_from == pytest.approx(0.8 * 0.9)
    assert dict(found.now) == now


def test_alarms_come_first_and_each_task_goes_by_its_own_last_step() -> None:
    rows = [*circuit_rows("a", 0), *circuit_rows("a", 40), *circuit_rows("b", 0)]
    rows += circuit_rows("b", 20, **ENDINGS["lost"])
    assert [(m.task, m.word, m.step) for m in mechanisms_of(table_of(rows))] == [("b", "lost", 20), ("a", "same", 40)]


def test_only_the_start_is_no_verdict_unless_it_cannot_be_measured() -> None:
    found = one_of(circuit_rows("t", 0))
    assert found.word is None and "Only the start" in found.why and not found.alarm
    assert one_of(circuit_rows("t", 0, effect_ratio=None)).word == "undetermined"


def test_superseded_rows_do_not_count() -> None:
    rows = [*circuit_rows("t", 0), *circuit_rows("t", 40), *circuit_rows("t", 50, **ENDINGS["lost"])]
    assert one_of(rows).word == "lost"
    assert one_of(rows, [r.step == 50 for r in rows]).word == "same"


def test_rows_that_make_no_verdict_say_why() -> None:
    rows = [*circuit_rows("t", 0), *circuit_rows("t", 40)]
    rows = [replace(r, value=float("inf")) if (r.metric, r.step) == ("circuit/effect_ratio", 40) else r for r in rows]
    found = one_of(rows)
    assert found.word is None and "effect_ratio: expected a finite number" in found.why


def test_control_runs_say_what_scrambled_preferences_do() -> None:
    def control(number: int, word: str, step: int = 40, *, circuits: bool = True) -> ControlTable:
        theirs = table_of([*circuit_rows("t", 0), *circuit_rows("t", step, **ENDINGS[word])])
        return ControlTable(f"{number:02d}", "pairs swapped", theirs, circuits=circuits)

    def said(word: str, *controls: ControlTable) -> str:
        rows = [*circuit_rows("t", 0), *circuit_rows("t", 40, **ENDINGS[word])]
        (found,) = mechanisms_of(table_of(rows), controls)
        return found.against_controls

    assert said("lost") == ""
    both = control(1, "diffuse"), control(2, "same")
    assert said("lost", *both) == "With scrambled preferences: diffuse 1, same 1; an alarm in 1 of 2, p 0.67."
    none = control(1, "relocated"), control(2, "same")
    assert said("lost", *none) == "With scrambled preferences: relocated 1, same 1; an alarm in 0 of 2, p 0.33."
    assert said("same", *both) == "With scrambled preferences: diffuse 1, same 1.", "no finding, no p"
    other = control(1, "lost", step=20), control(2, "lost", circuits=False)
    assert said("lost", *other) == "With scrambled preferences: 2 not compared: other tasks, settings or steps."
    assert said("lost", other[0], both[1]) == (
        "With scrambled preferences: same 1; an alarm in 0 of 1, p 0.5; 1 not compared: other tasks, settings or steps."
    )


def test_control_runs_stand_beside_verdicts_on_console_and_page(tmp_path: Path) -> None:
    made = with_circuits(make_run(tmp_path / "interp"), {"agreeing": "lost"}, steps=(0, 20))
    store_run(tmp_path, made.info, made.rows, made.events)
    theirs = [*control_rows(made), *circuit_rows("agreeing", 0), *circuit_rows("agreeing", 20, **ENDINGS["lost"])]
    control = {"number": 1, "kind": "pairs swapped", "changed": 12}
    store_run(tmp_path / "_controls" / "01", {**made.info, "control": control}, theirs)
    run = load_run(tmp_path)
    controls = find_controls(run)
    assert len(controls.used) == 1, controls.left_out
    options = {"tolerance": 0.1, "confidence": 0.95}
    sentence = "With scrambled preferences: lost 1; an alarm in 1 of 1, p 1."
    assert sentence in render_text(summarise(run.timeline(), run.events, controls=controls, **options))
    itself = replace(controls, itself="control run 1: pairs swapped")
    assert sentence not in render_text(summarise(run.timeline(), run.events, controls=itself, **options))
    page = render_report(run)
    assert sentence in page and "(an alarm in 1 of 1 control run too)" in page


def test_the_console_has_one_line_per_task(tmp_path: Path) -> None:
    run = with_circuits(make_run(tmp_path), {"induction": "same", "agreeing": "different"})
    text = render_text(summarise(run.timeline(), run.events, tolerance=0.1, confidence=0.95))
    lines = [line for line in text.splitlines() if line.startswith(("  agreeing:", "  induction:"))]
    assert lines[0].startswith("  agreeing: ALARM: different. The step-0 circuit carries 0.30")
    assert lines[1].startswith("  induction: same. The step-0 circuit still carries 0.90")
    assert "Mechanisms" not in render_text(summarise(make_run(tmp_path).timeline(), (), tolerance=0.1, confidence=0.95))


def test_the_console_counts_what_is_beyond_its_limit(tmp_path: Path) -> None:
    run = with_circuits(make_run(tmp_path), {f"t{i}": "same" for i in range(5)}, steps=(0, 20))
    text = render_text(summarise(run.timeline(), run.events, tolerance=0.1, confidence=0.95), limit=3)
    assert "  t2 (step 20): same." in text and "  t3" not in text and "  … and 2 more" in text


# -------------------------------------------------------------------------------------------------------------- drawing


def test_both_circuits_are_drawn_in_one_layout() -> None:
    before, now = circuit_event("t", 0), circuit_event("t", 40)
    drawing = drawing_of(before, now)
    sets = [{(u, v): s for u, v, s in event["edges"]} for event in (before, now)]
    for side, mine, other, lonely in zip(drawing.sides, sets, reversed(sets), ("gone", "new"), strict=True):
        fates = {line.edge: line.fate for line in side.lines}
        assert fates == {f"{u}>{v}": "both" if (u, v) in other else lonely for u, v in mine}
        assert Counter(fates.values()) == {"both": 100, lonely: 50}
        for line in side.lines:
            assert line.positive is (mine[tuple(line.edge.split(">"))] > 0)
    first, second = ({b.name: (b.x, b.y) for b in side.boxes} for side in drawing.sides)
    assert first == second and len(first) == 5 * 9 + 2
    assert {line.dash for line in drawing.sides[0].lines} == {"", "7 4"}
    assert {line.dash for line in drawing.sides[1].lines} == {"", "2.5 2.5"}
    assert [edge.score for edge, _ in drawing.edges] == sorted((e.score for e, _ in drawing.edges), key=abs)[::-1]
    assert len(drawing.edges) == 200 and not drawing.notes


def test_widths_are_proportional_to_scores_on_one_scale() -> None:
    before, now = (circuit_event("t", step, n=0) for step in (0, 40))
    before["edges"] = [["embed", "logits", 0.5], ["m0", "logits", -0.25], ["m1", "logits", 0.0]]
    now["edges"] = [["embed", "logits", -1.0]]
    for event in (before, now):
        event["size"] = 3
    drawing = drawing_of(before, now)
    widths = [{line.edge: line.width for line in side.lines} for side in drawing.sides]
    full = widths[1]["embed>logits"]
    assert widths[0]["embed>logits"] == pytest.approx(full / 2, abs=0.01)
    assert widths[0]["m0>logits"] == pytest.approx(full / 4, abs=0.01)
    assert 0 < widths[0]["m1>logits"] < full / 4
    assert [line.edge for line in drawing.sides[0].lines][-1] == "embed>logits", "the strongest is on top"


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"kv_heads": 2},
        {"layers": 32, "heads": 32, "kv_heads": 32},
        {"layers": 2, "heads": 4, "kv_heads": 1, "n": 30},
    ],
)
def test_edges_go_upwards_from_box_to_box_inside_the_picture(shape: dict[str, int]) -> None:
    drawing = drawing_of(circuit_event("t", 0, **shape), circuit_event("t", 40, **shape))
    for side in drawing.sides:
        boxes = {box.name: box for box in side.boxes}
        touched = {name for line in side.lines for name in (line.start, line.end)}
        assert {name for name, box in boxes.items() if box.inside} == touched
        for box in boxes.values():
            assert box.width / 2 <= box.x <= drawing.width - box.width / 2 and 0 < box.y < drawing.height
        for line in side.lines:
            numbers = [float(x) for x in re.findall(r"-?[\d.]+", line.path)]
            (x1, y1), (x2, y2) = numbers[:2], numbers[-2:]
            start, end = boxes[line.start], boxes[line.end]
            assert y2 < y1 and all(0 <= x <= drawing.width for x in numbers[::2])
            assert abs(x1 - start.x) <= start.width / 2 and y1 == pytest.approx(start.y - start.height / 2, abs=0.11)
            assert abs(x2 - end.x) <= end.width / 2 and y2 == pytest.approx(end.y + end.height / 2, abs=1)


def test_a_large_model_shows_only_what_is_in_a_circuit() -> None:
    shape = {"layers": 32, "heads": 32, "kv_heads": 32, "n": 12, "size": 400}
    drawing = drawing_of(circuit_event("t", 0, **shape), circuit_event("t", 40, **shape))
    names = {name for line in (*drawing.sides[0].lines, *drawing.sides[1].lines) for name in (line.start, line.end)}
    assert {box.name for box in drawing.sides[0].boxes} == names | {"embed", "logits"}
    layers = {int(re.findall(r"\d+", name)[0]) for name in names - {"embed", "logits"}}
    assert [name for name, _, _ in drawing.rows] == [f"layer {i}" for i in sorted(layers, reverse=True)]
    assert any("12 strongest of the circuit's 400 edges" in note for note in drawing.notes)
    assert any("not among the 12 strongest edges" in line.title for line in drawing.sides[0].lines)


def test_an_mlp_sits_above_its_layers_heads_unless_the_block_is_parallel() -> None:
    for parallel in (False, True):
        boxes = {box.name: box for box in drawing_of(circuit_event("t", 0, parallel=parallel)).sides[0].boxes}
        assert (boxes["m2"].y == boxes["a2.h0"].y) is parallel
        assert boxes["embed"].y > boxes["a0.h0"].y > boxes["m4"].y > boxes["logits"].y


def test_inputs_of_a_head_are_apart_and_a_groups_are_below_it() -> None:
    event = circuit_event("t", 0, n=0, size=6, kv_heads=2)
    event["edges"] = [["embed", f"a1.{x}", 1.0] for x in ("h5.q", "h1.k", "h1.v")]
    lines = {line.edge[6:]: line for line in drawing_of(event).sides[0].lines}
    assert {name: line.end for name, line in lines.items()} == {
        "a1.h5.q": "a1.h5",
        "a1.h1.k": "a1.kv1",
        "a1.h1.v": "a1.kv1",
    }
    boxes = {box.name: box for box in drawing_of(event).sides[0].boxes}
    assert boxes["a1.kv1"].x == pytest.approx((boxes["a1.h4"].x + boxes["a1.h7"].x) / 2)
    assert boxes["a1.kv1"].title == "a1.kv1: keys and values that heads 4 to 7 share"
    whole = circuit_event("t", 0, n=0, size=6)
    whole["edges"] = [["embed", f"a1.h3.{x}", 1.0] for x in "qkv"]
    ends = {line.edge[-1]: float(line.path.split(" ")[-2]) for line in drawing_of(whole).sides[0].lines}
    assert ends["q"] < ends["k"] < ends["v"]


def test_one_circuit_is_drawn_alone_and_too_many_edges_are_cut() -> None:
    drawing = drawing_of(circuit_event("t", 0))
    (side,) = drawing.sides
    assert side.title == "at the start" and {line.fate for line in side.lines} == {"alone"}
    many = circuit_event("t", 0, n=MOST_EDGES + 20)
    drawing = drawing_of(many)
    assert len(drawing.sides[0].lines) == MOST_EDGES and drawing.notes
    kept = sorted((abs(e[2]) for e in many["edges"]), reverse=True)[:MOST_EDGES]
    assert sorted((abs(edge.score) for edge, _ in drawing.edges), reverse=True) == kept


def test_two_models_are_not_drawn_side_by_side() -> None:
    with pytest.raises(FormatError, match="5 layers of 8 heads before, 6 layers of 8 heads after"):
        drawing_of(circuit_event("t", 0), circuit_event("t", 40, layers=6))


# --------------------------------------------------------------------------------------------------------------- events


BAD_CIRCUITS = {
    "layers: found nothing": {"layers": None},
    "heads: found True": {"heads": True},
    "kv_heads: found 0": {"kv_heads": 0},
    "layers: found 99999999": {"layers": 99999999},
    "size: found 3, expected a whole number from 150": {"size": 3},
    "edges: found 'all'": {"edges": "all"},
    "edges[0]: found ['embed', 'logits']": {"edges": [["embed", "logits"]]},
    "edges[0]: found 'a0.h0', expected a target": {"edges": [["embed", "a0.h0", 1.0]]},
    "edges[0]: found 'a5.h0', expected a source": {"edges": [["a5.h0", "logits", 1.0]]},
    "edges[0]: found 'a1.h8.q'": {"edges": [["embed", "a1.h8.q", 1.0]]},
    "edges[0]: found 'logits', expected a source": {"edges": [["logits", "logits", 1.0]]},
    "edges[0]: found 'embed', expected a target": {"edges": [["embed", "embed", 1.0]]},
    "edges[0]: found nan": {"edges": [["embed", "logits", float("nan")]]},
    "edges[0]: found '1'": {"edges": [["embed", "logits", "1"]]},
    "edges[0]: found 1000000000": {"edges": [["embed", "logits", 10**400]]},
    "edges[0]: found 'a1.h2.k'": {"kv_heads": 2, "edges": [["embed", "a1.h2.k", 1.0]]},
}
BAD_COMPONENTS = {
    "total: found nothing": {"total": None},
    "hookpoint: found nothing": {"hookpoint": None},
    "parts[0]: found ['m1', 1.0]": {"parts": [["m1", 1.0]]},
    "parts[0]: found 'x'": {"parts": [["m1", 1.0, None, "x", None, None]]},
    "parts[0]: found nothing": {"parts": [["m1", None, None, None, None, None]]},
    "rest: found inf": {"rest": float("inf")},
    "step: found '4'": {"step": "4"},
}


@pytest.mark.parametrize("told", [*BAD_CIRCUITS, *BAD_COMPONENTS])
def test_a_bad_event_is_told_of_and_the_rest_is_drawn(told: str) -> None:
    good = [circuit_event("good", 0), components_event("refusal", "layers.1.resid_post", 40)]
    event = (
        circuit_event("odd", 40) if told in BAD_CIRCUITS else components_event("odd", "layers.2.resid_post", 40)
    ) | (BAD_CIRCUITS.get(told) or BAD_COMPONENTS[told])
    found = circuit_events([event, *good])
    (problem,) = found.problems
    assert problem.startswith(f"{event['event']} event of odd") and told in problem and len(problem) < 200
    assert list(found.circuits) == ["good"] and [a.readout for a in found.attributions] == ["refusal"]


def test_a_foreign_event_does_not_break_the_page(tmp_path: Path) -> None:
    foreign = [{"event": kind} for kind in ("circuit", "components", "alarm")]
    foreign += [{"event": "alarm", "step": "x", "task": "t", "word": "w", "reason": "r"}]
    foreign += [circuit_event(HOSTILE, 0), circuit_event(HOSTILE, 40, layers=6)]
    page = render_report(make_run(tmp_path / "interp", events=foreign))
    assert page.count('<li class="problem">') == 5 and "alarm event: step: found nothing" in page
    assert "not one model" in page and "<b>bold" not in page


def test_what_a_later_start_left_behind_is_not_shown(tmp_path: Path) -> None:
    begun = {"event": "segment", "segment": 1, "resumed_from": None, "parent": None}
    again = {"event": "segment", "segment": 2, "resumed_from": 20, "parent": 1}
    alarm = {"event": "alarm", "task": "t", "word": "lost", "reason": "It is gone."}
    left = [circuit_event("t", 30), components_event("c", "layers.1.resid_post", 30), alarm | {"step": 30}]
    kept = [circuit_event("t", 0), circuit_event("t", 20), alarm | {"step": 10}]
    found = circuit_events([begun, *kept, *left, again, circuit_event("t", 25)])
    assert [c.step for c in found.circuits["t"]] == [0, 20, 25]
    assert not found.attributions and [a.step for a in found.alarms] == [10] and not found.problems


def test_of_each_concept_only_the_last_step_is_taken_apart() -> None:
    places = (("a", 1, 10, 9.0), ("a", 1, 20, 0.5), ("b", 1, 10, 2.0), ("b", 2, 20, -1.0), ("b", 3, 20, 0.1))
    events = [components_event(name, f"layers.{i}.resid_post", step, total) for name, i, step, total in places]
    found = [(a.readout, a.hookpoint, a.step) for a in circuit_events(events).attributions]
    assert found == [
        ("b", "layers.2.resid_post", 20),
        ("a", "layers.1.resid_post", 20),
        ("b", "layers.3.resid_post", 20),
    ]


def test_names_of_nodes() -> None:
    for name in ("embed", "logits", "m3", "a0.h11", "a1.h0.q"):
        assert parse_node(name) is not None
    for name in ("", "m", "a1", "a1.h", "a1.h0.x", "m-1", "m١", "embed ", "a1.h0.q\n", "m" + "1" * 40):
        assert parse_node(name) is None


# -------------------------------------------------------------------------------------------------------------- figures


def test_parts_of_a_drift_are_stacked_and_add_up() -> None:
    event = components_event("refusal", "layers.1.resid_post", 40, total=0.8, n=20)
    panel = attribution_panel(read_attribution(event))
    assert panel.title == "refusal: +0.8 SD at layers.1.resid_post, step 40"
    traces = {trace["name"]: trace for trace in panel.figure.to_dict()["data"]}
    names = list(panel.figure.layout.yaxis.ticktext)
    assert names == [*(p[0] for p in event["parts"][:12]), "everything else"][::-1]
    bars = [trace for trace in traces.values() if trace["type"] == "bar"]
    assert sum(sum(trace["x"]) for trace in bars) == pytest.approx(0.8)
    totals = traces["total, with interval"]
    for name, y, x, low, high in zip(
        totals["customdata"], totals["y"], totals["x"], totals["error_x"]["arrayminus"], totals["error_x"]["array"],
        strict=True,
    ):  # fmt: skip
        part = next(p for p in event["parts"] if p[0] == name)
        assert names[y] == name and (x, x - low, x + high) == pytest.approx(tuple(part[1:4]))
        stacked = [v for trace in bars for v, at in zip(trace["x"], trace["y"], strict=True) if at == y]
        assert sum(stacked) == pytest.approx(part[1])
    assert traces["through weights"]["marker"]["pattern"]["shape"] == "/", "told apart without colour"
    assert [names[y] for y in traces["not split"]["y"]] == ["everything else", "embed"]


def test_an_attribution_of_nothing_but_a_rest() -> None:
    event = components_event("refusal", "layers.1.resid_post", 40, n=0)
    panel = attribution_panel(read_attribution(event))
    assert list(panel.figure.layout.yaxis.ticktext) == ["everything else"]
    twice = components_event("c", "layers.1.resid_post", 1, n=0) | {"parts": [["m0", 1.0, None, None, 1, 0]] * 2}
    names = attribution_panel(read_attribution(twice | {"rest": 0})).figure.layout.yaxis.ticktext
    assert list(names) == ["m0", "m0"]


def test_faithfulness_over_steps_has_a_line_per_circuit_and_the_random_band() -> None:
    rows = [r for step in (0, 10, 20) for r in circuit_rows("t", step, faithfulness_index=0.9 - step / 100)]
    rows += circuit_rows("other", 20)
    table = table_of([r for r in rows if (r.metric, r.step) != ("circuit/faithfulness_matched", 10)])
    mechanism = next(m for m in mechanisms_of(table) if m.task == "t")
    panel = faithfulness_panel(table, mechanism)
    assert panel is not None
    lines = {trace.name: trace for trace in panel.figure.data}
    assert list(lines["step-0 circuit, by index"].y) == pytest.approx([0.9, 0.8, 0.7])
    assert list(lines["after matching"].x) == [0, 20] and len(lines["control task's"].y) == 3
    assert sorted(set(lines["random circuits"].y)) == pytest.approx([-0.05, 0.12])
    assert panel.figure.layout.shapes[0].y0 == pytest.approx(0.72)
    none = table_of(circuit_rows("t", 20, **ENDINGS["lost"]))
    assert faithfulness_panel(none, mechanisms_of(none)[0]) is None


# ----------------------------------------------------------------------------------------------------------------- page


def test_the_page_shows_verdicts_with_their_evidence_and_the_circuits(tmp_path: Path) -> None:
    run = with_circuits(
        make_run(tmp_path / "interp", concepts=("refusal",)), {HOSTILE: "different", "induction": "same"}
    )
    run.events.append(components_event("refusal", "layers.1.resid_post", 40))
    page = render_report(run)
    table = page[page.index('<table id="mechanisms">') : page.index("</table>", page.index('<table id="mechanisms">'))]
    assert re.findall(r'class="badge mechanism (\w+)"', table) == ["different", "same"]
    assert table.count('class="alarmed"') == 1 and "150<small>of 2461</small>" in table
    shown = set(re.findall(r'data-metric="(circuit/\w+)"[^>]*data-step="(\d+)" data-field="(\w+)"', table))
    for name in (
        "effect_ratio",
        "structure_change",
        *(f"faithfulness_{c}" for c in ("index", "matched", "own", "control")),
    ):
        assert {(f"circuit/{name}", "40", field) for field in ("value", "ci_low", "ci_high")} <= shown
    assert {("circuit/faithfulness_index", "40", "null_high"), ("circuit/faithfulness_index", "0", "value")} <= shown
    assert 'class="alarm"' in page and '<a href="#circuits">Mechanisms</a>' in page
    assert len(SVG.findall(page)) == 4 and "<b>bold" not in page and "alert(2)</script>" not in page
    assert [svg.count('<path class="edge') for svg in SVG.findall(page)] == [150] * 4
    specs = {name: json.loads(text) for name, text in re.findall(r'data-for="fig-([\w-]+)">(.*?)</script>', page)}
    assert {"faithfulness-0", "faithfulness-1", "components-0"} <= set(specs)
    assert page == render_report(run), "same bytes for a run"


def test_a_run_without_circuits_says_nothing_of_them(tmp_path: Path) -> None:
    page = render_report(make_run(tmp_path / "interp"))
    for words in ('id="circuits"', "#circuits", 'class="alarm"', 'id="metric-circuit"'):
        assert words not in page


def test_an_earlier_alarm_stays_on_the_page(tmp_path: Path) -> None:
    run = with_circuits(make_run(tmp_path / "interp"), {"induction": "same"})
    run.events.append(
        {"event": "alarm", "step": 20, "task": "induction", "word": "lost", "reason": "It was gone then."}
    )
    page = render_report(run)
    assert "1 alarm earlier in this run, none at the last reading" in page and "It was gone then." in page


def test_what_a_drift_brings_about_is_shown_beside_what_it_is_made_of(tmp_path: Path) -> None:
    run = make_run(tmp_path / "interp", concepts=("refusal",))
    share = {
        "ci_low": 0.3,
        "ci_high": 0.8,
        "null_kind": "random_directions",
        "null_low": -0.1,
        "null_high": 0.1,
        "p": 0.048,
    }
    rows = [
        row("component/weight_share", "refusal", HOOKPOINTS[1], 40, 0.625),
        row("causal/share_restored", "refusal", HOOKPOINTS[1], 40, 0.5, **share),
        row("causal/nll_change", "refusal", HOOKPOINTS[1], 40, 0.015625),
    ]
    run.rows, run.superseded = [*run.rows, *rows], [*run.superseded, *[False] * 3]
    page = render_report(run)
    table = page[page.index('<table id="causes-table">') :].split("</table>")[0]
    shown = set(re.findall(r'data-metric="([\w/]+)"[^>]*data-field="(\w+)" data-value="([^"]+)"', table))
    assert {(r.metric, "value", repr(r.value)) for r in rows} <= shown
    assert {
        ("causal/share_restored", field, str(value)) for field, value in share.items() if field != "null_kind"
    } <= shown
    assert '<a href="#circuits">Mechanisms</a>' in page and "share_injected" not in table


def test_only_as_many_attributions_as_can_be_read_are_drawn(tmp_path: Path) -> None:
    events = [components_event(f"c{i:02d}", "layers.1.resid_post", 40, total=1 + i) for i in range(15)]
    page = render_report(make_run(tmp_path / "interp", events=events))
    assert len(re.findall(r'data-for="fig-components-', page)) == 12
    assert "Not drawn, for their drifts are smaller: c02 at layers.1.resid_post, c01" in page


def test_circuits_of_a_stored_run(tmp_path: Path) -> None:
    made = with_circuits(make_run(tmp_path), {"induction": "relocated"})
    odd = {"event": "circuit", "task": "odd", "step": "x"}
    store_run(tmp_path, made.info, made.rows, [*made.events, odd])
    page = render_report(load_run(tmp_path))
    assert [svg.count('<path class="edge') for svg in SVG.findall(page)] == [150] * 2
    assert "mechanism relocated" in page and page.count('<li class="problem">circuit event of odd: ') == 1
