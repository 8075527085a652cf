"""A bank of real, unrelated concepts: how far do concepts drift that no one trained for?

Each is one topic of everyday text against another ("violin, trumpet …" against "frying, oven …"). Their directions are
fitted at step 0 like every concept's; later only their drift on the audit texts is computed, which costs no forward.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

import numpy as np

from interp_rlhf.readouts.packs import Pack, PackPair

#: Concepts drawn from the topics; fewer where texts are too long or cannot be told apart.
SIZE = 64
_PROMPT = "Say something about a word."


@cache
def topics() -> dict[str, tuple[str, ...]]:
    """The topics, each with its words."""
    text = (resources.files("interp_rlhf.readouts") / "bank.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: tuple(words.split(", ")) for name, words in (line.split(": ") for line in lines)}


def bank_packs(seed: int, size: int = SIZE) -> tuple[Pack, ...]:
    """``size`` contrasts of two different topics as packs named ``bank-NN``, drawn with the run's seed.

    >>> first = bank_packs(0)[0]
    >>> first.name, len(first.pairs), first.pairs[0].prompt
    ('bank-00', 8, 'Say something about a word.')
    """
    names = sorted(topics())
    every = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    drawn = np.random.default_rng(seed).permutation(len(every))[:size]
    return tuple(_pack(number, *every[index]) for number, index in enumerate(drawn))


def _pack(number: int, first: str, second: str) -> Pack:
    pairs = tuple(
        PackPair(first, _PROMPT, f"This is about the {a}.", f"This is about the {b}.")
        for a, b in zip(topics()[first], topics()[second], strict=True)
    )
    return Pack(f"bank-{number:02d}", f"{first} versus {second}", pairs)
