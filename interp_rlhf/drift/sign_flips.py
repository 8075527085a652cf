"""Did anything move on these prompts? Joint sign flips of whole prompts, the largest t over all readouts.

Signs are drawn by a generator of their own, seeded by the caller: the global generators are never touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp_rlhf.drift.control_runs import rank_place
from interp_rlhf.drift.estimates import Estimate, estimate
from interp_rlhf.drift.nulls import finite
from interp_rlhf.errors import MeasurementError

#: Sums of flipped values this close, as a share of the largest possible one, are equal: they differ by rounding.
_ROUNDING = 1e-12
#: Numbers of one block of flipped sums (8 MiB in float64).
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class MaxT:
    """t of each readout, with p and critical value adjusted for looking at all of them.

    Attributes:
        t: ``[m]`` float64.
        p: ``[m]`` float64, ``(1 + #{max|t*| ≥ |t|}) / (1 + flips)``, never 0.
        critical: ``p ≤ 1 − confidence`` where ``|t|`` is above it and nowhere else; ``None`` where so few prompts or
            flips cannot give such a p.
    """

    t: Float[Tensor, " m"]
    p: Float[Tensor, " m"]
    critical: float | None


def max_t(d: Float[Tensor, "n m"], *, flips: int = 2000, confidence: float = 0.95, seed: int = 0) -> MaxT:
    """Test of every column's mean against 0 by joint sign flips of rows (Westfall & Young 1993, maxT).

    ``t = mean / (SD/√n)`` with n − 1 in the SD. A flip changes the signs of whole rows, so that the dependence
    between columns is kept; each column is compared with the largest ``|t*|`` over all columns. H0: rows are
    symmetric about 0 jointly. Where a prompt set has at most ``flips`` sign patterns (2ⁿ) all are used and p is exact.

    Flips leave a column's sum of squares Q as it is: with ``u = Σd/√(nQ)``, which lies in [−1, 1],
    ``t = u·√(n − 1)/√(1 − u²)`` rises with u, and ranks are taken on u.

    Args:
        d: ``[n, m]`` drifts D of n prompts, one column for each concept and hookpoint; any unit.
        flips: sign patterns drawn.
        confidence: of the critical value, in (0, 1).
        seed: seeds the signs; equal ``(n, flips, seed)`` use the same.

    Returns:
        A column of zeros has t 0 and p 1. A column of one repeated number has no spread: its t is what the least
        spread that float32 readings resolve (1.2e-7 of the root mean square) would give; its p needs no spread.

    Raises:
        MeasurementError: not ``[n, m]``, fewer than 2 prompts, or a value that is not finite.

    >>> found = max_t(torch.tensor([[1.0, 1.0], [2.0, -1.0], [3.0, 1.0], [2.0, -1.0]]))
    >>> found.t, found.p  # in 4 of the 16 sign patterns one of the columns has all its signs alike
    (tensor([4.8990, 0.0000], dtype=torch.float64), tensor([0.2500, 1.0000], dtype=torch.float64))
    """
    values = finite(d, "concept/drift_t").double()
    if values.ndim != 2 or len(values) < 2:
        raise MeasurementError(
            f"concept/drift_t: expected drifts [n, m] of at least 2 prompts, found {tuple(values.shape)}"
        )
    n = len(values)
    length = values.norm(dim=0) * math.sqrt(n)
    scaled = values / torch.where(length > 0, length, 1.0)
    observed = scaled.sum(0)
    null = _largest_sums(scaled, _signs(n, flips, seed)).sort().values
    as_large = (len(null) - torch.searchsorted(null, observed.abs() - _ROUNDING)).double()
    place = rank_place(len(null), confidence)
    critical = None if place is None else float(_t(null[place - 1] + _ROUNDING, n))
    return MaxT(_t(observed, n), (1 + as_large) / (1 + len(null)), critical)


def drift_t_estimates(
    d: Float[Tensor, "n m"], *, flips: int = 2000, confidence: float = 0.95, seed: int = 0
) -> list[Estimate]:
    """``concept/drift_t`` of each column of ``d``, p and band adjusted for all of them; arguments of :func:`max_t`.

    >>> found = drift_t_estimates(torch.tensor([[1.0], [2.0], [3.0], [2.0]]))[0]
    >>> round(found.value, 3), found.p, found.null_high, found.n  # 4 prompts: p cannot be 0.05, there is no band
    (4.899, 0.125, None, 4)
    """
    found = max_t(d, flips=flips, confidence=confidence, seed=seed)
    band = None if found.critical is None else (-found.critical, found.critical)
    return [
        estimate("concept/drift_t", t, len(d), null_kind="sign_flip", band=band, p=p)
        for t, p in zip(found.t.tolist(), found.p.tolist(), strict=True)
    ]


def _t(u: Tensor, n: int) -> Tensor:
    least = torch.finfo(torch.float32).eps ** 2
    return math.sqrt(n - 1) * u / (1 - u.square()).clamp(min=least).sqrt()


def _largest_sums(scaled: Tensor, signs: Tensor) -> Tensor:
    """Largest ``|Σ s·scaled|`` over columns for each sign pattern ``[R, n]``: ``[R]``, block by block."""
    blocks = signs.split(max(1, _BLOCK // max(scaled.shape)))
    return torch.cat([(block.double() @ scaled).abs().amax(1) for block in blocks])


@lru_cache(maxsize=8)
def _signs(n: int, flips: int, seed: int) -> Tensor:
    """Sign patterns ``[R, n]`` int8 without the identity; kept, since all measurements of a run share them.

    All of them where there are at most ``flips``: then one of each pair (s, −s), which have the same ``|t|``.
    """
    if 2**n <= flips:
        negative = np.arange(1, 2 ** (n - 1))[:, None] >> np.arange(n) & 1
    else:
        negative = np.random.default_rng(seed).integers(0, 2, size=(flips, n), dtype=np.int8)
    return torch.from_numpy((1 - 2 * negative).astype(np.int8))
