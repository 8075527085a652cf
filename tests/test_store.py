"""One run's folder: the chain, retention, rotation, resuming, other writers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input import check_message, contents
from stored_runs import INFO, checkpoint, clean, measure, notes, resume, row, stored_run, tensors, with_tensors

from interp_rlhf import Snapshot, load_run
from interp_rlhf.audit.store import Run, RunStore
from interp_rlhf.audit.verification import verify_run
from interp_rlhf.cli import main
from interp_rlhf.errors import FormatError, InterpError, MeasurementError


def parents(run: Run) -> dict[str, str | None]:
    return {snapshot.name: snapshot.parent for snapshot in run.snapshots}


def superseded(output: Path) -> set[tuple[int, int]]:
    return {(found["segment"], found["step"]) for found in load_run(output).rows if found["superseded"]}


# -- one segment -------------------------------------------------------------------------------------------------------


def test_a_chain_of_parents(tmp_path: Path) -> None:
    store = stored_run(tmp_path)
    run = load_run(tmp_path)
    first, second, third = run.snapshots
    assert [s.name for s in run.snapshots] == ["01-step-000000", "01-step-000010", "01-step-000020"]
    assert parents(run) == {first.name: None, second.name: first.name, third.name: second.name}
    assert (first.parent_hash, second.parent_hash, third.parent_hash) == (None, first.digest, second.digest)
    assert [s.digest for s in store.snapshots] == [s.digest for s in run.snapshots]
    assert (first.checkpoint, third.checkpoint) == (None, "checkpoint-20")
    told = [(event["snapshot"], event["sha256"]) for event in run.events if event["event"] == "snapshot"]
    assert told == [(s.name, s.digest) for s in run.snapshots]
    assert clean(tmp_path)


def test_load_run_gives_what_was_written(tmp_path: Path) -> None:
    stored_run(tmp_path)
    for path in (tmp_path, str(tmp_path), tmp_path / "interp"):
        run = load_run(path)
        assert run.path == (tmp_path / "interp").resolve() and dict(run.info) == INFO
        assert [(s.number, s.resumed_from, s.parent, s.file) for s in run.segments] == [(1, None, None, "run.json")]
        assert [folder.name for folder in run.checkpoint_folders] == ["checkpoint-10", "checkpoint-20"]
        timeline = run.timeline()
        assert sorted(timeline.step) == [0, 0, 10, 10, 20, 20] and not timeline.superseded.any()
        drift = timeline[timeline.metric == "concept/drift"]
        np.testing.assert_array_equal(drift.value, 0.01 * drift.step)
    for nothing in (tmp_path / "nowhere", tmp_path / "checkpoint-10"):
        with pytest.raises(FormatError, match="found no run"):
            load_run(nothing)


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    stored_run(tmp_path, (0, 5, 10, 100))
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "checkpoint-7").write_text("no folder")
    names = [folder.name for folder in load_run(tmp_path).checkpoint_folders]
    assert names == ["checkpoint-5", "checkpoint-10", "checkpoint-100"]


def test_the_copy_beside_the_checkpoint_has_the_same_bytes(tmp_path: Path) -> None:
    stored_run(tmp_path)
    for step in (10, 20):
        snapshot = tmp_path / "interp" / "snapshots" / f"01-step-{step:06d}"
        assert contents(tmp_path / f"checkpoint-{step}" / "interp") == contents(snapshot)
        assert len(contents(snapshot)) == 3


def test_texts_are_written_once(tmp_path: Path) -> None:
    store = stored_run(tmp_path)
    path = store.texts("texts", [{"text": "Is it so?", "id": "a"}])
    assert path.read_text() == '{"id":"a","text":"Is it so?"}\n' and path == tmp_path / "_interp" / "01-texts.jsonl"
    before = contents(tmp_path)
    with pytest.raises(FormatError, match="other texts, nothing is written over"):
        store.texts("texts", [{"id": "a", "text": "It is not."}])
    with pytest.raises(FormatError, match="plain file name"):
        store.texts("../texts", [])
    assert contents(tmp_path) == before
    assert sum(event["event"] == "texts" for event in load_run(tmp_path).events) == 1


MISUSES: dict[str, tuple[type[Exception], str, Callable[[RunStore], Any]]] = {
    "the same step": (FormatError, "a snapshot of step 20 after step 20", lambda s: s.snapshot(20, [], {})),
    "an earlier step": (FormatError, "a snapshot of step 15 after step 20", lambda s: s.snapshot(15, [], {})),
    "a negative step": (FormatError, "step -1", lambda s: s.snapshot(-1, [], {})),
    "a row of another segment": (FormatError, "of segment 2, expected 1", lambda s: s.append([row(2, 30)])),
    "a snapshot with such a row": (FormatError, "of segment 2", lambda s: s.snapshot(30, [row(2, 30)], {})),
    "a value that is none": (MeasurementError, "finite", lambda s: s.append([row(1, 30, float("nan"))])),
    "a note without text": (FormatError, "note event: text", lambda s: s.event("note")),
    "a snapshot of nothing JSON knows": (FormatError, "JSON", lambda s: s.snapshot(30, [], {}, cost={"x": object()})),
}


@pytest.mark.parametrize("what", MISUSES)
def test_misuse_changes_nothing(what: str, tmp_path: Path) -> None:
    error, words, misuse = MISUSES[what]
    store = stored_run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(error) as caught:
        misuse(store)
    check_message(str(caught.value), (words,))
    assert contents(tmp_path) == before
    measure(store, 30)
    assert clean(tmp_path)


def test_nothing_before_the_start(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "new")
    for use in (lambda: store.append([]), lambda: store.event("note", text="x"), store.baseline):
        with pytest.raises(InterpError, match="has not been started"):
            use()
    assert contents(tmp_path) == {}


def test_a_reserved_key_of_the_run_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="reserved key 'segment'"):
        RunStore(tmp_path).start({"segment": 3}, resumed_from=None)


# -- retention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, [0, 50]), (2, [0, 40, 50]), (9, [0, 10, 20, 30, 40, 50]), (None, [0, 10, 20, 30, 40, 50])]
)
def test_step_0_and_the_newest_are_kept(keep: int | None, kept: list[int], tmp_path: Path) -> None:
    steps = (0, 10, 20, 30, 40, 50)
    stored_run(tmp_path, steps, keep=keep)
    assert with_tensors(tmp_path) == kept
    run = load_run(tmp_path)
    assert [snapshot.step for snapshot in run.snapshots] == list(steps), "manifests and rows stay"
    assert all(len(snapshot.rows) == 2 for snapshot in run.snapshots)
    pruned = [name for snapshot in run.snapshots for name in snapshot.manifest["pruned"]]
    assert pruned == [f"01-step-{step:06d}" for step in steps if step not in kept], "each is declared once"
    for snapshot in run.snapshots:
        if snapshot.step not in kept:
            with pytest.raises(FormatError, match=r"removed by the retention setting snapshots\.keep"):
                snapshot.arrays()
            copy = Snapshot.load(tmp_path / f"checkpoint-{snapshot.step}" / "interp")
            np.testing.assert_array_equal(
                copy.arrays()["direction/honesty"], tensors(snapshot.step)["direction/honesty"]
            )
    findings = [finding.file for finding in verify_run(tmp_path).findings if finding.severity == "note"]
    assert findings == [f"interp/snapshots/{name}/tensors.safetensors" for name in pruned]
    assert clean(tmp_path)


def test_tensors_that_nobody_gave_up_are_missed(tmp_path: Path) -> None:
    stored_run(tmp_path, (0, 10, 20, 30), keep=2)
    (tmp_path / "interp" / "snapshots" / "01-step-000030" / "tensors.safetensors").unlink()
    assert main(["verify", str(tmp_path)]) == 1


def test_retention_goes_on_after_a_resume(tmp_path: Path) -> None:
    stored_run(tmp_path, (0, 10, 20), keep=2)
    store = resume(tmp_path, 20)
    measure(store, 30, keep=2)
    measure(store, 40, keep=1)
    assert with_tensors(tmp_path) == [0, 40]
    assert clean(tmp_path)


def test_rotation_takes_checkpoints_only(tmp_path: Path) -> None:
    """The trainer deletes its old checkpoint folders, our copies with them: nothing else is lost."""
    stored_run(tmp_path, (0, 10, 20, 30))
    before = contents(tmp_path / "interp")
    for step in (10, 20):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    assert contents(tmp_path / "interp") == before
    run = load_run(tmp_path)
    assert [folder.name for folder in run.checkpoint_folders] == ["checkpoint-30"]
    assert all(snapshot.arrays() for snapshot in run.snapshots)
    gone = [finding for finding in verify_run(tmp_path).findings if finding.severity == "note"]
    assert [(finding.file, finding.found) for finding in gone] == [
        ("checkpoint-10", "no folder: rotated away"),
        ("checkpoint-20", "no folder: rotated away"),
    ]
    assert clean(tmp_path)
    resume(tmp_path, 30, (40,))
    shutil.rmtree(tmp_path / "checkpoint-30")
    assert clean(tmp_path)


def test_a_start_does_not_change_the_age_of_checkpoints(tmp_path: Path) -> None:
    stored_run(tmp_path)
    (tmp_path / "checkpoint-10" / f".interp-{2**31 - 2}-{'0' * 32}").mkdir()
    shutil.rmtree(tmp_path / "checkpoint-20" / "interp")
    for step in (10, 20):
        os.utime(tmp_path / f"checkpoint-{step}", (1_000_000 + step, 1_000_000 + step))
    resume(tmp_path, 20)
    assert [int((tmp_path / f"checkpoint-{step}").stat().st_mtime) for step in (10, 20)] == [1_000_010, 1_000_020]
    assert clean(tmp_path)


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_a_resumed_segment_forks_at_its_checkpoint(tmp_path: Path) -> None:
    stored_run(tmp_path, (0, 10, 20, 30))
    store = resume(tmp_path, 10, (20, 40))
    run = load_run(tmp_path)
    assert store.segment == 2
    assert [(s.number, s.resumed_from, s.parent, s.file) for s in run.segments] == [
        (1, None, None, "run.json"),
        (2, 10, 1, "run-02.json"),
    ]
    found = parents(run)
    assert found["02-step-000020"] == "01-step-000010" and found["02-step-000040"] == "02-step-000020"
    assert found["01-step-000030"] == "01-step-000020", "what was abandoned stays as it was"
    assert superseded(tmp_path) == {(1, 20), (1, 30)}
    assert Snapshot.load(tmp_path / "checkpoint-20" / "interp").name == "02-step-000020"
    assert main(["verify", str(tmp_path)]) == 0
    resume(tmp_path, 40, (50,))
    assert parents(load_run(tmp_path))["03-step-000050"] == "02-step-000040"
    assert superseded(tmp_path) == {(1, 20), (1, 30)}


def test_gone_on_from_an_abandoned_checkpoint(tmp_path: Path) -> None:
    """Step 30 of segment 1 was left behind by segment 2; resuming there goes back to the line of segment 1."""
    stored_run(tmp_path, (0, 10, 20, 30))
    resume(tmp_path, 10, (15,))
    resume(tmp_path, 30, (40,))
    run = load_run(tmp_path)
    assert (run.segments[2].resumed_from, run.segments[2].parent) == (30, 1)
    assert parents(run)["03-step-000040"] == "01-step-000030"
    assert superseded(tmp_path) == {(2, 15)}
    assert clean(tmp_path)


def test_a_start_from_scratch_supersedes_everything(tmp_path: Path) -> None:
    stored_run(tmp_path)
    before = contents(tmp_path / "interp" / "snapshots")
    store = resume(tmp_path, None, (0, 10))
    run = load_run(tmp_path)
    assert (run.segments[1].resumed_from, run.segments[1].parent) == (0, None)
    assert parents(run)["02-step-000000"] is None and parents(run)["02-step-000010"] == "02-step-000000"
    assert superseded(tmp_path) == {(1, 0), (1, 10), (1, 20)}
    after = contents(tmp_path / "interp" / "snapshots")
    assert {name: after[name] for name in before} == before, "nothing was written over"
    assert store.baseline() is not None
    assert clean(tmp_path)


def test_the_baseline_is_that_of_the_line_resumed(tmp_path: Path) -> None:
    def start(output: Path, scale: float) -> RunStore:
        store = RunStore(output)
        store.start(INFO, resumed_from=None)
        store.snapshot(0, [], {"start": np.full(3, scale, np.float32)})
        return store

    assert start(tmp_path, 1.0).baseline()["start"].tolist() == [1.0] * 3
    measure(resume(tmp_path, 0), 0)  # a start from scratch, superseded itself below
    measure(start(tmp_path, 2.0), 10)
    assert resume(tmp_path, 10).baseline()["start"].tolist() == [2.0] * 3
    assert resume(tmp_path, 10, (20,)).baseline()["start"].tolist() == [2.0] * 3
    assert resume(tmp_path, 20).baseline()["start"].tolist() == [2.0] * 3
    assert resume(tmp_path, None).baseline() is None, "a start from scratch has none yet"


def test_a_baseline_that_is_damaged_is_refused(tmp_path: Path) -> None:
    stored_run(tmp_path)
    place = tmp_path / "interp" / "snapshots" / "01-step-000000" / "tensors.safetensors"
    place.write_bytes(place.read_bytes()[:-1] + b"\0")
    with pytest.raises(FormatError, match="found other bytes"):
        resume(tmp_path, 20).baseline()


def test_the_start_of_a_run_that_was_not_measured_before(tmp_path: Path) -> None:
    checkpoint(tmp_path, 30)
    store = resume(tmp_path, 30, (30, 40))
    assert parents(load_run(tmp_path)) == {"01-step-000030": None, "01-step-000040": "01-step-000030"}
    assert "the start is unknown here" in notes(tmp_path)[0]
    measure(store, 50, keep=1)
    assert with_tensors(tmp_path) == [30, 50]
    found = resume(tmp_path, 50).baseline()
    np.testing.assert_array_equal(found["direction/honesty"].numpy(), tensors(30)["direction/honesty"])


def forget_copy(output: Path) -> None:
    shutil.rmtree(output / "interp" / "snapshots" / "01-step-000020")
    lines = (output / "interp" / "timeline.jsonl").read_bytes().splitlines(keepends=True)
    told = next(i for i, line in enumerate(lines) if b"01-step-000020" in line)
    (output / "interp" / "timeline.jsonl").write_bytes(b"".join(lines[:told]))


REMARKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another run's snapshot": (forget_copy, "resumed from step 20: its snapshot is of another run"),
    "other weights": (
        lambda output: (output / "checkpoint-20" / "model.safetensors").write_bytes(b"other"),
        "resumed from step 20: the weights of checkpoint-20 are not those of its snapshot",
    ),
    "a damaged copy": (
        lambda output: (output / "checkpoint-20" / "interp" / "snapshot.json").write_bytes(b"{}"),
        "snapshot.json: found no seal, expected a sealed JSON document",
    ),
    "no checkpoint": (
        lambda output: shutil.rmtree(output / "checkpoint-20"),
        "resumed from step 20: no snapshot beside that checkpoint, taken to be the newest run's",
    ),
}


@pytest.mark.parametrize("what", REMARKS)
def test_doubts_about_the_checkpoint_are_told(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage, words = REMARKS[what]
    stored_run(tmp_path)
    damage(tmp_path)
    resume(tmp_path, 20)
    (said,) = notes(tmp_path)
    check_message(said, (words,))
    assert said in caplog.messages
    assert load_run(tmp_path).segments[1].parent == 1, "the newest run is the best guess"


def test_nothing_is_said_where_nothing_is_odd(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored_run(tmp_path)
    resume(tmp_path, 20)
    assert notes(tmp_path) == [] and not caplog.messages
    resume(tmp_path, 20, config={"seed": 1})
    assert notes(tmp_path) == ["resumed with other settings than the run was started with: config.seed: 0 → 1"]
    resume(tmp_path, None, config={"seed": 2})
    assert len(notes(tmp_path)) == 1, "a start from scratch may be another run"


# -- folders that are not ours, other writers --------------------------------------------------------------------------


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "interp").mkdir()
    (tmp_path / "interp" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(FormatError) as caught:
        RunStore(tmp_path).start(INFO, resumed_from=None)
    check_message(str(caught.value), ("interp", "'notes.txt'"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["timeline.jsonl", "snapshots/01-step-000010/snapshot.json"])
def test_a_damaged_run_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    stored_run(tmp_path)
    place = tmp_path / "interp" / name
    place.write_bytes(place.read_bytes().replace(b"0", b"1", 1))
    before = contents(tmp_path)
    with pytest.raises(FormatError) as caught:
        RunStore(tmp_path).start(INFO, resumed_from=None)
    check_message(str(caught.value), (name,))
    assert contents(tmp_path) == before


def test_a_second_writer_is_noticed(tmp_path: Path) -> None:
    first = stored_run(tmp_path)
    second = resume(tmp_path, 20)
    before = contents(tmp_path)
    for write in (lambda: measure(first, 30, save=False), lambda: first.event("note", text="x")):
        with pytest.raises(FormatError, match="another process writes into this run"):
            write()
    assert contents(tmp_path) == before
    measure(second, 30)
    assert clean(tmp_path)
