"""Checks a run on disk against every hash it recorded: what changed, what is missing, what does not belong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from interp_rlhf.audit.layout import (
    SNAPSHOTS,
    TEXTS,
    TIMELINE,
    checkpoint_folders,
    find_run,
    parse_run_file_name,
    read_run_file,
)
from interp_rlhf.audit.sealing import is_leftover, safe_name, safe_relative, sha256_bytes, sha256_file
from interp_rlhf.audit.snapshots import MANIFEST, ROWS, TENSORS, Snapshot, describe, holds, parse_name
from interp_rlhf.audit.timeline import GENESIS, Scan, live_limits, scan_timeline, segments_of
from interp_rlhf.audit.weights import COPY, weight_hashes
from interp_rlhf.errors import FormatError

Severity = Literal["ok", "note", "warning", "failure"]

_FREE = ("report.html",)
_PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked.

    Attributes:
        severity: ``ok``; ``note`` (cannot be checked any more, as expected); ``warning`` (a writer was killed);
            ``failure`` (other bytes than were recorded).
        file: path relative to the output folder.
        found: what is there.
        expected: what should be.
    """

    severity: Severity
    file: str
    found: str
    expected: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What :func:`verify_run` found.

    Attributes:
        path: the ``interp`` folder.
        findings: everything checked, in order.
        head: chain value of the timeline's last line; it covers everything recorded so far. Note it down elsewhere
            (a tracker row, a signed message) and hand it to :func:`verify_run` later: only then is a cut-off end found.
        anchored: a noted head was given and is part of this chain.
    """

    path: Path
    findings: tuple[Finding, ...]
    head: str
    anchored: bool

    @property
    def ok(self) -> bool:
        """Nothing failed (notes and warnings may be there)."""
        return not any(finding.severity == "failure" for finding in self.findings)

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Failures and warnings."""
        return tuple(finding for finding in self.findings if finding.severity in ("failure", "warning"))


def verify_run(path: str | Path, *, head: str | None = None) -> Verification:
    """Check a run in an output folder (or its ``interp`` folder) against everything it recorded.

    Any changed byte of any file under ``interp`` (but ``report.html``) gives a failure. What nobody can see from the
    folder alone: that its newest part was cut off, all of it. For that, pass a ``head`` noted earlier.

    Raises:
        FormatError: there is no run at ``path``.
    """
    folder = find_run(path)
    data = (folder / TIMELINE).read_bytes()
    scan = scan_timeline(data, TIMELINE)
    events = [record for record in scan.records if "event" in record]
    snapshots, damaged = _load(folder)
    findings = [
        *_check_tree(folder, events),
        *_check_timeline(scan, data),
        *_check_declared(folder, events),
        *_check_run_files(folder, events),
        *damaged,
    ]
    for snapshot in snapshots:
        findings += _check_snapshot(snapshot, snapshots, data, folder)
    findings += _check_checkpoints(folder.parent, snapshots, events)
    findings += _check_texts(folder.parent, events)
    anchored = head is not None and head in (GENESIS, *scan.chains)
    if head is not None and not anchored:
        findings.append(
            _failure(f"interp/{TIMELINE}", "a chain without the noted head", f"{head} in it: cut or rewritten")
        )
    return Verification(folder, tuple(findings), scan.head, anchored)


def render(verification: Verification) -> str:
    """The result as text for the console: problems and notes one per line, counts, the head and what it is for."""
    counts = {level: sum(f.severity == level for f in verification.findings) for level in ("ok", "note", "warning")}
    failures = sum(finding.severity == "failure" for finding in verification.findings)
    lines = [
        f"{finding.severity:<8} {finding.file}: found {finding.found}; expected {finding.expected}"
        for finding in verification.findings
        if finding.severity != "ok"
    ]
    verdict = "verified" if verification.ok else "FAILED"
    lines.append(
        f"{verdict}: {verification.path}: checks passed: {counts['ok']}, notes: {counts['note']}, "
        f"warnings: {counts['warning']}, failures: {failures}"
    )
    lines.append(f"head     {verification.head}")
    lines.append(
        "The noted head is part of this chain: nothing up to it was removed."
        if verification.anchored
        else "Removing the newest snapshot together with the end of the timeline cannot be detected from the folder "
        "alone: note the head elsewhere and verify against it later."
    )
    return "\n".join(lines)


def _failure(file: str, found: str, expected: str) -> Finding:
    return Finding("failure", file, found, expected)


