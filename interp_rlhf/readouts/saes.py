"""Sparse dictionaries: autoencoders read from other libraries' folders, and the two methods any other object needs.

With ``x [d]`` an activation, ``n`` the normalisation of activations, ``s_i = ‖W_dec[i]‖`` where features are rescaled
by the decoder's norm and 1 elsewhere::

    p = (n(x) − b_dec·[apply_b_dec_to_input]) W_enc + b_enc
    standard   z = ReLU(p)                            Bricken et al. 2023, "Towards Monosemanticity"
    gated      z = [p_gate > 0] ReLU(p_magnitude)     Rajamanoharan et al. 2024, arXiv 2404.16014
    jumprelu   z = ReLU(p) [p > threshold]            Rajamanoharan et al. 2024, arXiv 2407.14435
    topk       z = ReLU(p s) for the k largest        Gao et al. 2024, arXiv 2406.04093
    batchtopk  z = ReLU(p s) [p s > threshold]        Bussmann et al. 2024, arXiv 2412.06410, section 3.3 (inference)
    x̂ = n⁻¹((z / s) W_dec + b_dec)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_rlhf.activations.hookpoints import parse_hookpoint
from interp_rlhf.errors import ConfigError, FormatError, MeasurementError
from interp_rlhf.readouts.files import check_names
from interp_rlhf.readouts.sae_files import Architecture, Normalisation, read_folder, write_folder

#: Added to the standard deviation by the layer norm, and the smallest length the rescaling by length divides by.
_EPSILON, _SHORTEST = 1e-5, 1e-12


@runtime_checkable
class Dictionary(Protocol):
    """What a dictionary has to offer; any object with these two methods is accepted where a dictionary is."""

    def encode(self, x: Tensor) -> Tensor:
        """Activations ``[..., d]`` to feature activations ``[..., F]``."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Feature activations ``[..., F]`` to a reconstruction ``[..., d]``."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class SparseAutoencoder:
    """A sparse autoencoder on the activations of one hookpoint. Two are compared by :attr:`hash`.

    Attributes:
        name: printable, without path separators.
        hookpoint: where it is read (``layers.3.resid_post``).
        architecture: which formula of this module's table applies.
        W_enc, W_dec: ``[d, F]`` and ``[F, d]`` float32.
        b_enc: ``[F]`` float32; of a gated one the bias of the magnitudes.
        b_dec: ``[d]`` float32.
        threshold: ``[F]`` float32, for jumprelu and batchtopk.
        k: features per token, for topk.
        b_gate, r_mag: ``[F]`` float32, for gated: bias of the gate, logarithm of the magnitudes' scale.
        apply_b_dec_to_input: ``b_dec`` is taken from the activations before they are encoded.
        normalisation: ``none``; ``length`` scales every activation to length ``√d``; ``layer_norm`` makes its mean 0
            and its standard deviation 1.
        scale: factor on the activations before all else.
        rescale_acts_by_decoder_norm: ``s`` in the formulas is the decoder's norm; for topk and batchtopk.

    Raises:
        MeasurementError: a shape does not fit, a tensor is missing or not finite.
        ConfigError: a name or a setting is none.
    """

    name: str
    hookpoint: str
    architecture: Architecture
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    k: int | None = None
    b_gate: Tensor | None = None
    r_mag: Tensor | None = None
    apply_b_dec_to_input: bool = True
    normalisation: Normalisation = "none"
    scale: float = 1.0
    rescale_acts_by_decoder_norm: bool = False
    _norms: Tensor | None = field(init=False, repr=False, default=None)
    _hash: str | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        check_names("dictionary", name=self.name, hookpoint=self.hookpoint)
        parse_hookpoint(self.hookpoint)
        for setting, choices in (("architecture", Architecture), ("normalisation", Normalisation)):
            if getattr(self, setting) not in get_args(choices):
                raise ConfigError(
                    f"{self._place}: {setting}: expected one of {', '.join(get_args(choices))}, "
                    f"found {getattr(self, setting)!r}"
                )
        if type(self.scale) not in (int, float) or not 0 < self.scale < float("inf"):
            raise ConfigError(f"{self._place}: scale: expected a finite number above 0, found {self.scale!r}")
        self._check_tensors()
        if (self.k is not None) != (self.architecture == "topk") or (
            self.k is not None and (type(self.k) is not int or not 1 <= self.k <= self.width)
        ):
            raise ConfigError(
                f"{self._place}: k: expected 1 to {self.width} for topk and none otherwise, found {self.k!r} for "
                f"{self.architecture}"
            )
        if self.rescale_acts_by_decoder_norm:
            if self.architecture not in ("topk", "batchtopk"):
                raise ConfigError(
                    f"{self._place}: rescale_acts_by_decoder_norm: expected topk or batchtopk, "
                    f"found {self.architecture}"
                )
            object.__setattr__(self, "_norms", self.W_dec.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny))

    def _check_tensors(self) -> None:
        if self.W_enc.ndim != 2 or self.W_enc.numel() == 0:
            raise MeasurementError(f"{self._place}: W_enc: expected [d, F], found {list(self.W_enc.shape)}")
        d, width = self.W_enc.shape
        thresholds = (width,) if self.architecture in ("jumprelu", "batchtopk") else None
        gates = (width,) if self.architecture == "gated" else None
        expected = {
            "W_enc": (d, width), "b_enc": (width,), "W_dec": (width, d), "b_dec": (d,),
            "threshold": thresholds, "b_gate": gates, "r_mag": gates,
        }  # fmt: skip
        for part, shape in expected.items():
            tensor = getattr(self, part)
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape:
                raise MeasurementError(
                    f"{self._place}: {part}: expected {list(shape) if shape else 'none'} for {self.architecture}, "
                    f"found {list(found) if found is not None else 'none'}"
                )
            if tensor is None:
                continue
            tensor = tensor.detach().to(torch.float32)
            if not bool(torch.isfinite(tensor).all()):
                raise MeasurementError(f"{self._place}: {part}: expected finite numbers, found NaN or infinity")
            object.__setattr__(self, part, tensor)

    @property
    def _place(self) -> str:
        return f"dictionary {self.name!r} at {self.hookpoint}"

    @property
    def d_model(self) -> int:
        """Width d of the activations that are read (of all heads together at a hookpoint of heads)."""
        return self.W_enc.shape[0]

    @property
    def width(self) -> int:
        """Number of features F."""
        return self.W_enc.shape[1]

    # ------------------------------------------------------------------------------------------------------ reading

    def encode(
        self, x: Float[Tensor, "*batch _"], features: Sequence[int] | Tensor | None = None
    ) -> Float[Tensor, "*tokens _"]:
        """Feature activations, at least 0, float32, on the device of the dictionary.

        Args:
            x: ``[..., d]``; at a hookpoint of heads also ``[..., H, dh]`` with ``H·dh = d``.
            features: indices of the features wanted, each 0 to F - 1. Only their columns of ``W_enc`` are multiplied,
                except for topk, where a feature's activation depends on all the others.

        Returns:
            ``[..., F]``, or ``[..., n]`` in the order of ``features``.

        Raises:
            ConfigError: the width of ``x`` is not d, or an index does not exist.
        """
        index = None if features is None else self._indices(features)
        with torch.autocast(self.W_enc.device.type, enabled=False):
            x, _, _ = self._normalised(self._flat(x))
            if self.apply_b_dec_to_input:
                x = x - self.b_dec
            if self.architecture != "topk":
                return self._activate(x, index)
            z = self._top(x @ self.W_enc + self.b_enc)
            return z if index is None else z.index_select(-1, index)

    def _activate(self, x: Tensor, index: Tensor | None) -> Tensor:
        def part(tensor: Tensor) -> Tensor:
            return tensor if index is None else tensor.index_select(-1, index)

        weight = part(self.W_enc)
        if self.b_gate is not None and self.r_mag is not None:
            # two products, where one would do up to rounding: SAELens rounds like this
            z = torch.relu(x @ (weight * part(self.r_mag).exp()) + part(self.b_enc))
            return z * (x @ weight + part(self.b_gate) > 0)
        p = torch.addmm(part(self.b_enc), x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)
        if self._norms is not None:
            p = p * part(self._norms)
        return p.relu_() if self.threshold is None else torch.relu(p) * (p > part(self.threshold))

    def _top(self, p: Tensor) -> Tensor:
        found = (p if self._norms is None else p * self._norms).topk(self.k or 0, dim=-1, sorted=False)
        return torch.zeros_like(p).scatter(-1, found.indices, found.values.relu())

    def decode(
        self, z: Float[Tensor, "*batch F"], x: Float[Tensor, "*tokens _"] | None = None
    ) -> Float[Tensor, "*batch d"]:
        """Reconstruction ``[..., d]`` of feature activations ``[..., F]``, float32, on the device of the dictionary.

        Args:
            z: ``[..., F]``.
            x: the activations that were encoded, ``[..., d]`` or ``[..., H, dh]``. A normalisation by length or a layer
                norm can only be undone with them.

        Raises:
            ConfigError: the width of ``z`` is not F.
            MeasurementError: ``x`` is missing where it is needed.
        """
        if z.ndim == 0 or z.shape[-1] != self.width:
            raise ConfigError(f"{self._place}: expected {self.width} features, found shape {list(z.shape)}")
        with torch.autocast(self.W_enc.device.type, enabled=False):
            z = z.to(self.W_dec.device, torch.float32)
            return self._undone((z if self._norms is None else z / self._norms) @ self.W_dec + self.b_dec, x)

    def decode_entries(
        self, starts: Int[Tensor, " tokens"], columns: Int[Tensor, " n"], values: Tensor, x: Tensor | None = None
    ) -> Float[Tensor, "T d"]:
        """:meth:`decode` of few features: those of token t are ``slice(starts[t], starts[t + 1])`` of the others.

        Args:
            starts: ``[T + 1]``.
            columns, values: index and activation of every feature that fired, ``[n]`` each.
            x: as in :meth:`decode`, ``[T, d]``.
        """
        values = values.to(self.W_dec.device, torch.float32)
        with torch.autocast(self.W_dec.device.type, enabled=False):
            if self._norms is not None:
                values = values / self._norms[columns]
            out = torch.nn.functional.embedding_bag(
                columns, self.W_dec, starts, mode="sum", per_sample_weights=values, include_last_offset=True
            )
            return self._undone(out + self.b_dec, x)

    def _undone(self, out: Tensor, x: Tensor | None) -> Tensor:
        """What was decoded, with the normalisation of ``x`` undone."""
        if self.normalisation != "none":
            if x is None:
                raise MeasurementError(
                    f"{self._place}: expected the activations beside the features: its normalisation "
                    f"({self.normalisation}) cannot be undone without them; found features alone"
                )
            _, centre, spread = self._normalised(self._flat(x))
            out = out * spread + centre
        return out if self.scale == 1 else out / self.scale

    def reconstruct(self, x: Float[Tensor, "*batch _"]) -> Float[Tensor, "*batch _"]:
        """``decode(encode(x))`` with the normalisation undone, in the shape of ``x``, float32.

        Raises:
            ConfigError: the width of ``x`` is not d.
        """
        return self.decode(self.encode(x), x).reshape(x.shape)

    def _flat(self, x: Tensor) -> Tensor:
        heads = self.hookpoint.endswith(".heads") and x.ndim > 1 and x.shape[-1] != self.d_model
        if heads and x.shape[-1] * x.shape[-2] == self.d_model:
            x = x.flatten(-2)
        if x.ndim == 0 or x.shape[-1] != self.d_model:
            raise ConfigError(f"{self._place}: expected {self.d_model} dimensions, found shape {list(x.shape)}")
        return x.to(self.W_enc.device, torch.float32)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """``n(x)`` with the centre and spread that undo it: ``x·scale = n(x)·spread + centre``, up to epsilon."""
        if self.scale != 1:
            x = x * self.scale
        if self.normalisation == "length":
            factor = self.d_model**0.5 / x.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)
            return x * factor, 0.0, 1 / factor
        if self.normalisation == "layer_norm":
            centre = x.mean(-1, keepdim=True)
            spread = (x - centre).std(-1, keepdim=True)
            return (x - centre) / (spread + _EPSILON), centre, spread
        return x, 0.0, 1.0

    def _indices(self, features: Sequence[int] | Tensor) -> Tensor:
        whole = isinstance(features, Tensor) and not (features.is_floating_point() or features.dtype == torch.bool)
        if not whole and (isinstance(features, Tensor) or any(type(index) is not int for index in features)):
            raise ConfigError(f"{self._place}: features: expected whole numbers, found {_shortly(features)}")
        index = torch.as_tensor(features, dtype=torch.int64, device=self.W_enc.device)
        if index.ndim != 1 or (index.numel() and not bool(((index >= 0) & (index < self.width)).all())):
            raise ConfigError(
                f"{self._place}: features: expected a list of indices 0..{self.width - 1}, found {_shortly(features)}"
            )
        return index

    # ------------------------------------------------------------------------------------------- identity and files

    @property
    def hash(self) -> str:
        """SHA-256 over architecture, settings and weights as float32, 64 hex digits; without name and hookpoint.

        It does not change when a folder is written again in the same precision, with other keys beside them or by
        another library. Computed once, from a copy of the weights on the CPU, tensor by tensor.
        """
        if self._hash is None:
            digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
            for part, tensor in self._tensors().items():
                digest.update(f"\n{part} {list(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().astype("<f4", copy=False).data)
            object.__setattr__(self, "_hash", digest.hexdigest())
        return self._hash or ""

    def _tensors(self) -> dict[str, Tensor]:
        found = {part.name: getattr(self, part.name) for part in fields(self) if not part.name.startswith("_")}
        return {part: value for part, value in found.items() if isinstance(value, Tensor)}

    def _settings(self) -> dict[str, Any]:
        names = ("architecture", "k", "apply_b_dec_to_input", "normalisation", "scale", "rescale_acts_by_decoder_norm")
        return {name: getattr(self, name) for name in names} | {"scale": float(self.scale)}

    def to(self, device: str | torch.device) -> SparseAutoencoder:
        """The same dictionary on another device; the hash stays."""
        return replace(self, **{part: tensor.to(device) for part, tensor in self._tensors().items()})

    @classmethod
    def from_folder(cls, path: str | Path, hookpoint: str | None = None, name: str | None = None) -> SparseAutoencoder:
        """Read a dictionary on the CPU from a folder of SAELens, sparsify or dictionary_learning (see ``sae_files``).

        Args:
            path: the folder.
            hookpoint: one of our names, in place of the one the folder tells.
            name: the folder's name where none is given.

        Raises:
            FormatError: a file is missing, damaged, foreign or of a kind that is not supported.
            HookpointError: the folder's hook has no counterpart here, or ``hookpoint`` is no hookpoint's name.
        """
        folder = Path(path)
        stored = read_folder(folder, hookpoint)
        name = Path(os.path.abspath(folder)).name if name is None else name
        parts: dict[str, Any] = {**stored.tensors, **stored.settings}
        try:
            return cls(name, stored.hookpoint, stored.architecture, **parts)
        except (MeasurementError, ConfigError) as error:
            raise FormatError(f"{folder}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write a folder that SAELens 6 and :meth:`from_folder` read; it appears complete or not at all.

        SAELens reads no batchtopk: such a dictionary becomes a jumprelu one. A scale, and a rescaling that jumprelu
        does not have, are multiplied into the weights, which leaves activations as they are but for rounding and gives
        another :attr:`hash`.

        Raises:
            FormatError: the folder exists and is not empty, or cannot be written.
        """
        plain = self._expressible()
        write_folder(Path(path), plain.hookpoint, plain.architecture, plain._tensors(), plain._settings())

    def _expressible(self) -> SparseAutoencoder:
        changes: dict[str, Any] = self._tensors() | {"scale": 1.0}
        if self.architecture == "batchtopk":
            changes["architecture"] = "jumprelu"
        if self._norms is not None and (self.architecture != "topk" or self.scale != 1):
            changes["rescale_acts_by_decoder_norm"] = False
            changes["W_dec"] = self.W_dec / self._norms[:, None]
            changes.update({part: changes[part] * self._norms for part in ("W_enc", "b_enc")})
        if self.scale != 1 and self.normalisation == "none":
            changes["W_enc"] = changes["W_enc"] * self.scale
            changes.update({part: changes[part] / self.scale for part in ("W_dec", "b_dec")})
        return replace(self, **changes)


def _shortly(value: object) -> str:
    text = repr(value.tolist() if isinstance(value, Tensor) and value.numel() < 20 else value)
    return " ".join(text.split())[:80]
