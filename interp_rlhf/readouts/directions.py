"""Concept directions: a unit vector, its name and its hookpoint; fitted in closed form, kept in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from interp_rlhf.errors import ConfigError, FormatError, MeasurementError
from interp_rlhf.readouts.files import Layout, check_names, read, write

_FILE = Layout(kind="direction", tensor="vector", fields=("hookpoint", "name"))


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
        check_names("direction", name=self.name, hookpoint=self.hookpoint)
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
        about = {"hookpoint": self.hookpoint, "name": self.name}
        write(Path(path), _FILE, self.vector, about, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            FormatError: missing, truncated, not safetensors, or not a direction; the message names the file.
        """
        path = Path(path)
        about, vector = read(path, _FILE)
        try:
            return cls(about["name"], about["hookpoint"], vector)
        except (MeasurementError, ConfigError) as error:
            raise FormatError(f"{path}: {error}") from None
