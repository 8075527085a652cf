"""Folds for cross-fitting: whole groups of pairs in one fold, labelled texts by class, and no text on two sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from interp_rlhf.errors import MeasurementError, PromptError


def pair_folds(groups: Sequence[str], k: int, seed: int) -> list[int]:
    """Fold of each pair, whole groups in one fold.

    Groups come in a seeded random order, each goes to the fold with the fewest pairs so far: two folds differ by at
    most the largest group.

    Args:
        groups: the group of each pair.
        k: folds wanted; as many as there are groups where those are fewer.

    Raises:
        MeasurementError: k or the number of groups is below 2.

    >>> folds = pair_folds(["a", "a", "b", "c", "c", "d"], 2, seed=0)
    >>> folds[0] == folds[1], folds[3] == folds[4], sorted(folds)
    (True, True, [0, 0, 0, 1, 1, 1])
    """
    sizes = Counter(groups)
    names = sorted(sizes)
    if min(k, len(names)) < 2:
        raise MeasurementError(f"folds: expected at least 2 folds and 2 groups of pairs, found {k} and {len(names)}")
    counts = [0] * min(k, len(names))
    fold: dict[str, int] = {}
    for index in np.random.default_rng(seed).permutation(len(names)):
        name = names[index]
        fold[name] = counts.index(min(counts))
        counts[fold[name]] += sizes[name]
    return [fold[group] for group in groups]


def label_folds(labels: Sequence[bool], k: int, seed: int) -> list[int]:
    """Fold of each labelled text, classes spread evenly over the folds (scikit-learn's ``StratifiedKFold``).

    Args:
        labels: class of each text.
        k: folds wanted; as many as the rarer class has texts where those are fewer.

    Raises:
        PromptError: fewer than 2 texts of a class.
        MeasurementError: k is below 2.

    >>> folds = label_folds([True, True, False, False], 5, seed=0)
    >>> sorted(folds[:2]), sorted(folds[2:])
    ([0, 1], [0, 1])
    """
    from sklearn.model_selection import StratifiedKFold

    positives = sum(map(bool, labels))
    rarer = min(positives, len(labels) - positives)
    if rarer < 2:
        raise PromptError(
            f"labels: expected at least 2 texts of each class, found {positives} positive and "
            f"{len(labels) - positives} negative"
        )
    if k < 2:
        raise MeasurementError(f"folds: expected at least 2, found {k}")
    splits = StratifiedKFold(min(k, rarer), shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels)
    folds = [0] * len(labels)
    for number, (_, held) in enumerate(splits):
        for row in held:
            folds[row] = number
    return folds


def check_no_leak(texts: Sequence[Sequence[str]], groups: Sequence[str], folds: Sequence[int]) -> None:
    """Refuse folds that hold the same text on both sides: a probe would be read on what it was fitted on.

    Args:
        texts: the ids of each pair's texts (:attr:`~interp_rlhf.activations.prompts.Prompt.id`), or of one text.
        groups: the group of each pair; named in the message.
        folds: the fold of each pair.

    Raises:
        PromptError: a text occurs in two folds; names its id and both groups.

    >>> check_no_leak([["t1", "t2"], ["t1", "t3"]], ["a", "a"], [0, 0])
    """
    first: dict[str, int] = {}
    for row, ids in enumerate(texts):
        for text in ids:
            other = first.setdefault(text, row)
            if folds[other] != folds[row]:
                raise PromptError(
                    f"pairs duplicated across folds: text {text} is in group {groups[other]!r} and in group "
                    f"{groups[row]!r}, expected it in one"
                )
