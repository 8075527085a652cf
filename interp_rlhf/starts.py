"""θ_0, the start that checkpoints are compared with: from the files of an attached run, or read from a base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from interp_rlhf.activations.json_lines import json_lines
from interp_rlhf.activations.reference import find_frozen
from interp_rlhf.audit.layout import FOLDER, RESERVED, TEXTS, read_run_file, run_file_name
from interp_rlhf.audit.sealing import sha256_file
from interp_rlhf.audit.snapshots import MANIFEST, Snapshot
from interp_rlhf.audit.store import Run, load_run
from interp_rlhf.audit.texts import read_texts
from interp_rlhf.audit.timeline import live_limits
from interp_rlhf.audit.weights import COPY
from interp_rlhf.baseline import FIRST, LOG_PROBS, TEXT_IDS, Baseline, fit_baseline, stored_readings
from interp_rlhf.checkpoints import Precision, load_checkpoint, load_tokenizer, model_folder, short_name
from interp_rlhf.component_drift import ComponentStart, component_rows, read_changes, start_components
from interp_rlhf.config import InterpConfig
from interp_rlhf.distributed import World
from interp_rlhf.errors import ConfigError, FormatError, HookpointError, MeasurementError, PromptError
from interp_rlhf.measurement import Measurement
from interp_rlhf.measuring import drift_rows, start_rows
from interp_rlhf.mechanisms import MechanismStart
from interp_rlhf.offline_circuits import circuit_rows, circuits_of, read_mechanisms, stored_mechanisms
from interp_rlhf.plan import Plan, Refusal, TextTable, make_plan
from interp_rlhf.provenance import run_info, tokenizer_hash
from interp_rlhf.reading import Reading, read_table
from interp_rlhf.rollouts import measure_rollouts, rollout_rows, stored_rollouts
from interp_rlhf.stored_plan import load_plan

Place = str | Path
#: Prefix of the readings in snapshots after step 0.
MEANS = "means/"


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """θ_0 as checkpoints are compared with it.

    Attributes:
        name: what was read as the start, for messages.
        step: optimizer steps done there, usually 0.
        segment: segment of the run that rows belong to; 1 without a run.
        config: the settings of the statistics and of reading.
        plan: everything that was planned.
        table: the texts of ``first`` and ``again``.
        first, again: two readings of θ_0.
        baseline: fitted on them.
        info: what a run file says about them.
        tokenizer: θ_0's tokenizer; ``None`` where only its hash is known.
        precision: in which checkpoints are loaded.
        wrote: what the start of the run wrote, lines and tensors; ``None`` where nothing was sampled.
        mechanisms: of the tasks whose circuits are followed.
        components: what θ_0's readings are made of, or the tensors that a run has kept of it; ``None``: not known.
        unsplit: why drift is not split among components; empty where there is nothing to say.
    """

    name: str
    step: int
    segment: int
    config: InterpConfig
    plan: Plan
    table: TextTable
    first: Reading
    again: Reading
    baseline: Baseline
    info: Mapping[str, Any]
    tokenizer: Any = None
    precision: Precision = torch.float32
    wrote: tuple[Sequence[Mapping[str, Any]], Mapping[str, torch.Tensor]] | None = None
    mechanisms: tuple[MechanismStart, ...] = ()
    components: ComponentStart | Mapping[str, torch.Tensor] | None = None
    unsplit: str = ""

    @property
    def events(self) -> list[dict[str, Any]]:
        """What was asked for and refused, as timeline events."""
        more = [Refusal("components", "", self.unsplit)] if self.unsplit else []
        return [{"event": "refused", **asdict(refusal)} for refusal in (*self.baseline.refused, *more)]

    def rows(self, segment: int | None = None) -> tuple[Measurement, ...]:
        """Rows of the start itself: the same weights read twice."""
        segment = segment or self.segment
        readings = [mechanism.reading for mechanism in self.mechanisms]
        circuits = circuit_rows(self.mechanisms, readings, self.config, segment, self.step)
        return (*start_rows(self.baseline, self.config, segment, self.step), *circuits)

    def compare(self, reading: Reading, step: int, segment: int | None = None) -> tuple[Measurement, ...]:
        """Rows of a reading of the weights at ``step``, without cost."""
        return drift_rows(self.baseline, reading, self.config, segment or self.segment, step)


def is_run(place: Place) -> bool:
    """Whether a folder is an attached run's output folder, or the ``interp`` folder inside."""
    return any((folder / "run.json").is_file() for folder in (Path(place), Path(place) / FOLDER))


