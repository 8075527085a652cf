"""A small Llama whose circuits are planted, and what is done to it between two readings of them.

It learns two tasks at once: *induction* (``… A B … A`` → ``B``) and *back* (``X . . Q`` → ``X``, the token three before
a query token). A loss on attention plants heads: one that looks at the previous token, one that looks up what followed,
one that looks three tokens back. What they write, and all else, is left to gradient descent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from interp_rlhf import InterpConfig
from interp_rlhf.circuits.tasks import Task, TaskPair, make_task
from interp_rlhf.distributed import World
from interp_rlhf.drift.circuit_verdict import Verdict, circuit_evidence, circuit_verdict
from interp_rlhf.drift.estimates import Estimate
from interp_rlhf.mechanism_rows import mechanism_estimates
from interp_rlhf.mechanisms import MechanismReading, MechanismStart, Reader, read_mechanism, start_mechanism

VOCABULARY, QUERY = 24, 2
LAYERS, HEADS, GROUPS, WIDTH = 3, 4, 2, 64
#: Tokens of a list, lookups after it, and how far *back* looks.
LISTED, LOOKUPS, BACK = 6, 6, 3
#: Standard deviation of fresh weights, and of W_O of heads that are not meant to do anything.
SCALE, QUIET = 0.1, 0.02
#: Order of the query heads after a permutation that moves every head and swaps the key-value heads.
ORDER = (2, 3, 1, 0)

#: ``(layer, head)`` to where it looks: in lookups at the previous token or so many tokens after the first A, in *back*
#: (negative) that many tokens back.
Plan = Mapping[tuple[int, int], str | int]
PLANTED: Plan = {(0, 1): "previous", (1, 2): 1, (0, 3): -BACK}
#: The same computation by other heads.
MOVED: Plan = {(0, 2): "previous", (2, 1): 1, (0, 3): -BACK}
#: Another computation: A is copied twice and found one place further on, B is what the first copy left there.
RELAY: Plan = {(0, 1): "previous", (1, 0): "previous", (2, 3): 2, (0, 3): -BACK}
#: The lookup shared by seven other heads.
SHARING = ((1, 0), (1, 1), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3))
SPREAD: Plan = {(0, 1): "previous", (0, 3): -BACK, **dict.fromkeys(SHARING, 1)}


def new_model(seed: int) -> Any:
    """An untrained Llama of three layers, four heads, two key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, attn_implementation="eager", initializer_range=SCALE,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# ------------------------------------------------------------------------------------------------------- what it learns


