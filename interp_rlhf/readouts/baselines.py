"""What a concept's direction has to beat: classifiers that see the words or the length only, never the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp_rlhf.errors import MeasurementError
from interp_rlhf.readouts.separation import auc

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

#: Token ids of one text's completion.
Tokens = Sequence[int]
#: Scores of positive texts ``[n]`` and of negative ones ``[m]``, float64.
Scores = tuple[Float[Tensor, " n"], Float[Tensor, " m"]]


def bag_of_tokens_auc(
    fit_positive: Sequence[Tokens],
    fit_negative: Sequence[Tokens],
    held_positive: Sequence[Tokens],
    held_negative: Sequence[Tokens],
) -> float:
    """Held-out AUC of a logistic regression on token counts (L2 with C = 1, L-BFGS; deterministic, no random draw).

    The vocabulary is that of the fitting half: tokens never seen there do not count.

    Args:
        fit_positive, fit_negative: completions the classifier is fitted on.
        held_positive, held_negative: completions it is scored on.

    Returns:
        AUC in [0, 1], ties counting one half.

    Raises:
        MeasurementError: one of the four has no text.

    >>> bag_of_tokens_auc([[1, 2], [1]], [[2, 3], [3]], [[1, 9]], [[3, 9]])
    1.0
    """
    _no_empty_side(fit_positive, fit_negative, held_positive, held_negative)
    return auc(*_token_scores(fit_positive, fit_negative, held_positive, held_negative))


def length_auc(
    fit_positive: Sequence[Tokens],
    fit_negative: Sequence[Tokens],
    held_positive: Sequence[Tokens],
    held_negative: Sequence[Tokens],
) -> float:
    """Held-out AUC of the number of tokens; whether longer means positive is decided on the fitting half.

    Raises:
        MeasurementError: one of the four has no text.

    >>> length_auc([[1, 1]], [[1, 1, 1]], [[5]], [[5, 5]])
    1.0
    """
    _no_empty_side(fit_positive, fit_negative, held_positive, held_negative)
    return auc(*_length_scores(fit_positive, fit_negative, held_positive, held_negative))


def held_token_scores(
    positive: Sequence[Tokens],
    negative: Sequence[Tokens],
    positive_folds: Sequence[int],
    negative_folds: Sequence[int],
) -> Scores:
    """Scores of the classifier of :func:`bag_of_tokens_auc`, fitted once per fold on the texts outside it.

    Scores of different folds are on different scales: compare them within a fold only.

    Args:
        positive, negative: completions of each side; of pairs, or of different numbers.
        positive_folds, negative_folds: the fold of each.

    Returns:
        ``[n]`` and ``[m]`` float64, each text scored by the classifier that never saw its fold.

    Raises:
        MeasurementError: a fold, or what is outside it, has no text of one side.

    >>> positive, negative = held_token_scores([[1], [1, 2]], [[3], [3, 2]], [0, 1], [0, 1])
    >>> bool((positive > negative).all())
    True
    """
    return _held(_token_scores, positive, negative, positive_folds, negative_folds)


def held_length_scores(
    positive: Sequence[Tokens],
    negative: Sequence[Tokens],
    positive_folds: Sequence[int],
    negative_folds: Sequence[int],
) -> Scores:
    """Number of tokens, its sign per fold such that the texts outside the fold say longer (or shorter) is positive.

    Arguments, result and errors as :func:`held_token_scores`.

    >>> held_length_scores([[1], [1]], [[3, 3], [3, 2]], [0, 1], [0, 1])[1].tolist()
    [-2.0, -2.0]
    """
    return _held(_length_scores, positive, negative, positive_folds, negative_folds)


def _held(
    score: Callable[..., Scores],
    positive: Sequence[Tokens],
    negative: Sequence[Tokens],
    positive_folds: Sequence[int],
    negative_folds: Sequence[int],
) -> Scores:
    sides = ((positive, list(positive_folds)), (negative, list(negative_folds)))
    scores = tuple(torch.zeros(len(texts), dtype=torch.float64) for texts, _ in sides)
    for fold in sorted({*positive_folds, *negative_folds}):
        held = [[row for row, own in enumerate(folds) if own == fold] for _, folds in sides]
        parts = [[text for text, own in zip(texts, folds, strict=True) if own != fold] for texts, folds in sides]
        parts += [[texts[row] for row in rows] for (texts, _), rows in zip(sides, held, strict=True)]
        _no_empty_side(*parts)
        for target, rows, values in zip(scores, held, score(*parts), strict=True):
            target[rows] = values
    return scores[0], scores[1]


def _token_scores(
    fit_positive: Sequence[Tokens],
    fit_negative: Sequence[Tokens],
    held_positive: Sequence[Tokens],
    held_negative: Sequence[Tokens],
) -> Scores:
    from sklearn.linear_model import LogisticRegression

    fitted = [*fit_positive, *fit_negative]
    columns = {token: column for column, token in enumerate(sorted({t for text in fitted for t in text}))}
    if not columns:
        return torch.zeros(len(held_positive)).double(), torch.zeros(len(held_negative)).double()
    labels = [1] * len(fit_positive) + [0] * len(fit_negative)
    model = LogisticRegression(C=1.0, solver="lbfgs", max_iter=1000).fit(_counts(fitted, columns), labels)
    positive, negative = (
        torch.from_numpy(model.decision_function(_counts(side, columns))) for side in (held_positive, held_negative)
    )
    return positive, negative


def _length_scores(
    fit_positive: Sequence[Tokens],
    fit_negative: Sequence[Tokens],
    held_positive: Sequence[Tokens],
    held_negative: Sequence[Tokens],
) -> Scores:
    sign = 1.0 if auc(_lengths(fit_positive), _lengths(fit_negative)) >= 0.5 else -1.0
    return sign * _lengths(held_positive), sign * _lengths(held_negative)


def _lengths(texts: Sequence[Tokens]) -> Tensor:
    return torch.tensor([float(len(text)) for text in texts], dtype=torch.float64)


def _counts(texts: Sequence[Tokens], columns: dict[int, int]) -> csr_matrix:
    """Token counts ``[len(texts), vocabulary]``; repeated cells add up."""
    import numpy as np
    from scipy.sparse import csr_matrix

    cells = [(row, columns[token]) for row, text in enumerate(texts) for token in text if token in columns]
    rows, cols = zip(*cells, strict=True) if cells else ((), ())
    return csr_matrix((np.ones(len(cells)), (rows, cols)), shape=(len(texts), len(columns)))


def _no_empty_side(*sides: Sequence[Tokens]) -> None:
    if not all(sides):
        raise MeasurementError(f"baseline: expected texts on every side, found {[len(side) for side in sides]}")
