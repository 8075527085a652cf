"""A real DPO training killed around a checkpoint and resumed in a new process ends with the same numbers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from reliability.forking import Forks, forks
from reliability.training import STEPS, newest_complete
from trainers.tiny_runs import KEY, assert_rows_equal, live, verify

from interp_rlhf import Snapshot, load_run

#: Killed as soon as this is there: the folder that is being filled, its last file, our snapshot, the copy of it.
MOMENTS = ("checkpoint-4", "checkpoint-4/trainer_state.json", "interp/snapshots/01-step-000004", "checkpoint-4/interp")


pytestmark = pytest.mark.xdist_group("killed")  # one worker, so that it is built once


@pytest.fixture(scope="module")
def children() -> Iterator[Forks]:
    with forks("reliability.training") as found:
        yield found


@pytest.fixture(scope="module")
def whole(children: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert children.run("dpo", str(folder), None) == 0
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(moment: str, children: Forks, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child, started = children.start("dpo", str(folder), None, 5), time.monotonic()
    while not (folder / moment).exists():
        assert time.monotonic() - started < 60, "it never came so far"
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    assert children.wait() == -signal.SIGKILL
    assert not (folder / f"checkpoint-{STEPS}").exists()

    assert verify(folder) == 0
    before = load_run(folder)
    assert all(Snapshot.load(path) for path in (folder / "interp" / "snapshots").glob("[0-9]*"))
    checkpoint = newest_complete(folder)
    assert checkpoint is not None and checkpoint.name in ("checkpoint-2", "checkpoint-4")
    assert checkpoint.name == "checkpoint-4" or moment in MOMENTS[:2], "our snapshot comes after a complete checkpoint"
    assert children.run("dpo", str(folder), str(checkpoint)) == 0

    assert verify(folder) == 0
    run = load_run(folder)
    assert not [path for path in folder.rglob(".interp-*")]
    assert [(segment.number, segment.resumed_from) for segment in run.segments] == [
        (1, None),
        (2, int(checkpoint.name.removeprefix("checkpoint-"))),
    ]
    timeline, expected = run.timeline(), live(load_run(whole).timeline())
    assert not timeline[~timeline.superseded].duplicated([*KEY, "reader"]).any()
    assert len(timeline[timeline.segment == 1]) >= len(before.timeline()), "what had been measured stays"
    rows = live(timeline)
    assert_rows_equal(rows, expected.loc[rows.index], 1e-6)
    steps = rows.index.get_level_values("step")
    assert {0, 2, 6, STEPS} <= set(steps) <= set(expected.index.get_level_values("step"))
    final = rows.xs(STEPS, level="step")
    assert len(final) == len(expected.xs(STEPS, level="step")) and len(final.loc["concept/drift"]) >= 2
    assert (final.loc["concept/drift"].value.abs() > 1e-4).any(), "something moved, so equality says something"
