"""Forked children of a fresh process, for tests that kill them: imports are paid once. As a script it is that process.

Each child runs one function of a module's ``WORK``; it ends by itself or by a signal, the test's or its own.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


class Forks:
    """The test's side: start a child, kill it, wait for it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def start(self, work: str, *words: Any) -> int:
        """Start a child and return its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([work, *words]) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """The child's exit code; negative for a signal. It has gone when this returns."""
        return os.waitstatus_to_exitcode(int(self._line()))

    def run(self, work: str, *words: Any) -> int:
        """Start a child and wait for it."""
        self.start(work, *words)
        return self.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the forking process has gone: {self.process.wait()}"
        return line


@contextmanager
def forks(module: str) -> Iterator[Forks]:
    """A fresh process that has imported ``module`` and forks children that run one of its ``WORK``."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, __file__, module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        yield Forks(process)
    finally:
        process.communicate(timeout=60)  # closes its input: it ends after the child it waits for


def serve(module: str) -> None:
    """One child at a time: its process id when it has started, its wait status when it has ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed goes to standard error
    work = importlib.import_module(module)
    work.warm_up()
    for line in sys.stdin:
        name, *words = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work.WORK[name](*words)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(child, flush=True, file=answers)
        print(os.waitpid(child, 0)[1], flush=True, file=answers)


if __name__ == "__main__":
    serve(sys.argv[1])
