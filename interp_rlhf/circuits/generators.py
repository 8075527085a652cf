"""Pairs of clean and corrupt prompts that need no data: induction, greater-than on digits, agreement with the user."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from interp_rlhf.activations.rows import encode_exchange
from interp_rlhf.errors import ConfigError, PromptError
from interp_rlhf.organisms import language

#: Generators by name; :func:`draw_pairs` says what each makes.
GENERATORS: tuple[str, ...] = ("induction", "greater_than", "agreement")
#: Draws per wanted pair before a generator counts as exhausted.
_DRAWS = 50
_EVENTS = ("war", "siege", "strike", "treaty", "voyage", "project", "reign", "famine", "trial", "journey")


class DrawnPair(NamedTuple):
    """One pair in token ids: prompts of equal length, tokens that may follow the clean one and tokens that may not."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answers: tuple[int, ...]
    wrong: tuple[int, ...]


_Draw = Callable[[np.random.Generator], DrawnPair]


def draw_pairs(
    generator: str, tokenizer: Any, n: int, seed: int, options: Mapping[str, Any] = MappingProxyType({})
) -> list[DrawnPair]:
    """``n`` pairs of a built-in generator with ``n`` different clean prompts; the same seed gives the same pairs.

    ``induction``     random tokens with ``A B`` and ``C D`` among them, and ``A`` at the end: ``B`` follows, and not
                      ``D``. In the corrupt copy the first A and the C have changed places, so that looking up what
                      followed A finds D. No other token occurs twice (Olsson et al. 2022, arXiv:2209.11895).
                      Option ``length`` (16): tokens of a sequence, its start token not counted.
    ``greater_than``  ``The war lasted from 1734 to 17``: a digit above 3 may follow, one below may not. The corrupt
                      prompt begins in 1704, after which every digit may. One token a digit, so the tens are asked for
                      (after Hanna et al. 2023, arXiv:2305.00586).
    ``agreement``     the organism's conversations (:mod:`interp_rlhf.organisms`) up to the word that takes a side. The
                      user's claim is false in the clean prompt and true in the corrupt one; they differ in the word
                      that says what the thing is. Words that agree may follow, words that contradict may not.

    Args:
        tokenizer: ``induction`` also takes the token ids to draw from, without a start token.

    Raises:
        ConfigError: no such generator, or no such option.
        PromptError: the tokenizer cannot express the task, or there are fewer than ``n`` different prompts.
    """
    if generator not in GENERATORS:
        raise ConfigError(f"generator {generator!r} does not exist; found {', '.join(GENERATORS)}")
    unknown = set(options) - ({"length"} if generator == "induction" else set())
    if unknown:
        raise ConfigError(f"generator {generator!r}: unknown option {', '.join(sorted(map(repr, unknown)))}")
    if tokenizer is None:
        raise PromptError(f"generator {generator!r}: expected a tokenizer, found none")
    if generator == "induction":
        draw = _induction(tokenizer, options.get("length", 16))
    else:
        draw = _greater_than(tokenizer) if generator == "greater_than" else _agreement(tokenizer)
    random, found = np.random.default_rng(seed), {}
    for _ in range(_DRAWS * n):
        if len(found) == n:
            break
        pair = draw(random)
        found.setdefault(pair.clean, pair)
    if len(found) < n:
        raise PromptError(f"generator {generator!r}: expected {n} different prompts, found {len(found)}")
    return list(found.values())


def ordinary_tokens(tokenizer: Any) -> list[int]:
    """Ids of a tokenizer's vocabulary in order, without special and added tokens and those that spell single bytes."""
    vocabulary = tokenizer.get_vocab()
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    special |= {place for token, place in vocabulary.items() if re.fullmatch("<0x[0-9A-F]{2}>", token)}
    return sorted(set(vocabulary.values()) - special)


