"""Fixed texts to read: prompts with a completion mask, contrast pairs, batches with either padding side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from interp_rlhf.errors import PromptError

PaddingSide = Literal["left", "right"]
Tokens = Literal["completion", "prompt", "all"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One tokenized text.

    Attributes:
        input_ids: token ids without padding.
        completion_start: index of the first completion token; ``len(input_ids)`` where there is no completion.
        unit: the sampling unit this text belongs to: its prompt, or the text itself where it has none.
    """

    input_ids: tuple[int, ...]
    completion_start: int
    unit: str

    @property
    def id(self) -> str:
        """First 16 hex digits of SHA-256 over token ids and completion start: what travels instead of the text."""
        payload = ",".join(map(str, self.input_ids)) + f"|{self.completion_start}"
        return hashlib.sha256(payload.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ContrastPair:
    """Two texts that differ in one concept. Pairs of one ``group`` are never split between fitting and reading."""

    positive: Prompt
    negative: Prompt
    group: str


@dataclass(frozen=True, slots=True)
class Batch:
    """A padded batch. ``input_ids``/``attention_mask``/``content_mask`` are ``[B, T]``; ``rows`` are prompt indices.

    ``content_mask`` marks the tokens that enter the per-text mean; ``completion_mask`` the completion tokens.
    """

    rows: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    content_mask: Tensor
    completion_mask: Tensor


def batches(
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    pad_token_id: int,
    tokens: Tokens = "completion",
    skip_ids: frozenset[int] = frozenset(),
    side: PaddingSide = "right",
    longest_first: bool = True,
) -> Iterator[Batch]:
    """Pad texts of similar length together, longest first (so that running out of memory happens at once).

    ``skip_ids`` (BOS and the like) and the very first token never enter the mean: they are attention sinks.

    Raises:
        PromptError: a text has no content token left under ``tokens``.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids), reverse=longest_first)
    for start in range(0, len(order), batch_size):
        rows = tuple(order[start : start + batch_size])
        width = max(len(prompts[i].input_ids) for i in rows)
        ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
        attention = torch.zeros((len(rows), width), dtype=torch.long)
        content = torch.zeros((len(rows), width), dtype=torch.bool)
        completion = torch.zeros((len(rows), width), dtype=torch.bool)
        for row, index in enumerate(rows):
            prompt = prompts[index]
            length = len(prompt.input_ids)
            begin = width - length if side == "left" else 0
            window = slice(begin, begin + length)
            ids[row, window] = torch.tensor(prompt.input_ids)
            attention[row, window] = 1
            content[row, window] = torch.tensor(content_tokens(prompt, tokens, skip_ids))
            completion[row, begin + prompt.completion_start : begin + length] = True
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        yield Batch(rows, ids, attention, positions, content, completion)


def content_tokens(prompt: Prompt, tokens: Tokens, skip_ids: frozenset[int]) -> list[bool]:
    """Which tokens of one text enter its mean, as a list of ``len(input_ids)`` booleans."""
    length, start = len(prompt.input_ids), prompt.completion_start
    if tokens == "all" or (tokens == "completion" and start >= length):
        first, last = 0, length
    elif tokens == "prompt":
        first, last = 0, start
    else:
        first, last = start, length
    keep = [first <= i < last and i > 0 and prompt.input_ids[i] not in skip_ids for i in range(length)]
    if not any(keep):
        raise PromptError(f"prompt {prompt.id}: no content token under tokens={tokens!r} ({length} tokens in all)")
    return keep