def _ok(file: str, what: str) -> Finding:
    return Finding("ok", file, what, what)


def _compare(file: str, found: str, expected: Any) -> Finding:
    if found == expected:
        return _ok(file, f"SHA-256 {found}")
    return _failure(file, f"SHA-256 {found[:16]}…", f"{str(expected)[:16]}…")


def _load(folder: Path) -> tuple[tuple[Snapshot, ...], list[Finding]]:
    """Snapshots that can be read, and a failure for each that cannot."""
    parent = folder / SNAPSHOTS
    names = [path.name for path in parent.iterdir()] if parent.is_dir() and not parent.is_symlink() else []
    snapshots, damaged = [], []
    for _, name in sorted((key, name) for name in names if (key := parse_name(name))):
        try:
            snapshots.append(Snapshot.load(parent / name))
        except FormatError as error:
            damaged.append(_failure(f"interp/{SNAPSHOTS}/{name}/{MANIFEST}", str(error), "the manifest as written"))
    return tuple(snapshots), damaged


def _check_tree(folder: Path, events: Iterable[Mapping[str, Any]]) -> Iterator[Finding]:
    """No file that does not belong, no symbolic link, no pickle."""
    told = {event.get("file") for event in events}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        file = f"interp/{ascii(name)[1:-1]}"
        if any(is_leftover(part) for part in name.split("/")):
            if is_leftover(path.name):
                yield Finding("warning", file, "what a killed writer left", "no such file; the next start removes it")
        elif path.is_symlink():
            yield _failure(file, "a symbolic link", "a plain file or folder")
        elif name in _FREE:
            continue
        elif not _belongs(name, path.is_dir()):
            yield _failure(file, "a file that does not belong here", "only files of the run")
        elif not path.is_dir() and not path.is_file():
            yield _failure(file, "a special file", "a plain file or folder")
        elif path.is_file() and _looks_like_pickle(path):
            yield _failure(file, "a pickle", "no pickle anywhere, whatever its name")
        elif name.startswith("timeline.torn-") and name not in told:
            yield Finding("warning", file, "lines cut off that no event tells of", "an event; the next start adds it")


def _belongs(name: str, is_folder: bool) -> bool:
    parts = name.split("/")
    if len(parts) == 1:
        torn = name.removeprefix("timeline.torn-")
        plain = name == TIMELINE or parse_run_file_name(name) is not None or (torn != name and torn.isdecimal())
        return name == SNAPSHOTS if is_folder else plain
    inside = parts[0] == SNAPSHOTS and parse_name(parts[1]) is not None
    if len(parts) == 2:
        return inside and is_folder
    return inside and not is_folder and len(parts) == 3 and parts[2] in (MANIFEST, TENSORS, ROWS)


def _looks_like_pickle(path: Path) -> bool:
    """By its suffix, or by its first bytes: pickle protocol 2 and up, or a zip archive (``torch.save``)."""
    with open(path, "rb") as file:
        start = file.read(4)
    protocol = len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[2:4] != b"\0\0"
    return path.suffix in _PICKLE_SUFFIXES or protocol or start == b"PK\x03\x04"


def _check_timeline(scan: Scan, data: bytes) -> Iterator[Finding]:
    file = f"interp/{TIMELINE}"
    if scan.damage is not None:
        yield _failure(file, scan.damage, "lines that follow from one another")
        return
    if scan.torn:
        whole = scan_timeline(data[:-1] + b"\n", TIMELINE), scan_timeline(data + b"\n", TIMELINE)
        if any(other.damage is None for other in whole):
            yield _failure(file, "a last line whose line end was changed", "a line end")
        else:
            found = f"a torn last line of {len(scan.torn)} bytes: its writer was killed"
            yield Finding("warning", file, found, "whole lines; the next start repairs it")
    yield _ok(file, f"{len(scan.records)} lines that follow from one another")
    try:
        segments_of(record for record in scan.records if "event" in record)
    except FormatError as error:
        yield _failure(file, str(error), "segments in order")


def _check_declared(folder: Path, events: Iterable[Mapping[str, Any]]) -> Iterator[Finding]:
    """Every file that an event seals is there, unchanged."""
    for event in events:
        if event.get("file") is None:
            continue
        name = str(event["file"])
        file = f"interp/{ascii(name)[1:-1][:80]}"
        try:
            yield _compare(file, sha256_file(folder / safe_relative(name)), event.get("sha256"))
        except FormatError as error:
            yield _failure(file, str(error), f"the file the timeline tells of ({event['event']})")