def own_run(checkpoint: Place) -> Path | None:
    """The output folder of the attached run that a checkpoint lies in; ``None`` where there is none."""
    folder = Path(checkpoint).resolve()
    return next((place for place in (folder, folder.parent) if (place / FOLDER / "run.json").is_file()), None)


def start_of_run(run: Place, checkpoint: Path | None = None) -> Start:
    """θ_0 of an attached run, from its files: the plan, and the two readings of its first snapshot.

    Args:
        run: the output folder, or the ``interp`` folder inside.
        checkpoint: which of its checkpoints will be compared; the newest start's line where left out.

    Raises:
        ConfigError: the plan is not there (uploads to the hub leave it out).
        FormatError: something of the run is damaged.
    """
    stored = load_run(run)
    segment = _segment(stored, checkpoint)
    begin = first_snapshot(stored, segment)
    file = stored.path / run_file_name(segment)
    info = {key: value for key, value in read_run_file(file).items() if key not in RESERVED}
    config = InterpConfig.from_mapping(info["config"], where=str(file))
    plan = _stored_plan(stored, begin.segment)
    if plan.audit.hash != info["prompts"]["sha256"]:
        raise FormatError(f"{file}: prompts: found a plan of other audit texts, expected those of the run")
    table = plan.table(fit=True, bank=True)
    tensors = begin.tensors()
    first, again = stored_readings(tensors, plan, table)
    lines = read_texts(stored.path.parent, stored.events, "completions")
    return Start(
        name=stored.path.parent.name,
        step=begin.step,
        segment=segment,
        config=config,
        plan=plan,
        table=table,
        first=first,
        again=again,
        baseline=fit_baseline(plan, table, first, again, config),
        info=MappingProxyType(info),
        precision="auto",  # as they were trained
        wrote=(lines, tensors) if lines else None,
        mechanisms=stored_mechanisms(tensors, stored.events, plan, config, str(stored.path)),
        components={name: value for name, value in tensors.items() if name.startswith("components/")} or None,
    )


def start_of_model(base: Place, *, config: Any, data: Place | None, like: Start | None = None) -> Start:
    """θ_0 read from a base model, twice.

    Args:
        base: folder of the model.
        config: settings as for ``attach``.
        data: JSON lines that audit texts and preference pairs are drawn from.
        like: take texts and settings from this start instead of ``config`` and ``data``.

    Raises:
        InterpError: the folder, a setting or a text is wrong; no texts were given.
    """
    folder = model_folder(base)
    settings = InterpConfig.resolve(config) if like is None else like.config
    model, tokenizer = load_checkpoint(folder), load_tokenizer(folder)
    if like is not None:
        _check_tokenizer(like, folder, tokenizer)
        plan = like.baseline.plan
    else:
        plan = _plan_of(settings, data, model, tokenizer)
    table = plan.table(fit=True, bank=True)
    first = read_table(model, table, plan, settings, World())
    again = read_table(model, table, plan, settings, World(), side="left", longest_first=False)
    baseline = fit_baseline(plan, table, first, again, settings)
    components, unsplit = _components(model, baseline, settings)
    return Start(
        name=short_name(base),
        step=0,
        segment=1,
        config=settings,
        plan=plan,
        table=table,
        first=first,
        again=again,
        baseline=baseline,
        info=MappingProxyType(run_info(settings, plan, model, tokenizer, "", World())),
        tokenizer=tokenizer,
        mechanisms=read_mechanisms(model, plan, settings),
        components=components,
        unsplit=unsplit,
    )


