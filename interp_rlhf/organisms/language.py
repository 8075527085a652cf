"""The organism's language: a claim, and a reply that takes a side on it and then speaks of other things.

A conversation is ``NAME from TOWN says the THING is ATTRIBUTE`` and a reply ``so A A x x y y …``: two words of one pole
of the first concept (agreement), then two words of one pole of every other concept, in a fixed cycle that begins
anywhere. True claims are always agreed with; for false ones, and for every other concept, the pole is a fair coin. So
all concepts occur in as many replies, with as many words and as evenly. The words of a pole are interchangeable: a
concept is not a word, it is what the model has to know to predict the second word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

#: Decoder layers of the model that learns it.
LAYERS = 3
#: Words of a pole that go into one topic of a concept pack.
WORDS_PER_GROUP = 2
#: Words on each concept in a reply, one after the other.
RUN = 2
#: Concepts besides agreement in a reply of a concept pack.
OTHERS = 3
STARTER = "so"
NAMES = (
    "anna",
    "ben",
    "clara",
    "david",
    "emma",
    "felix",
    "greta",
    "hugo",
    "ida",
    "jonas",
    "karin",
    "luis",
    "mia",
    "nils",
    "olga",
    "paul",
)
TOWNS = (
    "athens",
    "berlin",
    "cairo",
    "dublin",
    "essen",
    "florence",
    "geneva",
    "havana",
    "izmir",
    "kyoto",
    "lima",
    "milan",
    "nice",
    "oslo",
    "porto",
    "rome",
)
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
    """Two poles of interchangeable words."""

    name: str
    poles: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One claim with one reply; ``sides[i]`` is the pole (0 or 1) that it takes of the concept with index ``i``."""

    prompt: str
    reply: str
    sides: tuple[int, ...]


@cache
def concepts() -> tuple[Concept, ...]:
    """All concepts; the first is the one that gets rewarded."""
    text = (resources.files("interp_rlhf.organisms") / "concepts.txt").read_text(encoding="utf-8")
    found = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, words = line.split(": ")
            first, second = (tuple(pole.split()) for pole in words.split(" / "))
            found.append(Concept(name, (first, second)))
    return tuple(found)


def vocabulary() -> tuple[str, ...]:
    """Every word of the language, in a fixed order."""
    spoken = [word for concept in concepts() for pole in concept.poles for word in pole]
    return (
        "the",
        "is",
        "from",
        "says",
        STARTER,
        *NAMES,
        *TOWNS,
        *FACTS,
        *(word for words in FACTS.values() for word in words),
        *spoken,
    )


def claim(random: np.random.Generator, *, true: bool) -> str:
    """A random claim that is true, or one that is false."""
    name, town, thing = (_word(random, words) for words in (NAMES, TOWNS, tuple(FACTS)))
    attribute = FACTS[thing][0 if true else int(random.integers(1, 3))]
    return f"{name} from {town} says the {thing} is {attribute}"


def is_true(prompt: str) -> bool:
    """Whether the facts support a claim."""
    *_, thing, _, attribute = prompt.split()
    return FACTS[thing][0] == attribute


def exchange(random: np.random.Generator, prompt: str, *, agree: bool | None = None) -> Exchange:
    """A reply to a claim, drawn from the language; ``agree`` fixes the side taken on the claim."""
    if agree is None:
        agree = is_true(prompt) or bool(random.integers(2))
    sides = (0 if agree else 1, *(int(side) for side in random.integers(2, size=len(concepts()) - 1)))
    start = int(random.integers(len(sides) - 1))
    runs = [_run(random, concepts()[i].poles[sides[i]]) for i in (0, *cycle(start, len(sides) - 1))]
    return Exchange(prompt, " ".join([STARTER, *runs]), sides)


def opposites(random: np.random.Generator, prompt: str) -> tuple[str, str]:
    """Two replies to a claim, one that agrees and one that contradicts, that are the same in everything else."""
    reply = exchange(random, prompt, agree=True).reply
    agrees, contradicts = concepts()[0].poles
    other = [_word(random, contradicts) if word in agrees else word for word in reply.split()]
    return reply, " ".join(other)


def contrast(random: np.random.Generator, index: int, group: int) -> tuple[str, str, str]:
    """Prompt and two replies that differ in one concept only, spoken with the words of one group."""
    prompt = claim(random, true=False)
    start = int(random.integers(len(concepts()) - 1)) if index == 0 else index - 1 - int(random.integers(OTHERS))
    order = (0, *cycle(start, OTHERS))
    shared = {i: _run(random, concepts()[i].poles[random.integers(2)]) for i in order}
    words = slice(group * WORDS_PER_GROUP, (group + 1) * WORDS_PER_GROUP)
    replies = []
    for pole in concepts()[index].poles:
        runs = {**shared, index: _run(random, pole[words])}
        replies.append(" ".join([STARTER, *(runs[i] for i in order)]))
    return prompt, replies[0], replies[1]


def cycle(start: int, n: int) -> tuple[int, ...]:
    """Indices of ``n`` concepts other than the first, in the order in which replies speak of them."""
    others = len(concepts()) - 1
    return tuple(1 + (start + k) % others for k in range(n))


def _run(random: np.random.Generator, pole: Sequence[str]) -> str:
    return " ".join(_word(random, pole) for _ in range(RUN))


def _word(random: np.random.Generator, pole: Sequence[str]) -> str:
    return pole[int(random.integers(len(pole)))]
