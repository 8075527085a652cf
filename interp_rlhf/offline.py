"""Measuring a checkpoint after the fact: the same texts, statistics and rows as in a live run.

Two ways to have the start θ_0 that a checkpoint is compared with:

* The checkpoint is of a run that was attached: the plan lies in ``_interp/``, the readings of θ_0 in its first
  snapshot. Rows equal those that the run itself wrote at that step, up to rounding.
* Nothing was attached: the base model is read as step 0, on texts drawn from a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_rlhf.activations.engines import unchanged_random_states
from interp_rlhf.audit.layout import FOLDER, check_folder
from interp_rlhf.audit.sealing import canonical_json, sha256_bytes
from interp_rlhf.audit.store import Run, RunStore, load_run
from interp_rlhf.audit.timeline import to_frame
from interp_rlhf.audit.weights import weight_hashes
from interp_rlhf.baseline import Baseline, baseline_tensors, direction_tensors, reading_tensors
from interp_rlhf.checkpoints import checkpoint_step, load_tokenizer, model_folder, names_its_base, short_name
from interp_rlhf.component_drift import ComponentStart, component_tensors
from interp_rlhf.errors import ConfigError
from interp_rlhf.measurement import Measurement
from interp_rlhf.measuring import cost_rows
from interp_rlhf.mechanism_rows import mechanism_tensors
from interp_rlhf.offline_circuits import circuit_events, circuit_rows, circuits_of
from interp_rlhf.reading import Reading
from interp_rlhf.report.controls import Controls, find_controls
from interp_rlhf.report.rows import current
from interp_rlhf.report.tables import COST, Summary, summarise
from interp_rlhf.starts import (
    Place,
    Start,
    component_rows_of,
    load_for,
    own_run,
    read_model,
    rollout_rows_of,
    start_of_model,
    start_of_run,
)
from interp_rlhf.stored_plan import plan_lines

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One checkpoint, measured.

    Attributes:
        name: the checkpoint's folder.
        step: optimizer steps done.
        start: what it was compared with.
        rows: its measurements, as a live run writes them, without cost.
        run: the run folder that was written, ``None`` where none was asked for.
        controls: the run's control runs, ``None`` where the checkpoint is of no run or of another step than theirs.
    """

    name: str
    step: int
    start: Start
    rows: tuple[Measurement, ...]
    run: Run | None = None
    controls: Controls | None = None

    def timeline(self) -> pd.DataFrame:
        """Rows of the start and of the checkpoint, with the columns of a run's timeline."""
        segment = self.rows[0].segment if self.rows else None
        return to_frame([row.as_row() | {"superseded": False} for row in (*self.start.rows(segment), *self.rows)])

    def summary(self) -> Summary:
        """What moved, what did not, what could not be measured."""
        return summary_of(self.timeline(), self.start, self.controls)


def summary_of(timeline: pd.DataFrame, start: Start, controls: Controls | None = None) -> Summary:
    """The summary of rows that were measured against ``start``, judged against ``controls``."""
    options = {"tolerance": start.config.statistics.tolerance, "confidence": start.config.statistics.confidence}
    return summarise(timeline, start.events, controls=controls, **options)


def measure(
    checkpoint: Place,
    *,
    run: Place | None = None,
    base: Place | None = None,
    config: Any = None,
    data: Place | None = None,
    out: Place | None = None,
    step: int | None = None,
) -> Measured:
    """Measure a checkpoint: against its own run's step 0, or against a base model where nothing was attached.

    Args:
        checkpoint: folder of a saved model or PEFT adapter.
        run: output folder of the attached run whose texts and step 0 it is compared with; found by itself where the
            checkpoint lies in one and no ``data`` is given.
        base: the model to compare with, read as step 0; an adapter whose own base is gone is put on it. With a run:
            only the base that an adapter is put on.
        config: settings as for ``attach`` (default preset ``observe``); a run brings its own.
        data: JSON lines of prompts or preference pairs (``docs/formats.md``), for a checkpoint without a run.
        out: a folder without a run to write a complete one into, for ``report``, ``verify`` and ``load_run``.
        step: the checkpoint's step, where neither ``trainer_state.json`` nor its name tells.

    Raises:
        InterpError: a folder, setting or text that is wrong or missing; another tokenizer than the start's.
    """
    folder = model_folder(checkpoint)
    found = own_run(folder) if run is None and data is None else run
    if out is not None:
        _check_new(Path(out))
    with unchanged_random_states():
        if found is not None:
            if config is not None or data is not None:
                raise ConfigError(f"{found}: a run brings its own settings and texts, found config or data beside it")
            start = start_of_run(found, folder)
        elif base is not None:
            start = start_of_model(base, config=config, data=data)
        else:
            raise ConfigError(
                f"{checkpoint}: lies in no attached run, expected run (its output folder) or base and data"
            )
        step = _step(folder, step, start, known=found is None)
        put_on = base if found is not None or not names_its_base(folder) else None
        model = load_for(start, folder, base=put_on)
        reading = read_model(start, model)
        segment = 1 if out is not None else start.segment
        mechanisms = circuits_of(start.mechanisms, model, start.plan, start.config)
        rows = (
            *start.compare(reading, step, segment),
            *rollout_rows_of(start, model, step, segment),
            *component_rows_of(start, model, step, segment),
            *circuit_rows(start.mechanisms, mechanisms, start.config, segment, step),
        )
        drawn = [
            *circuit_events(start.mechanisms, [one.reading for one in start.mechanisms], start.step),
            *circuit_events(start.mechanisms, mechanisms, step),
        ]
        written = None if out is None else write_run(Path(out), start, folder, step, reading, rows, drawn)
    own = found is not None and own_run(folder) == Path(found).resolve()
    controls = _controls(load_run(found), step) if own and found is not None else None
    return Measured(short_name(checkpoint), step, start, rows, written, controls)


