"""One run's folder: what the main process writes during training, and how a run is read afterwards."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from interp_rlhf.audit.layout import (
    FOLDER,
    RESERVED,
    SNAPSHOTS,
    TEXTS,
    TIMELINE,
    check_ours,
    checkpoint_folders,
    differences,
    find_run,
    parse_run_file_name,
    read_run_file,
    run_document,
    run_file_name,
)
from interp_rlhf.audit.sealing import (
    canonical_json,
    clean_leftovers,
    safe_name,
    sha256_bytes,
    sync_folder,
    unseal,
    write_atomic,
)
from interp_rlhf.audit.snapshots import (
    MANIFEST,
    TENSORS,
    Snapshot,
    copy_to_checkpoint,
    holds,
    parse_name,
    write_snapshot,
)
from interp_rlhf.audit.timeline import Segment, TimelineWriter, live_limits, read_timeline, segments_of, to_frame
from interp_rlhf.audit.weights import COPY, weight_hashes
from interp_rlhf.errors import FormatError, InterpError
from interp_rlhf.measurement import Measurement

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import Tensor


log = logging.getLogger("interp_rlhf")


class RunStore:
    """Writes ``output_dir/interp`` during training; used by the main process only.

    Nothing is written over: a later start opens a new segment beside the earlier ones.

    Example:
        store = RunStore("out")
        store.start({"config": …}, resumed_from=None)
        store.append(rows)
        store.snapshot(0, rows, {"start/layers.3.resid_post": means}, captured={}, cost={})
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir).absolute()  # a training script may change its folder later
        self.folder = self.output_dir / FOLDER
        self.segment = 0
        self.snapshots: list[Snapshot] = []
        self._writer: TimelineWriter | None = None
        self._run_file: dict[str, str] = {}

    @property
    def timeline_path(self) -> Path:
        """Where the timeline is."""
        return self.folder / TIMELINE

    @property
    def newest(self) -> Snapshot | None:
        """The newest snapshot of this segment."""
        mine = [snapshot for snapshot in self.snapshots if snapshot.segment == self.segment]
        return mine[-1] if mine else None

    def start(self, info: Mapping[str, Any], *, resumed_from: int | None) -> int:
        """Repair what a killed run left, open a segment, and return its number (1 in a new folder).

        Args:
            info: JSON-ready content of the run file (config, versions, hashes of prompts and model).
            resumed_from: optimizer steps of the checkpoint that is gone on from; ``None`` or 0 for a start from
                scratch.

        Raises:
            FormatError: the folder holds something else, or a damaged run; nothing is changed then.
        """
        check_ours(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.output_dir)
        writer = TimelineWriter(self.timeline_path)
        self.snapshots = list(_load_snapshots(self.folder / SNAPSHOTS))
        self._writer = writer
        self._remove_unfinished()
        self._announce_found()
        self._copy_missing()
        parent, remark = self._resumed_segment(resumed_from or 0)
        remarks = [*([remark] if remark else []), *(self._changes(info, parent) if resumed_from else ())]
        self.segment = max(self._known_segments(), default=0) + 1
        name = run_file_name(self.segment)
        document = run_document(info, self.segment, resumed_from)
        write_atomic(self.folder / name, document)
        self._run_file = {"name": name, "sha256": sha256_bytes(document)}
        writer.begin_segment(
            resumed_from,
            {"file": name, "sha256": self._run_file["sha256"]},
            number=self.segment,
            parent=parent,
        )
        (self.folder / SNAPSHOTS).mkdir(exist_ok=True)
        sync_folder(self.folder)
        for text in remarks:
            self.event("note", text=text)
            log.warning("%s", text)
        return self.segment

    def append(self, rows: Iterable[Measurement]) -> None:
        """Append measurements to the timeline; they are on disk when this returns.

        Raises:
            MeasurementError: a value is not finite.
            FormatError: a row of another segment.
        """
        writer, rows = self._started(), tuple(rows)
        self._check_segment(rows)
        writer.append(rows)

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event to the timeline: ``refused``, ``failure``, ``note`` (with ``text``) or another kind."""
        self._started().event(kind, **fields)

    def snapshot(
        self,
        step: int,
        rows: Iterable[Measurement],
        tensors: Mapping[str, Tensor | np.ndarray],
        *,
        checkpoint: str | Path | None = None,
        captured: Mapping[str, Any] | Sequence[Any] = (),
        cost: Mapping[str, Any] = MappingProxyType({}),
        keep: int | None = None,
    ) -> Snapshot:
        """Write the snapshot of ``step``, copy it into its checkpoint, then remove tensors that retention gives up.

        Args:
            step: optimizer steps done; larger than that of this segment's newest snapshot.
            rows: the step's measurements (append them to the timeline first, so that the snapshot seals them).
            tensors: by name, any shapes.
            checkpoint: the checkpoint folder with these weights; its weight files are hashed.
            captured: what was read, JSON-ready.
            cost: seconds, tokens …, JSON-ready.
            keep: keep the tensors of this many newest snapshots besides the first of each chain; ``None`` keeps all.

        Raises:
            FormatError: a snapshot of this or a later step exists, or a value has no place in the format.
        """
        writer, newest, rows = self._started(), self.newest, tuple(rows)
        self._check_segment(rows)
        if step < 0 or (newest is not None and step <= newest.step):
            found = f"after step {newest.step}" if newest is not None else "below 0"
            raise FormatError(
                f"{self.folder / SNAPSHOTS}: found a snapshot of step {step} {found}, expected a later one"
            )
        parent = newest or _newest_on_line(self.snapshots, writer.segments, self.segment)
        written = write_snapshot(
            self.folder / SNAPSHOTS,
            segment=self.segment,
            step=step,
            rows=rows,
            tensors=tensors,
            parent=parent,
            run=self._run_file,
            timeline=writer.prefix(),
            checkpoint=Path(checkpoint) if checkpoint is not None else None,
            captured=captured,
            cost=cost,
            pruned=self._to_prune(parent is None, keep),
        )
        self.snapshots.append(written)
        self._announce(written)
        if checkpoint is not None:
            copy_to_checkpoint(written, checkpoint)
        self._prune()
        return written

    def baseline(self) -> dict[str, Tensor] | None:
        """Tensors of the snapshot that the resumed line begins with; ``None`` where there is none.

        That is step 0, or the step from which a run went on that had not been measured before.

        Raises:
            FormatError: it is there but damaged.
        """
        limits = live_limits(self._started().segments)
        starts = (s for s in self.snapshots if s.parent is None and s.step <= limits.get(s.segment, -1))
        start = next(starts, None)
        return None if start is None else start.tensors()

    def texts(self, name: str, texts: Iterable[Mapping[str, Any]]) -> Path:
        """Write texts (one JSON object a line) to ``output_dir/_interp/``, which hub uploads leave out.

        Raises:
            FormatError: this segment has other texts of that name.
        """
        name = f"{self.segment:02d}-{safe_name(name)}.jsonl"
        writer, folder = self._started(), self.output_dir / TEXTS
        data = b"".join(canonical_json(dict(text)) + b"\n" for text in texts)
        folder.mkdir(exist_ok=True)
        sync_folder(self.output_dir)
        if (folder / name).exists():
            if (folder / name).read_bytes() != data:
                raise FormatError(f"{folder / name}: exists already with other texts, nothing is written over")
        else:
            write_atomic(folder / name, data)
            writer.event("texts", texts=name, sha256=sha256_bytes(data))
        return folder / name

    def _started(self) -> TimelineWriter:
        if self._writer is None:
            raise InterpError(f"{self.folder}: the run has not been started")
        return self._writer

    def _check_segment(self, rows: Sequence[Measurement]) -> None:
        wrong = next((row for row in rows if row.segment != self.segment), None)
        if wrong is not None:
            raise FormatError(f"{wrong.metric}: found a row of segment {wrong.segment}, expected {self.segment}")

    def _known_segments(self) -> list[int]:
        files = [number for path in self.folder.iterdir() if (number := parse_run_file_name(path.name))]
        return [*files, *(segment.number for segment in self._started().segments)]

    def _remove_unfinished(self) -> None:
        places = (self.folder, self.folder / SNAPSHOTS, self.output_dir / TEXTS, *checkpoint_folders(self.output_dir))
        removed = [name for place in places if place.is_dir() for name in clean_leftovers(place)]
        if removed:
            self.event("note", text=f"{len(removed)} unfinished files of a killed writer were removed")

    def _announce_found(self) -> None:
        """Seal into the timeline what a writer that died had finished but not told of, and finish its pruning."""
        told = {event.get("file") for event in self._started().events}
        for path in sorted(self.folder.iterdir()):
            if parse_run_file_name(path.name) and path.name not in told:
                data = path.read_bytes()
                unseal(data, path)
                text = f"{path.name} was written, but its run was killed before it began"
                self.event("note", text=text, file=path.name, sha256=sha256_bytes(data))
        for snapshot in self.snapshots:
            if _manifest_path(snapshot) not in told:
                self._announce(snapshot)
        self._prune()

    def _copy_missing(self) -> None:
        """Put snapshots beside their checkpoints where a writer that died had not done so yet."""
        for place in checkpoint_folders(self.output_dir):
            owners = [snapshot for snapshot in self.snapshots if snapshot.checkpoint == place.name]
            if not owners or not (owners[-1].path / TENSORS).exists():
                continue
            newest, there = owners[-1], os.path.lexists(place / COPY)
            if there and not any(holds(place / COPY, other) for other in owners[:-1]):
                continue
            try:
                if newest.manifest["checkpoint"]["weights"] != weight_hashes(place):
                    continue
                copy_to_checkpoint(newest, place)
                outcome = "has been made"
            except (FormatError, OSError) as error:  # the snapshot itself is where it belongs
                outcome = f"could not be made ({error})"
            self.event("note", text=f"{place.name}: the copy of {newest.name} was missing and {outcome}")

    def _announce(self, snapshot: Snapshot) -> None:
        fields = {"snapshot": snapshot.name, "step": snapshot.step}
        self.event("snapshot", **fields, file=_manifest_path(snapshot), sha256=snapshot.digest)

    def _to_prune(self, starts: bool, keep: int | None) -> list[str]:
        if keep is None:
            return []
        done = {name for snapshot in self.snapshots for name in snapshot.manifest["pruned"]}
        older = [snapshot for snapshot in self.snapshots if snapshot.parent and snapshot.name not in done]
        kept = keep if starts else keep - 1
        return [snapshot.name for snapshot in older[: max(len(older) - kept, 0)]]

    def _prune(self) -> None:
        for name in sorted({name for snapshot in self.snapshots for name in snapshot.manifest["pruned"]}):
            place = self.folder / SNAPSHOTS / name
            if (place / TENSORS).exists():
                (place / TENSORS).unlink()
                sync_folder(place)

    def _resumed_segment(self, step: int) -> tuple[int | None, str | None]:
        """Which segment wrote the checkpoint of ``step`` (``None``: the newest), and a remark for the timeline."""
        segments = self._started().segments
        if not step:
            return None, None
        if not segments:
            return None, f"resumed from step {step}, but this folder holds no earlier run: the start is unknown here"
        checkpoint = self.output_dir / f"checkpoint-{step}"
        if not (checkpoint / COPY / MANIFEST).exists():
            return None, f"resumed from step {step}: no snapshot beside that checkpoint, taken to be the newest run's"
        try:
            found = Snapshot.load(checkpoint / COPY)
        except FormatError as error:
            return None, f"resumed from step {step}: {error}"
        recorded = found.manifest["checkpoint"]
        if recorded is None or recorded["weights"] != weight_hashes(checkpoint):
            return None, f"resumed from step {step}: the weights of {checkpoint.name} are not those of its snapshot"
        known = any(snapshot.digest == found.digest for snapshot in self.snapshots)
        return (found.segment, None) if known else (None, f"resumed from step {step}: its snapshot is of another run")

    def _changes(self, info: Mapping[str, Any], parent: int | None) -> list[str]:
        """One line that names what is set otherwise than in the run that is gone on from."""
        earlier = [segment for segment in self._started().segments if parent in (None, segment.number)]
        if not earlier or earlier[-1].file is None:
            return []
        try:
            changed = differences(read_run_file(self.folder / earlier[-1].file), json.loads(canonical_json(dict(info))))
        except FormatError as error:
            return [f"resumed with settings that cannot be compared: {error}"]
        return [f"resumed with other settings than the run was started with: {'; '.join(changed)}"] if changed else []


@dataclass(frozen=True, eq=False)
class Run:
    """A finished or running run, as read from disk.

    Attributes:
        path: the ``interp`` folder.
        info: what the newest start recorded (config, versions, hashes of prompts and model).
        segments: every start of this folder, in order.
        events: timeline events, in order.
        snapshots: ordered by segment and step.
        checkpoint_folders: checkpoint folders that exist beside ``interp``, by step.
    """

    path: Path
    info: Mapping[str, Any]
    segments: tuple[Segment, ...]
    events: tuple[dict[str, Any], ...]
    snapshots: tuple[Snapshot, ...]
    checkpoint_folders: tuple[Path, ...]
    rows: tuple[dict[str, Any], ...] = field(repr=False)

    def timeline(self) -> pd.DataFrame:
        """Measurement rows as a table (columns of ``Measurement``) with ``superseded`` for abandoned weights."""
        return to_frame(self.rows)


def load_run(path: str | Path) -> Run:
    """Read a run from its output folder or the ``interp`` folder inside.

    Raises:
        FormatError: no run there, or a damaged one.
    """
    folder = find_run(path)
    rows, events = read_timeline(folder / TIMELINE)
    segments = segments_of(events)
    if not segments:
        raise FormatError(f"{folder / TIMELINE}: found no segment, expected a run that has begun")
    info = read_run_file(folder / run_file_name(segments[-1].number))
    return Run(
        path=folder,
        info=MappingProxyType({key: value for key, value in info.items() if key not in RESERVED}),
        segments=segments,
        events=tuple(events),
        snapshots=_load_snapshots(folder / SNAPSHOTS),
        checkpoint_folders=checkpoint_folders(folder.parent),
        rows=tuple(rows),
    )


def _load_snapshots(folder: Path) -> tuple[Snapshot, ...]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    ordered = sorted((key, name) for name in names if (key := parse_name(name)) is not None)
    return tuple(Snapshot.load(folder / name) for _, name in ordered)


def _newest_on_line(snapshots: Sequence[Snapshot], segments: Sequence[Segment], segment: int) -> Snapshot | None:
    """Where a segment's first snapshot hangs: the newest one on the line of runs that led to it."""
    limits = live_limits(segments, last=segment)
    on_line = [snapshot for snapshot in snapshots if snapshot.step <= limits.get(snapshot.segment, -1)]
    return max(on_line, key=lambda snapshot: (snapshot.step, snapshot.segment), default=None)


def _manifest_path(snapshot: Snapshot) -> str:
    return f"{SNAPSHOTS}/{snapshot.name}/{MANIFEST}"
