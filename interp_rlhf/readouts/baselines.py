"""What a concept's direction has to beat: classifiers that see the words or the length only, never the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from interp_rlhf.errors import MeasurementError
from interp_rlhf.readouts.separation import auc

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

#: Token ids of one text's completion.
Tokens = Sequence[int]


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
    from sklearn.linear_model import LogisticRegression

    _no_empty_side(fit_positive, fit_negative, held_positive, held_negative)
    fitted = [*fit_positive, *fit_negative]
    columns = {token: column for column, token in enumerate(sorted({t for text in fitted for t in text}))}
    if not columns:
        return 0.5
    labels = [1] * len(fit_positive) + [0] * len(fit_negative)
    model = LogisticRegression(C=1.0, solver="lbfgs", max_iter=1000).fit(_counts(fitted, columns), labels)
    positive, negative = (
        torch.from_numpy(model.decision_function(_counts(side, columns))) for side in (held_positive, held_negative)
    )
    return auc(positive, negative)


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
    fitted = auc(_lengths(fit_positive), _lengths(fit_negative))
    held = auc(_lengths(held_positive), _lengths(held_negative))
    return held if fitted >= 0.5 else 1 - held


def _lengths(texts: Sequence[Tokens]) -> torch.Tensor:
    return torch.tensor([float(len(text)) for text in texts])


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
