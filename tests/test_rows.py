"""Every column layout of TRL's trainers, prepared and raw, gives the token ids the trainer itself trains on."""

from __future__ import annotations

import pytest
from trainers.table import tokenizer

from interp_rlhf.activations.rows import row_texts
from interp_rlhf.errors import PromptError

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def encode():
    return tokenizer()


def one(row, encode, max_length=64):
    (texts,) = row_texts(row, encode, max_length=max_length)
    return texts


def test_prepared_preferences_become_a_pair_sharing_a_unit(encode):
    texts = one({"prompt_ids": [1, 5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}, encode)
    assert [p.input_ids for p in texts.prompts] == [(1, 5, 6, 7, 8), (1, 5, 6, 9)]
    assert {p.completion_start for p in texts.prompts} == {3}
    assert len({p.unit for p in texts.prompts}) == 1
    assert texts.pair.positive == texts.prompts[0]


def test_reward_rows_find_their_shared_prompt(encode):
    texts = one({"chosen_ids": [1, 5, 6, 7], "rejected_ids": [1, 5, 9]}, encode)
    assert {p.completion_start for p in texts.prompts} == {2}


def test_kto_row_has_no_pair(encode):
    texts = one({"prompt_ids": [1, 5], "completion_ids": [6, 7], "label": True}, encode)
    assert texts.pair is None and texts.prompts[0].completion_start == 2


@pytest.mark.parametrize(
    ("row", "start"),
    [
        ({"input_ids": [1, 4, 5, 6], "labels": [-100, -100, 5, 6]}, 2),
        ({"input_ids": [1, 4, 5, 6], "completion_mask": [0, 0, 0, 1]}, 3),
        ({"input_ids": [1, 4, 5, 6], "labels": [1, 4, 5, 6]}, 4),
        ({"input_ids": [1, 4, 5, 6]}, 4),
        ({"input_ids": [1, 4, 5, 6], "completion_start": 1}, 1),
    ],
)
def test_language_model_rows(row, start, encode):
    assert one(row, encode).prompts[0].completion_start == start


def test_a_packed_row_is_split_into_its_texts(encode):
    row = {"input_ids": [1, 4, 5, 1, 6, 7, 8], "labels": [-100, 4, 5, -100, -100, 7, 8], "seq_lengths": [3, 4]}
    texts = row_texts(row, encode, max_length=64)
    assert [t.prompts[0].input_ids for t in texts] == [(1, 4, 5), (1, 6, 7, 8)]
    assert [t.prompts[0].completion_start for t in texts] == [1, 2]


def test_raw_text_matches_what_dpo_prepares(encode, tmp_path):
    from trainers.table import preferences, trainers

    prepared = trainers()["dpo"].build(tmp_path, use_lora=True).train_dataset
    raw = preferences()
    for index in range(5):
        row = {k: prepared[index][k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")}
        ours = one(
            {**raw[index], "chosen": raw[index]["chosen"] + " </s>", "rejected": raw[index]["rejected"] + " </s>"},
            encode,
        )
        assert ours.prompts == one(row, encode).prompts


def test_chat_messages_use_the_template(encode):
    encode.chat_template = CHAT
    user, reply = [{"role": "user", "content": "w1 w2"}], [{"role": "assistant", "content": "w3"}]
    texts = one({"prompt": user, "chosen": reply, "rejected": [{"role": "assistant", "content": "w4 w5"}]}, encode)
    prompt = texts.prompts[0]
    assert encode.decode(prompt.input_ids[prompt.completion_start :]) == "w3 </s>"
    assert encode.decode(texts.prompts[1].input_ids[prompt.completion_start :]) == "w4 w5 </s>"
    assert encode.decode(prompt.input_ids[: prompt.completion_start]).endswith("<unk>")  # the generation prompt


def test_long_completions_are_cut_and_long_prompts_left_out(encode):
    cut = one({"prompt_ids": [1, 5], "chosen_ids": [6] * 10, "rejected_ids": [7]}, encode, max_length=6)
    assert len(cut.prompts[0].input_ids) == 6
    assert one({"prompt_ids": [1] * 9, "chosen_ids": [6], "rejected_ids": [7]}, encode, max_length=6).prompts == ()


def test_unknown_columns_are_listed(encode):
    with pytest.raises(PromptError, match=r"no known text column, found \['answer', 'question'\]"):
        row_texts({"question": "x", "answer": "y"}, encode, max_length=8)


def test_text_without_tokenizer_is_refused():
    with pytest.raises(PromptError, match="tokenizer is needed"):
        row_texts({"text": "x"}, None, max_length=8)
