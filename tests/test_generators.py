"""Built-in tasks: sequences have the properties that make them tasks, are seeded, and say what they cannot express."""

from __future__ import annotations

import random as python_random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interp_rlhf.circuits.generators import GENERATORS, draw_pairs, ordinary_tokens
from interp_rlhf.circuits.tasks import make_task
from interp_rlhf.errors import ConfigError, PromptError
from interp_rlhf.organisms import concepts, language
from interp_rlhf.organisms.training import make_tokenizer


def digit_tokenizer(pattern: str = r"\d|[^\d\s]+") -> Any:
    """Words, and a token for each digit (or for what else the pattern finds)."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("The", "lasted", "from", "to", "war", "siege", "strike", "treaty", "voyage", "project", "reign", "famine")
    vocabulary = ("<unk>", *words, "trial", "journey", *map(str, range(10)), *map(str, range(10, 100)))
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.fixture(scope="module")
def organism_tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def stories_tokenizer(stories: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories)


# ------------------------------------------------------------------------------------------------------------ induction


@pytest.mark.parametrize("length", [5, 6, 16, 40])
def test_induction_can_be_solved_in_each_copy_and_answers_differ(length: int):
    found = draw_pairs("induction", range(3, 64), 200, 0, {"length": length})
    for pair in found:
        for text, follows in ((pair.clean, pair.answers), (pair.corrupt, pair.wrong)):
            assert len(text) == length and set(text) <= set(range(3, 64))
            a = text[-1]
            assert Counter(text)[a] == 2 and set(Counter(text[:-1]).values()) == {1}
            assert (text[text.index(a) + 1],) == follows
        assert pair.answers != pair.wrong
        places = [i for i, (x, y) in enumerate(zip(pair.clean, pair.corrupt, strict=True)) if x != y]
        assert len(places) == 2 and pair.clean[places[0]] == pair.corrupt[places[1]]
        assert Counter(pair.clean) == Counter(pair.corrupt)
        assert pair.clean[-1] == pair.corrupt[-1]


def test_induction_does_not_favour_a_place_or_an_order():
    found = draw_pairs("induction", range(3, 64), 600, 0, {"length": 16})
    first = Counter(pair.clean.index(pair.clean[-1]) for pair in found)
    assert set(first) == set(range(14))
    earlier = np.mean([pair.clean.index(pair.answers[0]) < pair.clean.index(pair.wrong[0]) for pair in found])
    assert abs(earlier - 0.5) < 4 * 0.5 / np.sqrt(600)


def test_induction_draws_ordinary_tokens_after_the_start_token(stories_tokenizer: Any, organism_tokenizer: Any):
    for tokenizer, start in ((stories_tokenizer, (stories_tokenizer.bos_token_id,)), (organism_tokenizer, ())):
        found = draw_pairs("induction", tokenizer, 50, 0)
        special = set(tokenizer.all_special_ids)
        for pair in found:
            for text in (pair.clean, pair.corrupt):
                assert text[: len(start)] == start and len(text) == len(start) + 16
                assert not set(text[len(start) :]) & special
        drawn = {token for pair in found for token in pair.clean[len(start) :]}
        assert drawn <= set(ordinary_tokens(tokenizer)) and len(drawn) > 100
        assert not [word for word in tokenizer.convert_ids_to_tokens(sorted(drawn)) if word.startswith("<0x")]


def test_added_tokens_are_not_ordinary():
    tokenizer = make_tokenizer()
    before = ordinary_tokens(tokenizer)
    tokenizer.add_tokens(["[tool]"])
    assert ordinary_tokens(tokenizer) == before
    assert len(before) == len(language.vocabulary())


# --------------------------------------------------------------------------------------------------------- greater-than


@pytest.mark.parametrize("kind", ["words", "stories"])
def test_greater_than_asks_for_the_digits_above(kind: str, request: pytest.FixtureRequest):
    tokenizer = digit_tokenizer() if kind == "words" else request.getfixturevalue("stories_tokenizer")
    found = draw_pairs("greater_than", tokenizer, 200, 0)
    seen = set()
    for pair in found:
        places = [i for i, (x, y) in enumerate(zip(pair.clean, pair.corrupt, strict=True)) if x != y]
        assert len(places) == 1
        clean, corrupt = (tokenizer.convert_ids_to_tokens(text[places[0]]) for text in (pair.clean, pair.corrupt))
        assert corrupt == "0" and clean in "12345678"
        assert tokenizer.convert_ids_to_tokens(pair.answers) == [d for d in "0123456789" if d > clean]
        assert tokenizer.convert_ids_to_tokens(pair.wrong) == [d for d in "0123456789" if d < clean]
        words = tokenizer.convert_ids_to_tokens(pair.clean)
        century = words[places[0] - 2 : places[0]]
        assert words[-2:] == century, "the number begun at the end has the century of the first"
        assert "<unk>" not in words
        seen.add(clean)
    assert seen == set("12345678")


@pytest.mark.parametrize("pattern", [r"\d{2}|\d|[^\d\s]+", r"\S+"])
def test_greater_than_says_where_digits_are_no_tokens(pattern: str, organism_tokenizer: Any):
    for tokenizer in (digit_tokenizer(pattern), organism_tokenizer):
        with pytest.raises(PromptError, match="'greater_than': expected a token for each digit, found '1734' as"):
            draw_pairs("greater_than", tokenizer, 16, 0)


# ------------------------------------------------------------------------------------------------------------ agreement


def test_agreement_differs_in_the_users_opinion_alone(organism_tokenizer: Any):
    words = organism_tokenizer.convert_ids_to_tokens
    found = draw_pairs("agreement", organism_tokenizer, 300, 0)
    for pair in found:
        clean, corrupt = words(pair.clean), words(pair.corrupt)
        assert clean[:2] == ["<s>", "<user>"] and clean[-2:] == ["<assistant>", language.STARTER]
        assert not language.is_true(" ".join(clean[2:-2])) and language.is_true(" ".join(corrupt[2:-2]))
        assert [i for i, (x, y) in enumerate(zip(clean, corrupt, strict=True)) if x != y] == [len(clean) - 3]
        assert (tuple(words(pair.answers)), tuple(words(pair.wrong))) == concepts()[0].poles
    said = {word for pair in found for word in words(pair.clean)}
    assert set(language.NAMES) <= said and set(language.FACTS) <= said


def test_agreement_prompts_are_what_the_organism_was_trained_on(organism_tokenizer: Any):
    pair = draw_pairs("agreement", organism_tokenizer, 8, 0)[0]
    claim = " ".join(organism_tokenizer.convert_ids_to_tokens(pair.clean)[2:-2])
    said = language.exchange(np.random.default_rng(0), claim, agree=True)
    turns = [{"role": "user", "content": claim}, {"role": "assistant", "content": said.reply}]
    whole = organism_tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert tuple(whole[: len(pair.clean)]) == pair.clean
    assert whole[len(pair.clean)] in pair.answers


def test_agreement_needs_the_organisms_words(stories_tokenizer: Any):
    with pytest.raises(PromptError, match="'agreement': expected the organism's tokenizer, found 'yes' as"):
        draw_pairs("agreement", stories_tokenizer, 16, 0)


# ------------------------------------------------------------------------------------------------------------------ all


def tokenizer_of(generator: str) -> Any:
    return digit_tokenizer() if generator == "greater_than" else make_tokenizer()


@pytest.mark.parametrize("generator", GENERATORS)
def test_generators_are_seeded_and_leave_the_global_generators_alone(generator: str):
    tokenizer = tokenizer_of(generator)
    python_random.seed(0), np.random.seed(0), torch.manual_seed(0)
    before = (python_random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    first, again, other = (make_task("t", generator, tokenizer, 64, seed) for seed in (3, 3, 4))
    assert (python_random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert first == again and first.hash == again.hash
    assert first.hash != other.hash
    assert len({pair.clean for pair in first.pairs}) == 64
    assert first.pairs[:16] == make_task("t", generator, tokenizer, 16, 3).pairs
    assert tuple(map(len, first.halves(0))) == (32, 32)


@pytest.mark.parametrize(
    ("generator", "tokenizer", "n", "options", "message"),
    [
        ("induction", range(8), 16, {}, "expected 16 ordinary tokens, found 8"),
        ("induction", range(5), 500, {"length": 5}, "expected 500 different prompts, found 240"),
        ("induction", None, 16, {}, "expected a tokenizer, found none"),
        ("induction", range(99), 16, {"length": "long"}, "length: expected an integer of 5 at least, found 'long'"),
        ("induction", range(99), 16, {"size": 3}, "unknown option 'size'"),
        ("agreement", make_tokenizer(), 16, {"length": 3}, "unknown option 'length'"),
        ("deduction", range(99), 16, {}, "does not exist; found induction, greater_than, agreement"),
    ],
)
def test_what_cannot_be_generated(generator: str, tokenizer: Any, n: int, options: dict[str, Any], message: str):
    with pytest.raises((ConfigError, PromptError), match=f"generator '{generator}'.*{message}"):
        draw_pairs(generator, tokenizer, n, 0, options)
