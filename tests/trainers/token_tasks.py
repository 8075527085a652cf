"""Tasks in token ids on which the tiny random models have an effect: the last token decides what is predicted."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from trainers.table import causal_lm

#: First and last token that prompts are made of; below them are special tokens.
_TOKENS = (4, 94)


def write_task(path: Path, *, metric: str = "logit_diff", n: int = 32, length: int = 6, seed: int = 0) -> str:
    """A task file of ``n`` pairs of ``length`` and one token more; gives its path.

    Clean prompts end in one token, corrupt ones in another, after the same random tokens but one. Answers and wrong
    tokens (or completions) are those that the random model tells apart most.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = (10 + seed, 50 + seed)
    high, low = _told_apart(*ends)
    lines = []
    for index in range(n):
        body = torch.randint(*_TOKENS, (length - 1 + index % 2,), generator=generator).tolist()
        other = [4 + (body[0] - 3) % 90, *body[1:]]
        pair = {"clean": [1, *body, ends[0]], "corrupt": [1, *other, ends[1]]}
        if metric == "logit_diff":
            pair |= {"answers": [high], "wrong": [low]}
        elif metric == "margin":
            pair |= {"chosen": [high, 7 + index], "rejected": [low, 8]}
        lines.append(json.dumps(pair))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@cache
def _told_apart(clean: int, corrupt: int) -> tuple[int, int]:
    with torch.no_grad():
        clean_logits, corrupt_logits = causal_lm().eval()(torch.tensor([[1, clean], [1, corrupt]])).logits[:, -1]
    difference = clean_logits - corrupt_logits
    return int(difference.argmax()), int(difference.argmin())
