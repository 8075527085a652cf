"""Snapshots: one sealed folder per measured set of weights, complete or absent, bound to its checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from interp_rlhf.audit.sealing import (
    as_array,
    atomic_folder,
    canonical_json,
    safe_name,
    safe_relative,
    seal,
    sha256_bytes,
    tensor_hash,
    unseal,
)
from interp_rlhf.audit.timeline import row_of
from interp_rlhf.audit.weights import COPY, weight_hashes
from interp_rlhf.errors import FormatError
from interp_rlhf.measurement import Measurement

if TYPE_CHECKING:
    from torch import Tensor

#: Version of the snapshot format; a reader refuses any other.
SCHEMA = 1
MANIFEST, TENSORS, ROWS = "snapshot.json", "tensors.safetensors", "rows.jsonl"

_NAME = re.compile(r"(\d{2,})-step-(\d{6,})")
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class _File:
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Array:
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    dtype: str
    shape: list[int]
    sha256: str


@dataclass(frozen=True)
class _Prefix:
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    bytes: int
    lines: int
    sha256: str
    chain: str


@dataclass(frozen=True)
class _Link:
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    name: str
    sha256: str


@dataclass(frozen=True)
class _Checkpoint:
    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    folder: str
    weights: dict[str, _File]


@dataclass(frozen=True)
class _Manifest:
    """The fields of ``snapshot.json``, for checking only (``docs/formats.md`` explains each)."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    schema: int
    name: str
    segment: int
    step: int
    parent: _Link | None
    run: _Link
    timeline: _Prefix
    files: dict[str, _File]
    tensors: dict[str, _Array]
    checkpoint: _Checkpoint | None
    captured: dict[str, Any] | list[Any]
    cost: dict[str, Any]
    pruned: list[str]
    versions: dict[str, str | None]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What was measured at one step, read from its folder; payloads are read (and checked) when asked for.

    Attributes:
        path: the folder.
        segment: segment that wrote it.
        step: optimizer steps done.
        parent: name of the snapshot it follows (``01-step-000050``), ``None`` for the first of a chain.
        parent_hash: SHA-256 of the parent's ``snapshot.json``.
        digest: SHA-256 of this ``snapshot.json``; the next snapshot names it.
        manifest: the content of ``snapshot.json`` (read-only; fields in ``docs/formats.md``).
    """

    path: Path
    segment: int
    step: int
    parent: str | None
    parent_hash: str | None
    digest: str
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a snapshot folder (or the copy in ``checkpoint-N/interp``).

        Raises:
            FormatError: missing, damaged, written by another version, or with names that leave the folder.
        """
        path = Path(path)
        data = _read(path / MANIFEST)
        manifest = unseal(data, path / MANIFEST)
        check_manifest(manifest, path / MANIFEST)
        if path.name not in (manifest["name"], COPY):
            raise FormatError(f"{path / MANIFEST}: found name {manifest['name']!r}, expected {path.name[:80]!a}")
        parent = manifest["parent"] or {}
        return cls(
            path,
            manifest["segment"],
            manifest["step"],
            parent.get("name"),
            parent.get("sha256"),
            sha256_bytes(data),
            MappingProxyType(manifest),
        )

    @property
    def name(self) -> str:
        """``<segment>-step-<step>``, the folder's name under ``snapshots/``."""
        return self.manifest["name"]

    @property
    def checkpoint(self) -> str | None:
        """Name of the checkpoint folder with the weights that were read; ``None`` where nothing was saved."""
        return (self.manifest["checkpoint"] or {}).get("folder")

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        """The measurement rows of this step.

        Raises:
            FormatError: the file is missing or damaged.
        """
        return tuple(json.loads(line) for line in self.payload(ROWS).splitlines())

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors as NumPy arrays, by name; torch is not needed.

        Raises:
            FormatError: damaged, or removed by the retention setting.
        """
        from safetensors import SafetensorError, numpy

        try:
            return numpy.load(self.payload(TENSORS))
        except (SafetensorError, KeyError) as error:
            raise FormatError(f"{self.path / TENSORS}: not a safetensors file of this format ({error})") from None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors on the CPU, by name.

        Raises:
            FormatError: damaged, or removed by the retention setting.
        """
        from torch import from_numpy

        return {name: from_numpy(array.copy()) for name, array in self.arrays().items()}

    def payload(self, name: str) -> bytes:
        """Bytes of a file the manifest names, after comparing them with its hash.

        Raises:
            FormatError: missing, or other bytes than were written.
        """
        expected = self.manifest["files"].get(name)
        if expected is None:
            raise FormatError(f"{self.path}: found no file {name[:80]!a} in {MANIFEST}")
        place = self.path / name
        if name == TENSORS and not place.exists():
            raise FormatError(f"{place}: not there: removed by the retention setting snapshots.keep, or lost")
        data = _read(place)
        if sha256_bytes(data) != expected["sha256"]:
            raise FormatError(f"{place}: found other bytes ({len(data)}) than {MANIFEST} names ({expected['bytes']})")
        return data


