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
from interp_rlhf.component_drift import ComponentStart, component_tensors, record_components, start_components
from interp_rlhf.config import InterpConfig
from interp_rlhf.distributed import World, barrier, run_on_main
from interp_rlhf.errors import FormatError, HookpointError, MeasurementError
from interp_rlhf.live_causes import causal_rows
from interp_rlhf.live_circuits import LiveCircuits
from interp_rlhf.measurement import Measurement
from interp_rlhf.measuring import cost_rows, drift_rows, start_rows
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
    circuits: LiveCircuits = field(init=False)
    components: ComponentStart | None = None  # the main process's
    split_step: int = -1
    rows: tuple[Measurement, ...] = ()
    tried_step: int = -1  # a failed measurement is tried again when the next one is due, not at every log
    measured_step: int = -1
    saved_step: int = -1
    began: float = field(default_factory=time.monotonic)
    spent: float = 0.0

    def __post_init__(self) -> None:
        self.circuits = LiveCircuits(self.model, self.config, self.plan, self.world, self.store, self.attempt)

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
            self.attempt(step, "circuits of the start", lambda: self.circuits.start(step, resumed=stored is not None))
        if self.config.components is not False:
            self.attempt(step, "components of the start", lambda: self._start_components(resumed=stored is not None))
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
        self.rows = tuple(start_rows(self.baseline, self.config, self.segment, step))
        self.store.append(self.rows)
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
        tensors |= self.circuits.start_tensors()
        self.rows = (*self.rows, *self.circuits.record_start(self.segment, step))
        if self.components is not None:
            tensors |= component_tensors(self.components)
        self.spent += (seconds := time.monotonic() - began)
        self.rows = (*self.rows, *self._record_cost(step, seconds, first.tokens + again.tokens))
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

    def measure(self, step: int, *, last: bool = False) -> None:
        """Read the weights of ``step`` and record every metric of them; of the ``last`` step circuits always too."""
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
        self.rows = run_on_main(lambda: self._compare(step, reading), self.world)
        self.reading, self.measured_step = reading, step
        self.spent += (seconds := time.monotonic() - began)
        if self.rollouts is not None:
            self.attempt(step, "sampled completions", lambda: self._sample(step))
        if self.circuits.due(step, last=last):
            self.attempt(step, "circuits", lambda: self._trace(step))
        if self.config.components is True:
            self._try_components(step)
        self.rows = (*self.rows, *run_on_main(lambda: self._record_cost(step, seconds, tokens), self.world))

    def _compare(self, step: int, reading: Reading) -> tuple[Measurement, ...]:
        rows = tuple(drift_rows(self.baseline, reading, self.config, self.segment, step))
        self.store.append(rows)
        return rows

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

    def keep(self, step: int, checkpoint: Path | None, *, gone: bool = False) -> None:
        """Measure ``step`` unless it was just done; snapshot it, beside its checkpoint where it has one.

        Where its weights are ``gone`` (others were loaded in their place) nothing more is read under its number.
        """
        if self.measured_step != step:
            self.measure(step, last=True)
        if not gone:
            self.attempt(step, "circuits", lambda: self._trace(step))
            self._try_components(step)
        barrier(self.world)  # every rank has finished writing its part of the checkpoint
        run_on_main(lambda: self._snapshot_reading(step, checkpoint), self.world)
        self.saved_step = step

    def find_causes(self, step: int, places: Sequence[tuple[str, str]]) -> None:
        """Record how much of each concept's change of behaviour goes through its direction."""
        if not places:
            return
        began, frozen = time.monotonic(), find_frozen(self.model, self.ref_model)
        if frozen is not None and self.table is not None:
            with frozen.reading() as start:
                again = self._read(self.table, start)
            check_is_start(frozen.kind, reading_difference(self.start_means, again.means))

        def record() -> None:
            place = (self.baseline, places, self.config, self.segment, step)
            found = list(causal_rows(self.model, frozen, *place))
            self.store.append([row for row in found if isinstance(row, Measurement)])
            for refusal in found:
                if isinstance(refusal, Refusal):
                    self._refuse(refusal)

        run_on_main(record, self.world)
        self.spent += time.monotonic() - began

    def _snapshot_reading(self, step: int, checkpoint: Path | None) -> None:
        if self.table is None or self.reading is None:
            raise MeasurementError(f"step {step}: no reading to keep")
        self._snapshot(step, reading_tensors(self.table, self.reading) | self.circuits.tensors(step), checkpoint)

    def _trace(self, step: int) -> None:
        """Read circuits, unless that was tried at this step."""
        before = self.circuits.seconds
        try:
            self.rows = (*self.rows, *self.circuits.trace(self.segment, step))
        finally:
            self.spent += self.circuits.seconds - before

    # -- components ------------------------------------------------------------------------------------------------

    def _start_components(self, *, resumed: bool) -> None:
        """Read what the start's projections are made of, or take it from step 0's snapshot; else tell why not."""

        def start() -> None:
            tensors = dict(self.store.baseline() or {}) if resumed else None
            try:
                self.components = start_components(self.model, self.baseline, self.config, tensors)
            except (HookpointError, MeasurementError, FormatError) as error:
                log.warning("drift is not split among components: %s", error)
                self._refuse(Refusal("components", "", str(error)))

        run_on_main(start, self.world)

    def _try_components(self, step: int) -> None:
        if self.config.components is not False and self.split_step != step:
            self.attempt(step, "components", lambda: self._split(step))

    def _split(self, step: int) -> None:
        """Record which components the drift of the weights of now comes from."""
        began, self.split_step = time.monotonic(), step

        def record() -> None:
            if self.components is not None:
                place = (self.baseline, self.config, self.segment, step)
                self.rows = (*self.rows, *record_components(self.model, self.components, self.store, *place))

        run_on_main(record, self.world)
        self.spent += time.monotonic() - began

    def _read(self, table: TextTable, model: nn.Module, **order: Any) -> Reading:
        return read_table(model, table, self.plan, self.config, self.world, **order)

    def _record_cost(self, step: int, seconds: float, tokens: int) -> tuple[Measurement, ...]:
        """What a measurement took, and the share of the time that all of them took, everything in them included."""
        fraction = self.spent / (time.monotonic() - self.began)
        rows = tuple(cost_rows(self.baseline, self.segment, step, seconds=seconds, fraction=fraction, tokens=tokens))
        self.store.append(rows)
        return rows

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