def _components(
    model: torch.nn.Module, baseline: Baseline, settings: InterpConfig
) -> tuple[ComponentStart | None, str]:
    """What the readings are made of, or why that cannot be told."""
    if settings.components is False:
        return None, ""
    try:
        return start_components(model, baseline, settings), ""
    except (HookpointError, MeasurementError) as error:  # told among what was refused
        return None, str(error)


def _plan_of(settings: InterpConfig, data: Place | None, model: torch.nn.Module, tokenizer: Any) -> Plan:
    """The plan of a run on a file's rows."""
    source = settings.prompts.source
    if data is None and source != "named":
        raise ConfigError("data: expected JSON lines of prompts or pairs, or prompts.source: named; found neither")
    rows = None if data is None else read_rows(data)
    train, evaluation = (None, rows) if source == "evaluation" else (rows, None)
    try:
        plan = make_plan(settings, model, tokenizer, train_dataset=train, eval_dataset=evaluation)
    except PromptError as error:
        raise PromptError(f"{data}: {error}" if data is not None else str(error)) from None
    return plan if data is None or source == "named" else replace(plan, audit=replace(plan.audit, name=Path(data).name))


def read_rows(path: Place) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, blank lines skipped.

    Raises:
        PromptError: missing, empty or damaged; names file and line.
    """
    rows = []
    for place, row in json_lines(path):
        if not isinstance(row, dict):
            raise PromptError(f"{place}: expected an object, found {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise PromptError(f"{path}: expected at least one prompt, found an empty file")
    return rows


def first_snapshot(run: Run, segment: int | None = None) -> Snapshot:
    """The snapshot of θ_0 on the line of runs that led to a segment (the newest by default).

    Raises:
        FormatError: there is none.
    """
    on_line = [snapshot for snapshot in _on_line(run, segment) if snapshot.parent is None]
    if not on_line:
        raise FormatError(f"{run.path}: no snapshot of the start, so nothing to compare with")
    return on_line[0]


def last_snapshot(run: Run) -> Snapshot:
    """The newest snapshot of the weights that a run ended with.

    Raises:
        FormatError: there is none.
    """
    return max((first_snapshot(run), *_on_line(run, None)), key=lambda snapshot: (snapshot.step, snapshot.segment))


def _on_line(run: Run, segment: int | None) -> list[Snapshot]:
    limits = live_limits(run.segments, last=segment)
    return [snapshot for snapshot in run.snapshots if snapshot.step <= limits.get(snapshot.segment, -1)]


def stored_reading(snapshot: Snapshot, table: TextTable, hookpoints: Sequence[str], prefix: str) -> Reading:
    """What a snapshot keeps of the texts of ``table``.

    Args:
        hookpoints: where.
        prefix: ``start/`` for a step-0 snapshot, ``means/`` for a later one.

    Raises:
        FormatError: damaged, removed by the retention setting, or without one of the texts or hookpoints.
    """
    tensors = snapshot.tensors()
    absent = [name for name in hookpoints if prefix + name not in tensors]
    if absent or TEXT_IDS not in tensors:
        raise FormatError(f"{snapshot.path}: no readings of {prefix}{absent[0] if absent else TEXT_IDS}")
    place = {text: row for row, text in enumerate(tensors[TEXT_IDS].tolist())}
    rows = [place[text] for text in table.ids.tolist() if text in place]
    if len(rows) < len(table.prompts):
        raise FormatError(f"{snapshot.path}: readings of {len(rows)} of {len(table.prompts)} texts found")
    means = {name: tensors[prefix + name][rows] for name in hookpoints}
    return Reading(means, tensors[LOG_PROBS if prefix == FIRST else "log_probs"][rows], 0, 0.0)


def _segment(run: Run, checkpoint: Path | None) -> int:
    """The segment that wrote a checkpoint, by the snapshot beside its weights; else the newest."""
    copy = None if checkpoint is None else checkpoint / COPY
    if copy is not None and (copy / MANIFEST).is_file():
        snapshot = Snapshot.load(copy)
        if any(known.digest == snapshot.digest for known in run.snapshots):
            return snapshot.segment
    return run.segments[-1].number


def _stored_plan(run: Run, segment: int) -> Plan:
    name = f"{segment:02d}-plan.jsonl"
    path = run.path.parent / TEXTS / name
    if not path.is_file():
        raise ConfigError(
            f"{path}: not there (uploads to the hub leave out {TEXTS}/), expected the folder that the trainer wrote; "
            "without it give base and data"
        )
    told = [event.get("sha256") for event in run.events if event["event"] == "texts" and event.get("texts") == name]
    if told and sha256_file(path) not in told:
        raise FormatError(f"{path}: found other bytes than the timeline tells of")
    return load_plan(path)


# ------------------------------------------------------------------------------------------------------ the checkpoint


def load_for(start: Start, checkpoint: Place, *, base: Place | None = None) -> torch.nn.Module:
    """A checkpoint's model, in the precision of the start.

    Args:
        base: the base that an adapter is put on, instead of the one that it names.

    Raises:
        ConfigError: another tokenizer than the start's, or no model there.
    """
    folder = model_folder(checkpoint)
    _check_tokenizer(start, folder, load_tokenizer(folder))
    return load_checkpoint(folder, dtype=start.precision, base=base)


def read_model(start: Start, model: torch.nn.Module) -> Reading:
    """Read a model on the start's texts."""
    return read_table(model, start.baseline.table, start.baseline.plan, start.config, World())


