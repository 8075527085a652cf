"""Sums over tokens by the text they belong to, a chunk of tokens at a time, in float64."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float, Float64, Int32, Int64
from torch import Tensor

#: Codes are looked through in so many blocks (48 bytes for each that fired), of a chunk with so many times more tokens
#: than texts (72 bytes for each feature of a text): per code :meth:`TokenSums.add_codes` takes so many bytes at most.
BLOCKS, TEXTS, PER_CODE = 8, 8, 9


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``stop`` of a batch, of texts ``first`` to ``last``; ``whole`` where the last one ends."""

    start: int
    stop: int
    first: int
    last: int
    whole: bool


def chunks(lengths: list[int], most: int) -> Iterator[Chunk]:
    """Tokens of texts that stand one after another, ``most`` at a time, of a ``TEXTS``-th as many texts.

    >>> [(chunk.start, chunk.stop, chunk.first, chunk.last) for chunk in chunks([5, 9, 1], most=8)]
    [(0, 5, 0, 1), (5, 13, 1, 2), (13, 14, 1, 2), (14, 15, 2, 3)]
    """
    ends, start = list(accumulate(lengths)), 0
    while start < ends[-1]:
        first = bisect_right(ends, start)
        stop = min(start + most, ends[min(first + max(most // TEXTS, 1), len(ends)) - 1])
        last = bisect_left(ends, stop) + 1
        yield Chunk(start, stop, first, last, stop == ends[last - 1])
        start = stop


class TokenSums:
    """Running sums of one batch of B texts.

    Args:
        lengths: counted tokens of each text ``[B]``, on the device of what will be added.
        d: width of activations.
        reconstructs: whether reconstructions will come.

    Attributes:
        x, x_hat: sums per text ``[B, d]``; ``x_hat`` is ``None`` where none come.
        error, power: Σ‖x − x̂‖² and Σ‖x‖²; ``error`` is NaN where no reconstructions come.
        finite: whether all codes were.
        fired: how many codes were not 0.
        entries: per chunk how many columns fired on each finished text, which, mean code and share of tokens; CPU.
    """

    def __init__(self, lengths: Int64[Tensor, " B"], d: int, *, reconstructs: bool) -> None:
        self.lengths = lengths
        self.x: Float64[Tensor, "B d"] = torch.zeros(len(lengths), d, dtype=torch.float64, device=lengths.device)
        self.x_hat = self.x.clone() if reconstructs else None
        self.power = self.x.new_zeros(())
        self.error = self.power + (0.0 if reconstructs else torch.nan)
        self.finite, self.fired = self.power == 0, 0
        self.entries: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._open: tuple[Tensor, Tensor] | None = None

    def add_activations(
        self, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"] | None, own: Int64[Tensor, " n"]
    ) -> None:
        """Add activations and reconstructions of tokens of the texts ``own``."""
        x = x.double()
        self.x.index_add_(0, own, x)
        self.power += torch.dot(x.flatten(), x.flatten())
        if x_hat is not None and self.x_hat is not None:
            x_hat = x_hat.double()
            self.x_hat.index_add_(0, own, x_hat)
            x_hat = (x_hat - x).flatten()
            self.error += torch.dot(x_hat, x_hat)

    def add_codes(self, z: Float[Tensor, "n K"], own: Int64[Tensor, " n"], chunk: Chunk) -> None:
        """Add the codes of a chunk, whose tokens are of the texts ``own``; chunks come in order."""
        n, columns = z.shape
        block, size = -(-n // BLOCKS), (chunk.last - chunk.first) * columns
        totals = torch.zeros(size, dtype=torch.float64, device=z.device)
        counts = torch.zeros(size, dtype=torch.int32, device=z.device)
        if self._open is not None:
            totals[:columns], counts[:columns] = self._open
        shift = (own - chunk.first - torch.arange(n, device=z.device) % block) * columns
        for start in range(0, n, block):
            codes = z[start : start + block].reshape(-1)
            index = fired_cells(codes)
            fired = codes[index].double()
            self.finite &= fired.isfinite().all()
            self.fired += len(index)
            index += shift[start + index // columns]
            totals.index_add_(0, index, fired)
            counts.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        done = size if chunk.whole else size - columns
        self._open = None if chunk.whole else (totals[done:].clone(), counts[done:].clone())
        self._finish(totals[:done], counts[:done], columns, self.lengths[chunk.first :])

    def _finish(
        self, totals: Float64[Tensor, " cells"], counts: Int32[Tensor, " cells"], columns: int, lengths: Tensor
    ) -> None:
        index = counts.nonzero().flatten()
        row = index // columns
        sizes = torch.bincount(row, minlength=len(counts) // columns)
        of = lengths[row]
        means, fired = (totals[index] / of).float(), (counts[index] / of).float()
        self.entries.append((sizes.cpu(), (index - row * columns).int().cpu(), means.cpu(), fired.cpu()))


def fired_cells(codes: Float[Tensor, " cells"]) -> Int64[Tensor, " entries"]:
    """Where codes are not 0, ascending. On the CPU NumPy finds them several times as fast as torch."""
    if codes.device.type != "cpu":
        return codes.nonzero().flatten()
    plain = codes.float() if codes.dtype is torch.bfloat16 else codes
    return torch.from_numpy(np.flatnonzero(plain.detach().numpy() != 0))


def as_dense(z: Tensor) -> Tensor:
    """Codes as an ordinary tensor."""
    return z if z.layout == torch.strided else z.to_dense()
