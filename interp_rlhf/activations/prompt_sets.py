"""Prompt sets: fixed texts drawn once from a dataset or read from a file, identified by hashes instead of texts."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from interp_rlhf.activations.prompts import ContrastPair, Prompt
from interp_rlhf.activations.rows import RowTexts, row_texts
from interp_rlhf.errors import PromptError
from interp_rlhf.measurement import Source


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Texts to read, ordered by id, with the preference pairs among them.

    Attributes:
        name: where they came from, for people (``eval_dataset``, a file's name).
        source: ``evaluation``, ``training`` or ``named``.
        prompts: texts ordered by :attr:`Prompt.id`; texts of one preference pair share their ``unit``.
        pairs: preference pairs, in drawing order (empty where the data has none).
        skipped: rows left out because their prompt does not fit into the length cap.
    """

    name: str
    source: Source
    prompts: tuple[Prompt, ...]
    pairs: tuple[ContrastPair, ...] = ()
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
        texts: dict[str, Prompt] = {}
        pairs, skipped, seen = [], 0, 0
        for row in rows:
            seen += 1
            skipped += not row.prompts
            for prompt in row.prompts:
                texts.setdefault(prompt.id, prompt)
            if row.pair is not None:
                pairs.append(row.pair)
        if not texts:
            raise PromptError(f"{name}: no usable prompt among {seen} rows ({skipped} do not fit into the length cap)")
        return cls(name, source, tuple(texts[key] for key in sorted(texts)), tuple(pairs), skipped)

    @classmethod
    def from_dataset(
        cls, dataset: Any, tokenizer: Any, *, n: int, seed: int, max_length: int, name: str, source: Source
    ) -> Self:
        """Draw ``n`` rows of a map-style dataset with a generator of its own; the dataset is never iterated.

        Raises:
            PromptError: a streaming dataset (drawing would consume it), an empty one, or no usable row.
        """
        return cls.from_rows(
            draw_rows(dataset, tokenizer, n=n, seed=seed, max_length=max_length, name=name), name=name, source=source
        )

    @classmethod
    def from_jsonl(cls, path: str | Path, tokenizer: Any, *, max_length: int, n: int | None = None) -> Self:
        """Read named prompts from a JSONL file (``docs/formats.md``); the first ``n`` lines where given.

        Raises:
            PromptError: missing, empty or damaged file, or a prompt longer than ``max_length``; names file and line.
        """
        path = Path(path)
        rows = [
            _named_row(path, number, line, tokenizer, max_length)
            for number, line in enumerate(_lines(path), start=1)
            if line.strip()
        ]
        if not rows:
            raise PromptError(f"{path}: expected at least one prompt, found an empty file")
        return cls.from_rows([text for row in rows[:n] for text in row], name=path.name, source="named")


def draw_rows(
    dataset: Any, tokenizer: Any, *, n: int, seed: int, max_length: int, name: str, skip: int = 0
) -> list[RowTexts]:
    """``n`` usable rows in a seeded random order, after the first ``skip`` usable ones of that order.

    Rows that do not fit are replaced by later ones (and come back empty, to be counted). Several texts of a packed row
    count separately.
    """
    check_drawable(dataset, name)
    found: list[RowTexts] = []
    unusable: list[RowTexts] = []
    passed = 0
    for index in np.random.default_rng(seed).permutation(len(dataset)):
        for texts in row_texts(dataset[int(index)], tokenizer, max_length=max_length):
            if not texts.prompts:
                unusable.append(texts)
            elif passed < skip:
                passed += 1
            else:
                found.append(texts)
        if len(found) >= n:
            break
    return [*found[:n], *unusable]


def check_drawable(dataset: Any, name: str) -> None:
    """Refuse datasets that cannot be read by index without consuming them, and empty ones."""
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise PromptError(
            f"{name}: a streaming dataset cannot be drawn from without consuming it, found {type(dataset).__name__}; "
            "set interp prompts.source: named and prompts.path"
        )
    if len(dataset) == 0:
        raise PromptError(f"{name}: expected at least one row, found an empty dataset")


def _lines(path: Path) -> Sequence[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise PromptError(f"{path}: expected UTF-8 text, found binary data") from None


def _named_row(path: Path, number: int, line: str, tokenizer: Any, max_length: int) -> tuple[RowTexts, ...]:
    place = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{place}: not valid JSON ({error.msg})") from None
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
