"""What a feature's weights and codes say by themselves: tokens it promotes, interference, and how many things it means.

Pure functions on tensors, in float64 inside. Cosines and lengths are of the rows of a decoder ``W_dec [F, d]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from interp_rlhf.errors import MeasurementError
from interp_rlhf.readouts.directions import Direction

#: Numbers of a float64 block (8 MiB).
_BLOCK = 2**20


# ------------------------------------------------------------------------------------------------------------- logits


def logit_attribution(
    decoder_row: Float[Tensor, " _"],
    unembedding: Float[Tensor, "V d"],
    norm_weight: Float[Tensor, " _"] | None = None,
    *,
    subtracts_mean: bool = False,
) -> Float32[Tensor, " V"]:
    """What one unit of a feature adds to every token's logit on the direct path, up to the final norm's length.

    ``a_v = (W_U (γ ⊙ w))_v`` less its mean over the vocabulary, which no probability depends on; later layers are left
    out, and of the final norm all but its weight γ (nostalgebraist 2020, "interpreting GPT: the logit lens"; Elhage et
    al. 2021, "A Mathematical Framework for Transformer Circuits", direct path).

    Args:
        decoder_row: w ``[d]``, the direction that the feature writes.
        unembedding: W_U ``[V, d]``, one row per token id.
        norm_weight: γ ``[d]`` as it multiplies (models that store γ − 1 must have 1 added); ``None`` for none.
        subtracts_mean: the final norm takes the mean over d away first (layer norm; not RMS norm).

    Raises:
        MeasurementError: widths differ or a number is not finite.

    >>> logit_attribution(torch.tensor([1.0, 0.0]), torch.tensor([[3.0, 0.0], [0.0, 9.0], [-3.0, 0.0]])).tolist()
    [3.0, 0.0, -3.0]
    """
    width = unembedding.shape[1]
    for name, vector in (("decoder row", decoder_row), ("norm weight", norm_weight)):
        if vector is not None and len(vector) != width:
            raise MeasurementError(f"logit attribution: {name}: expected width {width}, found {len(vector)}")
    row = decoder_row.detach().double()
    row = row - row.mean() if subtracts_mean else row
    row = row if norm_weight is None else row * norm_weight.detach().to(row)
    # block by block: of a large vocabulary no float64 copy is made
    found = torch.cat([block @ row.to(block.device) for _, block in _blocks(unembedding, width)])
    found = (found - found.mean()).float()
    if not bool(found.isfinite().all()):
        raise MeasurementError("logit attribution: expected finite logits, found NaN or infinity")
    return found


def extreme_tokens(
    attribution: Float[Tensor, " V"], n: int = 10
) -> tuple[tuple[tuple[int, float], ...], tuple[tuple[int, float], ...]]:
    """The n tokens promoted most and the n suppressed most, each as (token id, logit), strongest first, ties by id.

    >>> extreme_tokens(torch.tensor([0.5, -1.0, 2.0, 0.5]), n=2)
    (((2, 2.0), (0, 0.5)), ((1, -1.0), (0, 0.5)))
    """

    def first(order: Tensor) -> tuple[tuple[int, float], ...]:
        return tuple((int(token), float(attribution[token])) for token in order[:n])

    return first(attribution.argsort(descending=True, stable=True)), first(attribution.argsort(stable=True))


# ------------------------------------------------------------------------------------------------------- interference


@dataclass(frozen=True, slots=True, eq=False)
class Interference:
    """How much K features share their directions with the F − 1 others.

    Attributes:
        largest: ``[K]`` largest ``|cos|`` to another feature.
        nearest: ``[K]`` which feature that is, the first one where several are.
        total: ``[K]`` Σ cos² over all others; 0 where nothing is shared. F random directions have (F − 1)/d.
    """

    largest: Float32[Tensor, " K"]
    nearest: Int64[Tensor, " K"]
    total: Float32[Tensor, " K"]


def interference(decoder: Float[Tensor, "F d"], features: Sequence[int] | Int[Tensor, " K"]) -> Interference:
    """Interference ``Σ_{j≠i} cos²(w_i, w_j)`` of features i, as in Elhage et al. 2022, "Toy Models of Superposition".

    A feature that writes nothing (length 0) has cosine 0 to all. Memory: a few times K·8 bytes per feature of a block.

    Raises:
        MeasurementError: fewer than two features, one that does not exist, or numbers that are not finite.

    >>> found = interference(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]), [0, 2])
    >>> found.largest.tolist(), found.nearest.tolist(), [round(total, 2) for total in found.total.tolist()]
    ([0.60..., 0.80...], [2, 1], [0.36, 1.0])
    """
    chosen = torch.as_tensor(features, dtype=torch.long).to(decoder.device)
    count = len(decoder)
    if count < 2 or bool(((chosen < 0) | (chosen >= count)).any()):
        raise MeasurementError(
            f"interference: expected features 0..{count - 1} of at least 2, found {sorted(set(chosen.tolist()))[-3:]}"
        )
    mine = _unit(decoder[chosen].detach().double())
    largest = torch.full((len(chosen),), -1.0, dtype=torch.float64, device=decoder.device)
    nearest, total = torch.zeros_like(chosen), torch.zeros_like(largest)
    for start, block in _blocks(decoder, max(len(chosen), decoder.shape[1])):
        cosines = (mine @ _unit(block).T).abs()
        own = (chosen >= start) & (chosen < start + len(block))
        cosines[own, chosen[own] - start] = -0.5  # never the largest
        place = cosines.argmax(1)
        found = cosines.gather(1, place[:, None])[:, 0]
        nearest = torch.where(found > largest, start + place, nearest)
        largest = torch.maximum(largest, found)
        cosines[own, chosen[own] - start] = 0.0
        total += cosines.square().sum(1)
    if not bool(total.isfinite().all()):
        raise MeasurementError("interference: expected a finite decoder, found NaN or infinity")
    return Interference(largest.float().cpu(), nearest.cpu(), total.float().cpu())


# ---------------------------------------------------------------------------------------------- how many things it is


def participation_ratio(vectors: Float[Tensor, "K d"]) -> float | None:
    """Dimensions that the directions of K features take up: ``(Σλ)²/Σλ²`` over the eigenvalues of their Gram matrix.

    Rows are scaled to length 1, so that it is 1 for copies of one direction and K for orthogonal ones (the
    participation ratio of Gao et al. 2017, "A theory of multineuronal dimensionality, dynamics and measurement", which
    takes a covariance matrix). ``None`` where all rows are 0.

    Raises:
        MeasurementError: a number is not finite.

    >>> [round(participation_ratio(rows), 6) for rows in (torch.eye(3) * 5, torch.ones(4, 3))]
    [3.0, 1.0]
    """
    rows = _unit(vectors.detach().double())
    if not bool(rows.isfinite().all()):
        raise MeasurementError("participation ratio: expected finite directions, found NaN or infinity")
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    trace, square = float(gram.trace()), float(gram.square().sum())  # Σλ and Σλ², with no decomposition
    return trace**2 / square if square else None


def effective_tokens(codes: Float[Tensor, " n"]) -> float | None:
    """On how many of n tokens a feature fires, the strong ones counted more: ``(Σ|z|)²/Σz²``, 1 to n.

    n times the sparseness of Treves & Rolls 1991, "What determines the capacity of autoassociative memories in the
    brain?". ``None`` where the feature is silent.

    >>> effective_tokens(torch.tensor([2.0, 0.0, 2.0])), effective_tokens(torch.zeros(3))
    (2.0, None)
    """
    z = codes.detach().double().abs()
    square = float(z.square().sum())
    return float(z.sum()) ** 2 / square if square else None


@dataclass(frozen=True, slots=True)
class ContextEntropy:
    """Over how many token ids a feature's activation is spread.

    Attributes:
        entropy: nats; 0 where all of it is on one id.
        effective: ``exp(entropy)``, the number of ids that would have this entropy with equal shares.
    """

    entropy: float
    effective: float


def context_entropy(mass: Float[Tensor, " U"]) -> ContextEntropy | None:
    """Entropy ``−Σ p ln p`` of the shares p of a feature's summed codes that fall on each token id.

    The number of equal shares is Hill 1973, "Diversity and evenness", of order 1. ``None`` where the feature is silent.

    Args:
        mass: sum of the feature's codes on each token id, e.g. a column of
            :attr:`~interp_rlhf.activations.top_contexts.TokenCodes.sums`.

    Raises:
        MeasurementError: a sum is negative or not finite: shares are not defined.

    >>> found = context_entropy(torch.tensor([3.0, 0.0, 3.0]))
    >>> round(found.entropy, 4), round(found.effective, 4)
    (0.6931, 2.0)
    """
    mass = mass.detach().double()
    if not bool((mass >= 0).all() & mass.isfinite().all()):
        raise MeasurementError(
            f"context entropy: expected finite sums of codes of at least 0, found {float(mass.min())}"
        )
    if not float(mass.sum()) > 0:
        return None
    share = mass / mass.sum()
    entropy = max(float(-torch.special.xlogy(share, share).sum()), 0.0)
    return ContextEntropy(entropy, float(torch.tensor(entropy, dtype=torch.float64).exp()))


# ---------------------------------------------------------------------------------------------------------- concepts


def nearest_directions(
    decoder_row: Float[Tensor, " d"], directions: Sequence[Direction]
) -> tuple[tuple[str, float], ...]:
    """Cosines of a feature's direction with concepts, as (name, cosine), largest ``|cosine|`` first, ties by name.

    A cosine means something for directions read at the feature's hookpoint only; the caller picks those. A feature of
    length 0 has cosine 0 to all.

    Raises:
        ConfigError: a direction has another width.

    >>> honesty = Direction("honesty", "layers.0.resid_post", torch.tensor([3.0, 4.0]))
    >>> [(name, round(cosine, 3)) for name, cosine in nearest_directions(torch.tensor([0.0, -2.0]), [honesty])]
    [('honesty', -0.8)]
    """
    for direction in directions:
        direction.check(len(decoder_row))
    row = _unit(decoder_row.detach().cpu().double()[None])[0]
    found = [(direction.name, float(row @ _unit(direction.vector.double()[None])[0])) for direction in directions]
    return tuple(sorted(found, key=lambda pair: (-abs(pair[1]), pair[0])))


# ------------------------------------------------------------------------------------------------------------- shared


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; rows of 0 stay."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _blocks(rows: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    """First row and rows as float64, as many at a time as have ``_BLOCK`` numbers of ``width`` each."""
    size = max(_BLOCK // max(width, 1), 1)
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size].detach().double()
