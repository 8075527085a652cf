"""A run's plan as JSON lines: what a later reading of another checkpoint needs to read the very same texts.

The first line names the version, then comes each distinct text once, then one line per field of :class:`Plan`. Inside
a field a text is named by its id, tensors are float32 bytes as hex digits, sets are sorted lists, contrast pairs are
``[positive, negative, group]``, everything else is spelled field by field. The types of the dataclasses decide, so a
field that is added to the plan needs no line here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from interp_rlhf.activations.prompts import ContrastPair, Prompt
from interp_rlhf.errors import FormatError, InterpError
from interp_rlhf.plan import Plan

#: Version of the plan's lines; a reader refuses any other.
SCHEMA = 1
_TEXT = ("text", "input_ids", "completion_start", "unit")


def plan_lines(plan: Plan) -> Iterator[dict[str, Any]]:
    """The plan as JSON-ready objects, one a line; :func:`read_plan` gives it back, float32 vectors bit by bit."""
    texts: dict[Prompt, str] = {}
    fields = [
        {"field": part.name, "value": _plain(getattr(plan, part.name), texts, part.name)} for part in _fields(Plan)
    ]
    yield {"plan": SCHEMA}
    for prompt, name in texts.items():
        values = (name, list(prompt.input_ids), prompt.completion_start, prompt.unit)
        yield dict(zip(_TEXT, values, strict=True))
    yield from fields


def read_plan(lines: Iterable[Mapping[str, Any]], *, where: str = "plan") -> Plan:
    """The plan of :func:`plan_lines`.

    Args:
        lines: the objects, in order.
        where: what they were read from, for messages.

    Raises:
        FormatError: another version, a line of another kind, an unknown or missing field, a value of the wrong type;
            names ``where`` and the line.
    """
    texts: dict[str, Prompt] = {}
    found: dict[str, Any] = {}
    kinds = {part.name: _hints(Plan)[part.name] for part in _fields(Plan)}
    number = 0
    for number, line in enumerate(lines, start=1):
        try:
            if number == 1:
                _check_version(line)
            elif "text" in line:
                name, prompt = _read_text(line)
                texts[name] = prompt
            else:
                name, value = _read_field(line, kinds, found)
                found[name] = _typed(value, kinds[name], texts, name)
        except InterpError as error:
            raise FormatError(f"{where}, line {number}: {error}") from None
    absent = [part.name for part in _fields(Plan) if part.name not in found and not _has_default(part)]
    if absent:
        raise FormatError(f"{where}, line {number}: ends without the field {absent[0]!r}, expected a whole plan")
    return Plan(**found)


def load_plan(path: str | Path) -> Plan:
    """Read a plan file, ``_interp/NN-plan.jsonl`` of an output folder.

    Raises:
        FormatError: missing or damaged; names file and line.
    """
    path = Path(path)
    try:
        data = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from None
    return read_plan((_parsed(path, number, line) for number, line in enumerate(data, start=1)), where=str(path))


# ---------------------------------------------------------------------------------------------------------- writing


def _plain(value: Any, texts: dict[Prompt, str], place: str) -> Any:
    """A value as JSON has it; texts met on the way are collected with the names they go by."""
    if isinstance(value, Prompt):
        return _name_of(value, texts)
    if isinstance(value, ContrastPair):
        return [_name_of(value.positive, texts), _name_of(value.negative, texts), value.group]
    if isinstance(value, Tensor):
        array = value.detach().cpu().to(torch.float32).contiguous().numpy().astype("<f4")
        return {"shape": list(array.shape), "float32": array.tobytes().hex()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: getattr(value, part.name) for part in _fields(type(value))}
        return {name: _plain(part, texts, f"{place}.{name}") for name, part in parts.items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(part, texts, f"{place}.{key}") for key, part in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple | list):
        return [_plain(part, texts, place) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FormatError(f"plan: {place}: expected a value that JSON has, found {type(value).__name__}")


def _name_of(prompt: Prompt, texts: dict[Prompt, str]) -> str:
    """The text's id; where the same text was met as part of another sampling unit, the id and its unit."""
    if prompt not in texts:
        taken = set(texts.values())
        texts[prompt] = prompt.id if prompt.id not in taken else f"{prompt.id}/{prompt.unit}"
    return texts[prompt]


# ---------------------------------------------------------------------------------------------------------- reading


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        raise FormatError(f"{path}, line {number}: not valid JSON") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}, line {number}: expected an object, found {type(found).__name__}")
    return found


def _check_version(line: Mapping[str, Any]) -> None:
    if dict(line) != {"plan": SCHEMA}:
        raise FormatError(f"expected {{'plan': {SCHEMA}}}, found {str(dict(line))[:60]}")


