"""One pair of a task: what it must be, and how it is read from a line of a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from interp_rlhf.activations.rows import encode_exchange
from interp_rlhf.errors import PromptError

MetricName = Literal["logit_diff", "kl", "margin", "probe"]

#: What a pair needs for a metric, besides its prompts.
NEEDS: Mapping[MetricName, tuple[str, ...]] = {
    "logit_diff": ("answers", "wrong"),
    "margin": ("chosen", "rejected"),
    "kl": (),
    "probe": (),
}


@dataclass(frozen=True, slots=True)
class TaskPair:
    """A clean and a corrupt prompt of as many tokens, and what is asked for after them. All in token ids.

    Attributes:
        id: unique in its task; :meth:`of` derives it from the content.
        clean, corrupt: the prompts.
        answers, wrong: tokens that may and may not follow the clean prompt, for ``logit_diff``.
        chosen, rejected: completions, for ``margin``.

    Raises:
        PromptError: an empty prompt, prompts of different length or without a difference, negative ids, a token that
            is both answer and wrong, completions without a difference.
    """

    id: str
    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answers: tuple[int, ...] = ()
    wrong: tuple[int, ...] = ()
    chosen: tuple[int, ...] = ()
    rejected: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise PromptError(f"pair {self.id}: {problem}")

    @classmethod
    def of(cls, clean: Sequence[int], corrupt: Sequence[int], **more: Sequence[int]) -> Self:
        """A pair whose id is a hash of its content, 16 hex digits; ``more`` are the other fields."""
        content = {"clean": clean, "corrupt": corrupt, **more}
        tokens = {name: tuple(ids) for name, ids in content.items()}
        text = "|".join(f"{name}={','.join(map(str, tokens[name]))}" for name in sorted(tokens) if tokens[name])
        return cls(hashlib.sha256(text.encode()).hexdigest()[:16], **tokens)

    @property
    def content(self) -> tuple[tuple[int, ...], ...]:
        """Everything but the id."""
        return self.clean, self.corrupt, self.answers, self.wrong, self.chosen, self.rejected

    @property
    def length(self) -> int:
        """Tokens of the longest text that the model reads, completion included."""
        return len(self.clean) + max(len(self.chosen), len(self.rejected))

    def _problem(self) -> str:
        if not self.clean or not self.corrupt:
            return "expected a clean and a corrupt prompt, found an empty one"
        if len(self.clean) != len(self.corrupt):
            lengths = f"{len(self.clean)} (clean) and {len(self.corrupt)} (corrupt) tokens"
            return f"expected clean and corrupt prompts of equal length, found {lengths}"
        if self.clean == self.corrupt:
            return "expected clean and corrupt prompts to differ, found the same tokens"
        if any(token < 0 for ids in self.content for token in ids):
            return "expected token ids of 0 or more, found a negative one"
        both = sorted(set(self.answers) & set(self.wrong))
        if both:
            return f"expected answers and wrong to have no token in common, found {', '.join(map(str, both))} in both"
        if self.chosen and self.chosen == self.rejected:
            return "expected chosen and rejected to differ, found the same tokens"
        return ""


def read_pairs(path: Path, tokenizer: Any, metric: MetricName | None = None) -> tuple[MetricName, list[TaskPair]]:
    """The pairs of a JSONL file, one a line, blank lines skipped.

    Args:
        tokenizer: for texts; ``None`` is fine where prompts are token ids.
        metric: what the pairs are for; ``None`` tells it from the fields of the first: ``margin`` with ``chosen``,
            ``logit_diff`` with ``answers``, else ``kl``.

    Raises:
        PromptError: a missing or damaged file, or a line that is no pair of the task; names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not valid UTF-8 ({error.reason})") from None
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append((f"{path}: line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise PromptError(f"{path}: line {number}: not valid JSON ({error.msg})") from None
    if metric is None:
        first = rows[0][1] if rows and isinstance(rows[0][1], dict) else {}
        metric = "margin" if "chosen" in first else "logit_diff" if {"answer", "answers"} & first.keys() else "kl"
    return metric, _pairs(rows, tokenizer, metric)


def task_pairs(path: Path, given: Any, tokenizer: Any, metric: MetricName) -> list[TaskPair]:
    """The pairs written under ``pairs`` in a YAML file. Raises PromptError; it names file and pair, counted from 1."""
    if not isinstance(given, list):
        raise PromptError(f"{path}: pairs: expected a list, or the path of a .jsonl file, found {given!r:.40}")
    rows = [(f"{path}: pair {number}", row) for number, row in enumerate(given, start=1)]
    return _pairs(rows, tokenizer, metric)


def _pairs(rows: Iterable[tuple[str, Any]], tokenizer: Any, metric: MetricName) -> list[TaskPair]:
    size = 2**63 if tokenizer is None else 1 + max(tokenizer.get_vocab().values())
    found = []
    for place, row in rows:
        try:
            fields = _fields(row, metric)
            tokens = _token_fields(fields) or _encoded(fields, tokenizer)
            largest = max((token for ids in tokens.values() for token in ids), default=0)
            if largest >= size:
                raise PromptError(f"expected token ids below {size}, the tokenizer's size, found {largest}")
            found.append(TaskPair.of(**tokens))
        except PromptError as error:
            raise PromptError(f"{place}: {error}") from None
    return found


def _fields(row: Any, metric: MetricName) -> dict[str, Any]:
    """The fields of a pair, ``answer`` under its other name; no more and no less than the metric needs."""
    if not isinstance(row, Mapping):
        raise PromptError(f"expected a mapping with clean and corrupt, found {row!r:.40}")
    fields = {"answers" if key == "answer" and "answers" not in row else str(key): row[key] for key in row}
    expected = ("clean", "corrupt", *NEEDS[metric])
    if set(fields) != set(expected):
        found = ", ".join(sorted(map(str, row))) or "none"
        raise PromptError(f"expected the fields {', '.join(expected)} of metric {metric!r}, found {found}")
    return fields


def _token_fields(fields: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """The fields of a pair in token ids; ``None`` where its prompts are texts."""
    if not all(_is_ids(fields[name]) for name in ("clean", "corrupt")):
        return None
    tokens = {name: [value] if type(value) is int else value for name, value in fields.items()}
    for name, value in tokens.items():
        if not _is_ids(value):
            raise PromptError(f"{name}: expected token ids like clean, found {value!r:.40}")
    return tokens


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _encoded(fields: Mapping[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Texts, or lists of chat messages, as tokens."""
    for name in ("clean", "corrupt"):
        _check_prompt(name, fields[name])
    if tokenizer is None:
        raise PromptError("expected prompts in token ids where there is no tokenizer, found texts")
    if "chosen" in fields:
        return _with_completions(fields, tokenizer)
    tokens = {name: _prompt(tokenizer, fields[name]) for name in ("clean", "corrupt")}
    for name in ("answers", "wrong"):
        if name in fields:
            given = fields[name] if isinstance(fields[name], list) else [fields[name]]
            tokens[name] = [_single(tokenizer, fields["clean"], name, text) for text in given]
    return tokens


def _check_prompt(name: str, value: Any) -> None:
    turns = value if isinstance(value, list) else []
    chat = turns and all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns)
    if not chat and not (isinstance(value, str) and value):
        raise PromptError(f"{name}: expected a text, chat messages or token ids, found {value!r:.40}")


def _prompt(tokenizer: Any, value: Any) -> list[int]:
    tokens, end = encode_exchange(tokenizer, value, None)[0], tokenizer.eos_token_id
    if isinstance(value, str) and tokens[-1:] == [end] and not value.endswith(tokenizer.eos_token):
        raise PromptError("expected a tokenizer that leaves texts open, found one that ends them: write token ids")
    return tokens


def _single(tokenizer: Any, prompt: Any, name: str, text: Any) -> int:
    """The one token of an answer: as it continues a text, alone after chat messages."""
    if not isinstance(text, str):
        raise PromptError(f"{name}: expected a text like clean, in quotes, found {text!r:.40}")
    if isinstance(prompt, str):
        tokens = encode_exchange(tokenizer, prompt, text)[1]
    else:
        tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
        found = tokenizer.convert_ids_to_tokens(tokens)
        raise PromptError(f"{name}: expected a single token that the tokenizer knows, found {text!r} as {found}")
    return tokens[0]


def _with_completions(fields: Mapping[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Prompts that end where the completions begin; a chat template may add something between the two."""
    for name in ("chosen", "rejected"):
        if not isinstance(fields[name], str) or not fields[name]:
            raise PromptError(f"{name}: expected a text like clean, found {fields[name]!r:.40}")
    _prompt(tokenizer, fields["clean"])
    clean, chosen = encode_exchange(tokenizer, fields["clean"], fields["chosen"])
    again, rejected = encode_exchange(tokenizer, fields["clean"], fields["rejected"])
    corrupt, _ = encode_exchange(tokenizer, fields["corrupt"], fields["chosen"])
    if clean != again:
        raise PromptError("clean: expected the same tokens before chosen and before rejected, found others")
    return {"clean": clean, "corrupt": corrupt, "chosen": chosen, "rejected": rejected}
