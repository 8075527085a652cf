"""Prompt sets: drawn by index with a generator of their own, or read from a file that may be damaged."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from trainers.table import preferences, tokenizer

from interp_rlhf.activations.prompt_sets import PromptSet, draw_rows
from interp_rlhf.errors import PromptError

DRAW = {"n": 12, "seed": 3, "max_length": 64, "name": "train_dataset", "source": "training"}


def test_drawing_is_seeded_and_touches_no_global_generator():
    states = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())
    first = PromptSet.from_dataset(preferences(), tokenizer(), **DRAW)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all() and torch.equal(torch.get_rng_state(), states[2])
    assert first == PromptSet.from_dataset(preferences(), tokenizer(), **DRAW)
    assert first.hash != PromptSet.from_dataset(preferences(), tokenizer(), **{**DRAW, "seed": 4}).hash
    assert len(first.prompts) == 12 and len({p.unit for p in first.prompts}) == 12
    assert [p.id for p in first.prompts] == sorted(p.id for p in first.prompts)


def test_rows_that_do_not_fit_are_replaced_and_counted():
    data = preferences(20).to_list()
    data[4]["prompt"] = " ".join(["w1"] * 200)
    from datasets import Dataset

    drawn = PromptSet.from_dataset(Dataset.from_list(data), tokenizer(), **{**DRAW, "n": 20})
    assert drawn.skipped == 1 and len(drawn.prompts) == 19


def test_one_side_of_each_pair_is_read_chosen_and_rejected_in_turn():
    data = preferences(20)
    rows = draw_rows(data, tokenizer(), n=20, seed=0, max_length=64, name="train_dataset")
    drawn = PromptSet.from_rows(rows, name="train_dataset", source="training")
    chosen, rejected = ({getattr(row.pair, side).id for row in rows} for side in ("positive", "negative"))
    read = {prompt.id for prompt in drawn.prompts}
    assert len(read & chosen) == len(read & rejected) == 10


def test_rows_of_one_prompt_are_one_sampling_unit_and_drawn_once():
    from datasets import Dataset

    data = [{"prompt": f"w{i // 4} w1", "completion": f" w{i} w2"} for i in range(40)]
    drawn = PromptSet.from_dataset(Dataset.from_list(data), tokenizer(), **{**DRAW, "n": 40})
    assert len(drawn.prompts) == len({p.unit for p in drawn.prompts}) == 10


def test_units_left_out_are_never_drawn():
    rows = draw_rows(preferences(), tokenizer(), n=10, seed=3, max_length=64, name="train_dataset")
    left_out = frozenset(row.pair.group for row in rows)
    again = draw_rows(preferences(), tokenizer(), n=48, seed=3, max_length=64, name="d", leave_out=left_out)
    assert len(again) == 38 and left_out.isdisjoint(text.unit for row in again for text in row.prompts)


def test_texts_without_a_prompt_are_units_of_their_own():
    data = [{"text": f"w{i} w1"} for i in range(6)] + [
        {"prompt": "", "chosen": f"w{i}", "rejected": f"w{i + 9}"} for i in range(6)
    ]
    from datasets import Dataset

    for rows in (data[:6], data[6:]):
        drawn = PromptSet.from_dataset(Dataset.from_list(rows), tokenizer(), **DRAW)
        assert len({p.unit for p in drawn.prompts}) == 6


def test_a_streaming_dataset_is_refused_and_not_consumed():
    stream = preferences().to_iterable_dataset()
    with pytest.raises(PromptError, match=r"train_dataset: a streaming dataset .* prompts.path"):
        PromptSet.from_dataset(stream, tokenizer(), **DRAW)


def test_an_empty_dataset_is_refused():
    with pytest.raises(PromptError, match="found an empty dataset"):
        PromptSet.from_dataset(preferences().select([]), tokenizer(), **DRAW)


def test_named_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w1 w2", "completion": " w3"}\n\n{"input_ids": [1, 5, 6], "completion_start": 1}\n')
    named = PromptSet.from_jsonl(path, tokenizer(), max_length=16)
    assert named.source == "named" and len(named.prompts) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file"),
        (b'{"prompt": "w1 w2"}\n{"prompt": ', "line 2: not valid JSON"),
        (b"[1, 2]\n", "line 1: expected an object"),
        (b'{"question": "w1"}\n', "line 1: no known text column"),
        (b"\x80\x04\x95\x00", "expected UTF-8 text"),
        (b'{"prompt": "' + b"w1 " * 100 + b'"}\n', "line 1: expected a prompt of at most 16 tokens, found 100"),
        (b'{"input_ids": "abc"}\n', "line 1: expected token ids"),
    ],
)
def test_damaged_files_name_the_line(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(PromptError, match=message) as caught:
        PromptSet.from_jsonl(path, tokenizer(), max_length=16)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(PromptError, match="cannot be read"):
        PromptSet.from_jsonl(tmp_path / "none.jsonl", tokenizer(), max_length=16)


class Counted:
    """A large dataset of one prompt that counts what is read of it."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, str]:
        self.reads += 1
        return {"prompt": "w1 w2", "completion": f" w{index % 80}"}


def test_a_large_dataset_of_few_prompts_is_not_read_to_its_end():
    data = Counted()
    drawn = PromptSet.from_dataset(data, tokenizer(), **{**DRAW, "n": 128})
    assert len(drawn.prompts) == 1 and data.reads == 20 * 128
