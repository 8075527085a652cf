"""records.py: what a line may hold, whatever its chain value says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from stored_runs import row

from interp_rlhf.audit.records import EVENT_FIELDS, check_record
from interp_rlhf.errors import FormatError

ROW = row(1, 0).as_row()
EVENTS: dict[str, dict[str, Any]] = {
    kind: {"event": kind, **dict.fromkeys(fields, "x"), **({"step": 3} if kind == "failure" else {})}
    for kind, fields in EVENT_FIELDS.items()
}


@pytest.mark.parametrize("record", [ROW, *EVENTS.values(), {"event": "other", "number": 1}])
def test_what_the_writer_writes_is_fine(record: dict[str, Any]) -> None:
    check_record(record)


@pytest.mark.parametrize("field", ROW)
@pytest.mark.parametrize("value", [[], {}, [[]], float("nan"), float("-inf"), 10**400, 2**70, object], ids=str)
def test_no_field_of_a_measurement_takes_something_else(field: str, value: Any) -> None:
    bad = {**ROW, field: value} if value is not object else {k: v for k, v in ROW.items() if k != field}
    with pytest.raises(FormatError, match=r"^[^\n]+$"):
        check_record(bad)


@pytest.mark.parametrize(("field", "value"), [("value", None), ("value", "1"), ("n", 1.5), ("source", "elsewhere")])
def test_types_are_strict(field: str, value: Any) -> None:
    with pytest.raises(FormatError, match=rf"^measurement: {field}: found {re.escape(ascii(value))}; [^\n]+$"):
        check_record({**ROW, field: value})


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind, fields in EVENT_FIELDS.items() for field in fields]
)
def test_events_have_the_fields_their_readers_rely_on(kind: str, field: str) -> None:
    without = {name: value for name, value in EVENTS[kind].items() if name != field}
    with pytest.raises(FormatError, match=rf"^{kind} event: {field}: found nothing, expected text$"):
        check_record(without)
    with pytest.raises(FormatError, match=rf"^{kind} event: {field}: found \[\], expected text$"):
        check_record({**without, field: []})


@pytest.mark.parametrize("event", [{"event": 5}, {"event": None}, {"event": "x", "file": {}}, {}, {"value": 1.0}])
def test_foreign_lines(event: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"^[^\n]+$"):
        check_record(event)
