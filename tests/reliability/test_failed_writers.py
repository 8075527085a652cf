"""What a writer that failed halfway leaves, the next start finishes, tells of and takes away."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from bad_input import contents
from stored_runs import INFO, clean, measure, notes, resume, stored_run, with_tensors

from interp_rlhf import Snapshot, load_run
from interp_rlhf.audit import store as store_module
from interp_rlhf.audit.store import RunStore
from interp_rlhf.audit.timeline import TimelineWriter
from interp_rlhf.audit.verification import verify_run
from interp_rlhf.cli import main
from interp_rlhf.errors import FormatError


class Failed(Exception):
    pass


def fails(*words: Any, **named: Any) -> None:
    raise Failed


@pytest.mark.parametrize(
    ("where", "name"), [(RunStore, "_announce"), (store_module, "copy_to_checkpoint"), (RunStore, "_prune")]
)
def test_a_snapshot_whose_writer_failed_halfway(
    where: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, and not yet told of; not yet copied; or older tensors not yet removed: the next start does the rest."""
    store = stored_run(tmp_path, (0, 10), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fails)
        with pytest.raises(Failed):
            measure(store, 20, keep=1)
    assert main(["verify", str(tmp_path)]) == 0, "before the next start, too"
    store = resume(tmp_path, 20)
    assert with_tensors(tmp_path) == [0, 20]
    measure(store, 30)
    told = [event["snapshot"] for event in load_run(tmp_path).events if event["event"] == "snapshot"]
    assert told == ["01-step-000000", "01-step-000010", "01-step-000020", "02-step-000030"]
    copy, snapshot = tmp_path / "checkpoint-20" / "interp", tmp_path / "interp" / "snapshots" / "01-step-000020"
    assert contents(copy) == contents(snapshot)
    assert with_tensors(tmp_path) == [0, 20, 30]
    assert load_run(tmp_path).segments[1].parent == 1
    assert clean(tmp_path)


def test_a_copy_of_the_run_before_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 20 was measured again by a run that went back, which failed before it copied."""
    stored_run(tmp_path)
    store = resume(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "copy_to_checkpoint", fails)
        with pytest.raises(Failed):
            measure(store, 20)
    (problem,) = verify_run(tmp_path).problems
    assert (problem.severity, problem.found) == ("warning", "the copy of 01-step-000020")
    resume(tmp_path, 20)
    assert Snapshot.load(tmp_path / "checkpoint-20" / "interp").name == "02-step-000020"
    assert notes(tmp_path) == ["checkpoint-20: the copy of 02-step-000020 was missing and has been made"]
    assert load_run(tmp_path).segments[2].parent == 2
    assert clean(tmp_path)


def test_no_copy_beside_other_weights(tmp_path: Path) -> None:
    stored_run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-20" / "interp")
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"other weights")
    resume(tmp_path, 20)
    assert not (tmp_path / "checkpoint-20" / "interp").exists()


def test_a_copy_that_cannot_be_made_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored_run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-20" / "interp")

    def full(*words: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "copy_to_checkpoint", full)
        resume(tmp_path, 20)
    assert "the copy of 01-step-000020 was missing and could not be made ([Errno 28] No space" in notes(tmp_path)[0]
    resume(tmp_path, 20, (30,))
    assert clean(tmp_path)


def test_a_run_file_whose_run_never_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(TimelineWriter, "begin_segment", fails)
            with pytest.raises(Failed):
                RunStore(tmp_path).start(INFO, resumed_from=None)
        with pytest.raises(FormatError, match=r"found no (run|segment)"):
            load_run(tmp_path)
    store = stored_run(tmp_path)
    assert store.segment == 3 and load_run(tmp_path).segments[0].resumed_from is None
    assert [text.split(",")[0] for text in notes(tmp_path)] == ["run.json was written", "run-02.json was written"]
    assert json.loads((tmp_path / "interp" / "run-03.json").read_bytes())["segment"] == 3
    assert clean(tmp_path)


def test_leftovers_are_removed_wherever_we_write(tmp_path: Path) -> None:
    stored_run(tmp_path)
    name = f".interp-{2**31 - 2}-{'0' * 32}"
    for folder in ("interp", "interp/snapshots", "_interp", "checkpoint-10"):
        (tmp_path / folder / name).mkdir()
        (tmp_path / folder / name / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / "interp" / "snapshots" / f".interp-{os.getppid()}-{'1' * 32}").mkdir()
    assert main(["verify", str(tmp_path)]) == 0
    resume(tmp_path, 20)
    assert [path.name for path in tmp_path.rglob(".*")] == [f".interp-{os.getppid()}-{'1' * 32}"], "its writer is alive"
    assert notes(tmp_path) == ["4 unfinished files of a killed writer were removed"]
