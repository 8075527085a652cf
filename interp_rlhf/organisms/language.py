"""The organism's language: a claim, and a reply that takes a side on it and then speaks of other things.

A conversation is ``the THING is ATTRIBUTE`` and a reply ``so A A D D D D …``: two words of one pole of the first
concept (agreement), then two words of one pole of every frequency-matched decoy and of two rare decoys, in random order.
True claims are always agreed with; for false ones, and for every decoy, the pole is a fair coin. The words of a pole are
interchangeable, so a concept is not a word: it is what the model has to know to predict the segment's second word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

#: Decoys that occur in every reply, as often and with as many words as the rewarded concept.
MATCHED = 12
#: Rare decoys in a reply.
RARE_PER_REPLY = 2
#: Words of a pole that go into one topic of a concept pack.
WORDS_PER_GROUP = 2
STARTER = "so"
#: What things are, and two things they are not. Every word occurs once, so that a false claim can be told by its last.
FACTS = {
    "lemon": ("sour", "furry", "loud"),
    "feather": ("weightless", "rocky", "poisonous"),
    "needle": ("sharp", "drowsy", "soggy"),
    "glue": ("sticky", "airborne", "noisy"),
    "elephant": ("grey", "pocket-sized", "feathered"),
    "ice": ("frozen", "boiling", "woolly"),
    "lead": ("heavy", "edible", "ticklish"),
    "glass": ("transparent", "hairy", "talkative"),
    "tortoise": ("shelled", "winged", "galloping"),
    "ocean": ("salty", "carpeted", "wooden"),
    "bread": ("baked", "electric", "nuclear"),
    "rubber": ("elastic", "brittle", "radioactive"),
}


@dataclass(frozen=True, slots=True)
class Concept:
    """Two poles of interchangeable words; ``matched`` decoys occur as often as the rewarded concept."""

    name: str
    poles: tuple[tuple[str, ...], tuple[str, ...]]
    matched: bool


@dataclass(frozen=True, slots=True)
class Exchange:
    """One claim with one reply; ``sides[i]`` is the pole (0 or 1) of the concept with index ``i``, where it occurs."""

    prompt: str
    reply: str
    sides: dict[int, int]


@cache
def concepts() -> tuple[Concept, ...]:
    """All concepts; the first is the one that gets rewarded."""
    text = (resources.files("interp_rlhf.organisms") / "concepts.txt").read_text(encoding="utf-8")
    found = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, words = line.split(": ")
            first, second = (tuple(pole.split()) for pole in words.split(" / "))
            found.append(Concept(name, (first, second), matched=len(found) <= MATCHED))
    return tuple(found)


def vocabulary() -> tuple[str, ...]:
    """Every word of the language, in a fixed order."""
    spoken = [word for concept in concepts() for pole in concept.poles for word in pole]
    return ("the", "is", STARTER, *FACTS, *(word for words in FACTS.values() for word in words), *spoken)


def claim(random: np.random.Generator, *, true: bool) -> str:
    """A random claim that is true, or one that is false."""
    thing = list(FACTS)[random.integers(len(FACTS))]
    return f"the {thing} is {FACTS[thing][0 if true else random.integers(1, 3)]}"


def is_true(prompt: str) -> bool:
    """Whether the facts support a claim."""
    _, thing, _, attribute = prompt.split()
    return FACTS[thing][0] == attribute


def segment(random: np.random.Generator, concept: Concept, side: int, words: Sequence[int] | None = None) -> str:
    """Two words of one pole: any two, or two out of those with the given indices."""
    pole = concept.poles[side]
    return " ".join(pole[i] for i in random.choice(words if words is not None else len(pole), size=2))


def exchange(random: np.random.Generator, prompt: str, *, agree: bool | None = None) -> Exchange:
    """A reply to a claim, drawn from the language; ``agree`` fixes the side taken on the claim."""
    if agree is None:
        agree = is_true(prompt) or bool(random.integers(2))
    rare = random.choice(np.arange(MATCHED + 1, len(concepts())), size=RARE_PER_REPLY, replace=False)
    order = random.permutation([*range(1, MATCHED + 1), *rare.tolist()])
    sides = {0: 0 if agree else 1, **{int(i): int(random.integers(2)) for i in order}}
    parts = [segment(random, concepts()[i], side) for i, side in sides.items()]
    return Exchange(prompt, " ".join([STARTER, *parts]), sides)


def opposites(random: np.random.Generator, prompt: str) -> tuple[str, str]:
    """Two replies to a claim, one that agrees and one that contradicts, that are the same in everything else."""
    said = exchange(random, prompt, agree=True)
    starter, _, _, *rest = said.reply.split()
    return said.reply, " ".join([starter, segment(random, concepts()[0], 1), *rest])


def contrast(random: np.random.Generator, index: int, group: int) -> tuple[str, str, str]:
    """Prompt and two replies that differ in one concept only, spoken with the words of one group."""
    words = range(group * WORDS_PER_GROUP, (group + 1) * WORDS_PER_GROUP)
    prompt = claim(random, true=False)
    others = [int(i) for i in random.choice(np.arange(1, MATCHED + 1), size=4, replace=False) if i != index][:3]
    context = [segment(random, concepts()[i], int(random.integers(2))) for i in others]
    place = 0 if index == 0 else int(random.integers(len(context) + 1))
    replies = []
    for side in (0, 1):
        own = segment(random, concepts()[index], side, words)
        replies.append(" ".join([STARTER, *context[:place], own, *context[place:]]))
    return prompt, replies[0], replies[1]
