"""The packaged concept packs and their loader: format, balance of both poles, how far words or length alone go."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from interp_rlhf.config import PACKS
from interp_rlhf.errors import ConfigError, PromptError
from interp_rlhf.readouts.baselines import bag_of_tokens_auc, length_auc
from interp_rlhf.readouts.packs import Pack, load_pack, render, split

SEEDS = range(10)
#: Mean held-out AUC over the seeds that words alone may reach; a direction has to beat them to be admitted.
LEXICAL_BOUND = 0.85
ROOT = Path(__file__).parents[1]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
HEADER = '{"pack": "own", "description": "a test"}'
PAIR = {"group": "g", "prompt": "p", "positive": "yes", "negative": "no"}


@functools.cache
def tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """Lower-case words and punctuation marks of all packs, one token each."""
    words = {word for name in PACKS for text in texts(load_pack(name)) for word in re.findall(r"\w+|[^\w\s]+", text)}
    special = ["<pad>", "<unk>", "</s>", "<user>", "<assistant>"]
    vocabulary = [*special, *sorted({word.lower() for word in words})]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(special)
    found = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    if chat:
        found.chat_template = TEMPLATE
    return found


def texts(pack: Pack) -> list[str]:
    return [text for pair in pack.pairs for text in (pair.prompt, pair.positive, pair.negative)]


def lengths(pack: Pack) -> tuple[list[int], list[int]]:
    return [len(pair.positive.split()) for pair in pack.pairs], [len(pair.negative.split()) for pair in pack.pairs]


@functools.cache
def baselines(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Held-out AUCs of words and of length, one per seed."""
    rendered = render(load_pack(name), tokenizer(), 512)
    words, counts = [], []
    for seed in SEEDS:
        sides = [
            [text.input_ids[text.completion_start :] for text in side]
            for half in split(rendered, seed)
            for side in ([pair.positive for pair in half], [pair.negative for pair in half])
        ]
        words.append(bag_of_tokens_auc(*sides))
        counts.append(length_auc(*sides))
    return tuple(words), tuple(counts)


@pytest.mark.parametrize("name", PACKS)
def test_a_packaged_pack_has_enough_pairs_and_topics(name: str) -> None:
    pack = load_pack(name)
    assert pack.name == name
    assert pack.description
    groups = Counter(pair.group for pair in pack.pairs)
    assert len(pack.pairs) >= 48
    assert len(groups) >= 10
    assert max(groups.values()) <= len(pack.pairs) / 8  # no topic carries a half by itself


@pytest.mark.parametrize("name", PACKS)
def test_texts_are_clean_and_none_occurs_twice(name: str) -> None:
    found = texts(load_pack(name))
    assert [text for text, count in Counter(found).items() if count > 1] == []
    assert all(text.isascii() and text.isprintable() and text == " ".join(text.split()) for text in found)
    assert all(re.fullmatch(r"[a-z_]+", pair.group) for pair in load_pack(name).pairs)


def test_no_prompt_or_answer_is_shared_between_packs() -> None:
    shared = Counter(
        text for name in PACKS for pair in load_pack(name).pairs for text in (pair.positive, pair.negative)
    )
    assert [text for text, count in shared.items() if count > 1] == []


@pytest.mark.parametrize("name", [name for name in PACKS if name != "verbosity"])
def test_both_poles_are_equally_long(name: str) -> None:
    positive, negative = lengths(load_pack(name))
    assert all(3 <= count <= 25 for count in positive + negative)
    assert np.mean(positive) / np.mean(negative) == pytest.approx(1, abs=0.1)
    assert 0.3 <= np.mean(baselines(name)[1]) <= 0.65


def test_verbosity_is_length_within_a_pair_and_not_across_topics() -> None:
    positive, negative = lengths(load_pack("verbosity"))
    assert all(long >= 1.5 * short for long, short in zip(positive, negative, strict=True))
    assert np.mean(baselines("verbosity")[1]) < 0.85
    assert "length" in load_pack("verbosity").description.lower()


@pytest.mark.parametrize("name", PACKS)
def test_words_alone_do_not_give_the_concept_away(name: str) -> None:
    words, _ = baselines(name)
    assert np.mean(words) <= LEXICAL_BOUND
    assert max(words) <= LEXICAL_BOUND + 0.1  # one split of 30 and 30 pairs is noisy


@pytest.mark.parametrize("name", PACKS)
def test_the_documented_baselines_are_those_measured(name: str) -> None:
    table = (ROOT / "docs" / "packs.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{name}` \|(.*)\|$", table, re.MULTILINE)
    assert row is not None
    cells = [cell.strip() for cell in row[1].split("|")]
    pack = load_pack(name)
    words, counts = baselines(name)
    assert cells[1] == f"{len(pack.pairs)} / {len({pair.group for pair in pack.pairs})}"
    for cell, measured in zip(cells[2:], (words, counts), strict=True):
        stated = [float(number) for number in re.findall(r"\d\.\d\d", cell)]
        assert stated == pytest.approx([np.mean(measured), min(measured), max(measured)], abs=0.015)


def test_the_baseline_sees_a_single_word_that_gives_the_concept_away() -> None:
    pack = load_pack("sentiment")
    fit, held = split(render(pack, tokenizer(), 512), 0)
    marked = tokenizer().get_vocab()["lavender"]
    sides = [
        [[*text.input_ids[text.completion_start :], *extra] for text in side]
        for half in (fit, held)
        for side, extra in (([p.positive for p in half], [marked]), ([p.negative for p in half], []))
    ]
    assert bag_of_tokens_auc(*sides) > LEXICAL_BOUND > np.mean(baselines("sentiment")[0])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PACKS)
