"""How far a whole representation moved: debiased linear CKA, same-prompt cosine, norm ratio, effective rank.

All of it is computed in float64 from the float32 readings ``X_0``, ``X_t`` (``[N, d]``, row i is prompt i in both).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from interp_rlhf.drift.estimates import Estimate, estimate
from interp_rlhf.drift.nulls import finite, numeric_band, paired_bootstrap
from interp_rlhf.errors import MeasurementError


def debiased_cka(x0: Float[Tensor, "n d"], xt: Float[Tensor, "n d"]) -> float:
    """Linear CKA with the unbiased HSIC estimator throughout: in [−1, 1], centred on 0 for unrelated data.

    HSIC₁ of Song et al. 2012 (*Feature selection via dependence maximization*, eq. 5) is the inner product of the
    U-centred Gram matrices (Székely & Rizzo 2014); CKA is their cosine (Nguyen et al. 2021; Murphy et al. 2024 on
    why the biased one grows with d/N). Invariant to rotations, scale and shifts of either argument. With
    ``X_t == X_0`` it is exactly 1: the three inner products are then the same number s, and √(s·s) = s in IEEE
    arithmetic; otherwise only rounding beyond ±1 is cut off (Cauchy-Schwarz holds for the exact values).

    Raises:
        MeasurementError: fewer than 4 prompts, shapes that differ, NaN, or activations that do not vary.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [2.0, 1.0], [0.0, -1.0]])
    >>> debiased_cka(x, x)
    1.0
    >>> round(debiased_cka(x, x + 3.0), 6)
    1.0
    """
    a, b = _u_centred_grams(x0, xt)
    return _bounded_cosine((a * b).sum(), (a * a).sum(), (b * b).sum())


def same_prompt_cosine(x0: Float[Tensor, "n d"], xt: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Cosine of each prompt's reading with itself at step 0, ``[N]`` in [−1, 1]; exactly 1 where nothing changed.

    Raises:
        MeasurementError: a reading of length 0, shapes that differ, NaN.

    >>> same_prompt_cosine(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
    tensor([0., 1.], dtype=torch.float64)
    """
    a, b = _pair(x0, xt)
    squares = (a * a).sum(1), (b * b).sum(1)
    _no_zero_rows(*squares)
    return ((a * b).sum(1) / (squares[0] * squares[1]).sqrt()).clamp(-1, 1)


def norm_ratio(x0: Float[Tensor, "n d"], xt: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Length of each prompt's reading over its length at step 0, ``[N]`` > 0; exactly 1 where nothing changed.

    Raises:
        MeasurementError: a reading of length 0 at step 0, shapes that differ, NaN.

    >>> norm_ratio(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]]))
    tensor([2.], dtype=torch.float64)
    """
    a, b = _pair(x0, xt)
    _no_zero_rows((a * a).sum(1))
    return b.norm(dim=1) / a.norm(dim=1)


def effective_rank(x: Float[Tensor, "n d"]) -> float:
    """exp of the entropy (nats) of the singular values σ of the centred ``X``, normalised as ``σ_k / Σ σ``.

    Roy & Vetterli 2007 (*The effective rank*, def. 1), applied after subtracting the mean over prompts: σ, not σ²,
    enters the entropy. Between 1 and min(N − 1, d): with few prompts it is bounded by N and comparable only at
    equal N.

    Raises:
        MeasurementError: fewer than 2 prompts, NaN, or activations that do not vary.

    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> round(effective_rank(x), 6)
    2.0
    """
    return _rank_and_influence(x)[0]


def representation_floor(x0: Float[Tensor, "n d"], again: Float[Tensor, "n d"]) -> dict[str, tuple[float, float]]:
    """Numeric floor of each representation metric from two readings of the same weights (other batch order, padding).

    Args:
        x0: ``[N, d]`` step-0 readings.
        again: ``[N, d]`` the same texts read again.

    Returns:
        metric name → ``(low, high)``; a value inside its band is no drift.
    """
    return {
        "representation/cka": numeric_band(1.0, torch.tensor([debiased_cka(x0, again)], dtype=torch.float64)),
        "representation/cosine": numeric_band(1.0, same_prompt_cosine(x0, again)),
        "representation/norm_ratio": numeric_band(1.0, norm_ratio(x0, again)),
        "representation/effective_rank": numeric_band(
            effective_rank(x0), torch.tensor([effective_rank(again)], dtype=torch.float64)
        ),
    }


def representation_estimates(
    x0: Float[Tensor, "n d"],
    xt: Float[Tensor, "n d"],
    *,
    floor: Mapping[str, tuple[float, float]],
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """All representation metrics of one hookpoint, with intervals over prompts and the numeric floor as band.

    Cosine and norm ratio: paired percentile bootstrap. CKA: exact delete-one jackknife. Effective rank:
    infinitesimal jackknife. The latter two are no means over prompts: a resampled prompt that appears twice would
    look like two prompts that agree, which inflates CKA and deflates the rank.

    Args:
        x0, xt: ``[N, d]`` readings of the same prompts, one row per sampling unit.
        floor: from :func:`representation_floor`.

    Returns:
        metric name → estimate.
    """
    n = len(x0)
    boot = {"resamples": resamples, "confidence": confidence, "seed": seed}
    cosine, ratio = same_prompt_cosine(x0, xt), norm_ratio(x0, xt)
    cka, cka_interval = _cka_with_interval(x0, xt, confidence)
    rank, influence = _rank_and_influence(xt)
    spread = _z(confidence) * float((influence - influence.mean()).square().sum().sqrt())
    found = {
        "representation/cka": (cka, cka_interval),
        "representation/cosine": (float(cosine.mean()), paired_bootstrap(cosine, **boot)),
        "representation/norm_ratio": (float(ratio.mean()), paired_bootstrap(ratio, **boot)),
        "representation/effective_rank": (rank, (max(rank - spread, 1.0), min(rank + spread, n - 1.0))),
    }
    return {
        metric: estimate(metric, value, n, interval=interval, null_kind="numeric", band=floor[metric])
        for metric, (value, interval) in found.items()
    }


def _cka_with_interval(x0: Tensor, xt: Tensor, confidence: float) -> tuple[float, tuple[float, float]]:
    """CKA and its jackknife interval on Fisher's scale ``artanh``, which keeps the interval inside (−1, 1)."""
    value = debiased_cka(x0, xt)
    if abs(value) == 1.0:
        return value, (value, value)
    top = 1 - 2.0**-53
    deleted = torch.atanh(_delete_one_cka(x0, xt).clamp(-top, top))
    n = len(deleted)
    error = math.sqrt((n - 1) / n * float((deleted - deleted.mean()).square().sum()))
    centre, reach = math.atanh(value), _z(confidence) * error
    return value, (math.tanh(centre - reach), math.tanh(centre + reach))


