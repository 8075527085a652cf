"""Writers killed at any moment: what is on disk is readable, verifies, and the next start goes on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from reliability.forking import Forks, forks
from reliability.writing import EVERY, complete_checkpoints
from stored_runs import INFO, checkpoint, row, stored_run, tensors

from interp_rlhf import FormatError, Snapshot, load_run
from interp_rlhf.audit.store import Run, RunStore
from interp_rlhf.audit.timeline import TimelineWriter
from interp_rlhf.audit.verification import verify_run
from interp_rlhf.cli import main

#: What a killed writer may leave, all of it known for what it is.
LEFT = (
    "what a killed writer left",
    "a torn last line",
    "lines cut off that no event tells of",
    "a run file no event tells of",
    "no copy of the snapshot",
    "the copy of ",
)


@pytest.fixture(scope="module")
def children() -> Iterator[Forks]:
    with forks("reliability.writing") as found:
        yield found


def newest(folder: Path) -> int | None:
    """Step of the newest checkpoint that can be resumed."""
    return max(complete_checkpoints(folder), default=None)


def check_readable(folder: Path) -> None:
    """After a kill: all that is there is whole, and what is not is known for what a killed writer leaves."""
    for path in folder.glob("interp/snapshots/[0-9]*"):
        snapshot = Snapshot.load(path)
        assert [(found["step"], found["segment"]) for found in snapshot.rows] == [(snapshot.step, snapshot.segment)] * 2
    try:
        run = load_run(folder)
    except FormatError as error:
        assert "found no run" in str(error) or "found no segment" in str(error)
        assert not list(folder.glob("interp/snapshots/*")), "nothing has begun"
        return
    check_rows(run)
    verified = verify_run(folder)
    assert verified.ok, [finding for finding in verified.findings if finding.severity == "failure"]
    saved = {snapshot.manifest["checkpoint"]["folder"] for snapshot in run.snapshots if snapshot.step}
    for problem in verified.problems:  # weights only where a later run was killed while it wrote over a checkpoint
        assert problem.found.startswith(LEFT) or problem.file.split("/")[0] in saved, problem


def check_rows(run: Run) -> set[int]:
    """Nothing is measured twice; values are those of a run that was never killed. Gives the steps that count."""
    live = [found for found in run.rows if not found["superseded"]]
    keys = [(found["metric"], found["readout"], found["hookpoint"], found["step"]) for found in live]
    assert len(set(keys)) == len(keys)
    for found in live:
        assert found["value"] == (0.01 * found["step"] if found["metric"] == "concept/drift" else 1.0)
    return {found["step"] for found in live}


def check_finished(folder: Path, last: int) -> None:
    """After a start that was not killed: no trace of the kills but in the timeline, and one line from 0 to the end."""
    assert not list(folder.rglob(".*"))
    assert main(["verify", str(folder)]) == 0
    run = load_run(folder)
    steps, asked = check_rows(run), set(range(0, last + 1, EVERY))
    resumed = {segment.resumed_from for segment in run.segments}
    assert steps <= asked <= steps | resumed, "a step whose weights were saved right before the kill may lack its rows"
    by_name = {snapshot.name: snapshot for snapshot in run.snapshots}
    line = [max(run.snapshots, key=lambda snapshot: (snapshot.segment, snapshot.step))]
    while line[-1].parent is not None:
        line.append(by_name[line[-1].parent])
    assert line[0].step == last and line[-1].step == 0
    assert line[0].arrays() and line[-1].arrays(), "the newest and the start are kept"
    copy = Snapshot.load(folder / f"checkpoint-{last}" / "interp")
    assert copy.digest == line[0].digest


# -- at every call that changes the disk -------------------------------------------------------------------------------


def test_before_every_change_of_a_first_run(children: Forks, tmp_path: Path) -> None:
    for n in range(1, 200):
        folder = tmp_path / str(n)
        code = children.run("die_at", n, str(folder), None, 10)
        check_readable(folder)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        begun = newest(folder)
        last = (begun or 0) + EVERY
        assert children.run("go_on", str(folder), begun, last) == 0
        check_finished(folder, last)
        assert not verify_run(folder).problems
    assert 40 < n < 199


@pytest.mark.parametrize("begun", [20, 10], ids=["that prunes", "that went back"])
def test_before_every_change_of_a_resumed_run(begun: int, children: Forks, tmp_path: Path) -> None:
    """Gone on from the newest checkpoint; or from the one before, so that the newest is written over."""
    stored_run(tmp_path / "before", (0, 10, 20), keep=2)
    for n in range(1, 200):
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(n))
        code = children.run("die_at", n, str(folder), begun, begun + EVERY)
        check_readable(folder)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        last = newest(folder) + EVERY
        assert children.run("go_on", str(folder), newest(folder), last) == 0
        check_finished(folder, last)
        kept = sorted(path.parent.name for path in folder.glob("interp/snapshots/*/tensors.safetensors"))
        assert len(kept) == 3 and kept[0] == "01-step-000000", "whoever was killed, its pruning was finished"
        overwritten = () if begun == 20 else ("checkpoint-20/model.safetensors", "checkpoint-20/adapter_config.json")
        assert all(problem.file in overwritten for problem in verify_run(folder).problems)
    assert 20 < n < 199


def test_again_and_again_while_repairing(children: Forks, tmp_path: Path) -> None:
    """Each start dies one call later than the one before, in the same folder; no torn line is ever lost."""
    stored_run(tmp_path, (0, 10), keep=2)
    for n in range(1, 200):
        begun = newest(tmp_path)
        with open(tmp_path / "interp" / "timeline.jsonl", "ab") as timeline:
            timeline.write(b'{"half":%03d' % n)
        code = children.run("die_at", n, str(tmp_path), begun, begun + EVERY)
        check_readable(tmp_path)
        kept = b"".join(path.read_bytes() for path in (tmp_path / "interp").glob("timeline*"))
        assert all(b'{"half":%03d' % number in kept for number in range(1, n + 1))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert 20 < n < 199
    check_finished(tmp_path, begun + EVERY)


def test_in_the_middle_of_every_line(children: Forks, tmp_path: Path) -> None:
    """The last line is torn; the next start keeps it aside, and may be killed in the middle of saying so."""
    for n in range(1, 50):
        begun = newest(tmp_path)
        code = children.run("die_writing", n, str(tmp_path), begun, 20)
        check_readable(tmp_path)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert not (tmp_path / "interp" / "timeline.jsonl").read_bytes().endswith(b"\n")
    check_finished(tmp_path, 20)
    torn = sorted(path.name for path in tmp_path.glob("interp/timeline.torn-*"))
    told = sorted(event["file"] for event in load_run(tmp_path).events if event.get("file", "").startswith("timeline."))
    assert torn == told and len(torn) == n - 1 >= 5
    assert not verify_run(tmp_path).problems


# -- at any moment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_at_random_moments(seed: int, children: Forks, tmp_path: Path) -> None:
    """Ten kills of a writer that never ends, each time gone on from one of the newest checkpoints."""
    draw = random.Random(seed)
    for _ in range(10):
        found = complete_checkpoints(tmp_path)
        begun = draw.choice(found[-2:]) if found else None
        child = children.start("go_on", str(tmp_path), begun, 10**6)
        time.sleep(draw.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert children.wait() == -signal.SIGKILL
        check_readable(tmp_path)
    last = (newest(tmp_path) or 0) + 20
    assert children.run("go_on", str(tmp_path), newest(tmp_path), last) == 0
    check_finished(tmp_path, last)
    assert last > 20, "it was killed before it did anything"


# -- when the power is cut ---------------------------------------------------------------------------------------------


class Disk:
    """What a power cut would leave: each file and each folder as of its last flush."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, int]] = {}
        real = os.fsync

        def fsync(descriptor: int) -> None:
            place, number = Path(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor).st_ino
            if place.is_dir():
                self.folders[number] = {path.name: path.stat().st_ino for path in place.iterdir()}
            else:
                self.files[number] = place.read_bytes()
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    def check(self, *places: Path) -> None:
        """Everything at and below the places is on disk, and nothing that was removed comes back."""
        for path in [found for place in places for found in (place, *place.rglob("*"))]:
            number = path.stat().st_ino
            assert self.folders.get(path.parent.stat().st_ino, {}).get(path.name) == number, f"{path}: its name"
            if path.is_file():
                assert self.files.get(number) == path.read_bytes(), f"{path}: its bytes"
            elif number in self.folders or any(path.iterdir()):
                assert set(self.folders[number]) == {inside.name for inside in path.iterdir()}, path


def test_when_a_call_returns_its_files_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, ours = Disk(monkeypatch), tmp_path / "interp"
    for begun in (None, 20, 40):
        store = RunStore(tmp_path)
        store.start(INFO, resumed_from=begun)
        disk.check(ours)
        for step in (0 if begun is None else begun + 10, (begun or 0) + 20):
            store.append([row(store.segment, step)])
            disk.check(ours)
            saved = checkpoint(tmp_path, step)
            store.snapshot(step, [], tensors(step), checkpoint=saved, keep=1)
            disk.check(ours, saved / "interp")
        store.texts("texts", [{"id": "a", "text": "Is it so?"}])
        disk.check(ours, tmp_path / "_interp")
        with open(ours / "timeline.jsonl", "ab") as torn:
            torn.write(b'{"half')
        (ours / f".interp-{2**31 - 2}-{'0' * 32}").mkdir()

    (tmp_path / "alone").mkdir()
    os.fsync(os.open(tmp_path, os.O_RDONLY))
    TimelineWriter(tmp_path / "alone" / "timeline.jsonl").append([row(1, 0)])
    disk.check(tmp_path / "alone")