def _check_run_files(folder: Path, events: Iterable[Mapping[str, Any]]) -> Iterator[Finding]:
    told = {event.get("file") for event in events}
    for path in sorted(folder.glob("run*.json")):
        file = f"interp/{path.name}"
        segment = parse_run_file_name(path.name)
        if segment is None:
            continue
        try:
            found = read_run_file(path)["segment"]
        except FormatError as error:
            yield _failure(file, str(error), "the run file as written")
            continue
        if found != segment:
            yield _failure(file, f"the run file of segment {found}", f"segment {segment}")
        elif path.name not in told:
            yield Finding("warning", file, "a run file no event tells of", "an event; its writer was killed")


def _check_snapshot(snapshot: Snapshot, all_: tuple[Snapshot, ...], timeline: bytes, folder: Path) -> Iterator[Finding]:
    file = f"interp/{SNAPSHOTS}/{snapshot.name}"
    yield from _check_payloads(snapshot, snapshot.path, file, pruned=_pruned(all_))
    parent = next((other for other in all_ if other.name == snapshot.parent), None)
    if snapshot.parent is None:
        yield _ok(file, "the first of its chain")
    elif parent is None:
        yield _failure(file, f"no readable parent {snapshot.parent}", "an unbroken chain")
    else:
        yield _compare(f"interp/{SNAPSHOTS}/{parent.name}/{MANIFEST}", parent.digest, snapshot.parent_hash)
    prefix = snapshot.manifest["timeline"]
    found = sha256_bytes(timeline[: prefix["bytes"]])
    if len(timeline) < prefix["bytes"]:
        yield _failure(f"interp/{TIMELINE}", f"{len(timeline)} bytes", f"at least {prefix['bytes']} ({snapshot.name})")
    else:
        yield _compare(f"interp/{TIMELINE}", found, prefix["sha256"])
    run = snapshot.manifest["run"]
    try:
        yield _compare(f"interp/{run['name']}", sha256_file(folder / run["name"]), run["sha256"])
    except FormatError as error:
        yield _failure(f"interp/{run['name']}", str(error), "the run file this snapshot names")


def _pruned(snapshots: Iterable[Snapshot]) -> frozenset[str]:
    return frozenset(name for snapshot in snapshots for name in snapshot.manifest["pruned"])


def _check_payloads(snapshot: Snapshot, place: Path, file: str, *, pruned: frozenset[str]) -> Iterator[Finding]:
    """Bytes and tensors of a snapshot's files at ``place`` (its folder or a copy)."""
    here = Snapshot(place, snapshot.segment, snapshot.step, None, None, snapshot.digest, snapshot.manifest)
    for name in snapshot.manifest["files"]:
        if name == TENSORS and snapshot.name in pruned and not (place / TENSORS).exists():
            expected = "none: removed by retention, as a later snapshot declares"
            yield Finding("note", f"{file}/{name}", "no tensors", expected)
            continue
        try:
            here.payload(name)
            yield _ok(f"{file}/{name}", "the bytes as written")
            if name == TENSORS:
                found = {key: describe(array) for key, array in here.arrays().items()}
                wrong = sorted(set(found) ^ set(snapshot.manifest["tensors"])) or [
                    key for key, value in found.items() if value != snapshot.manifest["tensors"][key]
                ]
                changed = _failure(f"{file}/{name}", f"another tensor {wrong[0]!a}", MANIFEST) if wrong else None
                yield changed or _ok(file, "tensors")
        except FormatError as error:
            yield _failure(f"{file}/{name}", str(error), "the file as written")


def _check_checkpoints(
    output: Path, snapshots: Iterable[Snapshot], events: Iterable[Mapping[str, Any]]
) -> Iterator[Finding]:
    """Weights beside the run equal those recorded by the newest snapshot of that checkpoint; so does the copy there."""
    try:
        limits = live_limits(segments_of(events))
    except FormatError:
        limits = {}
    owners: dict[str, list[Snapshot]] = {}
    for snapshot in snapshots:
        if snapshot.checkpoint is not None:
            owners.setdefault(snapshot.checkpoint, []).append(snapshot)
    for folder, (*earlier, snapshot) in owners.items():
        for other in earlier:
            text = "weights that a later run wrote over"
            yield Finding("note", folder, text, f"those of {other.name}, which cannot be checked any more")
        checkpoint = output / safe_name(folder)
        if not checkpoint.is_dir():
            expected = f"the weights of {snapshot.name}, not checkable now"
            yield Finding("note", folder, "no folder: rotated away", expected)
            continue
        live = snapshot.step <= limits.get(snapshot.segment, -1)
        yield from _check_weights(checkpoint, snapshot, "failure" if live else "warning")
        yield from _check_copy(checkpoint, snapshot, earlier)
    for checkpoint in checkpoint_folders(output):
        if checkpoint.name not in owners and (checkpoint / COPY).is_dir():
            yield _check_stranger(checkpoint, snapshots)