def _controls(run: Run, step: int) -> Controls | None:
    """The run's control runs, where the checkpoint is of the step that they were measured at."""
    rows = current(run.timeline())
    return find_controls(run) if len(rows) and int(rows["step"].max()) == step else None


def measure_command(
    checkpoint: Place,
    *,
    run: Place | None = None,
    base: Place | None = None,
    config: Any = None,
    data: Place | None = None,
    out: Place | None = None,
    step: int | None = None,
) -> str:
    """What ``interp-rlhf measure`` prints; arguments and errors of :func:`measure`."""
    found = measure(checkpoint, run=run, base=base, config=config, data=data, out=out, step=step)
    head = f"{found.name} (step {found.step}) against {found.start.name} (step {found.start.step})"
    tail = [] if found.run is None else [f"run: {found.run.path.parent}"]
    return "\n".join([head, str(found.summary()), *tail])


def _step(folder: Path, step: int | None, start: Start, *, known: bool) -> int:
    """The checkpoint's step; 1 where nothing tells and the start is known to be the base model."""
    told = checkpoint_step(folder)
    if None not in (step, told) and step != told:
        raise ConfigError(f"{folder}: step: expected {told}, which the checkpoint tells of itself, found {step}")
    found = step if step is not None else told
    if found is None and not known:
        raise ConfigError(
            f"{folder}: neither trainer_state.json nor its name tells the step, expected step to be given"
        )
    found = 1 if found is None else found
    if found <= start.step:
        raise ConfigError(f"{folder}: step {found}: expected one after the start's, {start.step}")
    return found


# ------------------------------------------------------------------------------------------------------- a run folder


def write_run(
    out: Path,
    start: Start,
    checkpoint: Path,
    step: int,
    reading: Reading,
    rows: tuple[Measurement, ...],
    drawn: Sequence[Mapping[str, Any]] = (),
) -> Run:
    """Write what was measured as a run of one segment: the start, then the checkpoint.

    Args:
        rows: of segment 1.
        drawn: events of circuits, for the report.

    Raises:
        ConfigError: the folder holds a run already.
        FormatError: it cannot be written.
    """
    _check_new(out)
    out.mkdir(parents=True, exist_ok=True)
    store, baseline = RunStore(out), start.baseline
    names = {"base": start.name, "checkpoint": short_name(checkpoint), "weights_sha256": _weights_hash(checkpoint)}
    store.start({**start.info, "trainer": None, "measured": names}, resumed_from=None)
    for event in drawn:
        store.event("circuit", **{key: value for key, value in event.items() if key != "event"})
    for event in start.events:
        store.event("refused", **{key: value for key, value in event.items() if key != "event"})
    tokenizer = start.tokenizer or load_tokenizer(checkpoint)
    decode = getattr(tokenizer, "decode", None)
    tensors = baseline_tensors(start.table, start.first, start.again) | direction_tensors(baseline)
    for mechanism in start.mechanisms:
        tensors |= mechanism_tensors(mechanism)
    if isinstance(start.components, ComponentStart):
        tensors |= component_tensors(start.components)
    else:
        tensors |= start.components or {}
    seconds = start.first.seconds + start.again.seconds
    told = _with_cost(start.rows(1), baseline, start.step, seconds, start.first.tokens + start.again.tokens)
    store.append(told)
    store.texts("plan", plan_lines(start.plan))
    if decode is not None:
        store.texts("texts", ({"id": p.id, "text": decode(list(p.input_ids))} for p in start.table.prompts))
    captured = {"hookpoints": list(baseline.plan.hookpoints), "texts": baseline.plan.audit.hash}
    store.snapshot(start.step, told, tensors, captured=captured, cost={"seconds_so_far": seconds})
    told = _with_cost(rows, baseline, step, reading.seconds, reading.tokens)
    store.append(told)
    seconds += reading.seconds
    tensors = reading_tensors(baseline.table, reading)
    store.snapshot(step, told, tensors, captured=captured, cost={"seconds_so_far": seconds})
    return load_run(out)


def _with_cost(
    rows: tuple[Measurement, ...], baseline: Baseline, step: int, seconds: float, tokens: int
) -> tuple[Measurement, ...]:
    """The rows, then what reading cost; there is no training whose share it could be."""
    cost = cost_rows(baseline, 1, step, seconds=seconds, fraction=0.0, tokens=tokens)
    return (*rows, *(row for row in cost if row.metric != COST))


def _weights_hash(folder: Path) -> str:
    return sha256_bytes(canonical_json(weight_hashes(folder)))


def _check_new(out: Path) -> None:
    check_folder(out)
    if (out / FOLDER).exists():
        raise ConfigError(f"{out}: holds {FOLDER}/ already, expected a folder without a run to write it into")
