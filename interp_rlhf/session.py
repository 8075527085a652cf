"""The pipeline in one file: capture → read → drift → record, for one ``train()``.

    start     read θ_0 twice → fit directions and probes, admit concepts → rows, snapshot, texts
    measure   read θ_t → rows of every metric → timeline        (→ sampled completions, where they are wanted)
    keep      measure, unless just done → snapshot beside the checkpoint

When each is called is the callback's business (:mod:`interp_rlhf.callback`). Every method but the small ones is a
collective call: forwards run on all ranks, statistics and files are the main process's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from interp_rlhf.activations.reference import Reference, check_is_start, reading_difference
from interp_rlhf.audit.store import RunStore
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
from interp_rlhf.errors import MeasurementError
from interp_rlhf.measurement import Measurement
from interp_rlhf.measuring import cost_rows, drift_rows, start_rows
from interp_rlhf.plan import Plan, TextTable
from interp_rlhf.reading import Reading, read_table
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
    segment: int = 0
    fitted: Baseline | None = None
    table: TextTable | None = None  # what a measurement reads; None until step 0 was measured
    start_means: Mapping[str, Tensor] = field(default_factory=dict)
    reading: Reading | None = None
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
            self.store.event("refused", **asdict(refusal))
        return [concept.name for concept in fitted.concepts]

    def _record_start(self, step: int, table: TextTable, first: Reading, again: Reading, began: float) -> None:
        rows = start_rows(self.baseline, self.config, self.segment, step)
        self._record(step, rows, first.tokens + again.tokens, began)
        decode = getattr(getattr(self.tokenizer, "tokenizer", self.tokenizer), "decode", None)
        if decode is not None:
            self.store.texts("texts", ({"id": p.id, "text": decode(list(p.input_ids))} for p in table.prompts))
        self.store.texts("plan", plan_lines(self.plan))
        self._snapshot(step, baseline_tensors(table, first, again) | direction_tensors(self.baseline), start=True)

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

    def _compare(self, step: int, reading: Reading, tokens: int, began: float) -> tuple[Measurement, ...]:
        rows = drift_rows(self.baseline, reading, self.config, self.segment, step)
        return self._record(step, rows, tokens, began)

    def keep(self, step: int, checkpoint: Path | None) -> None:
        """Measure ``step`` unless it was just done; snapshot it, beside its checkpoint where it has one."""
        if self.measured_step != step:
            self.measure(step)
        barrier(self.world)  # every rank has finished writing its part of the checkpoint
        run_on_main(lambda: self._snapshot_reading(step, checkpoint), self.world)
        self.saved_step = step

    def _snapshot_reading(self, step: int, checkpoint: Path | None) -> None:
        if self.table is None or self.reading is None:
            raise MeasurementError(f"step {step}: no reading to keep")
        self._snapshot(step, reading_tensors(self.table, self.reading), checkpoint)

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