def snapshot_name(segment: int, step: int) -> str:
    """Folder name of a snapshot.

    >>> snapshot_name(1, 100)
    '01-step-000100'
    """
    return f"{segment:02d}-step-{step:06d}"


def parse_name(name: str) -> tuple[int, int] | None:
    """Segment and step of a folder name, ``None`` where it is not one that :func:`snapshot_name` gives."""
    match = _NAME.fullmatch(name) if len(name) <= 200 else None
    found = (int(match[1]), int(match[2])) if match else None
    return found if found and snapshot_name(*found) == name else None


def check_manifest(manifest: Mapping[str, Any], where: str | Path) -> None:
    """Refuse a manifest of another version, with missing, unknown or mistyped fields, or unsafe names.

    Raises:
        FormatError: names ``where`` and the field.
    """
    if manifest.get("schema") != SCHEMA:
        raise FormatError(f"{where}: found schema {str(manifest.get('schema'))[:20]!a}, expected {SCHEMA}")
    try:
        _adapter().validate_json(canonical_json(dict(manifest)))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise FormatError(f"{where}: {place[:80]}: {problem['msg']}") from None
    if parse_name(manifest["name"]) != (manifest["segment"], manifest["step"]):
        raise FormatError(f"{where}: name: found {manifest['name'][:80]!a}, which is not its segment and step")
    checkpoint = manifest["checkpoint"] or {"folder": "none", "weights": {}}
    links = [manifest["parent"]["name"]] if manifest["parent"] else []
    try:
        for name in (*manifest["files"], *manifest["pruned"], *links, manifest["run"]["name"], checkpoint["folder"]):
            safe_name(name)
        for path in checkpoint["weights"]:
            safe_relative(path)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    if set(manifest["files"]) != {TENSORS, ROWS}:
        raise FormatError(f"{where}: files: found {sorted(manifest['files'])!a}, expected {TENSORS} and {ROWS}")


