"""A label for a feature, made from what is known of it, and how well that predicts where the feature fires.

Scoring an explanation by the correlation of what it predicts with the codes on texts that it was not made from follows
Bills et al. 2023, "Language models can explain neurons in language models"; here no model reads the label: a token's
code is predicted from its id alone. A feature that depends on what stands before the token scores low, rightly: its
tokens do not explain it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from interp_rlhf.activations.top_contexts import TokenCodes
from interp_rlhf.errors import MeasurementError
from interp_rlhf.readouts.feature_gauges import context_entropy

#: Shuffled labels that are scored beside a label: one that scores above all 19 has p ≤ 1/20.
SHUFFLES = 19
#: A variance below so much of the mean square is rounding.
_ROUNDING = 1e-12


# ---------------------------------------------------------------------------------------------------------- the label


@dataclass(frozen=True, slots=True)
class FeatureLabel:
    """What a feature's evidence says, in words, with the evidence.

    Attributes:
        text: the label.
        tokens: token ids that carry most of the feature's activation on the fitting texts, with their shares, largest
            first, ties by id; only those the label names.
        spread: effective number of token ids it fires on; ``None`` where it is silent.
        promoted: ids of the tokens that the label says it promotes.
        concepts: concepts that the label names, with cosines.
    """

    text: str
    tokens: tuple[tuple[int, float], ...]
    spread: float | None
    promoted: tuple[int, ...]
    concepts: tuple[tuple[str, float], ...]


def feature_label(
    fit: TokenCodes,
    column: int,
    decode: Callable[[int], str],
    *,
    promoted: Sequence[int] = (),
    concepts: Sequence[tuple[str, float]] = (),
    most: int = 3,
    share: float = 0.1,
    close: float = 0.3,
) -> FeatureLabel:
    """Put a feature's evidence into one line.

    Args:
        fit: codes per token id on the fitting texts.
        column: which of its K features.
        decode: text of a token id.
        promoted: token ids, strongest first (:func:`~interp_rlhf.readouts.feature_gauges.extreme_tokens`).
        concepts: names and cosines, nearest first
            (:func:`~interp_rlhf.readouts.feature_gauges.nearest_directions`).
        most: how many tokens, promoted tokens and concepts to name of each.
        share: share of the activation that a token id must carry to be named.
        close: ``|cosine|`` that a concept must reach to be named.

    Raises:
        MeasurementError: the feature does not exist, or its codes on some token id sum up to less than 0.

    >>> fit = TokenCodes.of(torch.tensor([5, 5, 6, 7]), torch.tensor([[3.0], [5.0], [2.0], [0.0]]))
    >>> feature_label(fit, 0, {5: " cat", 6: "dog"}.get, promoted=[6], concepts=[("pets", -0.41)]).text
    "fires on ' cat' (80 %) and 'dog' (20 %); promotes 'dog'; opposite to pets (cosine -0.41)"
    """
    _check_column(fit, column)
    mass = fit.sums[:, column]
    spread = context_entropy(mass)
    named = tuple(_named(fit.ids, mass, most, share))
    chosen, near = tuple(promoted[:most]), tuple(pair for pair in concepts if abs(pair[1]) >= close)[:most]
    if spread is None:
        said = ["silent on the fitting texts"]
    elif named:
        said = ["fires on " + _list([f"{decode(token)!r} ({part:.0%})".replace("%", " %") for token, part in named])]
    else:
        said = [f"fires on many tokens (about {spread.effective:.0f})"]
    if chosen:
        said.append("promotes " + _list([repr(decode(token)) for token in chosen]))
    for name, cosine in near:
        said.append(f"{'close' if cosine > 0 else 'opposite'} to {name} (cosine {cosine:.2f})")
    return FeatureLabel("; ".join(said), named, None if spread is None else spread.effective, chosen, near)


def _named(ids: Tensor, mass: Tensor, most: int, share: float) -> list[tuple[int, float]]:
    total = float(mass.sum())
    order = mass.argsort(descending=True, stable=True)[:most].tolist()
    return [(int(ids[i]), float(mass[i]) / total) for i in order if total > 0 and float(mass[i]) >= share * total]


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


# ---------------------------------------------------------------------------------------------------------- the score


@dataclass(frozen=True, slots=True)
class LabelScore:
    """How well token ids predict a feature's codes on texts held out.

    Attributes:
        score: Pearson correlation, over the held-out tokens, of a token's code with the mean code that its id had on
            the fitting texts; ids that these do not hold are predicted by the mean code over all fitting tokens, which
            says nothing either way. ``None`` where it is undefined: no held-out token, the same code on all of them, or
            the same prediction for all.
        named: the same where only the ids that the label names are told apart and all others are predicted by the mean
            of all others; ``None`` too where the label names none.
        shuffled: the highest of 19 scores with the ids' predictions exchanged at random among the held-out ids (those
            that are defined); a label that is not above it predicts no better than chance.
        tokens: held-out tokens.
        unseen: share of these whose id the fitting texts do not hold; NaN where there is no token.
    """

    score: float | None
    named: float | None
    shuffled: float | None
    tokens: int
    unseen: float


def label_score(
    fit: TokenCodes, held: TokenCodes, column: int, label: FeatureLabel | None = None, *, seed: int = 0
) -> LabelScore:
    """Score the label of feature ``column`` on held-out texts, from sums per token id; no single code is needed.

    Args:
        fit: codes per token id on the texts that the label was made from.
        held: the same on other texts.
        column: which of the K features.
        label: for :attr:`LabelScore.named`.
        seed: of the shuffling.

    Raises:
        MeasurementError: the feature does not exist, or nothing was read to fit.

    >>> fit = TokenCodes.of(torch.tensor([1, 2, 2]), torch.tensor([[4.0], [0.0], [0.0]]))
    >>> held = TokenCodes.of(torch.tensor([1, 2, 1]), torch.tensor([[3.0], [0.0], [3.0]]))
    >>> label_score(fit, held, 0).score
    1.0
    """
    _check_column(fit, column)
    _check_column(held, column)
    if not fit.tokens:
        raise MeasurementError("label score: expected tokens to fit on, found none")
    sums, square = held.sums[:, column], float(held.squares[column])
    guess, seen = _predictions(fit, held.ids, column)
    generator = torch.Generator().manual_seed(seed)
    shuffles = (guess[torch.randperm(len(guess), generator=generator)] for _ in range(SHUFFLES))
    chance = [r for r in (_correlation(other, held.counts, sums, square) for other in shuffles) if r is not None]
    own = _named_predictions(fit, held.ids, column, label) if label is not None and label.tokens else None
    tokens = held.tokens
    return LabelScore(
        score=_correlation(guess, held.counts, sums, square),
        named=None if own is None else _correlation(own, held.counts, sums, square),
        shuffled=max(chance) if chance else None,
        tokens=tokens,
        unseen=float(held.counts[~seen].sum()) / tokens if tokens else float("nan"),
    )


def _check_column(codes: TokenCodes, column: int) -> None:
    if not 0 <= column < codes.sums.shape[1]:
        raise MeasurementError(f"feature label: expected a column 0..{codes.sums.shape[1] - 1}, found {column}")


def _predictions(fit: TokenCodes, ids: Int64[Tensor, " U"], column: int) -> tuple[Float64[Tensor, " U"], Tensor]:
    """The mean code of each id on the fitting texts, and which ids these hold."""
    place = torch.searchsorted(fit.ids, ids).clamp_max(len(fit.ids) - 1)
    seen = fit.ids[place] == ids
    mean = fit.sums[:, column].sum() / fit.tokens
    return torch.where(seen, fit.means[place, column], mean), seen


def _named_predictions(fit: TokenCodes, ids: Tensor, column: int, label: FeatureLabel) -> Float64[Tensor, " U"]:
    """As :func:`_predictions`, with all ids that the label does not name taken as one."""
    named = torch.tensor([token for token, _ in label.tokens])
    inside = torch.isin(fit.ids, named)
    others = fit.sums[~inside, column].sum() / fit.counts[~inside].sum().clamp_min(1)
    return torch.where(torch.isin(ids, named), _predictions(fit, ids, column)[0], others)


def _correlation(
    guess: Float64[Tensor, " U"], counts: Int64[Tensor, " U"], sums: Float64[Tensor, " U"], square: float
) -> float | None:
    """Pearson correlation over tokens, of which ``counts`` share a prediction and have codes that add up to ``sums``.

    Args:
        square: sum of the squared codes over all tokens.
    """
    n = int(counts.sum())
    if not n:
        return None
    of = counts.double()
    guess_mean, code_mean = float((of * guess).sum()) / n, float(sums.sum()) / n
    away = guess - guess_mean
    guess_spread, code_spread = float((of * away.square()).sum()), square - n * code_mean**2
    if guess_spread <= _ROUNDING * float((of * guess.square()).sum()) or code_spread <= _ROUNDING * square:
        return None
    r = float((away * (sums - of * code_mean)).sum()) / (guess_spread * code_spread) ** 0.5
    return min(max(r, -1.0), 1.0)
