"""Concept packs: JSONL files of contrast pairs, rendered for the model's own tokenizer and split by topic."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from interp_rlhf.activations.prompts import ContrastPair
from interp_rlhf.activations.rows import row_texts
from interp_rlhf.errors import ConfigError, PromptError

_Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class PackPair:
    """One prompt with two answers that differ in the concept; ``group`` is its topic, never split between halves."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    group: _Text
    prompt: _Text
    positive: _Text
    negative: _Text


@dataclass(frozen=True, slots=True)
class Pack:
    """One concept as contrast pairs.

    Attributes:
        name: what its rows are called.
        description: what a positive answer does that a negative one does not.
        pairs: in the order of the file.
    """

    name: str
    description: str
    pairs: tuple[PackPair, ...]


@dataclass(frozen=True, slots=True)
class _Header:
    __pydantic_config__ = ConfigDict(extra="forbid")

    pack: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: _Text


def load_pack(name_or_path: str) -> Pack:
    """A packaged pack by name, or a JSONL pack file by its path (``docs/formats.md``).

    Raises:
        ConfigError: no packaged pack has this name; the message lists those that exist.
        PromptError: the file cannot be read or a line does not fit; names file and line.
    """
    if name_or_path.endswith(".jsonl") or "/" in name_or_path:
        path = Path(name_or_path)
        try:
            return _parse(path.read_text(encoding="utf-8"), name_or_path)
        except OSError as error:
            raise PromptError(f"{path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise PromptError(f"{path}: expected UTF-8 text, found binary data") from None
    folder = resources.files(__name__)
    names = sorted(entry.name.removesuffix(".jsonl") for entry in folder.iterdir() if entry.name.endswith(".jsonl"))
    if name_or_path not in names:
        raise ConfigError(f"concepts.packs: no packaged pack {name_or_path!r}; found {', '.join(names)}")
    return _parse((folder / f"{name_or_path}.jsonl").read_text(encoding="utf-8"), f"{name_or_path}.jsonl")


def render(pack: Pack, tokenizer: Any, max_length: int) -> tuple[ContrastPair, ...]:
    """Tokenize a pack: through the chat template where there is one, as plain lines of text otherwise.

    Pairs of which one side is longer than ``max_length`` tokens are left out, never cut.
    """
    chat = getattr(tokenizer, "chat_template", None) is not None
    found = []
    for pair in pack.pairs:
        prompt = [{"role": "user", "content": pair.prompt}] if chat else pair.prompt + "\n"
        row = {"prompt": prompt, "chosen": pair.positive, "rejected": pair.negative}
        for texts in row_texts(row, tokenizer, max_length=sys.maxsize):
            if texts.pair is not None and max(len(text.input_ids) for text in texts.prompts) <= max_length:
                found.append(replace(texts.pair, group=pair.group))
    return tuple(found)


def split(pairs: Sequence[ContrastPair], seed: int) -> tuple[tuple[ContrastPair, ...], tuple[ContrastPair, ...]]:
    """Two halves, whole groups in either: one to fit a direction on, one to read it on."""
    groups = sorted({pair.group for pair in pairs})
    fitted: set[str] = set()
    count = 0
    for index in np.random.default_rng(seed).permutation(len(groups)):
        size = sum(pair.group == groups[index] for pair in pairs)
        if count + size / 2 <= len(pairs) / 2:
            fitted.add(groups[index])
            count += size
    return tuple(p for p in pairs if p.group in fitted), tuple(p for p in pairs if p.group not in fitted)


def _parse(text: str, where: str) -> Pack:
    rows = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not rows:
        raise PromptError(f"{where}: expected a header line and contrast pairs, found an empty file")
    header = _line(_Header, *rows[0], where)
    pairs = tuple(_line(PackPair, number, line, where) for number, line in rows[1:])
    for (number, _), pair in zip(rows[1:], pairs, strict=True):
        if pair.positive == pair.negative:
            raise PromptError(f"{where}, line {number}: expected two different answers, found the same twice")
    _check_apart([(number, pair) for (number, _), pair in zip(rows[1:], pairs, strict=True)], where)
    return Pack(header.pack, header.description, pairs)


def _check_apart(pairs: Sequence[tuple[int, PackPair]], where: str) -> None:
    """A text that stands in two groups would be fitted on and read, and the readout would know the answer."""
    first: dict[tuple[str, str], tuple[int, str]] = {}
    for number, pair in pairs:
        for answer in (pair.positive, pair.negative):
            line, group = first.setdefault((pair.prompt, answer), (number, pair.group))
            if group != pair.group:
                raise PromptError(
                    f"{where}, line {number}: expected each text in one group, found that of line {line} (group "
                    f"{group!r}) again in group {pair.group!r}; both halves would hold it"
                )


def _line(cls: type, number: int, line: str, where: str) -> Any:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}, line {number}: not valid JSON ({error.msg})") from None
    if not isinstance(found, Mapping):
        raise PromptError(f"{where}, line {number}: expected an object, found {type(found).__name__}")
    try:
        return TypeAdapter(cls).validate_python(dict(found))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "the line"
        raise PromptError(f"{where}, line {number}: {place}: {problem['msg']}") from None