def _check_stranger(checkpoint: Path, snapshots: Iterable[Snapshot]) -> Finding:
    """A copy of a snapshot that is not here: of another run, or one that was cut off this one."""
    file, expected = f"{checkpoint.name}/{COPY}", "a copy of a snapshot of this run"
    try:
        found = Snapshot.load(checkpoint / COPY)
    except FormatError as error:
        return Finding("warning", file, str(error), expected)
    if any(snapshot.digest == found.parent_hash for snapshot in snapshots):
        return _failure(file, f"{found.name}, which follows {found.parent} and was removed here", expected)
    return Finding("warning", file, f"{found.name} of another run", expected)


def _check_weights(checkpoint: Path, snapshot: Snapshot, severity: Severity) -> Iterator[Finding]:
    """Abandoned checkpoints warn only: a later run that was killed early may have written over them."""
    expected = snapshot.manifest["checkpoint"]["weights"]
    try:
        found = weight_hashes(checkpoint)
    except FormatError as error:
        yield Finding(severity, checkpoint.name, str(error), f"the weights of {snapshot.name}")
        return
    for name in sorted({*found, *expected}):
        file = f"{checkpoint.name}/{ascii(name)[1:-1]}"
        if name not in found or name not in expected:
            there = "a weight file" if name in found else "no file"
            yield Finding(severity, file, there, f"what {snapshot.name} recorded")
        else:
            result = _compare(file, found[name]["sha256"], expected[name]["sha256"])
            yield result if result.severity == "ok" else Finding(severity, file, result.found, result.expected)


def _check_copy(checkpoint: Path, snapshot: Snapshot, earlier: Iterable[Snapshot]) -> Iterator[Finding]:
    """The copy beside the weights; one of an earlier run where the later one was killed before it made its own."""
    copy, file = checkpoint / COPY, f"{checkpoint.name}/{COPY}"
    if copy.is_symlink() or any(path.is_symlink() for path in copy.glob("*")):
        yield _failure(file, "a symbolic link", "a plain copy of the snapshot")
    elif not copy.is_dir():
        yield Finding("warning", file, "no copy of the snapshot", f"a copy of {snapshot.name}; the next start makes it")
    else:
        stale = next((other for other in earlier if holds(copy, other)), None)
        if stale is not None:
            found, expected = f"the copy of {stale.name}", f"a copy of {snapshot.name}; the next start makes it"
            yield Finding("warning", file, found, expected)
            snapshot = stale
        names = {path.name for path in copy.iterdir()}
        for name in sorted(names - {MANIFEST, *snapshot.manifest["files"]}):
            yield _failure(f"{file}/{ascii(name)[1:-1]}", "a file that does not belong here", "a copy of the snapshot")
        try:
            yield _compare(f"{file}/{MANIFEST}", sha256_file(copy / MANIFEST), snapshot.digest)
        except FormatError as error:
            yield _failure(f"{file}/{MANIFEST}", str(error), "the snapshot's manifest")
        yield from _check_payloads(snapshot, copy, file, pruned=frozenset())


def _check_texts(output: Path, events: Iterable[Mapping[str, Any]]) -> Iterator[Finding]:
    """Texts, where they are kept, are those the run recorded."""
    for event in events:
        if event["event"] != "texts":
            continue
        file = f"{TEXTS}/{ascii(str(event.get('texts')))[1:-1][:80]}"
        try:
            place = output / TEXTS / safe_name(event["texts"])
            if place.exists():
                yield _compare(file, sha256_file(place), event.get("sha256"))
            else:
                yield Finding("note", file, "no file: texts are not published with a run", "texts, not checkable now")
        except (FormatError, KeyError) as error:
            yield _failure(file, str(error), "the texts as written")
