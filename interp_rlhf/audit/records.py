"""What a timeline line may hold: a measurement with its types, or an event with the fields its readers rely on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from interp_rlhf.errors import FormatError
from interp_rlhf.measurement import COLUMNS, Measurement

#: Text fields that an event of a kind has; other kinds and further fields are free.
EVENT_FIELDS: Mapping[str, tuple[str, ...]] = {
    "refused": ("readout", "reason"),
    "failure": ("what", "reason"),
    "note": ("text",),
    "texts": ("texts", "sha256"),
    "snapshot": ("snapshot", "file", "sha256"),
    "circuit": ("task",),
    "components": ("readout", "hookpoint"),
    "alarm": ("task", "word", "reason"),
}
#: Fields that are text wherever an event has them.
_TEXT = ("file", "sha256", "hookpoint")
_LARGEST = 2**53


def check_record(record: Mapping[str, Any]) -> None:
    """Refuse a line that is neither a measurement nor an event, or one whose fields have other types.

    Raises:
        FormatError: names the field, what was found and what was expected.
    """
    if "event" in record:
        _check_event(record)
    elif set(record) == set(COLUMNS):
        _check_measurement(record)
    else:
        raise FormatError("found neither an event nor the columns of a measurement: written by another version?")


def _check_event(event: Mapping[str, Any]) -> None:
    kind = event["event"]
    if not isinstance(kind, str):
        raise FormatError(f"event: found {ascii(kind)[:40]}, expected the kind of an event")
    wanted = EVENT_FIELDS.get(kind, ())
    for name in (*wanted, *(name for name in _TEXT if name in event)):
        if not isinstance(event.get(name), str):
            found = ascii(event[name])[:40] if name in event else "nothing"
            raise FormatError(f"{kind} event: {name}: found {found}, expected text")
    if kind == "failure" and type(event.get("step")) is not int:
        raise FormatError(f"failure event: step: found {ascii(event.get('step'))[:40]}, expected a whole number")


def _check_measurement(row: Mapping[str, Any]) -> None:
    large = next((name for name, x in row.items() if isinstance(x, int) and not -_LARGEST < x < _LARGEST), None)
    if large is not None:
        raise FormatError(
            f"measurement: {large}: found a number of {row[large].bit_length()} bits, expected at most 53"
        )
    infinite = next((name for name, x in row.items() if isinstance(x, float) and not math.isfinite(x)), None)
    if infinite is not None:
        raise FormatError(f"measurement: {infinite}: found {row[infinite]}, expected a finite number")
    try:
        _adapter().validate_json(json.dumps(dict(row)), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise FormatError(f"measurement: {place}: found {ascii(row.get(place))[:40]}; {problem['msg']}") from None


@cache
def _adapter() -> TypeAdapter[Measurement]:
    return TypeAdapter(Measurement)
