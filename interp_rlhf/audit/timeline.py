"""The timeline: append-only JSON lines, each sealed to the one before, with segments for resumed runs."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_rlhf.audit.records import check_record
from interp_rlhf.audit.sealing import sha256_bytes, sync_folder, write_atomic
from interp_rlhf.errors import FormatError, InterpError, MeasurementError
from interp_rlhf.measurement import COLUMNS, Measurement

if TYPE_CHECKING:
    import pandas as pd

#: The chain value before the first line.
GENESIS = "0" * 64
_CHAIN = re.compile(rb',"chain":"([0-9a-f]{64})"}')
_CHAIN_LENGTH = 76
_TORN = re.compile(r"timeline\.torn-(\d+)")
_NUMBERS = ("value", "ci_low", "ci_high", "null_low", "null_high", "p")
_INTEGERS = ("segment", "step", "n")


@dataclass(frozen=True, slots=True)
class Segment:
    """One run of an output folder.

    Attributes:
        number: 1 for the first, larger for every later start.
        resumed_from: step of the checkpoint it went on from; ``None`` for a first start, 0 for a start from scratch.
        parent: the segment whose checkpoint that was; ``None`` where there was none.
        file: name of its run file (``run.json``, ``run-02.json`` …), ``None`` where the writer named none.
    """

    number: int
    resumed_from: int | None
    parent: int | None
    file: str | None


@dataclass(frozen=True, slots=True)
class Scan:
    """What a timeline's bytes hold.

    Attributes:
        records: parsed lines up to the first damage, without their chain values.
        ends: byte offset after each of those lines.
        chains: chain value of each of those lines.
        torn: bytes after the last line end.
        damage: one line naming the first damaged line, or ``None``.
    """

    records: tuple[dict[str, Any], ...]
    ends: tuple[int, ...]
    chains: tuple[str, ...]
    torn: bytes
    damage: str | None

    @property
    def head(self) -> str:
        """Chain value of the last good line: it covers every byte before it."""
        return self.chains[-1] if self.chains else GENESIS


def scan_timeline(data: bytes, where: str | Path) -> Scan:
    """Check every line of a timeline against the one before it; stops at the first damaged line."""
    *lines, torn = data.split(b"\n")
    records, ends, chains = [], [], []
    chain, end = GENESIS, 0
    for number, line in enumerate(lines, start=1):
        try:
            record, chain = _open_line(line, chain)
        except FormatError as error:
            return Scan(tuple(records), tuple(ends), tuple(chains), b"", f"{where}, line {number}: {error}")
        end += len(line) + 1
        records.append(record)
        ends.append(end)
        chains.append(chain)
    return Scan(tuple(records), tuple(ends), tuple(chains), torn, None)


def read_timeline(path: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measurement rows and events in the order they were written; a torn last line (a writer died) is left out.

    Every row gets ``superseded``: a later segment went on from before it, so the weights it describes were abandoned.

    Raises:
        FormatError: missing file, or damage before the last line; names file and line.
    """
    path = Path(path)
    scan = scan_timeline(_read(path), path)
    if scan.damage is not None:
        raise FormatError(scan.damage)
    rows = [record for record in scan.records if "event" not in record]
    events = [record for record in scan.records if "event" in record]
    limits = live_limits(segments_of(events))
    for row in rows:
        row["superseded"] = bool(limits) and row["step"] > limits.get(row["segment"], -1)
    return rows, events


def segments_of(events: Iterable[Mapping[str, Any]]) -> tuple[Segment, ...]:
    """The segments that events tell of, in order.

    Raises:
        FormatError: a segment event without its fields, or numbers that do not rise.
    """
    segments: list[Segment] = []
    for event in events:
        if event["event"] != "segment":
            continue
        fields = tuple(event.get(key) for key in ("segment", "resumed_from", "parent"))
        number, resumed_from, parent = fields
        if type(number) is not int or any(type(value) not in (int, type(None)) for value in fields):
            raise FormatError(f"segment event: found {str(fields)[:80]}, expected whole numbers")
        if segments and number <= segments[-1].number:
            raise FormatError(
                f"segment event: found number {number} after {segments[-1].number}, expected a larger one"
            )
        file = event.get("file")
        segments.append(Segment(number, resumed_from, parent, file if isinstance(file, str) else None))
    return tuple(segments)


