"""What a dictionary of features reads on texts, summed up while the model runs; no activation is kept.

A feature *fires* on a token where its code is not 0, negative codes included. Per text two numbers remain of every
feature that fired there, its mean code and the share of tokens on which it fired, and of the activations what the
fraction of variance unexplained (FVU) needs. Sums are float64: how texts are batched and padded changes nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int32, Int64
from torch import Tensor, nn

from interp_rlhf.activations.token_sums import PER_CODE, Chunk, TokenSums, as_dense, chunks, fired_cells
from interp_rlhf.errors import InterpError, MeasurementError

#: How many times the codes' own memory a dictionary may take to compute them, they included.
_ENCODING = 4
#: Codes that fired are decoded one by one where they are fewer than one in so many.
_SPARSE = 16
#: Bytes per activation: as given, converted, reconstructed, and float64 of all that.
_PER_ACTIVATION = 48
#: Tokens at a time at most: more are no quicker, and slower where their codes leave the processor's cache.
_MOST = 1024


@runtime_checkable
class Codes(Protocol):
    """A dictionary of features: anything that has these two."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Codes ``[n, F]``, dense or sparse, of activations ``[n, d]``."""
        ...

    def decode(self, z: Tensor, /) -> Tensor:
        """Activations ``[n, d]`` of codes ``[n, F]`` as :meth:`encode` returned them."""
        ...


# -------------------------------------------------------------------------------------------------------- the result


@dataclass(frozen=True, slots=True, eq=False)
class FeatureReading:
    """One dictionary of F features read on N texts; tensors on the CPU. Row ``i`` of the sparse part (compressed rows):
    ``slice(indptr[i], indptr[i + 1])`` of ``columns``, ``means`` and ``fired``, the features that fired on text i.

    Attributes:
        indptr: ``[N + 1]``.
        columns: features, ascending within a text.
        means: mean code over the text's content tokens (those where it did not fire count as 0).
        fired: share of the text's content tokens on which it fired, in (0, 1].
        tokens: content tokens ``[N]``.
        x_mean: mean activation ``[N, d]``.
        x_hat_mean: mean reconstruction ``[N, d]``; ``None`` where only some features were read.
        x_sum: sum of the activations of all tokens ``[d]``.
        error: Σ‖x − x̂‖² over all tokens; NaN where only some features were read.
        power: Σ‖x‖² over all tokens.
        l0: number of codes that are not 0, over all tokens (and the features read).
        width: F.
        features: the features that were read, ascending; ``None`` for all.
    """

    indptr: Int64[Tensor, " rows"]
    columns: Int32[Tensor, " entries"]
    means: Float32[Tensor, " entries"]
    fired: Float32[Tensor, " entries"]
    tokens: Int64[Tensor, " N"]
    x_mean: Float32[Tensor, "N d"]
    x_hat_mean: Float32[Tensor, "N d"] | None
    x_sum: Float64[Tensor, " d"]
    error: float
    power: float
    l0: int
    width: int
    features: Int64[Tensor, " K"] | None = None

    @property
    def texts(self) -> Int64[Tensor, " F"]:
        """On how many texts each feature fired, ``[F]``."""
        return torch.bincount(self.columns.long(), minlength=self.width)

    @property
    def alive(self) -> Bool[Tensor, " F"]:
        """Which features fired on any token, ``[F]``."""
        return self.texts > 0

    def dense(
        self, features: Sequence[int] | Int[Tensor, " K"], *, of: Literal["means", "fired"] = "means"
    ) -> Float32[Tensor, "N K"]:
        """Mean codes (or shares of tokens) of these features on every text, ``[N, K]``.

        Raises:
            MeasurementError: a feature that the dictionary does not have or that was not read.
        """
        wanted, back = torch.as_tensor(features, dtype=torch.long).unique(return_inverse=True)
        known = torch.arange(self.width) if self.features is None else self.features
        strange = wanted[~torch.isin(wanted, known)].tolist()
        if strange:
            some = f"0..{self.width - 1}" if self.features is None else f"one of the {len(known)} that were read"
            raise MeasurementError(f"feature {strange[0]}: expected {some}")
        place = torch.full((self.width,), -1)
        place[wanted] = torch.arange(len(wanted))
        column = place[self.columns.long()]
        row = torch.repeat_interleave(self.indptr.diff())
        out = torch.zeros(len(self.tokens), len(wanted))
        out[row[column >= 0], column[column >= 0]] = (self.means if of == "means" else self.fired)[column >= 0]
        return out[:, back]

    @staticmethod
    def merge(parts: Sequence[FeatureReading], order: Sequence[int] | Int[Tensor, " N"]) -> FeatureReading:
        """Readings of different texts by one dictionary as one.

        Args:
            parts: one or more; the texts of all of them are counted through, part after part.
            order: text ``i`` of the result is text ``order[i]``; every text once.

        Raises:
            MeasurementError: no part, parts of different dictionaries, or an order that is none.
        """
        order = torch.as_tensor(order, dtype=torch.long)
        _check_parts(parts, order)
        lengths = torch.cat([part.indptr.diff() for part in parts])
        starts = lengths.cumsum(0) - lengths
        indptr = torch.cat([torch.zeros(1, dtype=torch.long), lengths[order].cumsum(0)])
        take = torch.repeat_interleave(starts[order] - indptr[:-1], lengths[order]) + torch.arange(int(indptr[-1]))
        whole = [part.x_hat_mean for part in parts if part.x_hat_mean is not None]
        return FeatureReading(
            indptr=indptr,
            columns=torch.cat([part.columns for part in parts])[take],
            means=torch.cat([part.means for part in parts])[take],
            fired=torch.cat([part.fired for part in parts])[take],
            tokens=torch.cat([part.tokens for part in parts])[order],
            x_mean=torch.cat([part.x_mean for part in parts])[order],
            x_hat_mean=torch.cat(whole)[order] if whole else None,
            x_sum=torch.stack([part.x_sum for part in parts]).sum(0),
            error=sum(part.error for part in parts),
            power=sum(part.power for part in parts),
            l0=sum(part.l0 for part in parts),
            width=parts[0].width,
            features=parts[0].features,
        )


