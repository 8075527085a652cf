"""Texts with a yes/no label each: what a probe is tried on in the training's own domain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from interp_rlhf.activations.json_lines import json_lines
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.activations.rows import row_texts
from interp_rlhf.errors import PromptError


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    """Texts and their labels, one sampling unit each.

    Attributes:
        name: the concept that the label speaks of.
        prompts: ``N`` different texts.
        labels: ``N`` booleans; both occur, twice at least.
    """

    name: str
    prompts: tuple[Prompt, ...]
    labels: tuple[bool, ...]

    @classmethod
    def from_jsonl(cls, path: str | Path, tokenizer: Any, *, name: str, max_length: int) -> Self:
        """Read JSON lines with a text (columns as in ``docs/formats.md``, Prompts) and a ``label``, true or false.

        Raises:
            PromptError: an unreadable file or line, a text with both labels, fewer than 2 texts of a class; names file
                and line.
        """
        found: dict[str, tuple[Prompt, bool]] = {}
        for place, row in json_lines(path):
            prompt, label = _labelled(row, place, tokenizer, max_length)
            if found.setdefault(prompt.id, (prompt, label))[1] != label:
                raise PromptError(f"{place}: expected one label per text, found both for the same text")
        labels = tuple(label for _, label in found.values())
        true = sum(labels)
        if min(true, len(labels) - true) < 2:
            counts = f"{true} true, {len(labels) - true} false"
            raise PromptError(f"{path}: expected labels of both classes, found {counts}; 2 of each are needed")
        return cls(name, tuple(prompt for prompt, _ in found.values()), labels)


def _labelled(row: Any, place: str, tokenizer: Any, max_length: int) -> tuple[Prompt, bool]:
    label = row.pop("label", None) if isinstance(row, dict) else None
    if not isinstance(label, bool):
        raise PromptError(f"{place}: expected an object with a label, true or false, found label {label!r}")
    try:
        texts = row_texts(row, tokenizer, max_length=max_length)
    except (PromptError, TypeError, ValueError, KeyError) as error:
        raise PromptError(f"{place}: {error}") from None
    if len(texts) != 1 or len(texts[0].prompts) != 1:
        raise PromptError(f"{place}: expected one text of at least 2 and a prompt below {max_length} tokens")
    return texts[0].prompts[0], label
