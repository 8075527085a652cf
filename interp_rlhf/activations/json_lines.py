"""Reading files of JSON lines that people write: every problem names the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interp_rlhf.errors import PromptError


def json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """What each line holds, with its place (``<path>, line <n>``) for messages; empty lines are passed over.

    Lines end at line feeds only: other separators may stand inside a text.

    Raises:
        PromptError: the file cannot be read or is no UTF-8 text, a line is not valid JSON.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise PromptError(f"{path}: expected UTF-8 text, found binary data") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            yield place, json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PromptError(f"{place}: not valid JSON ({getattr(error, 'msg', 'nested too deeply')})") from None