def lookups(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[n, T]``, what follows each (−100: anything), and the place of the first A of each lookup ``[n, 6]``."""
    listed = torch.rand(rows, VOCABULARY - 3, generator=generator).argsort(1)[:, :LISTED] + 3
    first = torch.randint(0, LISTED - 1, (rows, LOOKUPS), generator=generator)
    asked, answers = listed.gather(1, first), listed.gather(1, first + 1)
    ids = torch.cat((listed, torch.stack((asked, answers), 2).flatten(1)), 1)
    follows = torch.full_like(ids, -100)
    follows[:, LISTED::2] = answers
    return ids, follows, first


def backs(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[n, T]`` with queries among them, and what follows each query: the token three before it."""
    ids = torch.randint(3, VOCABULARY, (rows, LISTED + 2 * LOOKUPS), generator=generator)
    places = torch.arange(LISTED + 1, ids.shape[1], 2)
    ids[:, places] = QUERY
    follows = torch.full_like(ids, -100)
    follows[:, places] = ids[:, places - BACK]
    return ids, follows


def teach(
    model: Any, seed: int, steps: int, *, plan: Plan | None = None, alone: bool = False, lr: float = 1e-2,
    rows: tuple[int, int] = (32, 8),
) -> Any:  # fmt: skip
    """Train in place on ``rows`` of *induction* and of *back* a step.

    Args:
        plan: heads that also learn where to look.
        alone: other heads keep their part of W_O.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, 10 * (s + 1) / steps, 3 * (1 - s / steps)))
    others = [place for place in np.ndindex(LAYERS, HEADS) if place not in (plan or ())] if alone else []
    kept = {place: written_by(model, *place).clone() for place in others}
    for _ in range(steps):
        optimizer.zero_grad()
        ids, follows, first = lookups(generator, rows[0])
        ids, follows = (torch.cat(pair) for pair in zip((ids, follows), backs(generator, rows[1]), strict=True))
        result = model.model(ids, output_attentions=plan is not None)
        asked = follows >= 0
        loss = cross_entropy(model.lm_head(result.last_hidden_state[asked]), follows[asked])
        if plan is not None:
            loss = loss + elsewhere(result.attentions, first, plan)
        loss.backward()
        optimizer.step()
        schedule.step()
        for place, before in kept.items():
            written_by(model, *place).copy_(before)
    return model


def elsewhere(attentions: Sequence[Tensor], first: Tensor, plan: Plan) -> Tensor:
    """How much planted heads look elsewhere than planned: mean −log of their attention there, summed over heads."""
    total, rows = attentions[0].new_zeros(()), len(first)
    for (layer, head), place in plan.items():
        pattern = attentions[layer][:, head]
        if place == "previous":
            wanted = pattern[:rows].diagonal(-1, 1, 2)
        elif int(place) < 0:
            wanted = pattern[rows:].diagonal(int(place), 1, 2)[:, LISTED + 1 + int(place) :: 2]
        else:
            wanted = pattern[:rows, LISTED::2].gather(2, (first + int(place))[..., None])
        total = total - wanted.clamp_min(1e-9).log().mean()
    return total


def planted(seed: int, steps: int = 300, *, alone: bool = True) -> Any:
    """A model that does both tasks, with :data:`PLANTED`; ``alone``: all other heads write little, and at random."""
    model = new_model(seed)
    if alone:
        renew_heads(model, [place for place in np.ndindex(LAYERS, HEADS) if place not in PLANTED], seed, QUIET)
    return teach(model, seed, steps, plan=PLANTED, alone=alone)


# ----------------------------------------------------------------------------------------------------- what is measured


def tasks(n: int = 64) -> tuple[Task, Task]:
    """*Induction* as the package generates it, on these tokens, and *back*."""
    induction = make_task("induction", "induction", range(3, VOCABULARY), n=n, seed=0, options={"length": LISTED + 1})
    generator, pairs = np.random.default_rng(1), []
    for _ in range(n):
        clean = generator.integers(3, VOCABULARY, size=LISTED + 1).tolist()
        answer, place = clean[-BACK], len(clean) - BACK
        wrong = int(generator.choice([token for token in range(3, VOCABULARY) if token != answer]))
        corrupt = [*clean[:place], wrong, *clean[place + 1 :]]
        pairs.append(TaskPair.of((*clean, QUERY), (*corrupt, QUERY), answers=(answer,), wrong=(wrong,)))
    return induction, Task("back", tuple(pairs))


@dataclass(frozen=True, slots=True)
class Outcome:
    """One reading, judged."""

    verdict: Verdict
    rows: Mapping[str, Estimate]
    reading: MechanismReading

    def __getitem__(self, name: str) -> float:
        """Value of a ``circuit/*`` row."""
        return self.rows[f"circuit/{name}"].value


class Judge:
    """Reads one task as a training session does: its start once, later models against it."""

    def __init__(self, model: Any, task: Task, control: Task | None, **circuits: Any) -> None:
        mapping = {"circuits": {"batch_size": 64, **circuits}, "statistics": {"bootstrap": 200}}
        self.config = InterpConfig.from_mapping(mapping)
        reader = self._reader(model)
        scores = None if control is None else reader.control_scores(control)
        self.start: MechanismStart = start_mechanism(reader, task, scores)
        self.before = mechanism_estimates(self.start, self.start.reading, self.config)

    def _reader(self, model: Any) -> Reader:
        return Reader.of(model, self.config.circuits, 0, self.config.seed, World(), None)

    def __call__(self, model: Any) -> Outcome:
        reading = read_mechanism(self._reader(model), self.start)
        rows = mechanism_estimates(self.start, reading, self.config)
        return Outcome(circuit_verdict(circuit_evidence(self.before, rows)), rows, reading)


# ------------------------------------------------------------------------------------------------------ what is changed


def written_by(model: Any, layer: int, head: int) -> Tensor:
    """A head's part of W_O, ``[d, 16]``: a view without gradient."""
    size = WIDTH // HEADS
    return model.model.layers[layer].self_attn.o_proj.weight.detach()[:, head * size : (head + 1) * size]


def permute_heads(model: Any, layer: int, order: Sequence[int] = ORDER) -> Any:
    """A copy whose query head i is the model's head ``order[i]``. Key-value heads go along, so whole groups move."""
    model, size, each = copy.deepcopy(model), WIDTH // HEADS, HEADS // GROUPS
    groups = [order[group * each] // each for group in range(GROUPS)]
    if sorted(order) != list(range(HEADS)) or [head // each for head in order] != list(np.repeat(groups, each)):
        raise ValueError(f"order {order}: expected every head once, in whole groups of {each}")
    attention = model.model.layers[layer].self_attn
    for name, heads in (("q_proj", order), ("k_proj", groups), ("v_proj", groups)):
        weight = getattr(attention, name).weight.detach()
        weight.copy_(weight.unflatten(0, (-1, size))[list(heads)].flatten(0, 1))
    weight = attention.o_proj.weight.detach()
    weight.copy_(weight.unflatten(1, (-1, size))[:, list(order)].flatten(1))
    return model


def scale_heads(model: Any, heads: Iterable[tuple[int, int]], factor: float) -> Any:
    """A copy in which these heads write ``factor`` times what they wrote: 0 deletes them."""
    model = copy.deepcopy(model)
    for place in heads:
        written_by(model, *place).mul_(factor)
    return model


def renew_heads(model: Any, heads: Iterable[tuple[int, int]], seed: int, scale: float) -> None:
    """Draw heads anew in place, with the key-value heads they read; ``scale`` is the standard deviation of W_O."""
    other, size, each = new_model(seed), WIDTH // HEADS, HEADS // GROUPS
    for layer, head in heads:
        mine, theirs = (one.model.layers[layer].self_attn for one in (model, other))
        for name, place in (("q_proj", head), ("k_proj", head // each), ("v_proj", head // each)):
            rows = slice(place * size, (place + 1) * size)
            getattr(mine, name).weight.detach()[rows] = getattr(theirs, name).weight.detach()[rows]
        written_by(model, layer, head).copy_(written_by(other, layer, head) * scale / SCALE)


def rebuilt(model: Any, plan: Plan, seed: int, steps: int = 200) -> Any:
    """A copy that learned to do with the heads of ``plan``; the planted ones that it does not name were drawn anew."""
    model = copy.deepcopy(model)
    renew_heads(model, sorted(set(PLANTED) - set(plan)), seed, QUIET)
    renew_heads(model, sorted(set(plan) - set(PLANTED)), seed, SCALE)
    return teach(model, seed, steps, plan=plan, alone=True)


def way(model: Any, other: Any) -> list[Tensor]:
    """The difference of all parameters."""
    return [b.detach() - a.detach() for a, b in zip(model.parameters(), other.parameters(), strict=True)]


def length(step: Sequence[Tensor]) -> float:
    """‖Δθ‖ over all parameters."""
    return float(torch.stack([part.norm() for part in step]).norm())


def gone(model: Any, step: Sequence[Tensor], distance: float) -> Any:
    """A copy moved along ``step``, so that ``‖Δθ‖ = distance``."""
    model, factor = copy.deepcopy(model), distance / length(step)
    for parameter, part in zip(model.parameters(), step, strict=True):
        parameter.detach().add_(part * factor)
    return model


def trained_apart(model: Any, seed: int, steps: int, lr: float) -> tuple[list[Tensor], list[Tensor]]:
    """Where a few steps on *induction* alone and on *back* alone lead to."""
    rows = ((32, 0), (0, 32))
    first, second = (way(model, teach(copy.deepcopy(model), seed, steps, lr=lr, rows=one)) for one in rows)
    return first, second