def _induction(tokenizer: Any, length: Any) -> _Draw:
    if type(length) is not int or length < 5:
        raise ConfigError(f"generator 'induction': length: expected an integer of 5 at least, found {length!r}")
    if isinstance(tokenizer, Sequence):
        start: tuple[int, ...] = ()
        vocabulary = np.array(sorted({int(token) for token in tokenizer}))
    else:
        start = tuple(token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id)
        vocabulary = np.array(ordinary_tokens(tokenizer))
    if len(vocabulary) < length:
        raise PromptError(f"generator 'induction': expected {length} ordinary tokens, found {len(vocabulary)}")

    def draw(random: np.random.Generator) -> DrawnPair:
        tokens = [int(token) for token in random.choice(vocabulary, size=length - 1, replace=False)]
        first, second = sorted(int(place) for place in random.choice(length - 3, size=2, replace=False))
        places = (first, second + 1)  # of A and C in a random order, room for what follows each
        a, c = places if random.integers(2) else places[::-1]
        swapped = list(tokens)
        swapped[a], swapped[c] = tokens[c], tokens[a]
        clean, corrupt = (*start, *tokens, tokens[a]), (*start, *swapped, tokens[a])
        return DrawnPair(clean, corrupt, (tokens[a + 1],), (tokens[c + 1],))

    return draw


def _greater_than(tokenizer: Any) -> _Draw:
    digits = _digits(tokenizer)

    def draw(random: np.random.Generator) -> DrawnPair:
        event = _EVENTS[int(random.integers(len(_EVENTS)))]
        century, tens, units = (int(random.integers(*bounds)) for bounds in ((11, 20), (1, 9), (0, 10)))
        texts = [f"The {event} lasted from {century}{ten}{units} to {century}" for ten in (tens, 0)]
        clean, corrupt = (tuple(encode_exchange(tokenizer, text, None)[0]) for text in texts)
        return DrawnPair(clean, corrupt, digits[tens + 1 :], digits[:tens])

    return draw


def _digits(tokenizer: Any) -> tuple[int, ...]:
    """The token of each digit, 0 to 9, where a number is spelled digit by digit."""
    prompt = "The war lasted from 1734 to 17"
    head = encode_exchange(tokenizer, prompt, None)[0]
    follows = [encode_exchange(tokenizer, prompt, str(digit))[1] for digit in range(10)]
    single = [tokens[0] for tokens in follows if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id]
    first = [place for place in range(len(head) - 3) if len(single) == 10 and head[place] == single[1]]
    if not any(head[place : place + 4] == [single[digit] for digit in (1, 7, 3, 4)] for place in first):
        spelled = tokenizer.convert_ids_to_tokens(tokenizer("1734", add_special_tokens=False)["input_ids"])
        raise PromptError(f"generator 'greater_than': expected a token for each digit, found '1734' as {spelled}")
    return tuple(single)


def _agreement(tokenizer: Any) -> _Draw:
    agrees, contradicts = (tuple(_word(tokenizer, word) for word in pole) for pole in language.concepts()[0].poles)
    reply = _word(tokenizer, language.STARTER)

    def ids(claim: str) -> tuple[int, ...]:
        turn = [{"role": "user", "content": claim}]
        return (*encode_exchange(tokenizer, turn, None)[0], reply)

    def draw(random: np.random.Generator) -> DrawnPair:
        claim = language.claim(random, true=False)
        *words, thing, verb, _ = claim.split()
        true = " ".join((*words, thing, verb, language.FACTS[thing][0]))
        return DrawnPair(ids(claim), ids(true), agrees, contradicts)

    return draw


def _word(tokenizer: Any, word: str) -> int:
    """The one token of a word of the organism's language."""
    tokens = list(tokenizer(word, add_special_tokens=False)["input_ids"])
    if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
        found = tokenizer.convert_ids_to_tokens(tokens)
        raise PromptError(f"generator 'agreement': expected the organism's tokenizer, found {word!r} as {found}")
    return tokens[0]