def test_halves_are_balanced_and_keep_topics_whole(name: str, seed: int) -> None:
    pairs = render(load_pack(name), tokenizer(), 512)
    fit, held = split(pairs, seed)
    assert {pair.group for pair in fit}.isdisjoint(pair.group for pair in held)
    assert sorted(map(repr, fit + held)) == sorted(map(repr, pairs))
    assert abs(len(fit) - len(held)) <= max(Counter(pair.group for pair in pairs).values())
    assert (fit, held) == split(pairs, seed)


def test_seeds_draw_different_halves() -> None:
    pairs = render(load_pack("refusal"), tokenizer(), 512)
    assert len({frozenset(pair.group for pair in split(pairs, seed)[0]) for seed in SEEDS}) > 5


@pytest.mark.parametrize("name", PACKS)
def test_plain_rendering_is_prompt_then_answer(name: str) -> None:
    pack = load_pack(name)
    pairs = render(pack, tokenizer(), 512)
    assert len(pairs) == len(pack.pairs)
    for pair, source in zip(pairs, pack.pairs, strict=True):
        assert pair.group == source.group
        for text, answer in ((pair.positive, source.positive), (pair.negative, source.negative)):
            assert list(text.input_ids[: text.completion_start]) == tokenizer()(source.prompt)["input_ids"]
            assert list(text.input_ids[text.completion_start :]) == tokenizer()(answer)["input_ids"]


@pytest.mark.parametrize("name", PACKS)
def test_chat_rendering_goes_through_the_template(name: str) -> None:
    chat = tokenizer(chat=True)
    user, assistant, end = (chat.convert_tokens_to_ids(token) for token in ("<user>", "<assistant>", "</s>"))
    pack = load_pack(name)
    pairs = render(pack, chat, 512)
    assert len(pairs) == len(pack.pairs)
    for pair, source in zip(pairs, pack.pairs, strict=True):
        head = [user, *tokenizer()(source.prompt)["input_ids"], end, assistant]
        for text, answer in ((pair.positive, source.positive), (pair.negative, source.negative)):
            assert list(text.input_ids[: text.completion_start]) == head
            assert list(text.input_ids[text.completion_start :]) == [*tokenizer()(answer)["input_ids"], end]


@pytest.mark.parametrize("chat", [False, True])
def test_pairs_that_are_too_long_are_left_out_and_never_cut(chat: bool) -> None:
    pairs = render(load_pack("verbosity"), tokenizer(chat=chat), 10_000)
    longest = [max(len(pair.positive.input_ids), len(pair.negative.input_ids)) for pair in pairs]
    limit = sorted(longest)[len(longest) // 2]
    expected = tuple(pair for pair, length in zip(pairs, longest, strict=True) if length <= limit)
    assert 0 < len(expected) < len(pairs)
    assert render(load_pack("verbosity"), tokenizer(chat=chat), limit) == expected
    assert render(load_pack("verbosity"), tokenizer(chat=chat), 1) == ()


def _without(field: str) -> dict[str, Any]:
    return {key: value for key, value in PAIR.items() if key != field}


@pytest.mark.parametrize(
    ("lines", "number", "problem"),
    [
        (["{"], 1, "not valid JSON"),
        (["[1]"], 1, "expected an object, found list"),
        (['{"pack": "own"}'], 1, "description"),
        (['{"pack": "two words", "description": "d"}'], 1, "pack"),
        ([json.dumps(PAIR)], 1, "pack"),
        ([HEADER, "not json"], 2, "not valid JSON"),
        ([HEADER, "null"], 2, "expected an object, found NoneType"),
        ([HEADER, json.dumps(PAIR), json.dumps(_without("group"))], 3, "group"),
        ([HEADER, json.dumps(_without("negative"))], 2, "negative"),
        ([HEADER, json.dumps({**PAIR, "positive": ""})], 2, "positive"),
        ([HEADER, json.dumps({**PAIR, "prompt": 3})], 2, "prompt"),
        ([HEADER, json.dumps({**PAIR, "label": "x"})], 2, "label"),
        ([HEADER, "", json.dumps({**PAIR, "negative": "yes"})], 3, "two different answers"),
    ],
)
def test_errors_name_file_line_and_problem(tmp_path: Path, lines: list[str], number: int, problem: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(PromptError) as raised:
        load_pack(str(path))
    message = str(raised.value)
    assert message.startswith(f"{path}, line {number}: ")
    assert problem in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.write_text("\n \n"), "found an empty file"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "expected UTF-8 text"),
    ],
)
def test_errors_about_a_whole_file_name_it(tmp_path: Path, write: Callable[[Path], object], problem: str) -> None:
    path = tmp_path / "own.jsonl"
    write(path)
    with pytest.raises(PromptError, match=problem) as raised:
        load_pack(str(path))
    assert str(raised.value).startswith(str(path))


def test_an_unknown_name_lists_the_packs_there_are() -> None:
    with pytest.raises(ConfigError, match="no packaged pack 'sycophany'") as raised:
        load_pack("sycophany")
    assert all(name in str(raised.value) for name in PACKS)


def test_an_own_pack_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(f"{HEADER}\n\n{json.dumps({**PAIR, 'positive': 'schön'})}\n", encoding="utf-8")
    pack = load_pack(str(path))
    assert (pack.name, pack.description, len(pack.pairs)) == ("own", "a test", 1)
    assert pack.pairs[0].positive == "schön"
