"""Texts beside a run are read back only as they were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from interp_rlhf.audit.sealing import sha256_bytes
from interp_rlhf.audit.texts import read_texts
from interp_rlhf.errors import FormatError


def told(folder: Path, name: str, data: bytes) -> dict[str, Any]:
    """A file and the event that tells of it."""
    (folder / "_interp").mkdir(exist_ok=True)
    (folder / "_interp" / name).write_bytes(data)
    return {"event": "texts", "texts": name, "sha256": sha256_bytes(data)}


def test_the_newest_of_a_name_is_read(tmp_path: Path) -> None:
    events = [
        told(tmp_path, "01-plan.jsonl", b'{"a": 1}\n'),
        told(tmp_path, "01-completions.jsonl", b'{"b": 1}\n'),
        told(tmp_path, "02-plan.jsonl", '{"a": "\u2028"}\n\n{"a": 3}\n'.encode()),
        {"event": "note", "text": "x"},
    ]
    assert read_texts(tmp_path, events, "plan") == [{"a": "\u2028"}, {"a": 3}], "one object a line, whatever is in it"
    assert read_texts(tmp_path, events, "completions") == [{"b": 1}]
    assert read_texts(tmp_path, events, "texts") == [] == read_texts(tmp_path, [], "plan")


@pytest.mark.parametrize(
    ("data", "problem"),
    [(b"[1]\n", "one JSON object"), (b"{\n", "one JSON object"), (b"\xff\n", "one JSON object")],
)
def test_what_is_no_object_a_line(data: bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=rf"01-plan\.jsonl: expected {problem}"):
        read_texts(tmp_path, [told(tmp_path, "01-plan.jsonl", data)], "plan")


def test_missing_changed_and_outside(tmp_path: Path) -> None:
    event = told(tmp_path, "01-plan.jsonl", b"{}\n")
    (tmp_path / "_interp" / "01-plan.jsonl").write_bytes(b"{} \n")
    with pytest.raises(FormatError, match=r"01-plan\.jsonl: found SHA-256 \w{64}, expected \w{64}"):
        read_texts(tmp_path, [event], "plan")
    (tmp_path / "_interp" / "01-plan.jsonl").unlink()
    with pytest.raises(FormatError, match=r"01-plan\.jsonl: the texts cannot be read"):
        read_texts(tmp_path, [event], "plan")
    told(tmp_path, "01-plan.jsonl", b"{}\n")
    for name in ("../01-plan.jsonl", str(tmp_path / "_interp" / "01-plan.jsonl")):
        with pytest.raises(FormatError):
            read_texts(tmp_path, [{**event, "texts": name}], "plan")
