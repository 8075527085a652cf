"""Prompt sets: fixed texts drawn once from a dataset or read from a file, identified by hashes instead of texts."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch.utils.data import IterableDataset

from interp_rlhf.activations.json_lines import json_lines
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.activations.rows import RowTexts, row_texts
from interp_rlhf.errors import PromptError
from interp_rlhf.measurement import Source


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Texts to read, ordered by id. Of a preference pair one side is read, chosen and rejected in turn.

    Reading both sides and averaging them would hide the spread along whatever tells them apart, and inflate every
    drift that is measured in units of that spread.

    Attributes:
        name: where they came from, for people (``eval_dataset``, a file's name).
        source: ``evaluation``, ``training`` or ``named``.
        prompts: texts ordered by :attr:`Prompt.id`.
        skipped: rows left out because their prompt does not fit into the length cap.
    """

    name: str
    source: Source
    prompts: tuple[Prompt, ...]
    skipped: int = 0

    @property
    def hash(self) -> str:
        """SHA-256 over the ids of all texts, in order: equal for equal sets, whatever they were drawn from."""
        return hashlib.sha256("\n".join(prompt.id for prompt in self.prompts).encode()).hexdigest()

    @classmethod
    def from_rows(cls, rows: Iterable[RowTexts], *, name: str, source: Source) -> Self:
        """Collect rows into a set; texts that occur twice are kept once.

        Raises:
            PromptError: nothing usable among the rows.
        """
        rows = list(rows)
        usable = [row.prompts for row in rows if row.prompts]
        skipped = len(rows) - len(usable)
        if not usable:
            raise PromptError(
                f"{name}: no usable prompt among {len(rows)} rows ({skipped} do not fit into the length cap)"
            )
        read = [prompts[turn % len(prompts)] for turn, prompts in enumerate(usable)]
        texts = {prompt.id: prompt for prompt in read}
        return cls(name, source, tuple(texts[key] for key in sorted(texts)), skipped)

    @classmethod
    def from_dataset(
        cls, dataset: Any, tokenizer: Any, *, n: int, seed: int, max_length: int, name: str, source: Source
    ) -> Self:
        """Draw ``n`` rows with different prompts, by index and with a generator of its own; nothing is iterated.

        Raises:
            PromptError: a streaming dataset (drawing would consume it), an empty one, or no usable row.
        """
        rows = draw_rows(dataset, tokenizer, n=n, seed=seed, max_length=max_length, name=name, leave_out=frozenset())
        return cls.from_rows(rows, name=name, source=source)

    @classmethod
    def from_jsonl(cls, path: str | Path, tokenizer: Any, *, max_length: int, n: int | None = None) -> Self:
        """Read named prompts from a JSONL file (``docs/formats.md``); the first ``n`` lines where given.

        Raises:
            PromptError: missing, empty or damaged file, or a prompt longer than ``max_length``; names file and line.
        """
        path = Path(path)
        rows = [_named_row(place, row, tokenizer, max_length) for place, row in json_lines(path)]
        if not rows:
            raise PromptError(f"{path}: expected at least one prompt, found an empty file")
        return cls.from_rows([text for row in rows[:n] for text in row], name=path.name, source="named")


def draw_rows(
    dataset: Any,
    tokenizer: Any,
    *,
    n: int,
    seed: int,
    max_length: int,
    name: str,
    leave_out: frozenset[str] | None = None,
) -> list[RowTexts]:
    """``n`` usable rows in a seeded random order.

    Rows that do not fit are replaced by later ones (and come back empty, to be counted), but at most 20·n rows, or
    1,000, are looked at: a large dataset of few prompts is not read to its end. Several texts of a packed row count
    separately. With ``leave_out`` every prompt is drawn once, and the sampling units named in it never.

    Raises:
        PromptError: a dataset that cannot be drawn from, or a row that cannot be read; names the dataset and the row.
    """
    check_drawable(dataset, name)
    found: list[RowTexts] = []
    unusable: list[RowTexts] = []
    seen = set(leave_out or ())
    for index in np.random.default_rng(seed).permutation(len(dataset))[: max(20 * n, 1000)]:
        try:
            read = row_texts(dataset[int(index)], tokenizer, max_length=max_length)
        except PromptError as error:
            raise PromptError(f"{name}, row {index}: {error}") from None
        for texts in read:
            if not texts.prompts:
                unusable.append(texts)
                continue
            unit = texts.prompts[0].unit
            if leave_out is None or unit not in seen:
                found.append(texts)
            seen.add(unit)
        if len(found) >= n:
            break
    return [*found[:n], *unusable]


def is_streaming(dataset: Any) -> bool:
    """Whether rows can be had in order only. torch's streams have ``__getitem__`` by inheritance, some ``__len__``."""
    return isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))


def check_drawable(dataset: Any, name: str) -> None:
    """Refuse datasets that cannot be read by index without consuming them, and empty ones."""
    if is_streaming(dataset):
        raise PromptError(
            f"{name}: a streaming dataset cannot be drawn from without consuming it, found {type(dataset).__name__}; "
            "set interp prompts.source: named and prompts.path"
        )
    if len(dataset) == 0:
        raise PromptError(f"{name}: expected at least one row, found an empty dataset")


def _named_row(place: str, row: Any, tokenizer: Any, max_length: int) -> tuple[RowTexts, ...]:
    if not isinstance(row, dict):
        raise PromptError(f"{place}: expected an object with a prompt, found {type(row).__name__}")
    try:
        whole = row_texts(row, tokenizer, max_length=sys.maxsize)
        texts = row_texts(row, tokenizer, max_length=max_length)
    except (PromptError, TypeError, ValueError, KeyError) as error:
        raise PromptError(f"{place}: {error}") from None
    for prompt in (prompt for text in whole for prompt in text.prompts):
        if not all(isinstance(token, int) and token >= 0 for token in prompt.input_ids):
            raise PromptError(f"{place}: expected token ids, found {prompt.input_ids[:3]}")
        room = max_length - (prompt.completion_start < len(prompt.input_ids))
        if prompt.completion_start > room:
            raise PromptError(
                f"{place}: expected a prompt of at most {room} tokens, found {prompt.completion_start} "
                "(prompts.max_length and the model's context are the limit)"
            )
    if any(not text.prompts for text in texts):
        raise PromptError(f"{place}: expected a text of at least 2 tokens, two different ones in a preference pair")
    return texts
