"""Baselines on given folds: scikit-learn's numbers fold by fold, and words of a held-out fold never seen."""

from __future__ import annotations

import numpy as np
import pytest
from shape_checked import checked
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from interp_rlhf.errors import MeasurementError

baselines = checked("interp_rlhf.readouts.baselines")


def texts(n: int, bias: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    words = [(rng.integers(0, 30, rng.integers(1, 9)), rng.integers(bias, bias + 12, 2)) for _ in range(n)]
    return [[*anything.tolist(), *own.tolist()] for anything, own in words]


def sklearn_scores(positive: list, negative: list, held: list) -> np.ndarray:
    words = CountVectorizer(analyzer=lambda text: text)
    counts = words.fit_transform([*positive, *negative])
    labels = [1] * len(positive) + [0] * len(negative)
    return LogisticRegression(max_iter=1000).fit(counts, labels).decision_function(words.transform(held))


def test_token_scores_are_scikit_learns_fold_by_fold() -> None:
    positive, negative = texts(40, 20, 0), texts(25, 10, 1)
    folds_p, folds_n = [i % 3 for i in range(40)], [(i * 7) % 3 for i in range(25)]
    scores = baselines.held_token_scores(positive, negative, folds_p, folds_n)
    for fold in range(3):
        sides = (positive, folds_p), (negative, folds_n)
        p, n = ([t for t, f in zip(own, fs, strict=True) if f != fold] for own, fs in sides)
        for values, own, fs in zip(scores, (positive, negative), (folds_p, folds_n), strict=True):
            held = [t for t, f in zip(own, fs, strict=True) if f == fold]
            np.testing.assert_allclose(values[np.array(fs) == fold].numpy(), sklearn_scores(p, n, held), atol=1e-5)


def test_two_halves_give_what_the_half_split_gives() -> None:
    positive, negative = texts(30, 20, 2), texts(30, 8, 3)
    folds = [i % 2 for i in range(30)]
    for held_scores, auc in (
        (baselines.held_token_scores, baselines.bag_of_tokens_auc),
        (baselines.held_length_scores, baselines.length_auc),
    ):
        a, b = held_scores(positive, negative, folds, folds)
        expected = auc(positive[1::2], negative[1::2], positive[::2], negative[::2])
        truth = np.r_[np.ones(15), np.zeros(15)]
        assert roc_auc_score(truth, np.r_[a[::2], b[::2]]) == pytest.approx(expected, abs=1e-12)


def test_length_decides_its_sign_outside_the_fold() -> None:
    positive, negative = [[1] * 5, [1] * 5, [1]], [[1] * 2, [1] * 2, [1] * 3]
    a, b = baselines.held_length_scores(positive, negative, [0, 0, 1], [0, 0, 1])
    assert a.tolist() == [-5, -5, 1] and b.tolist() == [-2, -2, 3]  # what holds in one fold is wrong in the other


def test_sides_without_texts_are_refused() -> None:
    with pytest.raises(MeasurementError, match=r"expected texts on every side, found \[0, 0, 2, 2\]"):
        baselines.held_token_scores([[1], [2]], [[3], [4]], [0, 0], [0, 0])
    with pytest.raises(MeasurementError, match="expected texts on every side"):
        baselines.held_length_scores([[1], [2]], [[3], [4]], [0, 1], [0, 0])
