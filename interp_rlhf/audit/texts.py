"""Files of texts beside a run (``_interp/``): read back only with the hash that the timeline recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interp_rlhf.audit.layout import TEXTS
from interp_rlhf.audit.sealing import safe_name, sha256_bytes
from interp_rlhf.errors import FormatError


def read_texts(output_dir: Path, events: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """The newest ``_interp/NN-<name>.jsonl`` that a run has told of, line by line; empty where it told of none.

    Raises:
        FormatError: the file is missing, changed, or not one JSON object a line.
    """
    told = [event for event in events if event["event"] == "texts" and event["texts"].endswith(f"-{name}.jsonl")]
    if not told:
        return []
    file, folder = told[-1]["texts"], output_dir / TEXTS
    try:
        path = folder / safe_name(file)
    except FormatError as error:
        raise FormatError(f"{folder}: {error}") from None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: the texts cannot be read ({error.strerror})") from None
    found = sha256_bytes(data)
    if found != told[-1]["sha256"]:
        raise FormatError(f"{path}: found SHA-256 {found}, expected {told[-1]['sha256']}")
    try:
        lines = [json.loads(line) for line in data.decode("utf-8").split("\n") if line.strip()]
    except ValueError:
        raise FormatError(f"{path}: expected one JSON object a line") from None
    if not all(isinstance(line, dict) for line in lines):
        raise FormatError(f"{path}: expected one JSON object a line")
    return lines
