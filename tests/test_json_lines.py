"""json_lines.py: rows with their places, and problems that name them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from interp_rlhf.activations.json_lines import json_lines
from interp_rlhf.errors import PromptError


def test_rows_come_with_their_lines_and_separators_inside_a_text_end_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\u2028two\x85three"}, {"text": "four\rfive"}, [1], None]
    lines = [json.dumps(rows[0], ensure_ascii=False), "", json.dumps(rows[1]) + "\r", "  ", *map(json.dumps, rows[2:])]
    path.write_bytes("\n".join(lines).encode())
    assert list(json_lines(path)) == [(f"{path}, line {n}", row) for n, row in zip((1, 3, 5, 6), rows, strict=True)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1}\n{"a"', r"a.jsonl, line 2: not valid JSON \("),
        (b"[" * 200_000, r"a.jsonl, line 1: not valid JSON \(nested too deeply\)"),
        (b"\xff\xfe", "a.jsonl: expected UTF-8 text, found binary data"),
        (None, r"a.jsonl: cannot be read \(No such file"),
    ],
)
def test_a_file_that_is_none_is_named(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=words):
        list(json_lines(path))
