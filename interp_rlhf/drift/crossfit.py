"""Cross-fitted readouts: one fit per fold, each read on the fold it never saw, and the AUC of such scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_rlhf.drift.nulls import finite
from interp_rlhf.errors import MeasurementError
from interp_rlhf.readouts.probes import fit_together

#: Readings ``[n, d]`` and labellings ``[S, n]`` of texts to fit on, to weights ``[S, d]`` and biases ``[S]``.
Fitter = Callable[[Sequence[tuple[Tensor, Tensor]]], list[tuple[Tensor, Tensor]]]


def probe_fitter(jobs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Logistic regressions (:func:`~interp_rlhf.readouts.probes.fit_together`)."""
    return fit_together(jobs)


def direction_fitter(jobs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Differences in means, with bias 0."""
    found = []
    for x, labels in jobs:
        means = [side @ x.double() / side.sum(1, keepdim=True) for side in (labels.double(), (~labels).double())]
        found.append((means[0] - means[1], means[0].new_zeros(len(labels))))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class CrossFitted:
    """Readouts of K folds: row k was fitted on the texts outside fold k.

    Attributes:
        weights: ``[K, d]`` float64.
        biases: ``[K]`` float64.
    """

    weights: Tensor
    biases: Tensor

    def all_scores(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "K n"]:
        """Every readout on every text, float64.

        Raises:
            MeasurementError: another width than that of the weights, or readings that are not finite.
        """
        if x.ndim != 2 or x.shape[1] != self.weights.shape[1]:
            expected = self.weights.shape[1]
            raise MeasurementError(f"probe: expected readings [n, {expected}], found {tuple(x.shape)}")
        return self.weights @ finite(x, "probe readings").double().T + self.biases[:, None]

    def held(self, x: Float[Tensor, "n d"], folds: Sequence[int]) -> Float[Tensor, " n"]:
        """Each text's score by the readout of its fold, float64."""
        _one_fold_each(x, folds)
        return self.all_scores(x)[torch.tensor(folds), torch.arange(len(x))]


def cross_fit_texts(
    x: Float[Tensor, "n d"], labels: Bool[Tensor, " n"], folds: Sequence[int], fitter: Fitter = probe_fitter
) -> CrossFitted:
    """Fit one readout per fold on the texts outside it.

    Args:
        x: ``[n, d]`` readings.
        labels: ``[n]`` true for positive texts.
        folds: fold of each text, 0 to K − 1.
        fitter: what is fitted; logistic regression unless told.

    Raises:
        MeasurementError: a fold without texts, or outside which there is one class only; readings that are not finite.
    """
    return _cross_fit(x, labels[None], [folds], fitter)[0][0]


def cross_fit(positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"], folds: Sequence[int]) -> CrossFitted:
    """Fit one probe per fold on the pairs outside it.

    Args:
        positive, negative: ``[n, d]`` readings of the two sides of pair i.
        folds: fold of each pair, 0 to K − 1.

    Raises:
        MeasurementError: as :func:`cross_fit_texts`, or sides of different shapes.
    """
    return cross_fit_texts(*_texts(positive, negative), [*folds, *folds])


def cross_fit_again(
    positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"], foldings: Sequence[Sequence[int]]
) -> list[CrossFitted]:
    """:func:`cross_fit` once per folding of the same pairs, all fits together."""
    twice = [[*folds, *folds] for folds in foldings]
    x, labels = _texts(positive, negative)
    return [fitted for (fitted,) in _cross_fit(x, labels[None], twice, probe_fitter)]


def held_scores(
    fitted: CrossFitted, positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"], folds: Sequence[int]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Scores of both sides of each pair by the probe of the pair's fold, ``[n]`` twice, float64."""
    return fitted.held(positive, folds), fitted.held(negative, folds)


@dataclass(frozen=True, slots=True, eq=False)
class FoldWins:
    """Which positive outscores which negative of its own fold: all that an AUC within folds needs.

    Scores of different folds come from different readouts and are on no common scale, so they are never compared: the
    AUC is the mean of the folds' AUCs, each weighted by its number of texts (of pairs, where there are pairs).

    Attributes:
        matrix: ``[p, m]`` float64, 1 where the positive wins, ½ at a tie, 0 elsewhere and between folds. Differences
            of such matrices give differences of AUCs.
        positive_folds, negative_folds: one-hot folds ``[p, K]`` and ``[m, K]`` float64.
    """

    matrix: Tensor
    positive_folds: Tensor
    negative_folds: Tensor

    @classmethod
    def of(
        cls,
        positive: Float[Tensor, " p"],
        negative: Float[Tensor, " m"],
        positive_folds: Sequence[int] | None = None,
        negative_folds: Sequence[int] | None = None,
    ) -> FoldWins:
        """Compare scores; without folds all of them, as scores of one readout.

        Raises:
            MeasurementError: scores that are not finite, a fold per score missing, or a fold with one side only.
        """
        a, b = finite(positive, "positive scores").double(), finite(negative, "negative scores").double()
        folds = [own if own is not None else [0] * len(s) for s, own in ((a, positive_folds), (b, negative_folds))]
        _one_fold_each(a, folds[0])
        _one_fold_each(b, folds[1])
        k = 1 + max(*folds[0], *folds[1])
        rows, columns = (torch.nn.functional.one_hot(torch.tensor(own), k).double() for own in folds)
        lonely = [fold for fold in range(k) if not (rows[:, fold].any() and columns[:, fold].any())]
        if lonely:
            raise MeasurementError(f"AUC: expected both sides in every fold, found one side or none in {lonely}")
        wins = (a[:, None] > b[None, :]).double() + 0.5 * (a[:, None] == b[None, :]).double()
        return cls(wins * (rows @ columns.T), rows, columns)

    def __sub__(self, other: FoldWins) -> FoldWins:
        return FoldWins(self.matrix - other.matrix, self.positive_folds, self.negative_folds)

    def auc(
        self, positives: Float[Tensor, "R p"] | None = None, negatives: Float[Tensor, "R m"] | None = None
    ) -> Float[Tensor, " R"]:
        """The AUC within folds, of the texts themselves or of resamples.

        Args:
            positives, negatives: how often each text was drawn, ``[R, p]`` and ``[R, m]``; once each unless told. A
                fold that a resample leaves without one side counts as AUC 0 with the weight of what it has.

        >>> FoldWins.of(torch.tensor([2.0, 9.0]), torch.tensor([1.0, 9.5]), [0, 1], [0, 1]).auc().item()
        0.5
        """
        a = torch.ones(1, len(self.matrix), dtype=torch.float64) if positives is None else positives
        b = torch.ones(1, self.matrix.shape[1], dtype=torch.float64) if negatives is None else negatives
        drawn_a, drawn_b = a @ self.positive_folds, b @ self.negative_folds
        wins = ((a @ self.matrix) * b) @ self.negative_folds
        sizes = drawn_a + drawn_b
        return (sizes * wins / (drawn_a * drawn_b).clamp(min=1)).sum(1) / sizes.sum(1)

    @property
    def value(self) -> float:
        """The AUC of the texts themselves."""
        return float(self.auc())

    def by_pair(self, counts: Float[Tensor, "R n"]) -> Float[Tensor, " R"]:
        """AUC of resamples that draw pairs: positive i and negative i together, ``counts [R, n]``."""
        return self.auc(counts, counts)

    def by_text(self, counts: Float[Tensor, "R n"]) -> Float[Tensor, " R"]:
        """AUC of resamples that draw texts: ``counts [R, p + m]``, positives first."""
        return self.auc(counts[:, : len(self.matrix)], counts[:, len(self.matrix) :])


def fold_thresholds(negative: Float[Tensor, " n"], folds: Sequence[int], fpr: float) -> Float[Tensor, " K"]:
    """Per fold the smallest score with at most a share ``fpr`` of the fold's held-out negatives above it.

    Args:
        negative: ``[n]`` held-out scores of negatives.
        folds: fold of each.
        fpr: false-positive rate in (0, 1).

    Raises:
        MeasurementError: fewer than 10/fpr negatives, or a fold without one.

    >>> fold_thresholds(torch.arange(20.0), [0, 1] * 10, fpr=0.5)
    tensor([8., 9.], dtype=torch.float64)
    """
    needed = math.ceil(round(10 / fpr, 9))
    if len(negative) < needed:
        raise MeasurementError(
            f"recall at a false-positive rate of {fpr:g} needs at least {needed} held-out negatives, "
            f"found {len(negative)}"
        )
    scores, own = finite(negative, "negative scores").double(), torch.tensor(folds)
    sides = [scores[own == fold].sort(descending=True).values for fold in range(1 + max(folds))]
    if not all(map(len, sides)):
        raise MeasurementError(f"folds: expected negatives in each of {len(sides)} folds, found one without")
    return torch.stack([side[math.floor(round(fpr * len(side), 9))] for side in sides])


def shuffled_pair_wins(
    positive: Float[Tensor, "n d"],
    negative: Float[Tensor, "n d"],
    folds: Sequence[int],
    *,
    shuffles: int,
    seed: int,
    fitter: Fitter = probe_fitter,
) -> FoldWins:
    """Mean wins of readouts fitted after swapping the sides of half of each fold's pairs, drawn at random.

    The swapped sides are also those that are read: about 0.5 unless the folds leak.

    Args:
        positive, negative: ``[n, d]`` readings of the two sides of pair i.
        folds: fold of each pair.
        shuffles: how often.
        seed: seeds the draws.
    """
    swaps = _half_of_each_fold(folds, shuffles, seed)
    x, _ = _texts(positive, negative)
    label_sets = torch.cat([~swaps, swaps], 1)
    n, twice = len(positive), [*folds, *folds]
    wins: list[FoldWins] = []
    for swap, fitted in zip(swaps, _cross_fit(x, label_sets, [twice], fitter)[0], strict=True):
        a, b = fitted.held(x[:n], folds), fitted.held(x[n:], folds)
        wins.append(FoldWins.of(torch.where(swap, b, a), torch.where(swap, a, b), folds, folds))
    mean = torch.stack([one.matrix for one in wins]).mean(0)
    return FoldWins(mean, wins[0].positive_folds, wins[0].negative_folds)


def shuffled_text_auc(
    x: Float[Tensor, "n d"],
    labels: Bool[Tensor, " n"],
    folds: Sequence[int],
    *,
    shuffles: int,
    seed: int,
    fitter: Fitter = probe_fitter,
) -> float:
    """Mean AUC within folds of readouts fitted and read after shuffling the labels inside each fold.

    Arguments as :func:`shuffled_pair_wins`, for texts ``[n, d]`` with a label each: about 0.5 unless the folds leak.
    """
    generator, own = np.random.default_rng(seed), np.asarray(folds)
    label_sets = labels.repeat(shuffles, 1)
    for row in label_sets:
        for fold in range(1 + own.max()):
            members = np.flatnonzero(own == fold)
            row[members] = labels[generator.permutation(members)]
    values = []
    for shuffled, fitted in zip(label_sets, _cross_fit(x, label_sets, [folds], fitter)[0], strict=True):
        scores = fitted.held(x, folds)
        values.append(text_wins(scores, shuffled, folds).value)
    return float(np.mean(values))


def text_wins(scores: Float[Tensor, " n"], labels: Bool[Tensor, " n"], folds: Sequence[int]) -> FoldWins:
    """:class:`FoldWins` of texts with a label and a fold each; positives and negatives keep the order of the texts."""
    own = torch.tensor(folds)
    return FoldWins.of(scores[labels], scores[~labels], own[labels].tolist(), own[~labels].tolist())


def _half_of_each_fold(folds: Sequence[int], shuffles: int, seed: int) -> Bool[Tensor, "S n"]:
    """Per shuffle half of each fold's rows, the odd one in or out at random."""
    generator = np.random.default_rng(seed)
    own = np.asarray(folds)
    chosen = np.zeros((shuffles, len(own)), dtype=bool)
    for row in chosen:
        for fold in range(1 + own.max()):
            members = generator.permutation(np.flatnonzero(own == fold))
            row[members[: (len(members) + generator.integers(2)) // 2]] = True
    return torch.from_numpy(chosen)


def _texts(positive: Tensor, negative: Tensor) -> tuple[Float[Tensor, "texts d"], Bool[Tensor, " texts"]]:
    """Both sides of pairs as labelled texts, positives first."""
    if positive.shape != negative.shape or positive.ndim != 2:
        raise MeasurementError(
            f"probe: expected two [n, d] of one shape, found {tuple(positive.shape)} and {tuple(negative.shape)}"
        )
    return torch.cat([positive, negative]).detach().cpu(), torch.arange(2 * len(positive)) < len(positive)


def _cross_fit(
    x: Float[Tensor, "n d"], label_sets: Bool[Tensor, "S n"], foldings: Sequence[Sequence[int]], fitter: Fitter
) -> list[list[CrossFitted]]:
    """Per folding, one cross-fit per labelling."""
    jobs = []
    for folds in foldings:
        _one_fold_each(x, folds)
        own = torch.tensor(folds)
        for fold in range(1 + max(folds)):
            fitted = own != fold
            if bool(fitted.all()):
                raise MeasurementError(f"folds: expected texts in every fold, found none in fold {fold}")
            jobs.append((x[fitted], label_sets[:, fitted]))
    done = iter(fitter(jobs))
    found = []
    for folds in foldings:
        weights, biases = zip(*(next(done) for _ in range(1 + max(folds))), strict=True)
        both = zip(torch.stack(weights, 1), torch.stack(biases, 1), strict=True)
        found.append([CrossFitted(w, b) for w, b in both])
    return found


def _one_fold_each(rows: Tensor, folds: Sequence[int]) -> None:
    if len(rows) != len(folds) or not folds:
        raise MeasurementError(f"folds: expected one per row ({len(rows)}), found {len(folds)}")