def live_limits(segments: Sequence[Segment], *, last: int | None = None) -> dict[int, float]:
    """The line of runs that led to segment ``last`` (the newest by default): segment → its last step that counts.

    Segments that are not in the mapping were abandoned. The newest counts without end.

    >>> first, second = Segment(1, None, None, None), Segment(2, 50, 1, None)
    >>> live_limits([first, second])
    {2: inf, 1: 50}
    """
    by_number = {segment.number: segment for segment in segments}
    number = last if last is not None else max(by_number, default=None)
    limits: dict[int, float] = {}
    limit = math.inf
    while number is not None and number in by_number and number not in limits:
        limits[number] = limit
        segment = by_number[number]
        if not segment.resumed_from:
            break
        limit = min(limit, segment.resumed_from)
        number = segment.parent
    return limits


def live_events(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events of the line of runs that led to the newest segment; without segments, all of them.

    >>> begun = {"event": "segment", "segment": 1, "resumed_from": None, "parent": None}
    >>> again = {"event": "segment", "segment": 2, "resumed_from": 5, "parent": 1}
    >>> live_events([begun, {"event": "failure", "step": 4}, {"event": "failure", "step": 6}, again])[1:]
    [{'event': 'failure', 'step': 4}, {'event': 'segment', 'segment': 2, 'resumed_from': 5, 'parent': 1}]
    """
    limits, number, live = live_limits(segments_of(events)), None, []
    for event in events:
        number = event["segment"] if event["event"] == "segment" else number
        step = event.get("step", 0)
        if number is None or not isinstance(step, int | float) or step <= limits.get(number, -1):
            live.append(event)
    return live


def to_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a table with the columns of :class:`Measurement` and ``superseded``; ``None`` becomes NaN in numbers."""
    import pandas as pd

    frame = pd.DataFrame(list(rows), columns=[*COLUMNS, "superseded"])
    frame[list(_NUMBERS)] = frame[list(_NUMBERS)].astype("float64")
    frame["superseded"] = frame["superseded"].fillna(False).astype(bool)
    return frame


def row_of(measurement: Measurement) -> dict[str, Any]:
    """A measurement as plain JSON values in column order.

    Raises:
        MeasurementError: NaN, an infinity or no number where one is expected; names metric, hookpoint and field.
    """
    row = measurement.as_row()
    place = "/".join(str(row[key]) for key in ("metric", "readout", "hookpoint") if row[key])
    for key in (*_INTEGERS, *_NUMBERS):
        if row[key] is None and key in _NUMBERS and key != "value":
            continue
        try:
            row[key] = operator.index(row[key]) if key in _INTEGERS else float(row[key])
        except (TypeError, ValueError):
            raise MeasurementError(f"{place}: {key}: found {row[key]!r}, expected a number") from None
    for key in _NUMBERS:
        if row[key] is not None and not math.isfinite(row[key]):
            raise MeasurementError(f"{place}: {key}: found {row[key]}, expected a finite number (step {row['step']})")
    return row


class TimelineWriter:
    """Appends to one timeline. Every call is one write that is on disk when the call returns.

    Opening repairs what a killed writer left: a torn last line is cut off and kept as ``timeline.torn-<n>``, and an
    event says so. The folder must exist; the file appears with the first line.

    Raises:
        FormatError: damage before the last line; nothing is changed then.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        data = self.path.read_bytes() if self.path.exists() else b""
        scan = scan_timeline(data, self.path)
        if scan.damage is not None:
            raise FormatError(scan.damage)
        good = data[: len(data) - len(scan.torn)]
        self._digest = hashlib.sha256(good)
        self._size, self._lines, self._chain = len(good), len(scan.records), scan.head
        self.events: list[dict[str, Any]] = [record for record in scan.records if "event" in record]
        self._repair(scan.torn)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments begun so far."""
        return segments_of(self.events)

    def prefix(self) -> dict[str, Any]:
        """What a snapshot seals: ``bytes`` and ``lines`` written so far, their ``sha256``, the last ``chain`` value."""
        return {
            "bytes": self._size,
            "lines": self._lines,
            "sha256": self._digest.hexdigest(),
            "chain": self._chain,
        }

    def next_segment(self) -> int:
        """The number the next segment will get if nothing else is asked for."""
        return max((segment.number for segment in self.segments), default=0) + 1

    def begin_segment(
        self,
        resumed_from: int | None,
        info: Mapping[str, Any],
        *,
        number: int | None = None,
        parent: int | None = None,
    ) -> int:
        """Begin a segment and return its number.

        Args:
            resumed_from: step of the checkpoint that is gone on from; ``None`` or 0 for a start from scratch, which
                supersedes everything before it.
            info: further fields of the event.
            number: a larger number than the next one, where that is taken.
            parent: the segment the checkpoint is of; the one before by default.
        """
        earlier = self.segments
        number = self.next_segment() if number is None else number
        if resumed_from is None and earlier:
            resumed_from = 0
        if resumed_from and parent is None and earlier:
            parent = earlier[-1].number
        self.event("segment", **{**info, "segment": number, "resumed_from": resumed_from, "parent": parent})
        return number

    def append(self, rows: Iterable[Measurement]) -> None:
        """Append measurements, all in one write.

        Raises:
            MeasurementError: a value is not finite; nothing is written then.
        """
        self._write([row_of(row) for row in rows])

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event (``segment``, ``snapshot``, ``refused``, ``failure``, ``note`` …) with the time (UTC).

        Raises:
            FormatError: fields that JSON has no spelling for, or a field its readers rely on is missing.
        """
        record = {"event": kind, "time": datetime.now(UTC).isoformat(timespec="seconds"), **fields}
        self._write([record])
        self.events.append(json.loads(json.dumps(record)))

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        if not records:
            return
        chain, lines = self._chain, []
        for record in records:
            check_record(record)
            line, chain = _seal_line(record, chain)
            lines.append(line)
        data = b"".join(lines)
        self._append_bytes(data)
        self._digest.update(data)
        self._size, self._lines, self._chain = self._size + len(data), self._lines + len(lines), chain

    def _append_bytes(self, data: bytes) -> None:
        try:
            with open(self.path, "ab") as file:
                found = os.fstat(file.fileno()).st_size
                if found != self._size:
                    raise FormatError(
                        f"{self.path}: found {found} bytes, expected {self._size}: another process writes into this run"
                    )
                try:
                    file.write(data)
                    file.flush()
                except OSError:
                    os.ftruncate(file.fileno(), self._size)
                    raise
                os.fsync(file.fileno())
            if not self._size:
                sync_folder(self.path.parent)
        except OSError as error:
            raise InterpError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _repair(self, torn: bytes) -> None:
        if torn:
            taken = [int(match[1]) for match in map(_TORN.fullmatch, os.listdir(self.path.parent)) if match]
            write_atomic(self.path.parent / f"timeline.torn-{max(taken, default=0) + 1}", torn)
            os.truncate(self.path, self._size)
        told = {event.get("file") for event in self.events}
        for name in sorted(filter(_TORN.fullmatch, os.listdir(self.path.parent))):
            if name not in told:
                data = (self.path.parent / name).read_bytes()
                text = f"a torn last line of {len(data)} bytes was cut off and kept aside"
                self.event("note", text=text, file=name, sha256=sha256_bytes(data))


def _seal_line(record: Mapping[str, Any], previous: str) -> tuple[bytes, str]:
    """The line ``{…,"chain":"<sha256 of previous chain and the line without it>"}`` and its chain value."""
    if "chain" in record:
        raise FormatError("timeline: found a field named 'chain', which is reserved")
    try:
        body = json.dumps(record, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError) as error:
        raise FormatError(f"timeline: {record.get('event', record.get('metric'))}: {error}") from None
    chain = sha256_bytes(previous.encode() + body)
    return body[:-1] + f',"chain":"{chain}"}}\n'.encode(), chain


def _open_line(line: bytes, previous: str) -> tuple[dict[str, Any], str]:
    suffix = _CHAIN.fullmatch(line[-_CHAIN_LENGTH:])
    if suffix is None:
        raise FormatError("found no chain value at its end, expected a timeline line")
    body, chain = line[:-_CHAIN_LENGTH] + b"}", suffix[1].decode()
    if sha256_bytes(previous.encode() + body) != chain:
        raise FormatError("found a line that does not follow from the one before, expected an unchanged line")
    try:
        record = json.loads(body)
    except (ValueError, RecursionError):
        raise FormatError("found no JSON, expected a timeline line") from None
    if not isinstance(record, dict):
        raise FormatError(f"found {type(record).__name__}, expected a measurement or an event")
    check_record(record)
    return record, chain


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