def _read_text(line: Mapping[str, Any]) -> tuple[str, Prompt]:
    if set(line) != set(_TEXT):
        raise FormatError(f"expected the fields {', '.join(_TEXT)}, found {', '.join(sorted(line))[:80]}")
    name, ids, start, unit = (line[key] for key in _TEXT)
    numbers = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
    if not (numbers and isinstance(name, str) and isinstance(unit, str)):
        raise FormatError(f"text {str(name)[:40]!a}: expected token ids and a unit's name")
    if type(start) is not int or not 0 <= start <= len(ids):
        raise FormatError(f"text {name[:40]!a}: completion_start: expected 0 to {len(ids)}, found {str(start)[:20]}")
    prompt = Prompt(tuple(ids), start, unit)
    if name not in (prompt.id, f"{prompt.id}/{unit}"):
        raise FormatError(f"text {name[:40]!a}: its tokens have the id {prompt.id}")
    return name, prompt


def _read_field(line: Mapping[str, Any], kinds: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, Any]:
    if set(line) != {"field", "value"}:
        raise FormatError(f"expected a text, or field and value, found {', '.join(map(str, line))[:80]}")
    if line["field"] not in kinds:
        raise FormatError(f"field: expected one of {', '.join(kinds)}, found {str(line['field'])[:40]!a}")
    if line["field"] in found:
        raise FormatError(f"field {line['field']!r}: found twice")
    return line["field"], line["value"]


def _typed(value: Any, kind: Any, texts: Mapping[str, Prompt], place: str) -> Any:
    """The value of a type's spelling; refuses any other."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value if value in inner else _refuse(value, place, f"one of {', '.join(map(str, inner))}")
    if origin in (UnionType, Union):
        rest = [part for part in inner if part is not NoneType]
        return None if value is None and NoneType in inner else _typed(value, rest[0], texts, place)
    if origin in (tuple, frozenset):
        return _sequence(value, origin, inner, texts, place)
    if origin is not None and issubclass(origin, Mapping):
        _expect(value, dict, place)
        return {key: _typed(part, inner[1], texts, f"{place}.{key}") for key, part in value.items()}
    if kind is Prompt:
        return (
            texts[value] if isinstance(value, str) and value in texts else _refuse(value, place, "a text named above")
        )
    if kind is ContrastPair:
        return ContrastPair(*_sequence(value, tuple, (Prompt, Prompt, str), texts, place))
    if kind is Tensor:
        return _tensor(value, place)
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, kind, texts, place)
    _expect(value, kind, place)
    return value


def _sequence(value: Any, kind: Any, inner: tuple[Any, ...], texts: Mapping[str, Prompt], place: str) -> Any:
    _expect(value, list, place)
    if kind is tuple and inner[-1:] != (Ellipsis,):
        if len(value) != len(inner):
            _refuse(value, place, f"{len(inner)} values")
        return tuple(_typed(part, part_kind, texts, place) for part, part_kind in zip(value, inner, strict=True))
    return kind(_typed(part, inner[0], texts, f"{place}[{index}]") for index, part in enumerate(value))


def _dataclass(value: Any, kind: type, texts: Mapping[str, Prompt], place: str) -> Any:
    _expect(value, dict, place)
    parts, hints = _fields(kind), _hints(kind)
    unknown = set(value) - {part.name for part in parts}
    absent = [part.name for part in parts if part.name not in value and not _has_default(part)]
    if unknown or absent:
        _refuse(sorted(value), place, f"the fields {', '.join(part.name for part in parts)}")
    return kind(**{key: _typed(part, hints[key], texts, f"{place}.{key}") for key, part in value.items()})


def _tensor(value: Any, place: str) -> Tensor:
    _expect(value, dict, place)
    try:
        array = np.frombuffer(bytes.fromhex(value["float32"]), dtype="<f4").reshape(value["shape"])
    except (KeyError, TypeError, ValueError):
        _refuse(value, place, "the hex digits of a float32 tensor and its shape")
    return torch.from_numpy(array.astype(np.float32))


def _expect(value: Any, kind: type, place: str) -> None:
    if type(value) is not kind and not (kind is float and type(value) is int):
        _refuse(value, place, kind.__name__)


def _refuse(value: Any, place: str, expected: str) -> NoReturn:
    raise FormatError(f"{place}: expected {expected}, found {str(value)[:60]!a}")


def _fields(kind: type) -> list[dataclasses.Field[Any]]:
    return [part for part in dataclasses.fields(kind) if part.init]


def _has_default(part: dataclasses.Field[Any]) -> bool:
    return part.default is not dataclasses.MISSING or part.default_factory is not dataclasses.MISSING


def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
