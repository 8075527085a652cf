"""Concept directions: a unit vector, its name and its hookpoint; fitted in closed form, kept in one file."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from interp_rlhf.errors import ConfigError, FormatError, MeasurementError

FORMAT = 1
_KEY = "interp_rlhf.direction"


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """A concept's direction in the activations of one hookpoint.

    Attributes:
        name: the concept; printable, without path separators.
        hookpoint: where the direction was fitted and is read (``layers.3.resid_post``).
        vector: ``[d]`` float32 on the CPU, of length 1; a vector of another length is scaled on construction.

    Raises:
        MeasurementError: the vector is not 1-D, is 0, or holds NaN.
        ConfigError: the name or the hookpoint is empty or holds path separators or control characters.
    """

    name: str
    hookpoint: str
    vector: Tensor

    def __post_init__(self) -> None:
        for field, text in (("name", self.name), ("hookpoint", self.hookpoint)):
            if not isinstance(text, str) or not text.isprintable() or text in ("", ".", "..") or set(text) & set("/\\"):
                raise ConfigError(f"direction {field}: expected printable text without path separators, found {text!r}")
        vector = self.vector.detach().cpu().double()
        if vector.ndim != 1 or vector.numel() == 0:
            raise MeasurementError(
                f"direction {self.name!r} at {self.hookpoint}: expected shape [d], found {tuple(vector.shape)}"
            )
        length = float(vector.norm())
        if not 0 < length < float("inf"):
            raise MeasurementError(
                f"direction {self.name!r} at {self.hookpoint}: expected a finite non-zero vector, found length {length}"
            )
        unit = vector if abs(length - 1) <= 1e-6 else vector / length  # a stored unit vector keeps its bits
        object.__setattr__(self, "vector", unit.to(torch.float32, copy=True))

    @classmethod
    def from_means(
        cls, name: str, hookpoint: str, positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"]
    ) -> Self:
        """Difference in means, ``mean(positive) − mean(negative)``, scaled to length 1 (Marks & Tegmark 2023).

        Args:
            positive, negative: ``[n, d]``, row i of both from contrast pair i.

        Raises:
            MeasurementError: the shapes differ, or the difference is 0 or NaN.
        """
        if positive.shape != negative.shape or positive.ndim != 2:
            raise MeasurementError(
                f"direction {name!r} at {hookpoint}: expected two [n, d] of one shape, found "
                f"{tuple(positive.shape)} and {tuple(negative.shape)}"
            )
        return cls(name, hookpoint, (positive.detach().double() - negative.detach().double()).mean(0))

    def project(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Component of activations along the direction: ``[..., d]`` → ``[...]`` float32, on the device of ``x``.

        Raises:
            ConfigError: the width of ``x`` is not d.
        """
        self.check(x.shape[-1] if x.ndim else 0)
        return x.to(torch.float32) @ self.vector.to(x.device)

    def check(self, width: int) -> None:
        """Raise :class:`~interp_rlhf.errors.ConfigError` unless the activations it is to read have its width."""
        if len(self.vector) != width:
            raise ConfigError(
                f"direction {self.name!r} at {self.hookpoint}: expected {width} dimensions, found {len(self.vector)}"
            )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write one safetensors file; it appears complete or not at all. The same direction gives the same bytes.

        Args:
            overwrite: replace a file that holds something else (an equal file is left as it is).

        Raises:
            FormatError: the file exists with other content, or cannot be written.
        """
        from safetensors.torch import save

        # one metadata key only: with more, safetensors does not write the same bytes twice
        about = json.dumps({"format": FORMAT, "hookpoint": self.hookpoint, "name": self.name}, sort_keys=True)
        content = save({"vector": self.vector}, metadata={_KEY: about})
        path = Path(path)
        try:
            if path.exists() and not overwrite:
                if path.read_bytes() == content:
                    return
                raise FormatError(f"{path}: exists and holds something else; expected overwrite=True to replace it")
            _write_atomically(path, content)
        except OSError as error:
            raise FormatError(f"{path}: cannot be written ({error.strerror})") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            FormatError: missing, truncated, not safetensors, or not a direction; the message names the file.
        """
        path = Path(path)
        about, vector = _read(path)
        try:
            return cls(about["name"], about["hookpoint"], vector)
        except (MeasurementError, ConfigError) as error:
            raise FormatError(f"{path}: {error}") from None


def _read(path: Path) -> tuple[dict[str, Any], Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            about = _about(path, file.metadata() or {})
            names = sorted(file.keys())
            if names != ["vector"]:
                raise FormatError(f"{path}: expected the single tensor 'vector', found {', '.join(names) or 'none'}")
            kind, shape = file.get_slice("vector").get_dtype(), file.get_slice("vector").get_shape()
            if kind != "F32" or len(shape) != 1:
                raise FormatError(f"{path}: vector: expected float32 [d], found {kind} {list(shape)}")
            return about, file.get_tensor("vector")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise FormatError(
            f"{path}: not a safetensors file, or a damaged one ({' '.join(str(error).split())})"
        ) from None


def _about(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        about = json.loads(metadata[_KEY])
    except (KeyError, json.JSONDecodeError):
        raise FormatError(f"{path}: not a direction file (no readable {_KEY!r} in its metadata)") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else about
        raise FormatError(f"{path}: expected direction format {FORMAT}, found {found!r}")
    if set(about) != {"format", "hookpoint", "name"}:
        raise FormatError(f"{path}: expected the fields format, hookpoint, name, found {', '.join(sorted(about))}")
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
