"""Summary and headline: the definitions of docs/metrics.md on hand-made rows, and against a brute-force reading."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_run import HOOKPOINTS, SyntheticRun, drift_row, make_run, row

from interp_rlhf.measurement import Measurement
from interp_rlhf.report.console import render_text
from interp_rlhf.report.grids import PROBES, grid
from interp_rlhf.report.rows import beyond, latest, measurements, natural, outside_band
from interp_rlhf.report.tables import CAVEAT, Summary, headline, headline_key, summarise


def summary_of(rows: list[Measurement], events: Any = (), superseded: list[bool] | None = None) -> Summary:
    run = SyntheticRun(Path("run"), {}, rows, superseded or [False] * len(rows))
    return summarise(run.timeline(), list(events), tolerance=0.1, confidence=0.95)


def names(findings: Any) -> list[str]:
    return [finding.readout for finding in findings]


@pytest.mark.parametrize(
    ("low", "high", "moved"),
    [
        (0.11, 0.3, True),
        (0.1, 0.3, False),
        (-0.3, -0.11, True),
        (-0.3, -0.1, False),
        (-0.5, 0.5, False),
        (0.0, 2.0, False),
    ],
)
def test_moved_means_the_whole_interval_beyond_the_tolerance(low: float, high: float, moved: bool) -> None:
    at_end = drift_row("c", "layers.0.resid_post", 5, (low + high) / 2, ci_low=low, ci_high=high)
    assert beyond(at_end, 0.1) is moved
    summary = summary_of([at_end])
    assert names(summary.moved) == (["c"] if moved else [])
    assert names(summary.not_detected) == ([] if moved else ["c"])


def test_finding_shows_the_largest_drift_among_hookpoints_where_it_moved() -> None:
    rows = [
        drift_row("c", "layers.0.resid_post", 5, 0.3),
        drift_row("c", "layers.1.resid_post", 5, -0.5),
        drift_row("c", "layers.2.resid_post", 5, 0.9, ci_low=-0.2, ci_high=2.0),
    ]
    (finding,) = summary_of(rows).moved
    assert (finding.hookpoint, finding.value, finding.interval) == ("layers.1.resid_post", -0.5, (-0.55, -0.45))
    assert finding.read == 3
    assert finding.moved_at == ("layers.0.resid_post", "layers.1.resid_post")
    assert finding.outside_at == ("layers.1.resid_post",)
    assert finding.outside_band is True


def test_outside_the_band_without_moving_is_not_specific() -> None:
    at_end = drift_row("c", "layers.0.resid_post", 5, 0.5, ci_low=-0.1, ci_high=1.1)
    assert outside_band(at_end) is True
    summary = summary_of([at_end])
    assert summary.specific == ()
    assert names(summary.not_detected) == ["c"]


def test_numeric_floor_is_no_band_of_comparable_directions() -> None:
    at_end = drift_row("c", "layers.0.resid_post", 5, 0.5, null_kind="numeric", null_low=-1e-6, null_high=1e-6)
    summary = summary_of([drift_row("c", "layers.0.resid_post", 0, 0.0), at_end])
    assert summary.moved[0].band is None and summary.moved[0].outside_band is None
    assert summary.specific == ()
    assert summary.moved[0].verdict == "moved" and "nothing to compare it with" in render_text(summary)


def test_smallest_detectable_drift_is_where_the_verdict_turns() -> None:
    half = 0.07
    at_end = drift_row("c", "layers.0.resid_post", 5, 0.02, ci_low=0.02 - half, ci_high=0.02 + half)
    (finding,) = summary_of([at_end]).not_detected
    for shift, moved in ((1e-9, True), (-1e-9, False)):
        value = finding.detectable + shift
        assert beyond(drift_row("c", "", 5, value, ci_low=value - half, ci_high=value + half), 0.1) is moved


def test_inside_the_numeric_floor_is_no_drift() -> None:
    start = drift_row("c", "layers.0.resid_post", 0, 0.0, null_low=-0.3, null_high=0.3)
    inside = drift_row("c", "layers.0.resid_post", 5, 0.25)
    outside = drift_row("c", "layers.0.resid_post", 5, 0.35)
    assert beyond(inside, 0.1)
    summary = summary_of([start, inside])
    assert summary.not_detected[0].within_floor and summary.moved == ()
    assert "no drift: inside the numeric floor" in render_text(summary)
    assert not summary_of([start, outside]).moved[0].within_floor


def test_superseded_rows_do_not_count() -> None:
    rows = [drift_row("c", "layers.0.resid_post", 9, 3.0), drift_row("c", "layers.0.resid_post", 5, 0.0, segment=2)]
    summary = summary_of(rows, superseded=[True, False])
    assert (summary.step, names(summary.moved), names(summary.not_detected)) == (5, [], ["c"])


def test_behaviour_beside_each_concept_and_the_two_interesting_kinds_of_rows() -> None:
    def behaviour(name: str, low: float, high: float) -> Measurement:
        return row("concept/behaviour_change", name, "", 5, (low + high) / 2, ci_low=low, ci_high=high, unit="nats")

    rows = [drift_row(name, "layers.0.resid_post", 5, 0.9 if "moved" in name else 0.0) for name in
            ("moved both", "moved only", "behaves only", "neither", "moved unread")]  # fmt: skip
    rows += [behaviour("moved both", 1, 2), behaviour("moved only", -1, 2), behaviour("behaves only", -2, -1)]
    rows += [behaviour("neither", -1, 1)]
    summary = summary_of(rows)
    assert names(summary.moved_without_behaviour) == ["moved only"]
    assert names(summary.behaviour_without_moved) == ["behaves only"]
    changed = {f.readout: f.behaviour_changed for f in (*summary.moved, *summary.not_detected)}
    assert changed == {
        "moved both": True, "moved only": False, "behaves only": True, "neither": False, "moved unread": None,
    }  # fmt: skip


def test_everything_without_a_number_is_listed_with_its_reason() -> None:
    rows = [
        drift_row("gone", "layers.0.resid_post", 5, 1.0),
        drift_row("here", "layers.0.resid_post", 9, 1.0),
        drift_row("bare", "layers.0.resid_post", 9, 1.0, ci_low=None, ci_high=None),
    ]
    events = [
        {"event": "segment", "segment": 1},
        {"event": "refused", "readout": "weak", "hookpoint": "layers.0.resid_post", "reason": "AUC 0.5"},
        {"event": "failure", "step": 7, "what": "a measurement", "reason": "NaN activations"},
        {"event": "note", "text": "nothing"},
    ]
    found = {(m.what, m.hookpoint, m.step, m.reason) for m in summary_of(rows, events).not_measured}
    assert found == {
        ("gone", "", 9, "last measured at step 5"),
        ("bare", "layers.0.resid_post", 9, "the drift has no interval"),
        ("weak", "layers.0.resid_post", None, "AUC 0.5"),
        ("a measurement", "", 7, "NaN activations"),
    }


def test_one_step_only_is_no_drift() -> None:
    summary = summary_of([drift_row("c", "layers.0.resid_post", 0, 0.0)])
    assert (summary.moved, summary.not_detected) == ((), ())
    assert summary.not_measured[0].reason == "only the starting point was measured"


def test_a_start_after_step_0_is_no_drift_either() -> None:
    start = drift_row("c", "layers.0.resid_post", 4, 0.0, null_kind="numeric", null_low=-0.3, null_high=0.3)
    summary = summary_of([start])
    assert (summary.moved, summary.not_detected) == ((), ())
    assert summary.not_measured[0].reason == "only the starting point was measured"
    later = summary_of([start, drift_row("c", "layers.0.resid_post", 6, 0.25)])
    assert later.not_detected[0].within_floor


def test_events_of_abandoned_weights_do_not_count_and_refusals_count_once() -> None:
    refused = {
        "event": "refused",
        "readout": "c",
        "hookpoint": "layers.0.resid_post",
        "reason": "no better than chance",
    }
    failure = {"event": "failure", "what": "a measurement", "reason": "not finite"}
    begun, resumed, afresh = (
        {"event": "segment", "segment": number, "resumed_from": step, "parent": parent}
        for number, step, parent in ((1, None, None), (2, 4, 1), (3, 0, None))
    )
    run = [begun, refused, {**failure, "step": 3}, {**failure, "step": 6}, resumed, refused]
    assert [(m.what, m.step) for m in summary_of([], run).not_measured] == [("c", None), ("a measurement", 3)]
    assert summary_of([], [*run, afresh]).not_measured == ()


def test_empty_timeline() -> None:
    summary = summary_of([], [{"event": "failure", "step": 0, "what": "the baseline", "reason": "no content tokens"}])
    assert summary.step is None and summary.steps == 0
    assert "nothing was measured" in render_text(summary) and "no content tokens" in render_text(summary)


def test_against_a_brute_force_reading_of_random_timelines() -> None:
    rng = random.Random(0)
    for _ in range(20):
        rows = []
        for concept in "abcdefgh":
            for hookpoint in HOOKPOINTS:
                for step in (0, 4, 8):
                    value, half = rng.gauss(0, 0.4), rng.uniform(0.01, 0.4)
                    rows.append(drift_row(concept, hookpoint, step, value, ci_low=value - half, ci_high=value + half))
        table = pd.DataFrame([r.as_row() for r in rows])
        last = table[table["step"] == 8]
        last = last.assign(m=(last["ci_low"] > 0.1) | (last["ci_high"] < -0.1), o=last["value"].abs() > 0.4)
        expect_moved = set(last[last["m"]]["readout"])
        expect_specific = set(last[last["m"] & last["o"]]["readout"])
        summary = summary_of(rng.sample(rows, len(rows)))
        assert set(names(summary.moved)) == expect_moved
        assert set(names(summary.specific)) == expect_specific
        assert set(names(summary.not_detected)) == set("abcdefgh") - expect_moved
        for finding in summary.moved:
            best = last[(last["readout"] == finding.readout) & last["m"]]["value"].abs().max()
            assert abs(finding.value) == best


def test_measurements_inverts_as_row() -> None:
    run = make_run(Path("run"))
    table = run.timeline()
    back = measurements(table)
    assert back == list(run.rows)
    assert all(type(r.step) is int and type(r.value) is float for r in back)


def test_headline_keys_and_values() -> None:
    rows = [
        drift_row("be kind", "layers.3.resid_post", 5, 0.25),
        row("representation/cka", "", "layers.3.resid_post", 5, 0.9),
        row("concept/behaviour_change", "be kind", "", 5, 1.5),
        row("concept/auc", "be kind", "layers.3.resid_post", 5, 0.8),
        row("cost_fraction", "", "", 5, 0.01),
        drift_row("be kind", "layers.3.resid_post", 5, 9.0, text="rollout"),
        row("probe/staleness", "be kind", "layers.3.resid_post", 5, 0.125),
        row("probe/staleness", "be kind", "layers.3.resid_post", 5, 0.5, reader="reference"),
        row("shift/total", "be kind", "layers.3.resid_post", 5, 0.75, text="rollout"),
        row("shift/text", "be kind", "layers.3.resid_post", 5, 0.5, text="rollout"),
    ]
    assert headline(rows, 50) == {
        "interp/concept/behaviour_change/be kind": 1.5,
        "interp/concept/drift/be kind@layers.3.resid_post": 0.25,
        "interp/cost_fraction": 0.01,
        "interp/probe/staleness/be kind@layers.3.resid_post": 0.125,
        "interp/representation/cka@layers.3.resid_post": 0.9,
        "interp/shift/total/be kind@layers.3.resid_post": 0.75,
    }
    priority = [
        key.split("/be kind")[0].split("@")[0]
        for n in range(1, 8)
        for key in {*headline(rows, n)} - {*headline(rows, n - 1)}
    ]
    assert priority == [
        f"interp/{metric}"
        for metric in (
            "cost_fraction",
            "concept/drift",
            "representation/cka",
            "concept/behaviour_change",
            "probe/staleness",
            "shift/total",
        )
    ]
    assert headline(rows, 0) == {}


@pytest.mark.parametrize("concepts", [1, 8, 30])
def test_headline_is_the_same_set_of_keys_at_every_step_and_in_any_order(concepts: int) -> None:
    run = make_run(Path("run"), concepts=[f"concept {i}" for i in range(concepts)])
    rng = random.Random(1)
    chosen = []
    for step in (0, 10, 20, 30, 40):
        rows = [r for r in run.rows if r.step == step]
        chosen.append(tuple(headline(rng.sample(rows, len(rows)), 50)))
        assert all(headline(rows, 50)[headline_key(r)] == r.value for r in rows if headline_key(r) in chosen[-1])
    assert len(set(chosen)) == 1
    named = ("concept/drift", "representation/", "concept/behaviour", "cost_fraction")
    assert len(chosen[0]) == min(50, sum(r.metric.startswith(named) and r.metric != "concept/drift_norm" for r in rows))
    assert all(key.startswith("interp/") for key in chosen[0])
    assert "interp/cost_fraction" in chosen[0]
    for index in range(concepts):
        assert any(key.startswith(f"interp/concept/drift/concept {index}@") for key in chosen[0])


def test_text_is_short_plain_and_claims_no_cause() -> None:
    events = [{"event": "refused", "readout": f"r{i}", "hookpoint": "", "reason": "AUC"} for i in range(40)]
    run = make_run(Path("run"), concepts=[f"concept {i}" for i in range(30)], events=events)
    text = render_text(summarise(run.timeline(), run.events, tolerance=0.1, confidence=0.95))
    assert len(text.splitlines()) <= 35
    assert CAVEAT in text and "nan" not in text.lower()
    assert "  concept 0  +1.4" in text and "where it is largest" in text
    for word in ("because of the preferences", "caused", "due to"):
        assert word not in text


def test_text_names_every_concept_that_was_refused_once_and_is_what_print_shows() -> None:
    places = [f"layers.{layer}.resid_post" for layer in range(4)]
    events = [
        {"event": "refused", "readout": f"weak{i}", "hookpoint": place, "reason": f"AUC 0.{layer}"}
        for i in range(9)
        for layer, place in enumerate(places)
    ]
    summary = summary_of([drift_row("c", places[0], 5, 1.0)], events)
    lines = str(summary).splitlines()
    assert str(summary) == render_text(summary)
    assert "  weak0 at layers.0.resid_post: AUC 0.0 (and at 3 more)" in lines
    assert "  … and weak6, weak7, weak8" in lines
    assert [sum(f"weak{i}" in line for line in lines) for i in range(9)] == [1] * 9


def test_natural_order() -> None:
    assert sorted(["layers.10.mlp_out", "layers.9.mlp_out", "embed", "layers.9.attn_out"], key=natural) == [
        "embed", "layers.9.attn_out", "layers.9.mlp_out", "layers.10.mlp_out",
    ]  # fmt: skip
    assert math.isfinite(len(natural("²x1")))


def test_report_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, interp_rlhf.report.tables, interp_rlhf.report.figures, interp_rlhf.report.html; "
        "print([m for m in ('torch', 'transformers', 'trl', 'plotly', 'jinja2') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_grid_takes_the_latest_step_and_the_policy_where_anybodys_reading_will_do() -> None:
    at = ("c", "layers.10.resid_post")
    rows = [
        row("probe/auc", *at, 5, 0.5),
        row("probe/recall", *at, 9, 0.25),
        row("probe/recall", *at, 9, 0.125, reader="reference"),
        row("probe/auc", "c", "layers.9.resid_post", 9, 0.75, reader="reference"),
    ]
    timeline = SyntheticRun(Path("run"), {}, rows, [False] * 4).timeline()
    found = grid(latest(timeline, "probe"), PROBES, ["c"])
    assert [(c.metric, c.reader) for c in found.columns] == [("probe/auc", "reference"), ("probe/recall", "")]
    values = [(line.hookpoint, [r and r.value for r in line.cells]) for line in found.lines]
    assert values == [("layers.9.resid_post", [0.75, None]), ("layers.10.resid_post", [None, 0.25])]
    assert found.step == 9 and not grid(latest(timeline, "shift"), PROBES, ["c"])
    superseded = SyntheticRun(Path("run"), {}, rows, [False, True, True, True]).timeline()
    assert [r.value for r in latest(superseded, "probe")] == [0.5]
