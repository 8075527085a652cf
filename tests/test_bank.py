"""The bank of unrelated concepts: what it is made of, how it is drawn, and which of it is compared with."""

from __future__ import annotations

import pytest
import torch

from interp_rlhf.baseline import unrelated
from interp_rlhf.readouts.bank import SIZE, bank_packs, topics


def test_topics_are_apart_and_equally_long() -> None:
    found = topics()
    words = [word for topic in found.values() for word in topic]
    assert len(words) == len(set(words)), "no word stands in two topics"
    assert {len(topic) for topic in found.values()} == {len(words) // len(found)}
    assert len(found) * (len(found) - 1) // 2 >= SIZE
    assert all(word == word.strip() and word for word in words)


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_each_concept_is_one_topic_against_another(seed: int) -> None:
    packs = bank_packs(seed)
    assert [pack.name for pack in packs] == [f"bank-{n:02d}" for n in range(SIZE)]
    contrasts = set()
    place = {word: name for name, words in topics().items() for word in words}
    for pack in packs:
        sides = [{place[answer.removeprefix("This is about the ").removesuffix(".")] for answer in side}
                 for side in ([p.positive for p in pack.pairs], [p.negative for p in pack.pairs])]  # fmt: skip
        assert all(len(side) == 1 for side in sides) and sides[0] != sides[1]
        contrasts.add(frozenset(sides[0] | sides[1]))
    assert len(contrasts) == SIZE, "no contrast is drawn twice"


def test_the_seed_draws() -> None:
    assert bank_packs(3) == bank_packs(3) != bank_packs(4)
    assert bank_packs(3, size=5) == bank_packs(3)[:5]


def test_directions_much_like_the_concept_are_left_out() -> None:
    v = torch.tensor([1.0, 0.0])
    cosines = torch.tensor([1.0, -1.0, 0.6, -0.5, 0.49, 0.0, -0.49])
    bank = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    assert unrelated(bank, v)[:, 0].tolist() == pytest.approx([0.49, 0.0, -0.49])
    assert unrelated(bank[:1], v).shape == (0, 2)
