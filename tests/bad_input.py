"""What the tests of bad input share: a pickle that tells on whoever loads it, a folder's content, one-line messages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

#: A config that measures little and hides nothing.
SMALL: dict[str, Any] = {
    "prompts": {"n": 16},
    "concepts": {"n_pairs": 32, "packs": []},
    "statistics": {"bootstrap": 100, "directions": 200},
    "on_error": "raise",
}


class Executed:
    """A pickle that would leave a file behind if anything loaded it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes, every link's target and every folder below ``folder``."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def check_message(message: str, words: tuple[str, ...] = ()) -> None:
    assert len(message.splitlines()) == 1 and len(message) < 1000
    assert all(word in message for word in words), (message, words)