def _check_parts(parts: Sequence[FeatureReading], order: Tensor) -> None:
    kinds = {
        (part.width, part.x_mean.shape[1], None if part.features is None else tuple(part.features.tolist()))
        for part in parts
    }
    if len(kinds) != 1:
        widths = " and ".join(f"{width} features of width {d}" for width, d, _ in sorted(kinds, key=str)) or "none"
        raise MeasurementError(f"feature readings: expected parts of one dictionary, found {widths}")
    n = sum(len(part.tokens) for part in parts)
    if order.shape != (n,) or not torch.equal(order.sort().values, torch.arange(n)):
        raise MeasurementError(f"feature readings: expected an order of {n} texts, each once, found {len(order)}")


# -------------------------------------------------------------------------------------------------------- the stream


class FeatureStream:
    """Reads a dictionary on the batches of one pass: an observer for ``read_prompts``, then :meth:`reading`.

    What is wrong with a batch is raised by :meth:`reading`, after the pass: a rank that raises inside a sharded forward
    would leave the others waiting. Errors that the dictionary raises later than on its first token are its own.

    Args:
        dictionary: ``encode``: ``[n, d]`` → ``[n, F]``, dense or sparse, and ``decode`` back, which is called as
            ``decode(z, x=…)`` where it takes that (normalisations that only the activations can undo). Where it has
            ``decode_entries(starts, columns, values, x)`` this is called where few codes fired: those of token t are
            ``slice(starts[t], starts[t + 1])`` of ``columns`` and ``values``. Activations come in the dtype and on the
            device of its weights (``W_dec``, or a module's first parameter), else as float32 where they are.
        name: for messages.
        hookpoint: where it is read, for messages and for who places the stream.
        width: F, where the dictionary does not say (``width``, or ``W_dec`` ``[F, d]``).
        memory: MiB that reading may take beyond the dictionary and what is kept, if one token's codes fit in.
        features: read these only, without reconstruction; ``encode(x, features=…)`` is called where it takes
            that.

    Raises:
        MeasurementError: ``memory`` is not positive, or a feature comes twice, is negative or is beyond ``width``.
    """

    def __init__(
        self,
        dictionary: Codes,
        name: str,
        hookpoint: str = "",
        *,
        width: int | None = None,
        memory: float = 256.0,
        features: Sequence[int] | Int[Tensor, " K"] | None = None,
    ) -> None:
        self.name, self.hookpoint = name, hookpoint
        self.place = f"dictionary {name!r}" + (f" at {hookpoint}" if hookpoint else "")
        self._dictionary: Any = dictionary
        self._width, self._d = _sizes(dictionary, width)
        self._memory = memory * 2**20
        self._tried: int | None = None
        self._features = None if features is None else torch.as_tensor(features, dtype=torch.long).sort().values
        self._selects = features is not None and _takes(dictionary.encode, "features")
        self._undoes = _takes(dictionary.decode, "x")
        self._rows: list[int] = []
        self._parts: list[FeatureReading] = []
        self._problem: MeasurementError | None = None
        if not memory > 0:
            raise MeasurementError(f"{self.place}: memory: expected MiB above 0, found {memory}")
        self._check_features()

    @property
    def rows(self) -> Int64[Tensor, " N"]:
        """The rows read so far, ascending: which texts those of :meth:`reading` are."""
        return torch.tensor(self._rows, dtype=torch.long).sort().values

    def __call__(self, rows: Sequence[int], values: Float[Tensor, "B T d"], content_mask: Tensor) -> None:
        """Take in a batch: values of the texts ``rows``, of which the marked tokens ``[B, T]`` count.

        Every row comes once. What stands at unmarked tokens does not matter, not even NaN.
        """
        if self._problem is not None or not len(rows):
            return
        try:
            self._parts.append(self._read(values, content_mask.bool()))
            self._rows.extend(rows)
        except MeasurementError as problem:  # raised by reading()
            self._problem = problem

    def part(self) -> FeatureReading | None:
        """What was read, texts in ascending order of their rows; ``None`` where no text came.

        Raises:
            MeasurementError: activations of another width than the dictionary's; a text without a content token or
                that came twice; codes or reconstructions that are not finite or have another shape.
        """
        if self._problem is not None:
            raise self._problem
        if len(set(self._rows)) != len(self._rows):
            raise MeasurementError(f"{self.place}: expected every text once, found one twice")
        return FeatureReading.merge(self._parts, torch.tensor(self._rows).argsort()) if self._parts else None

    def reading(self) -> FeatureReading:
        """As :meth:`part`; having read nothing is an error too."""
        found = self.part()
        if found is None:
            raise MeasurementError(f"{self.place}: expected texts to read, found none")
        return found

    # ------------------------------------------------------------------------------------------------------ one batch

    @torch.no_grad()
    def _read(self, values: Tensor, mask: Tensor) -> FeatureReading:
        tokens = mask.sum(1).cpu()
        if not bool(tokens.all()):
            raise MeasurementError(f"{self.place}: expected content tokens in every text, found a text without")
        flat, where = values.reshape(-1, values.shape[-1]), mask.flatten().nonzero().flatten()
        width = self._prepare(flat[where[:1]])
        device, dtype = _home(self._dictionary, flat.device)
        sums = TokenSums(tokens.to(device), flat.shape[1], reconstructs=self._features is None)
        owner = torch.repeat_interleave(sums.lengths)
        per_code = max(_ENCODING * dtype.itemsize, dtype.itemsize + PER_CODE)
        most = int(self._memory // (per_code * width + _PER_ACTIVATION * flat.shape[1]))
        for chunk in chunks(tokens.tolist(), min(max(most, 1), _MOST)):
            part = slice(chunk.start, chunk.stop)
            self._add(sums, flat[where[part]].to(device), dtype, owner[part], chunk)
        return self._finish(sums, tokens, width)

    def _add(self, sums: TokenSums, x: Tensor, dtype: torch.dtype, own: Tensor, chunk: Chunk) -> None:
        given = x.to(dtype)
        codes = self._encode(given)
        before = sums.fired
        sums.add_codes(as_dense(codes), own, chunk)
        few = (sums.fired - before) * _SPARSE < codes.numel()
        sums.add_activations(x, self._decode(codes, given, few) if self._features is None else None, own)

    def _prepare(self, x: Tensor) -> int:
        """F, after trying the dictionary on the first token ``[1, d]``."""
        if self._tried is not None:
            return self._tried
        d = x.shape[1]
        if self._d is not None and self._d != d:
            raise MeasurementError(f"{self.place}: expected activations of width {self._d}, found {d}")
        device, dtype = _home(self._dictionary, x.device)
        try:
            codes = self._dictionary.encode(x.to(device, dtype))
        except (RuntimeError, ValueError, TypeError, InterpError) as error:
            raise MeasurementError(f"{self.place}: cannot encode activations of width {d}: {error}") from error
        if not isinstance(codes, Tensor) or codes.ndim != 2 or len(codes) != 1:
            found = list(codes.shape) if isinstance(codes, Tensor) else type(codes).__name__
            raise MeasurementError(f"{self.place}: expected codes of shape [1, F], found {found}")
        if self._width not in (None, codes.shape[1]):
            raise MeasurementError(f"{self.place}: expected codes of width {self._width}, found {codes.shape[1]}")
        self._width = self._tried = codes.shape[1]
        self._check_features()
        return self._tried

    def _check_features(self) -> None:
        chosen = self._features
        if chosen is None:
            return
        if not len(chosen) or len(chosen.unique()) != len(chosen) or int(chosen[0]) < 0:
            raise MeasurementError(f"{self.place}: features: expected different ones from 0, found {chosen.tolist()}")
        if self._width is not None and int(chosen[-1]) >= self._width:
            raise MeasurementError(f"{self.place}: expected features below {self._width}, found {int(chosen[-1])}")

    def _encode(self, x: Tensor) -> Tensor:
        chosen = None if self._features is None else self._features.to(x.device)
        z = self._dictionary.encode(x, features=chosen) if self._selects else self._dictionary.encode(x)
        expected = [len(x), len(chosen) if self._selects and chosen is not None else self._tried]
        if list(z.shape) != expected:
            raise MeasurementError(f"{self.place}: expected codes of shape {expected}, found {list(z.shape)}")
        return z if self._selects or chosen is None else as_dense(z)[:, chosen]

    def _decode(self, z: Tensor, x: Tensor, few: bool) -> Tensor:
        if few and hasattr(self._dictionary, "decode_entries"):
            codes, width = as_dense(z).reshape(-1), z.shape[1]
            cells = fired_cells(codes)
            starts = torch.searchsorted(cells, torch.arange(len(z) + 1, device=z.device) * width)
            x_hat = self._dictionary.decode_entries(starts, cells % width, codes[cells], x)
        else:
            x_hat = self._dictionary.decode(z, x=x) if self._undoes else self._dictionary.decode(z)
        if x_hat.shape != x.shape:
            raise MeasurementError(
                f"{self.place}: expected activations of width {x_hat.shape[-1]}, found {x.shape[-1]} (what it decodes "
                f"to has shape {list(x_hat.shape)}, what it read {list(x.shape)})"
            )
        return x_hat

    def _finish(self, sums: TokenSums, tokens: Tensor, width: int) -> FeatureReading:
        if not bool(sums.finite):
            raise MeasurementError(f"{self.place}: expected finite codes, found NaN or infinity")
        error, power = float(sums.error), float(sums.power)
        if self._features is None and not isfinite(error):
            raise MeasurementError(f"{self.place}: expected finite reconstructions, found NaN or infinity")
        sizes, columns, means, fired = (torch.cat(parts) for parts in zip(*sums.entries, strict=True))
        of = sums.lengths.double().unsqueeze(1)
        return FeatureReading(
            indptr=torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]),
            columns=columns if self._features is None else self._features[columns].int(),
            means=means,
            fired=fired,
            tokens=tokens,
            x_mean=(sums.x / of).float().cpu(),
            x_hat_mean=None if sums.x_hat is None else (sums.x_hat / of).float().cpu(),
            x_sum=sums.x.sum(0).cpu(),
            error=error,
            power=power,
            l0=sums.fired,
            width=width,
            features=self._features,
        )


def _takes(function: Callable[..., Tensor], name: str) -> bool:
    """Whether a function has an argument of this name beside its first."""
    return name in list(inspect.signature(function).parameters)[1:]


def _sizes(dictionary: Any, width: int | None) -> tuple[int | None, int | None]:
    """F and d, as far as the dictionary says."""
    decoder = getattr(dictionary, "W_dec", None)
    shape: Sequence[Any] = decoder.shape if isinstance(decoder, Tensor) and decoder.ndim == 2 else (None, None)
    said = (width or getattr(dictionary, "width", shape[0]), getattr(dictionary, "d_model", shape[1]))
    return said[0] if isinstance(said[0], int) else None, said[1] if isinstance(said[1], int) else None


def _home(dictionary: Any, device: torch.device) -> tuple[torch.device, torch.dtype]:
    """Where a dictionary's weights are and in which dtype."""
    weight = getattr(dictionary, "W_dec", None)
    if not isinstance(weight, Tensor) and isinstance(dictionary, nn.Module):
        weight = next(dictionary.parameters(), None)
    return (weight.device, weight.dtype) if isinstance(weight, Tensor) else (device, torch.float32)
