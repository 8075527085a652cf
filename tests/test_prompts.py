"""Batches: every text once, the same content whatever the padding side, nothing padded enters a mean."""

from __future__ import annotations

import pytest
import torch

from interp_rlhf.activations.prompts import Prompt, batches, content_tokens
from interp_rlhf.errors import PromptError

TEXTS = [Prompt(tuple(range(1, 2 + n)), max(1, n // 2), str(n)) for n in (3, 7, 5, 9, 4)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("longest_first", [True, False])
def test_each_text_is_there_once_with_its_own_tokens(side, longest_first):
    seen = {}
    for batch in batches(TEXTS, batch_size=2, pad_token_id=0, side=side, longest_first=longest_first):
        for row, index in enumerate(batch.rows):
            real = batch.attention_mask[row].bool()
            assert tuple(batch.input_ids[row][real].tolist()) == TEXTS[index].input_ids
            assert batch.position_ids[row][real].tolist() == list(range(len(TEXTS[index].input_ids)))
            assert not (batch.content_mask[row] & ~real).any()
            completion = TEXTS[index].input_ids[TEXTS[index].completion_start :]
            assert tuple(batch.input_ids[row][batch.completion_mask[row]].tolist()) == completion
            seen[index] = batch.input_ids[row][batch.content_mask[row]].tolist()
    assert sorted(seen) == list(range(len(TEXTS)))
    assert seen == {i: list(p.input_ids[p.completion_start :]) for i, p in enumerate(TEXTS)}


def test_the_longest_batch_comes_first():
    widths = [b.input_ids.shape[1] for b in batches(TEXTS, batch_size=2, pad_token_id=0)]
    assert widths == sorted(widths, reverse=True)


def test_first_token_and_special_tokens_are_left_out():
    prompt = Prompt((1, 5, 2, 6), 4, "u")
    assert content_tokens(prompt, "all", frozenset({2})) == [False, True, False, True]
    assert content_tokens(prompt, "completion", frozenset()) == [False, True, True, True]  # no completion: the prompt


def test_a_text_without_content_is_an_error():
    with pytest.raises(PromptError, match="no content token"):
        content_tokens(Prompt((1, 2), 1, "u"), "prompt", frozenset())


def test_ids_depend_on_tokens_and_on_where_the_completion_starts():
    assert Prompt((1, 2, 3), 1, "a").id == Prompt((1, 2, 3), 1, "b").id
    assert len({Prompt((1, 2, 3), 1, "a").id, Prompt((1, 2, 3), 2, "a").id, Prompt((12, 3), 1, "a").id}) == 3


def test_padding_is_the_pad_token():
    batch = next(iter(batches(TEXTS, batch_size=5, pad_token_id=77)))
    assert (batch.input_ids[~batch.attention_mask.bool()] == 77).all() and torch.is_tensor(batch.input_ids)