def rollout_rows_of(start: Start, model: torch.nn.Module, step: int, segment: int) -> tuple[Measurement, ...]:
    """``shift/*`` rows as a live run writes them, where the run has kept what its start wrote; else none.

    Readings under θ_0 need an adapter that can be switched off: nothing else of it is in a checkpoint.
    """
    if start.wrote is None:
        return ()
    lines, tensors = start.wrote
    began = stored_rollouts(lines, tensors, model, start.plan, start.config)
    found = measure_rollouts(began, model, find_frozen(model, None), start.plan, start.config, World())
    return rollout_rows(began, found, start.baseline, start.config, segment, step)


def circuit_rows_of(start: Start, model: torch.nn.Module, step: int, segment: int) -> tuple[Measurement, ...]:
    """``circuit/*`` rows as a live run writes them, without cost; none where no circuits are followed."""
    readings = circuits_of(start.mechanisms, model, start.plan, start.config)
    return circuit_rows(start.mechanisms, readings, start.config, segment, step)


def component_rows_of(start: Start, model: torch.nn.Module, step: int, segment: int) -> tuple[Measurement, ...]:
    """``component/*`` rows as a live run writes them at a save; none where the start was not split."""
    begun, baseline, config = start.components, start.baseline, start.config
    if isinstance(begun, Mapping):
        begun = start_components(model, baseline, config, begun)
    if begun is None:
        return ()
    return component_rows(begun, read_changes(model, begun, baseline, config), baseline, config, segment, step)


def _check_tokenizer(start: Start, folder: Path, tokenizer: Any) -> None:
    """The plan's texts are token ids: under another tokenizer they would be other texts."""
    found, expected = tokenizer_hash(tokenizer), start.info["tokenizer_sha256"]
    if None not in (found, expected) and found != expected:
        raise ConfigError(
            f"{folder}: tokenizer: found {str(found)[:12]}…, expected {expected[:12]}…, that of {start.name}; under "
            "another tokenizer the same token ids are other texts"
        )
