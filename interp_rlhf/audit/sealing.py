"""Hashes, canonical JSON and atomic writes: what the evidence on disk is built from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_rlhf.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

_LEFTOVER = re.compile(r"\.interp-(\d+)-[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+%=-]{0,199}")
_CHUNK = 1 << 20


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of ``data`` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits, read in pieces of 1 MiB.

    Raises:
        FormatError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def as_array(tensor: Tensor | np.ndarray) -> np.ndarray:
    """A tensor or array of any shape as a C-contiguous little-endian array of the same dtype on the CPU.

    Raises:
        FormatError: a dtype NumPy does not have (bfloat16, float8): statistics are kept in float32.
    """
    if not isinstance(tensor, np.ndarray):
        try:
            tensor = tensor.detach().cpu().numpy()
        except TypeError:
            raise FormatError(f"tensor: found dtype {tensor.dtype}, expected one NumPy has (float32)") from None
    if tensor.dtype.kind not in "biuf":
        raise FormatError(f"array: found dtype {tensor.dtype}, expected numbers or booleans")
    array = np.ascontiguousarray(tensor).reshape(tensor.shape)
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def tensor_hash(tensor: Tensor | np.ndarray) -> str:
    """SHA-256 over dtype, shape and values (little-endian, C order): equal for equal tensors, whatever file holds them.

    >>> tensor_hash(np.zeros((2, 3))) == tensor_hash(np.zeros((3, 2)))
    False
    """
    array = as_array(tensor)
    digest = hashlib.sha256(f"{array.dtype.name}|{','.join(map(str, array.shape))}|".encode())
    digest.update(array.tobytes())
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """One spelling per value: sorted keys, no spaces, ASCII.

    Raises:
        FormatError: NaN, an infinity, or something JSON has no spelling for.

    >>> canonical_json({"b": 1, "a": [True, None]})
    b'{"a":[true,null],"b":1}'
    """
    return _dumps(value, sort_keys=True, separators=(",", ":"))


def seal(document: Mapping[str, Any]) -> bytes:
    """A JSON document for people that carries its own SHA-256 under ``seal``; :func:`unseal` reads it back."""
    body = {key: value for key, value in document.items() if key != "seal"}
    body["seal"] = sha256_bytes(canonical_json(body))
    return _dumps(body, sort_keys=True, indent=1) + b"\n"


def unseal(data: bytes, where: str | Path) -> dict[str, Any]:
    """The document without its seal. Any changed byte, white space included, is found.

    Raises:
        FormatError: not JSON, or bytes other than those :func:`seal` wrote; names ``where``.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not a sealed JSON document ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(document, dict) or not isinstance(document.get("seal"), str):
        raise FormatError(f"{where}: found no seal, expected a sealed JSON document")
    found = document.pop("seal")
    expected = sha256_bytes(canonical_json(document))
    if found != expected:
        raise FormatError(f"{where}: found seal {found[:16]!a}, expected {expected[:16]!r}: the content was changed")
    if seal(document) != data:
        raise FormatError(f"{where}: found other spacing or key order than was written, the bytes were changed")
    return document


def safe_name(name: str) -> str:
    """``name`` itself if it is a plain file name: no separators, no leading dot, at most 200 characters.

    Raises:
        FormatError: anything else.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise FormatError(f"name {str(name)[:80]!a}: expected a plain file name of letters, digits and _.+%=-")
    return name


def safe_relative(path: str) -> str:
    """``path`` itself if it is relative, POSIX-style, normalised, and stays below its folder.

    Raises:
        FormatError: anything else.
    """
    parts = path.split("/")
    clean = all(part not in ("", ".", "..") and "\\" not in part and part.isprintable() for part in parts)
    if not clean or PurePosixPath(path).is_absolute():
        raise FormatError(f"path {path[:80]!a}: expected a relative path below its folder")
    return path


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a file that exists completely or not at all (an older file of that name is replaced, or stays)."""
    path = Path(path)
    temporary = path.parent / _temporary_name()
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def atomic_folder(final: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Build a folder that exists completely or not at all.

    Yields an empty folder beside ``final``; when the block ends, its files are flushed to disk and it is renamed. When
    the block raises, it is removed. With ``replace`` an older folder is moved away first: between the two renames there
    is none.

    Raises:
        FormatError: ``final`` exists already (without ``replace``).
    """
    final = Path(final)
    _refuse_existing(final, replace)
    temporary = final.parent / _temporary_name()
    temporary.mkdir()
    old = final.parent / _temporary_name()
    try:
        yield temporary
        _sync_tree(temporary)
        _refuse_existing(final, replace)
        if replace and final.exists():
            os.rename(final, old)
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(final.parent)
    if old.exists():
        shutil.rmtree(old)


def is_leftover(name: str) -> bool:
    """Whether a file name is one that is used while an atomic write is under way."""
    return name.startswith(".interp-")


def clean_leftovers(folder: str | Path) -> tuple[str, ...]:
    """Remove what writers that died left in ``folder`` (not below); returns the removed names.

    What belongs to another process that is alive on this machine stays, and so does the folder's modification time:
    the trainer rotates checkpoints by it.
    """
    before, removed = Path(folder).stat(), []
    for entry in sorted(Path(folder).iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if not is_leftover(entry.name) or (match is not None and _is_other_alive(int(match[1]))):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
        removed.append(entry.name)
    if removed:
        os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    return tuple(removed)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dumps(value: Any, **options: Any) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, **options).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"JSON: {' '.join(str(error).split())}") from None


def _temporary_name() -> str:
    return f".interp-{os.getpid()}-{uuid.UUID(bytes=os.urandom(16)).hex}"


def _refuse_existing(final: Path, replace: bool) -> None:
    if final.is_symlink() or (final.exists() and not (replace and final.is_dir())):
        raise FormatError(f"{final}: exists already, nothing is written over")


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            with open(Path(parent) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))


def _is_other_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return pid < 2**31
    return True