def _delete_one_cka(x0: Tensor, xt: Tensor) -> Tensor:
    """CKA without prompt i, for every i: ``[N]``, in O(N²) from the sums that leave row and column i out."""
    if len(x0) < 5:
        raise MeasurementError(f"representation/cka: expected at least 5 prompts for an interval, found {len(x0)}")
    a, b = (_hollow_gram(x) for x in _pair(x0, xt))
    cross, own_0, own_t = _delete_one_hsic(a, b), _delete_one_hsic(a, a), _delete_one_hsic(b, b)
    if float(torch.minimum(own_0, own_t).min()) <= 0:
        raise MeasurementError("representation/cka: all variation comes from a single prompt")
    return cross / (own_0 * own_t).sqrt()


def _delete_one_hsic(a: Tensor, b: Tensor) -> Tensor:
    """``m(m−3)·HSIC₁`` of hollow Gram matrices with row and column i left out, m = N − 1: ``[N]``."""
    m = len(a) - 1
    rows_a, rows_b, both = a.sum(1), b.sum(1), (a * b).sum(1)
    trace = both.sum() - 2 * both
    totals = (rows_a.sum() - 2 * rows_a) * (rows_b.sum() - 2 * rows_b)
    mixed = (rows_a * rows_b).sum() - rows_a * rows_b - a @ rows_b - b @ rows_a + both
    return trace + totals / ((m - 1) * (m - 2)) - 2 * mixed / (m - 2)


def _u_centred_grams(x0: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _pair(x0, xt)
    if len(a) < 4:
        raise MeasurementError(f"representation/cka: expected at least 4 prompts, found {len(a)}")
    return _u_centred(_hollow_gram(a)), _u_centred(_hollow_gram(b))


def _hollow_gram(x: Tensor) -> Tensor:
    """Gram matrix of the centred rows with a zero diagonal (centring changes nothing but the rounding)."""
    centred = x - x.mean(0)
    gram = centred @ centred.T
    return gram.fill_diagonal_(0)


def _u_centred(hollow: Tensor) -> Tensor:
    n = len(hollow)
    rows = hollow.sum(1)
    centred = hollow - (rows[:, None] + rows[None, :]) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0)


def _rank_and_influence(x: Tensor) -> tuple[float, Tensor]:
    """Effective rank, and its derivative ``[N]`` with respect to the weight of each prompt (infinitesimal jackknife).

    With eigenpairs ``(σ_k², u_k)`` of the Gram matrix, ``∂σ_k/∂w_i = σ_k u_ik²/2``; the mean's own dependence on the
    weights is of second order. For ``H = −Σ p log p``, ``∂H/∂σ_k = −(log p_k + H)/Σσ``.
    """
    centred = _centred(x)
    squares, vectors = torch.linalg.eigh(centred @ centred.T)
    sigma = squares.clamp(min=0).sqrt()
    sigma = torch.where(sigma > 1e-7 * sigma.max(), sigma, 0.0)
    share = sigma / sigma.sum()
    entropy = torch.special.entr(share).sum()
    log_share = torch.where(share > 0, share.log(), 0.0)
    slope = -(log_share + entropy) * share / 2
    rank = entropy.exp()
    return float(rank), rank * (vectors.square() @ slope)


def _centred(x: Tensor) -> Tensor:
    x = finite(x, "representation").double()
    if x.ndim != 2 or len(x) < 2:
        raise MeasurementError(f"representation: expected [N ≥ 2, d], found {tuple(x.shape)}")
    centred = x - x.mean(0)
    if float(centred.norm()) <= 1e-12 * float(x.norm()):
        raise MeasurementError(f"representation: the readings of {len(x)} prompts do not differ")
    return centred


def _pair(x0: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
    if x0.shape != xt.shape or x0.ndim != 2:
        raise MeasurementError(
            f"representation: expected two [N, d] of one shape, found {tuple(x0.shape)} and {tuple(xt.shape)}"
        )
    return finite(x0, "step-0 readings").double(), finite(xt, "readings").double()


def _no_zero_rows(*squares: Tensor) -> None:
    zero = sum(int((square == 0).sum()) for square in squares)
    if zero:
        raise MeasurementError(f"representation: expected readings of non-zero length, found {zero} that are 0")


def _bounded_cosine(cross: Tensor, own_0: Tensor, own_t: Tensor) -> float:
    if float(own_0) <= 0 or float(own_t) <= 0:
        raise MeasurementError("representation/cka: the readings do not vary between prompts")
    return min(1.0, max(-1.0, float(cross) / math.sqrt(float(own_0) * float(own_t))))


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
