"""What a number is compared with: bootstrap intervals, comparable directions, the numeric floor.

Every random draw has a generator of its own, seeded by the caller: the global generators are never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp_rlhf.drift.control_runs import rank_place
from interp_rlhf.errors import MeasurementError

#: Statistic of many resamples at once: counts ``[R, n]`` (how often each unit was drawn) to values ``[R]``.
Statistic = Callable[[Tensor], Tensor]


def paired_bootstrap(
    per_unit: Float[Tensor, " n"], *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of ``per_unit`` (Efron & Tibshirani 1993, ch. 13).

    Paired because each entry already is a difference (or ratio, or projection) of the same unit at two times.

    Args:
        per_unit: ``[n]``, one value per sampling unit.
        resamples: bootstrap resamples R.
        confidence: coverage aimed at, in (0, 1).
        seed: seeds the resampling; equal ``(n, resamples, seed)`` draw the same units.

    Returns:
        ``(low, high)`` in the unit of ``per_unit``.

    Raises:
        MeasurementError: fewer than 2 units, or a value that is not finite.
    """
    values = finite(per_unit, "bootstrap").double()
    n = len(values)
    return bootstrap_statistic(
        lambda counts: counts @ values / n, n, resamples=resamples, confidence=confidence, seed=seed
    )


def bootstrap_statistic(
    statistic: Statistic, n: int, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a statistic that is given as a function of resampling counts.

    Args:
        statistic: maps counts ``[R, n]`` (float64, rows sum to n) to values ``[R]``.
        n: sampling units; at least 2.

    Raises:
        MeasurementError: fewer than 2 units, or the statistic is not finite in some resample.
    """
    if n < 2:
        raise MeasurementError(f"bootstrap: expected at least 2 sampling units, found {n}")
    replicates = finite(statistic(_counts(n, resamples, seed)), "bootstrap")
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates.double().numpy(), [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _counts(n: int, resamples: int, seed: int) -> Tensor:
    """How often each of n units is drawn, ``[R, n]`` float64; kept, since all readouts of a pass share it."""
    drawn = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    cells = drawn + n * np.arange(resamples)[:, None]
    return torch.from_numpy(np.bincount(cells.ravel(), minlength=resamples * n).reshape(resamples, n).astype(float))


def covariance_directions(
    x0: Float[Tensor, "n d"], k: int, seed: int, *, drop_top: bool = False
) -> Float[Tensor, "k d"]:
    """Unit directions drawn from the normal distribution with the covariance of the activations.

    ``g = Zᵀ(X_0 − mean)`` with standard normal ``Z [n, k]`` has covariance ``(n − 1)·Cov(X_0)`` exactly, without
    ever forming the d × d matrix; each draw is then scaled to length 1.

    Args:
        x0: ``[n, d]`` step-0 activations.
        k: number of directions.
        seed: seeds the draw.
        drop_top: leave out the first principal component, which in deep layers holds most of the variance and
            would make all directions alike.

    Returns:
        ``[k, d]`` float32, rows of length 1.

    Raises:
        MeasurementError: the activations do not vary (or not beyond the first component).
    """
    centred = finite(x0, "comparison directions").double()
    centred = centred - centred.mean(0)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(k, len(centred), generator=generator, dtype=torch.float64)
    if drop_top:
        _, vectors = torch.linalg.eigh(centred @ centred.T)
        top = vectors[:, -1]
        centred = centred - torch.outer(top, top @ centred)
    draws = noise @ centred
    lengths = draws.norm(dim=1, keepdim=True)
    if not bool((lengths > 1e-9 * x0.double().norm()).all()):
        raise MeasurementError(f"comparison directions: the activations of {len(x0)} prompts do not vary")
    return (draws / lengths).float()


def rank_p(value: float, null: Float[Tensor, " k"]) -> float:
    """Two-sided rank p-value ``(1 + #{|null| ≥ |value|}) / (1 + k)`` (Phipson & Smyth 2010); never 0.

    >>> rank_p(3.0, torch.tensor([1.0, -2.0, 0.5]))
    0.25
    >>> rank_p(1.0, torch.tensor([1.0, -2.0, 0.5]))
    0.75
    """
    as_large = int((finite(null, "rank").double().abs() >= abs(value)).sum())
    return (1 + as_large) / (1 + len(null))


def direction_band(null: Float[Tensor, " k"], confidence: float = 0.95) -> tuple[float, float]:
    """Band ``±m`` that matches :func:`rank_p`: a value outside it has ``p ≤ 1 − confidence``, one inside has not.

    ``m`` is the ``⌈confidence·(k + 1)⌉``-th smallest ``|null|``. Symmetric about 0 because the sign of a comparison
    direction is arbitrary.

    Raises:
        MeasurementError: k is too small for this confidence (19 directions at least for 95 %).

    >>> direction_band(torch.arange(-1.0, 18.0), confidence=0.95)
    (-17.0, 17.0)
    """
    sizes = finite(null, "directions band").double().abs().sort().values
    place = rank_place(len(sizes), confidence)
    if place is None:
        raise MeasurementError(f"directions band: {len(sizes)} directions are too few for confidence {confidence}")
    half = float(sizes[place - 1])
    return -half, half


def numeric_band(at_rest: float, readings: Float[Tensor, " n"]) -> tuple[float, float]:
    """Band within which a value says nothing: what reading the same weights twice does to it.

    Args:
        at_rest: the value when nothing changes (0 for a drift, 1 for a similarity).
        readings: ``[n]`` the value between two passes over the same weights with other batch order and padding: one
            per prompt where the statistic is a mean over prompts (no mean of such values can leave the band), else
            the single value of the statistic itself.

    Returns:
        ``(at_rest − m, at_rest + m)``, holding every reading despite rounding. ``m = max |readings − at_rest|``, but at
        least one float32 rounding of the value: readings have no more digits, and two passes may agree by luck.

    >>> numeric_band(1.0, torch.tensor([1.25, 0.5]))
    (0.5, 1.5)
    """
    values = finite(readings, "numeric floor").double()
    half = max(float((values - at_rest).abs().max()), torch.finfo(torch.float32).eps * max(1.0, abs(at_rest)))
    return min(at_rest - half, float(values.min())), max(at_rest + half, float(values.max()))


def finite(values: Tensor, what: str) -> Tensor:
    """``values`` as they are, detached, on the CPU.

    Raises:
        MeasurementError: empty, or some entry is NaN or infinite; the message starts with ``what``.
    """
    values = values.detach().cpu()
    if values.numel() == 0:
        raise MeasurementError(f"{what}: expected values, found none (shape {tuple(values.shape)})")
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise MeasurementError(f"{what}: expected finite numbers, found {bad} of {values.numel()} NaN or infinite")
    return values
