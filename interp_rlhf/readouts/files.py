"""One small readout in one safetensors file: a single tensor and one metadata key, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from interp_rlhf.errors import ConfigError, FormatError


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file of one kind holds.

    Attributes:
        kind: the word for it in messages.
        tensor: name of its only tensor, float32 ``[d]``.
        fields: keys of the JSON under the metadata key ``interp_rlhf.<kind>``, besides ``format``.
        version: the number under ``format``.
    """

    kind: str
    tensor: str
    fields: tuple[str, ...]
    version: int = 1

    @property
    def key(self) -> str:
        """The one metadata key: with more, safetensors does not write the same bytes twice."""
        return f"interp_rlhf.{self.kind}"


def check_names(kind: str, **names: str) -> None:
    """Raise :class:`~interp_rlhf.errors.ConfigError` unless each is printable text without path separators."""
    for field, text in names.items():
        if not isinstance(text, str) or not text.isprintable() or text in ("", ".", "..") or set(text) & set("/\\"):
            raise ConfigError(f"{kind} {field}: expected printable text without path separators, found {text!r}")


def write(path: Path, layout: Layout, vector: Tensor, about: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write one file; it appears complete or not at all. Equal content gives equal bytes.

    Args:
        vector: ``[d]`` float32.
        overwrite: replace a file that holds something else (an equal file is left as it is).

    Raises:
        FormatError: the file exists with other content, or cannot be written.
    """
    from safetensors.torch import save

    text = json.dumps({"format": layout.version, **about}, sort_keys=True, allow_nan=False)
    content = save({layout.tensor: vector}, metadata={layout.key: text})
    try:
        if path.exists() and not overwrite:
            if path.read_bytes() == content:
                return
            raise FormatError(f"{path}: exists and holds something else; expected overwrite=True to replace it")
        _write_atomically(path, content)
    except OSError as error:
        raise FormatError(f"{path}: cannot be written ({error.strerror})") from None


def read(path: Path, layout: Layout) -> tuple[dict[str, Any], Tensor]:
    """The JSON and the tensor ``[d]`` float32 of a file written by :func:`write`.

    Raises:
        FormatError: missing, truncated, not safetensors, or of another kind; the message names the file.
    """
    from safetensors import SafetensorError, safe_open

    name = layout.tensor
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            about = _about(path, layout, file.metadata() or {})
            names = sorted(file.keys())
            if names != [name]:
                raise FormatError(f"{path}: expected the single tensor {name!r}, found {', '.join(names) or 'none'}")
            kind, shape = file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()
            if kind != "F32" or len(shape) != 1:
                raise FormatError(f"{path}: {name}: expected float32 [d], found {kind} {list(shape)}")
            return about, file.get_tensor(name)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise FormatError(
            f"{path}: not a safetensors file, or a damaged one ({' '.join(str(error).split())})"
        ) from None


def _about(path: Path, layout: Layout, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        about = json.loads(metadata[layout.key])
    except (KeyError, json.JSONDecodeError):
        raise FormatError(f"{path}: not a {layout.kind} file (no readable {layout.key!r} in its metadata)") from None
    if not isinstance(about, dict) or about.get("format") != layout.version:
        found = about.get("format") if isinstance(about, dict) else about
        raise FormatError(f"{path}: expected {layout.kind} format {layout.version}, found {found!r}")
    if set(about) != {"format", *layout.fields}:
        expected = ", ".join(("format", *layout.fields))
        raise FormatError(f"{path}: expected the fields {expected}, found {', '.join(sorted(about))}")
    return about


def _write_atomically(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".interp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
