"""What the killed children do: a trainer and its callback, without a model, writing as fast as they can."""

from __future__ import annotations

import builtins
import io
import itertools
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stored_runs import INFO, measure

from interp_rlhf.audit.store import RunStore
from interp_rlhf.audit.timeline import TimelineWriter

#: Steps between two checkpoints.
EVERY = 10
#: Calls of ``os`` that change what is on disk, or see to it that it stays.
CALLS = ("fsync", "replace", "rename", "truncate", "ftruncate", "mkdir", "unlink", "rmdir")


def go_on(folder: str, resumed_from: int | None, last: int) -> None:
    """Start from a checkpoint or from scratch and measure up to ``last``."""
    store = RunStore(folder)
    store.start(INFO, resumed_from=resumed_from)
    if not resumed_from:
        store.texts("texts", [{"id": "a", "text": "Is it so?"}])
    for step in range(resumed_from + EVERY if resumed_from else 0, last + 1, EVERY):
        measure(store, step, keep=2)


def die_at(n: int, folder: str, resumed_from: int | None, last: int) -> None:
    """As :func:`go_on`, killed before the ``n``-th call that changes the disk, or between a file and its bytes."""
    calls = itertools.count(1)

    def tick() -> None:
        if next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            tick()
            return real(*words, **named)

        return call

    def opening(file: Any, mode: str = "r", *words: Any, **named: Any) -> Any:
        if mode.startswith("r"):
            return real_open(file, mode, *words, **named)
        tick()
        opened = real_open(file, mode, *words, **named)
        tick()
        return opened

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    real_open = io.open
    builtins.open = io.open = opening  # pathlib calls the second one
    go_on(folder, resumed_from, last)


def die_writing(n: int, folder: str, resumed_from: int | None, last: int) -> None:
    """As :func:`go_on`, killed in the middle of the ``n``-th write to the timeline."""
    count, real = itertools.count(1), TimelineWriter._append_bytes

    def append(self: TimelineWriter, data: bytes) -> None:
        if next(count) < n:
            return real(self, data)
        with open(self.path, "ab") as file:
            file.write(data[: len(data) * 2 // 3])
        os.kill(os.getpid(), signal.SIGKILL)

    TimelineWriter._append_bytes = append
    go_on(folder, resumed_from, last)


def warm_up() -> None:
    """What is looked up once per process is looked up before the first child; nothing waits for the disk.

    What was written outlives its process; flushing it guards against power cuts, which are tested without a kill.
    """
    os.fsync = lambda descriptor: None
    with tempfile.TemporaryDirectory() as folder:
        go_on(folder, None, EVERY)


WORK: dict[str, Callable[..., None]] = {"go_on": go_on, "die_at": die_at, "die_writing": die_writing}


def complete_checkpoints(folder: Path) -> list[int]:
    """Steps of checkpoints that can be resumed: the trainer's state is written last."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if path.read_bytes() == b"{}"]
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in found)
