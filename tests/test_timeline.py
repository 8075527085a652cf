"""The timeline: chained lines, segments, repair."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
from stored_runs import row

from interp_rlhf.audit import timeline
from interp_rlhf.errors import FormatError, InterpError, MeasurementError
from interp_rlhf.measurement import COLUMNS


@pytest.fixture
def path(tmp_path):
    return tmp_path / "timeline.jsonl"


def test_rows_and_events_come_back(path):
    writer = timeline.TimelineWriter(path)
    assert writer.begin_segment(None, {"file": "run.json"}) == 1
    writer.append([row(1, 0), row(1, 0, 2.5)])
    writer.event("refused", readout="x", reason="line one\nline two é")
    rows, events = timeline.read_timeline(path)
    assert [{k: r[k] for k in COLUMNS} for r in rows] == [row(1, 0).as_row(), row(1, 0, 2.5).as_row()]
    assert [event["event"] for event in events] == ["segment", "refused"]
    assert events[1]["reason"] == "line one\nline two é" and not any(r["superseded"] for r in rows)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_an_empty_append_writes_nothing(path):
    timeline.TimelineWriter(path).append([])
    assert not path.exists()


@pytest.mark.parametrize("field", ["value", "ci_low", "ci_high", "null_low", "null_high", "p"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float32("nan"), "0.5"])
def test_what_is_not_finite_is_refused_and_nothing_is_written(path, field, bad):
    writer = timeline.TimelineWriter(path)
    writer.append([row(1, 0)])
    before = path.read_bytes()
    if bad == "0.5":
        bad = "half"
    with pytest.raises(MeasurementError, match=f"^concept/drift/honesty/layers.1.resid_post: {field}: [^\n]+$"):
        writer.append([row(1, 5), dataclasses.replace(row(1, 5), **{field: bad})])
    assert path.read_bytes() == before
    with pytest.raises(FormatError):
        writer.event("note", text="x", value=math.nan)
    assert path.read_bytes() == before


def test_a_value_must_be_there(path):
    with pytest.raises(MeasurementError, match="value"):
        timeline.TimelineWriter(path).append([dataclasses.replace(row(1, 0), value=None)])


def test_numpy_scalars_become_numbers(path):
    measured = dataclasses.replace(row(1, 0), value=np.float32(0.5), n=np.int64(8), step=np.int32(3))
    timeline.TimelineWriter(path).append([measured])
    assert timeline.read_timeline(path)[0][0]["value"] == 0.5


def test_steps_are_whole_numbers_that_tables_can_hold(path):
    writer = timeline.TimelineWriter(path)
    writer.append([row(1, 2**53 - 1)])
    with pytest.raises(FormatError, match=r"^measurement: step: found a number of 100 bits, expected at most 53$"):
        writer.append([row(1, 10**30)])
    rows, _ = timeline.read_timeline(path)
    assert [r["step"] for r in rows] == [2**53 - 1] == list(timeline.to_frame(rows)["step"])


def _superseded(path, starts):
    """``starts``: (resumed_from, parent, steps of rows) per segment."""
    writer = timeline.TimelineWriter(path)
    for resumed_from, parent, steps in starts:
        segment = writer.begin_segment(resumed_from, {}, parent=parent)
        writer.append([row(segment, step) for step in steps])
    return {(r["segment"], r["step"]) for r in timeline.read_timeline(path)[0] if r["superseded"]}


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([(None, None, (0, 50, 100)), (50, None, (60, 70))], {(1, 100)}),
        ([(None, None, (0, 50)), (None, None, (0, 50))], {(1, 0), (1, 50)}),
        ([(None, None, (0, 50)), (0, None, (0,))], {(1, 0), (1, 50)}),
        ([(None, None, (0, 100)), (50, None, (60, 90)), (80, None, (90,))], {(1, 100), (2, 90)}),
        ([(None, None, (0, 100)), (50, None, (60, 90)), (20, None, (30,))], {(1, 100), (2, 60), (2, 90)}),
        ([(None, None, (0, 60, 100)), (50, None, (60, 70)), (100, 1, (110,))], {(2, 60), (2, 70)}),
        ([(None, None, (0, 10)), (None, None, (0, 10)), (10, None, (20,))], {(1, 0), (1, 10)}),
        ([(100, None, (100, 110))], set()),
    ],
)
def test_superseded(path, starts, expected):
    assert _superseded(path, starts) == expected


def test_a_torn_last_line_is_left_out_by_readers_and_kept_aside_by_the_next_writer(path):
    writer = timeline.TimelineWriter(path)
    writer.append([row(1, 0), row(1, 5)])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        for old in path.parent.iterdir():
            old.unlink()
        path.write_bytes(whole[:cut])
        assert len(timeline.read_timeline(path)[0]) == 1
        repaired = timeline.TimelineWriter(path)
        torn = path.parent / "timeline.torn-1"
        assert torn.exists() == (cut > first) and (cut == first or torn.read_bytes() == whole[first:cut])
        repaired.append([row(1, 6)])
        rows, events = timeline.read_timeline(path)
        assert [r["step"] for r in rows] == [0, 6] and len(events) == (cut > first)
        if events:
            assert events[0]["file"] == "timeline.torn-1"


def test_two_torn_lines_are_both_kept(path):
    timeline.TimelineWriter(path).append([row(1, 0)])
    for _ in range(2):
        path.write_bytes(path.read_bytes() + b'{"half')
        timeline.TimelineWriter(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["timeline.jsonl", "timeline.torn-1", "timeline.torn-2"]
    assert len(timeline.read_timeline(path)[1]) == 2


def test_damage_in_the_middle_names_the_line_and_stops_the_writer(path):
    writer = timeline.TimelineWriter(path)
    writer.append([row(1, step) for step in range(4)])
    good = path.read_bytes()
    lines = good.splitlines(keepends=True)
    damaged = {
        "changed": [lines[0], lines[1].replace(b"0.5", b"0.6"), *lines[2:]],
        "lost": [lines[0], *lines[2:]],
        "doubled": [lines[0], lines[0], *lines[1:]],
        "swapped": [lines[0], lines[2], lines[1], lines[3]],
        "foreign": [lines[0], b"hello\n", *lines[1:]],
        "empty": [lines[0], b"\n", *lines[1:]],
    }
    for parts in damaged.values():
        path.write_bytes(b"".join(parts))
        with pytest.raises(FormatError, match=r"timeline\.jsonl, line 2: [^\n]+$"):
            timeline.read_timeline(path)
        with pytest.raises(FormatError, match="line 2"):
            timeline.TimelineWriter(path)
        assert path.read_bytes() == b"".join(parts)


def test_a_row_of_another_version_is_refused(path):
    line, _ = timeline._seal_line({"metric": "x", "step": 1}, timeline.GENESIS)
    path.write_bytes(line)
    with pytest.raises(FormatError, match=r"line 1: .*another version"):
        timeline.read_timeline(path)


def test_a_second_writer_is_noticed(path):
    first, second = timeline.TimelineWriter(path), timeline.TimelineWriter(path)
    first.append([row(1, 0)])
    with pytest.raises(FormatError, match="another process"):
        second.append([row(1, 0)])
    assert len(timeline.read_timeline(path)[0]) == 1


def test_a_failed_write_leaves_whole_lines(path, monkeypatch):
    writer = timeline.TimelineWriter(path)
    writer.append([row(1, 0)])
    before = path.read_bytes()
    path.chmod(0o444)
    real = open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def fileno(self):
            return self.file.fileno()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", lambda *a, **k: Full(real(*a, **k)))
    with pytest.raises(InterpError, match="No space left"):
        writer.append([row(1, 5)])
    monkeypatch.undo()
    assert path.read_bytes() == before
    path.chmod(0o644)
    writer.append([row(1, 6)])
    assert [r["step"] for r in timeline.read_timeline(path)[0]] == [0, 6]


def test_prefix_is_the_hash_of_the_bytes(path):
    timeline.TimelineWriter(path).append([row(1, 0)])
    for _ in range(2):
        current = timeline.TimelineWriter(path)
        current.event("note", text="x")
        data = path.read_bytes()
        prefix = current.prefix()
        assert prefix["sha256"] == hashlib.sha256(data).hexdigest() and prefix["bytes"] == len(data)
        assert prefix["lines"] == data.count(b"\n") and prefix["chain"].encode() in data.splitlines()[-1]


def test_the_table_has_the_columns_even_without_rows():
    assert list(timeline.to_frame([]).columns) == [*COLUMNS, "superseded"]
    frame = timeline.to_frame([{**row(1, 0).as_row(), "superseded": True}])
    assert frame["superseded"].tolist() == [True] and frame["p"].isna().all() and frame["value"].dtype == "float64"


def test_forged_segment_events_are_refused():
    for event in ({"segment": "1"}, {"segment": 1, "resumed_from": 1.5}, {}):
        with pytest.raises(FormatError, match="segment event"):
            timeline.segments_of([{"event": "segment", **event}])
    with pytest.raises(FormatError, match="after 2"):
        timeline.segments_of([{"event": "segment", "segment": 2}, {"event": "segment", "segment": 1}])
