"""Folds: whole groups, balanced, seeded; leaks are named."""

from __future__ import annotations

from collections import Counter

import pytest

from interp_rlhf.errors import MeasurementError, PromptError
from interp_rlhf.readouts.folds import check_no_leak, label_folds, pair_folds

GROUPS = [f"g{i}" for i in range(23) for _ in range(1 + i % 5)]


@pytest.mark.parametrize("k", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_groups_stay_whole_and_folds_are_balanced(k: int, seed: int) -> None:
    folds = pair_folds(GROUPS, k, seed)
    assert len(folds) == len(GROUPS) and set(folds) == set(range(k))
    assert len({(group, fold) for group, fold in zip(GROUPS, folds, strict=True)}) == len(set(GROUPS))
    sizes = Counter(folds).values()
    assert max(sizes) - min(sizes) <= 5  # the largest group
    assert folds == pair_folds(GROUPS, k, seed) != pair_folds(GROUPS, k, seed + 100)


def test_folds_do_not_depend_on_the_order_of_pairs() -> None:
    forward = dict(zip(GROUPS, pair_folds(GROUPS, 4, 3), strict=True))
    backward = dict(zip(GROUPS[::-1], pair_folds(GROUPS[::-1], 4, 3), strict=True))
    assert forward == backward


def test_fewer_groups_than_folds() -> None:
    assert set(pair_folds(["a", "b", "c", "a"], 5, 0)) == {0, 1, 2}
    with pytest.raises(MeasurementError, match="at least 2 folds and 2 groups of pairs, found 5 and 1"):
        pair_folds(["a", "a"], 5, 0)
    with pytest.raises(MeasurementError, match="found 1 and 2"):
        pair_folds(["a", "b"], 1, 0)


@pytest.mark.parametrize("k", [2, 5])
def test_labels_are_spread_over_the_folds(k: int) -> None:
    labels = [i % 3 == 0 for i in range(60)]
    folds = label_folds(labels, k, 4)
    for label, total in ((True, 20), (False, 40)):
        sizes = Counter(fold for fold, own in zip(folds, labels, strict=True) if own is label)
        assert set(sizes) == set(range(k)) and max(sizes.values()) - min(sizes.values()) <= 1
        assert sum(sizes.values()) == total
    assert folds == label_folds(labels, k, 4) != label_folds(labels, k, 5)


def test_labels_of_one_class_are_counted() -> None:
    with pytest.raises(PromptError, match="at least 2 texts of each class, found 12 positive and 0 negative"):
        label_folds([True] * 12, 5, 0)
    with pytest.raises(PromptError, match="found 1 positive and 3 negative"):
        label_folds([True, False, False, False], 5, 0)
    assert set(label_folds([True] * 3 + [False] * 9, 5, 0)) == {0, 1, 2}


def test_a_text_in_two_folds_is_named_with_both_groups() -> None:
    texts = [["p1", "n1"], ["p2", "n2"], ["p3", "n1"]]
    check_no_leak(texts, ["a", "b", "c"], [0, 1, 0])
    check_no_leak(texts[:2], ["a", "b"], [0, 1])
    with pytest.raises(PromptError, match=r"pairs duplicated across folds: text n1 is in group 'a' and in group 'c'"):
        check_no_leak(texts, ["a", "b", "c"], [0, 0, 1])