def write_snapshot(
    folder: Path,
    *,
    segment: int,
    step: int,
    rows: Iterable[Measurement],
    tensors: Mapping[str, Tensor | np.ndarray],
    parent: Snapshot | None,
    run: Mapping[str, str],
    timeline: Mapping[str, Any],
    checkpoint: Path | None,
    captured: Mapping[str, Any] | Sequence[Any],
    cost: Mapping[str, Any],
    pruned: Sequence[str] = (),
) -> Snapshot:
    """Write ``folder/<name>`` completely or not at all and read it back.

    Args:
        folder: the ``snapshots`` folder.
        rows: measurements of this step; one line of ``rows.jsonl`` each.
        tensors: by name, any shapes; dtypes NumPy has (statistics are float32).
        parent: the snapshot it follows.
        run: ``name`` and ``sha256`` of the segment's run file.
        timeline: :meth:`TimelineWriter.prefix`, taken after the step's rows were appended.
        checkpoint: the checkpoint folder whose weight files are hashed.
        captured: what was read (hookpoints, prompt-set hash …), JSON-ready.
        cost: seconds, tokens …, JSON-ready.
        pruned: snapshots whose tensors this one's commit removes.

    Raises:
        FormatError: the name is taken, or a value has no place in the format.
        MeasurementError: a row is not finite.
    """
    name = snapshot_name(segment, step)
    arrays = {key: as_array(tensor) for key, tensor in sorted(tensors.items())}
    payloads = {
        ROWS: b"".join(canonical_json(row_of(row)) + b"\n" for row in rows),
        TENSORS: _safetensors(arrays),
    }
    manifest = {
        "schema": SCHEMA,
        "name": name,
        "segment": segment,
        "step": step,
        "parent": {"name": parent.name, "sha256": parent.digest} if parent else None,
        "run": dict(run),
        "timeline": dict(timeline),
        "files": {key: {"bytes": len(data), "sha256": sha256_bytes(data)} for key, data in payloads.items()},
        "tensors": {key: describe(array) for key, array in arrays.items()},
        "checkpoint": {"folder": checkpoint.name, "weights": weight_hashes(checkpoint)} if checkpoint else None,
        "captured": captured if isinstance(captured, Mapping) else list(captured),
        "cost": dict(cost),
        "pruned": list(pruned),
        "versions": _versions(),
    }
    document = json.loads(canonical_json(manifest))
    check_manifest(document, folder / name / MANIFEST)
    with atomic_folder(folder / name) as building:
        for key, data in (*payloads.items(), (MANIFEST, seal(document))):
            (building / key).write_bytes(data)
    return Snapshot.load(folder / name)


def copy_to_checkpoint(snapshot: Snapshot, checkpoint_dir: str | Path) -> Path:
    """Copy a snapshot to ``checkpoint_dir/interp``, atomically, and return that folder.

    A copy of an earlier run there is replaced (its checkpoint was overwritten; the canonical snapshot stays). The
    modification time of ``checkpoint_dir`` is put back, because the trainer rotates checkpoints by it.

    Raises:
        FormatError: the checkpoint folder is missing, or the snapshot is damaged.
    """
    checkpoint = Path(checkpoint_dir)
    if not checkpoint.is_dir():
        raise FormatError(f"{checkpoint}: found no folder, expected the checkpoint to put the snapshot into")
    before = checkpoint.stat()
    with atomic_folder(checkpoint / COPY, replace=True) as building:
        for name in (ROWS, TENSORS):
            (building / name).write_bytes(snapshot.payload(name))
        (building / MANIFEST).write_bytes(_read(snapshot.path / MANIFEST))
    os.utime(checkpoint, ns=(before.st_atime_ns, before.st_mtime_ns))
    return checkpoint / COPY


def holds(copy: Path, snapshot: Snapshot) -> bool:
    """Whether ``copy`` is a folder with the manifest of ``snapshot``, byte for byte."""
    try:
        return sha256_bytes(_read(copy / MANIFEST)) == snapshot.digest
    except FormatError:
        return False


def describe(array: np.ndarray) -> dict[str, Any]:
    """Dtype, shape and :func:`tensor_hash` of an array, as the manifest lists them."""
    return {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": tensor_hash(array)}


def _safetensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    """One metadata key: with more, safetensors orders them at random and the bytes are not reproducible."""
    from safetensors import numpy

    return numpy.save(dict(arrays), metadata={"interp_schema": str(SCHEMA)})


@cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("interp-rlhf", "torch", "transformers", "trl", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(_Manifest)


def _read(path: Path) -> bytes:
    if path.is_symlink() or path.parent.is_symlink():
        raise FormatError(f"{path}: found a symbolic link, expected a plain file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
