"""Control runs in an output folder: which of them may be compared, and why the others may not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import START, SyntheticRun, control_rows, make_run, store_controls, store_run

from interp_rlhf.audit.store import RunStore, load_run
from interp_rlhf.report.controls import Controls, find_controls, statistics

CONTROL = {"number": 7, "kind": "pairs swapped", "changed": 12}


@pytest.fixture
def run(tmp_path: Path) -> SyntheticRun:
    made = make_run(tmp_path / "interp", concepts=("a", "b"), steps=(0, 10))
    made.info = {**made.info, "control": None, "seed": 0, "world_size": 1}
    store_run(tmp_path, made.info, made.rows)
    return made


def add(run: SyntheticRun, info: Mapping[str, Any], name: str = "07", **changes: Any) -> Controls:
    """What is found where one control run with this run file lies beside the run."""
    rows = changes.pop("rows", None) or control_rows(run)
    store_run(run.path.parent / "_controls" / name, {**run.info, "control": CONTROL, **info}, rows, **changes)
    return find_controls(load_run(run.path.parent))


def test_none_are_found_where_there_are_none(run: SyntheticRun) -> None:
    assert find_controls(load_run(run.path.parent)) == Controls()


def test_equal_ones_are_used_in_order(run: SyntheticRun) -> None:
    store_controls(run, 3, run.path.parent)
    found = find_controls(load_run(run.path.parent))
    assert [(control.name, control.kind) for control in found.used] == [(f"0{i}", "pairs swapped") for i in (1, 2, 3)]
    assert found.left_out == () and found.itself == ""
    expected = {(r.readout, r.hookpoint): r.value for r in control_rows(run, seed=2) if r.step == 10}
    assert found.used[1].drifts() == expected
    place = {"a": [r.hookpoint for r in run.rows if r.readout == "a" and r.metric == "concept/drift" and r.step == 10]}
    assert statistics(found.used, place)["a"][1] == max(abs(v) for (name, _), v in expected.items() if name == "a")


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"control": None}, "run.json does not say that it is a control run"),
        ({"control": {**CONTROL, "changed": 0}}, "nothing was changed in its data"),
        ({"seed": 1}, "run.json differs in seed: 0 → 1"),
        ({"training_sha256": "ab"}, 'run.json differs in training_sha256: absent → "ab"'),
        ({"prompts": {"n": 9}}, "run.json differs in prompts.n: 64 → 9 (and"),
        ({"config": {"statistics": {"tolerance": 0.2}}}, "run.json differs in config.hookpoints"),
    ],
)
def test_others_are_left_out_with_the_first_difference(run: SyntheticRun, info: dict[str, Any], reason: str) -> None:
    found = add(run, info)
    assert found.used == ()
    ((name, why),) = found.left_out
    assert name == "07" and why.startswith(reason)


def test_what_only_makes_it_a_control_run_or_tells_of_it_may_differ(run: SyntheticRun) -> None:
    free = {"control": 7, "control_within": "topic", "report": False, "headline": 0, "on_error": "raise",
            "schedule": {"every": 500}, "snapshots": {"enabled": False}}  # fmt: skip
    assert len(add(run, {"config": {**run.info["config"], **free}}).used) == 1


@pytest.mark.parametrize(("theirs", "same"), [({"every": 9}, True), ({"method": "eap-ig"}, False), ({}, True)])
def test_circuits_read_with_other_settings_are_not_compared(tmp_path: Path, theirs: dict[str, Any], same: bool) -> None:
    run = make_run(tmp_path / "interp")
    circuits = {"method": "eap", "every": 7}
    run.info["config"]["circuits"] = circuits
    run.info["circuits"] = [{"task": "t", "sha256": "ab"}]
    store_run(tmp_path, run.info, run.rows)
    config = run.info["config"] | {"circuits": circuits | theirs}
    assert [control.circuits for control in add(run, {"config": config}).used] == [same]
    other = {"circuits": [{"task": "t", "sha256": "cd"}], "control": CONTROL | {"number": 8}}
    assert [control.circuits for control in add(run, other, name="08").used] == [same, False]


def test_what_else_a_control_run_measured_or_failed_at_leaves_its_drift_comparable(run: SyntheticRun) -> None:
    failure = {"event": "failure", "step": 10, "what": "circuit of t", "reason": "no"}
    found = add(run, {"circuits": [{"task": "t"}], "sealed_probe": {"sha256": "ab"}}, events=[failure])
    assert len(found.used) == 1 and not found.left_out and not found.used[0].circuits


def test_versions_and_world_size_are_noted(run: SyntheticRun) -> None:
    (control,) = add(run, {"versions": {**run.info["versions"], "torch": "9"}, "world_size": 2}).used
    assert control.notes == ('versions.torch: "2.13.0" → "9"', "world_size: 1 → 2")


def test_permuted_rewards_change_no_row(run: SyntheticRun) -> None:
    assert len(add(run, {"control": {"number": 1, "kind": "rewards permuted", "changed": 0}}).used) == 1


def test_a_number_counts_once(run: SyntheticRun) -> None:
    add(run, {}, "07")
    found = add(run, {}, "08")
    assert [control.name for control in found.used] == ["07"]
    assert found.left_out == (("08", "control run 7 was counted already, as 07"),)


def test_another_last_step_a_failure_or_a_missing_concept(run: SyntheticRun) -> None:
    assert add(run, {}, "01", rows=[r for r in control_rows(run) if r.step == 0]).left_out[0][1] == (
        "its last measured step is 0, expected 10"
    )
    failure = {"event": "failure", "what": "a measurement", "reason": "not finite"}
    found = add(run, {}, "02", events=[{**failure, "step": 10}])
    assert found.left_out[1] == ("02", "a measurement failed at its last step: not finite")
    rows = [r for r in control_rows(run) if (r.readout, r.hookpoint) != ("b", "layers.1.resid_post")]
    assert add(run, {}, "03", rows=rows).left_out[2] == ("03", "it has no drift of b at layers.1.resid_post")
    assert [control.name for control in add(run, {}, "04", events=[{**failure, "step": 5}]).used] == ["04"]


def test_superseded_rows_of_a_control_run_do_not_count(run: SyntheticRun) -> None:
    folder, rows = run.path.parent / "_controls" / "07", control_rows(run)
    store = RunStore(folder)
    store.start({**run.info, "control": CONTROL}, resumed_from=None)
    store.append([replace(r, value=99.0, step=2 * r.step) for r in rows])
    segment = store.start({**run.info, "control": CONTROL}, resumed_from=None)
    store.append([replace(r, segment=segment) for r in rows])
    store.snapshot(0, [], START)
    (control,) = find_controls(load_run(run.path.parent)).used
    assert max(control.drifts().values()) < 9


def test_another_start_is_left_out(run: SyntheticRun) -> None:
    """Other weights read otherwise; other texts cannot be compared at all."""
    for name, changes, reason in (
        ("07", {"start/layers.0.resid_post": np.full((4, 2), 1.01, dtype=np.float32)}, "it began at other weights"),
        ("08", {"text_ids": np.arange(1, 5)}, "it read other texts at its start"),
        ("09", {"start/layers.1.resid_post": np.ones((4, 2))}, "it read other texts or hookpoints at its start"),
    ):
        store = RunStore(run.path.parent / "_controls" / name)
        store.start({**run.info, "control": CONTROL}, resumed_from=None)
        store.append(control_rows(run))
        store.snapshot(0, [], {**START, **changes})
        found = dict(find_controls(load_run(run.path.parent)).left_out)
        assert found[name].startswith(reason)


def test_damaged_and_empty_folders_are_named_without_the_machines_folders(run: SyntheticRun) -> None:
    root = run.path.parent
    store_controls(run, 2, root)
    (root / "_controls" / "03").mkdir()
    timeline = root / "_controls" / "02" / "interp" / "timeline.jsonl"
    timeline.write_bytes(timeline.read_bytes().replace(b"pairs", b"tears").replace(b'"step":0', b'"step":1', 1))
    found = find_controls(load_run(root))
    assert [control.name for control in found.used] == ["01"]
    reasons = dict(found.left_out)
    assert reasons["02"].startswith("interp/timeline.jsonl") and reasons["03"].startswith("found no run, expected")
    assert str(root) not in str(found.left_out)


def test_a_control_run_knows_what_it_is(run: SyntheticRun) -> None:
    add(run, {})
    assert find_controls(load_run(run.path.parent / "_controls" / "07")).itself == "control run 7: pairs swapped"
