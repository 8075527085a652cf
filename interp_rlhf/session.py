"""The pipeline in one file: capture → read → drift → record, for one ``train()``.

    start     read θ_0 twice → fit directions and probes, admit concepts → rows, snapshot, texts
    measure   read θ_t → rows of every metric → timeline
    sample    completions of fixed prompts, where they are wanted: written by θ_t and by θ_0, read by both → rows
    trace     circuits of tasks, where there are any: edge scores, circuits run on the other half → rows, alarms
    keep      measure, unless just done → snapshot beside the checkpoint

When each is called is the callback's business (:mod:`interp_rlhf.callback`). Every method but the small ones is a
collective call: forwards run on all ranks, statistics and files are the main process's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from interp_rlhf.activations.reference import Reference, check_is_start, find_frozen, reading_difference
from interp_rlhf.audit.store import RunStore, load_run
from interp_rlhf.audit.texts import read_texts
from interp_rlhf.baseline import (
    Baseline,
    baseline_tensors,
    direction_tensors,
    fit_baseline,
    later_table,
    reading_tensors,
    stored_readings,
)
from interp_rlhf.config import InterpConfig
from interp_rlhf.distributed import World, barrier, run_on_main
from interp_rlhf.drift.circuit_verdict import circuit_evidence, circuit_verdict
from interp_rlhf.errors import FormatError, MeasurementError
from interp_rlhf.measurement import Measurement
from interp_rlhf.measuring import cost_rows, drift_rows, start_rows
from interp_rlhf.mechanism_rows import (
    drawn_circuit,
    mechanism_estimates,
    mechanism_rows,
    mechanism_tensors,
    stored_mechanism,
)
from interp_rlhf.mechanisms import MechanismReading, MechanismStart, Reader, read_mechanism, start_mechanism
from interp_rlhf.plan import Plan, Refusal, TextTable
from interp_rlhf.reading import Reading, read_table
from interp_rlhf.rollout_labels import Labeller, label_completions
from interp_rlhf.rollouts import (
    RolloutReadings,
    RolloutStart,
    measure_rollouts,
    quadrant_rows,
    rollout_cost_rows,
    rollout_lines,
    rollout_rows,
    rollout_tensors,
    start_rollouts,
    stored_rollouts,
)
from interp_rlhf.stored_plan import plan_lines

log = logging.getLogger("interp_rlhf")


@dataclass
class Session:
    """What one ``train()`` measures with, and where it stands. ``store`` and ``baseline`` are the main process's."""

    config: InterpConfig
    model: nn.Module
    tokenizer: Any
    world: World
    plan: Plan
    reference: Reference
    store: RunStore
    attempt: Callable[[int, str, Callable[[], None]], None]  # runs what may fail without costing the rest
    ref_model: nn.Module | None = None
    samples: bool = False  # whether completions are sampled
    labels: Labeller | None = None
    segment: int = 0
    fitted: Baseline | None = None
    table: TextTable | None = None  # what a measurement reads; None until step 0 was measured
    start_means: Mapping[str, Tensor] = field(default_factory=dict)
    reading: Reading | None = None
    rollouts: RolloutStart | None = None
    mechanisms: tuple[MechanismStart, ...] = ()
    traced: tuple[MechanismReading, ...] = ()
    traced_step: int = -1
    rows: tuple[Measurement, ...] = ()
    tried_step: int = -1  # a failed measurement is tried again when the next one is due, not at every log
    measured_step: int = -1
    saved_step: int = -1
    began: float = field(default_factory=time.monotonic)
    spent: float = 0.0

    @property
    def baseline(self) -> Baseline:
        """What step 0 left; an error where measuring it failed."""
        if self.fitted is None:
            raise MeasurementError("nothing to compare with, since measuring the start failed")
        return self.fitted

    # -- step 0 ----------------------------------------------------------------------------------------------------

    def start(self, step: int) -> None:
        """Read θ_0 twice, or load both readings where the run is resumed; fit, admit, record, snapshot."""
        began = time.monotonic()
        table = self.plan.table(fit=True, bank=True)
        stored = run_on_main(lambda: self._stored_start(table), self.world) if step else None
        first, again = stored or self._read_start(step, table)
        names = run_on_main(lambda: self._fit(table, first, again), self.world)
        self.table = later_table(self.plan.keep(names), self.config)
        rows = table.rows(self.table.prompts)
        self.start_means = {name: value[rows] for name, value in first.means.items()}
        if stored and self.reference.kind == "copy":
            log.warning("reference: copy: none was kept of step 0, the resumed run goes by its readings (cached)")
            self.reference = Reference("cached")
        if self.samples:
            self.attempt(step, "what the start writes", lambda: self._start_rollouts(resumed=stored is not None))
        if self.plan.tasks:
            self.attempt(step, "circuits of the start", lambda: self._start_circuits(step, resumed=stored is not None))
        if not stored:
            run_on_main(lambda: self._record_start(step, table, first, again, began), self.world)
        self.tried_step = self.measured_step = self.saved_step = step

    def _stored_start(self, table: TextTable) -> tuple[Reading, Reading] | None:
        tensors = self.store.baseline()
        return None if tensors is None else stored_readings(tensors, self.plan, table)

    def _read_start(self, step: int, table: TextTable) -> tuple[Reading, Reading]:
        first = self._read(table, self.model)
        if self.reference.kind != "cached":
            with self.reference.reading() as frozen:
                difference = reading_difference(first.means, self._read(table, frozen).means)
            check_is_start(self.reference.kind, difference)
        if step:
            log.warning("resumed at step %d without readings of step 0: drift is counted from here", step)
        return first, self._read(table, self.model, side="left", longest_first=False)

    def _fit(self, table: TextTable, first: Reading, again: Reading) -> list[str]:
        self.fitted = fitted = fit_baseline(self.plan, table, first, again, self.config)
        for refusal in fitted.refused:
            self._refuse(refusal)
        return [concept.name for concept in fitted.concepts]

    def _record_start(self, step: int, table: TextTable, first: Reading, again: Reading, began: float) -> None:
        rows = start_rows(self.baseline, self.config, self.segment, step)
        self._record(step, rows, first.tokens + again.tokens, began)
        decode = getattr(getattr(self.tokenizer, "tokenizer", self.tokenizer), "decode", None)
        if decode is not None:
            self.store.texts("texts", ({"id": p.id, "text": decode(list(p.input_ids))} for p in table.prompts))
        self.store.texts("plan", plan_lines(self.plan))
        tensors = baseline_tensors(table, first, again) | direction_tensors(self.baseline)
        if self.rollouts is not None:
            self.store.texts("completions", rollout_lines(self.rollouts))
            tensors |= rollout_tensors(self.rollouts)
            cost = rollout_cost_rows(self.rollouts, self.baseline, self.segment, step)
            self.store.append(cost)
            self.rows = (*self.rows, *cost)
        for start in self.mechanisms:
            tensors |= mechanism_tensors(start)
            self._record_mechanism(step, start, start.reading)
        self._snapshot(step, tensors, start=True)

    def _start_rollouts(self, *, resumed: bool) -> None:
        """Let the start write, or find what it wrote. Where that cannot be, the reason stands in for every number."""
        try:
            if resumed:
                kept = run_on_main(self._kept_rollouts, self.world)
                self.rollouts = stored_rollouts(*kept, self.model, self.plan, self.config)
            else:
                self.rollouts = start_rollouts(self.model, self.plan, self.config, self.world)
        except (MeasurementError, FormatError) as error:
            reason = str(error)
            log.warning("sampled completions are not measured: %s", reason)
            run_on_main(lambda: self._refuse(Refusal("sampled completions", "", reason)), self.world)

    def _kept_rollouts(self) -> tuple[list[dict[str, Any]], Mapping[str, Tensor]]:
        lines = read_texts(self.store.output_dir, load_run(self.store.folder).events, "completions")
        return lines, self.store.baseline() or {}

    def _refuse(self, refusal: Refusal) -> None:
        self.store.event("refused", **asdict(refusal))

    # -- one measurement -------------------------------------------------------------------------------------------

    def measure(self, step: int) -> None:
        """Read the weights of ``step`` and record every metric of them."""
        began = time.monotonic()
        self.tried_step = step
        if self.table is None:
            raise MeasurementError(f"step {step}: nothing to compare with, since measuring the start failed")
        reading = self._read(self.table, self.model)
        tokens = reading.tokens
        if self.reference.kind != "cached":
            with self.reference.reading() as frozen:
                start = self._read(self.table, frozen)
            check_is_start(self.reference.kind, reading_difference(self.start_means, start.means))
            tokens += start.tokens
        self.rows = run_on_main(lambda: self._compare(step, reading, tokens, began), self.world)
        self.reading, self.measured_step = reading, step
        if self.rollouts is not None:
            self.attempt(step, "sampled completions", lambda: self._sample(step))
        every = self.config.circuits.every
        if every is None or step - self.traced_step >= every:
            self._try_circuits(step)

    def _compare(self, step: int, reading: Reading, tokens: int, began: float) -> tuple[Measurement, ...]:
        rows = drift_rows(self.baseline, reading, self.config, self.segment, step)
        return self._record(step, rows, tokens, began)

    def _sample(self, step: int) -> None:
        """Let the policy write on the same prompts; read what it and the start wrote, under both where that can be."""
        start = self.rollouts
        if start is None:
            raise MeasurementError(f"step {step}: the start has written nothing to compare with")
        frozen = self.reference if self.reference.kind != "cached" else None
        if self.config.reference == "auto":
            frozen = find_frozen(self.model, self.ref_model)
        found = measure_rollouts(start, self.model, frozen, self.plan, self.config, self.world)
        self.spent += found.seconds
        self.rows = (*self.rows, *run_on_main(lambda: self._compare_rollouts(step, start, found), self.world))

    def _compare_rollouts(self, step: int, start: RolloutStart, found: RolloutReadings) -> tuple[Measurement, ...]:
        place = (self.baseline, self.config, self.segment, step)
        rows = (*rollout_rows(start, found, *place), *rollout_cost_rows(found, self.baseline, self.segment, step))
        self.store.append(rows)
        if found.no_reference:
            self._refuse(Refusal("shift: text and representation apart", "", found.no_reference))
        return (*rows, *self._quadrant(start, found, step))

    def _quadrant(self, start: RolloutStart, found: RolloutReadings, step: int) -> tuple[Measurement, ...]:
        """What a user's labels say of the completions beside what the probes see; a failure costs these rows only."""
        rows: list[Measurement] = []

        def work(label: Labeller) -> None:
            both = (start.completions, found.completions)
            before, after = (label_completions(label, texts, self.tokenizer) for texts in both)
            probes = {place: panel.mean_probe(*place) for place, panel in self.baseline.panels.items()}
            read = {place: (probe.weight, probe.bias) for place, probe in probes.items()}
            place = (self.baseline, self.config, self.segment, step)
            rows.extend(quadrant_rows(start, found, before, after, read, *place))
            self.store.append(rows)

        if (label := self.labels) is not None:
            self.attempt(step, "the quadrant", lambda: work(label))
        return tuple(rows)

    def keep(self, step: int, checkpoint: Path | None) -> None:
        """Measure ``step`` unless it was just done; snapshot it, beside its checkpoint where it has one."""
        if self.measured_step != step:
            self.measure(step)
        self._try_circuits(step)
        barrier(self.world)  # every rank has finished writing its part of the checkpoint
        run_on_main(lambda: self._snapshot_reading(step, checkpoint), self.world)
        self.saved_step = step

    def _snapshot_reading(self, step: int, checkpoint: Path | None) -> None:
        if self.table is None or self.reading is None:
            raise MeasurementError(f"step {step}: no reading to keep")
        tensors = reading_tensors(self.table, self.reading)
        if self.traced_step == step:
            for start, found in zip(self.mechanisms, self.traced, strict=True):
                tensors |= mechanism_tensors(start, found)
        self._snapshot(step, tensors, checkpoint)

    # -- circuits --------------------------------------------------------------------------------------------------

    def _reader(self) -> Reader:
        config = self.config
        return Reader.of(self.model, config.circuits, self.plan.pad_token_id, config.seed, self.world, config.layers)

    def _start_circuits(self, step: int, *, resumed: bool) -> None:
        """Find the circuits of the start, or take them from step 0's snapshot."""
        reader, control = self._reader(), self.plan.control_task
        if resumed:
            tensors = run_on_main(lambda: dict(self.store.baseline() or {}), self.world)
            known = (reader.wiring.graph, self.config.seed)
            self.mechanisms = tuple(stored_mechanism(tensors, task, *known) for task in self.plan.tasks)
        else:
            self.mechanisms = tuple(start_mechanism(reader, task, control) for task in self.plan.tasks)
        self.traced_step = step

    def _try_circuits(self, step: int) -> None:
        if self.mechanisms and self.traced_step != step:
            self.attempt(step, "circuits", lambda: self._trace(step))

    def _trace(self, step: int) -> None:
        """Read every task on the weights of now and record what became of its mechanism."""
        began, reader = time.monotonic(), self._reader()
        self.traced = tuple(read_mechanism(reader, start) for start in self.mechanisms)
        self.traced_step = step

        def record() -> None:
            for start, found in zip(self.mechanisms, self.traced, strict=True):
                self._record_mechanism(step, start, found)

        run_on_main(record, self.world)
        self.spent += time.monotonic() - began

    def _record_mechanism(self, step: int, start: MechanismStart, found: MechanismReading) -> None:
        before, now = (mechanism_estimates(start, one, self.config) for one in (start.reading, found))
        rows = mechanism_rows(start, now, self.segment, step)
        self.store.append(rows)
        if step == self.measured_step or found is start.reading:
            self.rows = (*self.rows, *rows)
        self.store.event("circuit", step=step, **drawn_circuit(start, found))
        verdict = circuit_verdict(circuit_evidence(before, now))
        if found is start.reading and verdict.word == "undetermined":
            self._refuse(Refusal(f"circuit of {start.task.name}", "", verdict.why))
        if verdict.alarm:
            log.warning("step %d: circuit of %s: %s. %s", step, start.task.name, verdict.word, verdict.why)
            self.store.event("alarm", step=step, task=start.task.name, word=verdict.word, reason=verdict.why)

    def _read(self, table: TextTable, model: nn.Module, **order: Any) -> Reading:
        return read_table(model, table, self.plan, self.config, self.world, **order)

    def _record(self, step: int, rows: Sequence[Measurement], tokens: int, began: float) -> tuple[Measurement, ...]:
        """Append to the timeline with the cost of getting here; gives all rows of the measurement."""
        now = time.monotonic()
        self.spent += now - began
        fraction = self.spent / (now - self.began)
        cost = cost_rows(self.baseline, self.segment, step, seconds=now - began, fraction=fraction, tokens=tokens)
        self.rows = (*rows, *cost)
        self.store.append(self.rows)
        return self.rows

    def _snapshot(
        self, step: int, tensors: Mapping[str, Tensor], checkpoint: Path | None = None, *, start: bool = False
    ) -> None:
        if not (self.config.snapshots.enabled or start):
            return
        self.store.snapshot(
            step,
            self.rows,
            tensors,
            checkpoint=checkpoint,
            captured={"hookpoints": list(self.plan.hookpoints), "texts": self.plan.audit.hash},
            cost={"seconds_so_far": self.spent},
            keep=self.config.snapshots.keep,
        )
