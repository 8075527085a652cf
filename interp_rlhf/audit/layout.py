"""Where everything of a run lies, and the run files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from interp_rlhf.audit.sealing import is_leftover, seal, unseal
from interp_rlhf.errors import FormatError

#: Names inside an output folder (``interp``, ``_interp``) and inside ``interp``.
FOLDER, TEXTS, TIMELINE, SNAPSHOTS = "interp", "_interp", "timeline.jsonl", "snapshots"
#: Folder of a run's control runs, inside its output folder. Uploads leave out names that begin with ``_``.
CONTROLS = "_controls"
#: Version of the run files; a reader refuses any other.
RUN_SCHEMA = 1
#: Keys of a run file that are not the caller's.
RESERVED: tuple[str, ...] = ("schema", "segment", "resumed_from", "seal")

#: Longest spelling of a value, and of a hash, in a difference.
_SHOWN, _SHOWN_HASH = 60, 13

_RUN_FILE = re.compile(r"run(?:-(\d{2,}))?\.json")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def run_file_name(segment: int) -> str:
    """``run.json`` for segment 1, ``run-02.json`` for the second …"""
    return "run.json" if segment == 1 else f"run-{segment:02d}.json"


def parse_run_file_name(name: str) -> int | None:
    """The segment of a run file's name, ``None`` where it is not one."""
    match = _RUN_FILE.fullmatch(name) if len(name) <= 100 else None
    number = int(match[1] or 1) if match else None
    return number if number is not None and run_file_name(number) == name else None


def run_document(info: Mapping[str, Any], segment: int, resumed_from: int | None) -> bytes:
    """The bytes of a run file.

    Raises:
        FormatError: ``info`` uses a reserved key or holds something JSON has no spelling for.
    """
    taken = [key for key in RESERVED if key in info]
    if taken:
        raise FormatError(f"run file: found the reserved key {taken[0]!r} in the run's information")
    return seal({**info, "schema": RUN_SCHEMA, "segment": segment, "resumed_from": resumed_from})


def find_run(path: str | Path) -> Path:
    """The ``interp`` folder of an output folder, or ``path`` itself where it is one.

    Raises:
        FormatError: neither holds a run.
    """
    for folder in (Path(path), Path(path) / FOLDER):
        if (folder / TIMELINE).is_file() and (folder / "run.json").is_file():
            return folder.resolve()
    raise FormatError(f"{path}: found no run, expected an output folder with {FOLDER}/run.json and {FOLDER}/{TIMELINE}")


def read_run_file(path: Path) -> dict[str, Any]:
    """A run file's content, after its seal and version were checked.

    Raises:
        FormatError: missing, damaged, or of another version.
    """
    try:
        document = unseal(path.read_bytes(), path)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    if document.get("schema") != RUN_SCHEMA:
        raise FormatError(f"{path}: found schema {str(document.get('schema'))[:20]!a}, expected {RUN_SCHEMA}")
    if type(document.get("segment")) is not int:
        raise FormatError(f"{path}: segment: found {str(document.get('segment'))[:20]!a}, expected a whole number")
    return document


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Fields in which two run files differ, as ``place: old → new``; what belongs to the segment is left out.

    >>> differences({"config": {"seed": 0}, "segment": 1}, {"config": {"seed": 1}, "segment": 2})
    ['config.seed: 0 → 1']
    """
    before, after = (
        dict(_leaves({key: value for key, value in document.items() if key not in RESERVED})) for document in (old, new)
    )
    changed = [place for place in {**before, **after} if before.get(place) != after.get(place)]
    return [f"{place}: {_short(place, before)} → {_short(place, after)}" for place in changed]


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Place and spelling of every value; entries of a list that have a name are found by it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
        for item in value:
            yield from _leaves({key: inner for key, inner in item.items() if key != "name"}, f"{place}.{item['name']}")
    else:
        yield place, json.dumps(value)


def _short(place: str, leaves: Mapping[str, str]) -> str:
    text, limit = leaves.get(place, "absent"), _SHOWN_HASH if place.endswith("sha256") else _SHOWN
    return text if len(text) <= limit else f"{text[:limit]}…"


def checkpoint_folders(output_dir: Path) -> tuple[Path, ...]:
    """Existing ``checkpoint-N`` folders by step."""
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    return tuple(path for _, path in sorted(found) if path.is_dir())


def check_ours(folder: Path) -> None:
    """Refuse a folder with files that are not of a run; an empty or missing one is fine.

    Raises:
        FormatError: names the first file found.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    names = [name for name in names if not is_leftover(name)]
    if names and not any(name == TIMELINE or parse_run_file_name(name) for name in names):
        raise FormatError(f"{folder}: found {sorted(names)[0][:80]!a} and no run, expected an empty folder or a run")


def check_folder(output_dir: str | Path) -> None:
    """Refuse an output folder that no run can be written into, before anything is trained.

    Raises:
        FormatError: one of the folders of a run is a file.
    """
    for path in (Path(output_dir), *(Path(output_dir) / name for name in (FOLDER, TEXTS, f"{FOLDER}/{SNAPSHOTS}"))):
        if path.exists() and not path.is_dir():
            raise FormatError(f"{path}: expected a folder for the run's records, found a file")
