"""The pipeline in one file: capture → read → drift → record, on a schedule.

The loop it lives in, as pseudo-code (Trainer-loop trainers; PPO's own loop logs before ``on_step_end``)::

    attach(trainer)                      prepare: plan the run (hookpoints, texts, concepts); wrong input raises here
    trainer.train()
        on_train_begin                   step 0: read θ_0 twice, fit directions, admit concepts, snapshot
        for every step:
            the trainer trains           nothing of ours runs
            trainer.log(row)             due? measure: capture → read → drift → record; headline scalars join the row
            checkpoint saved → on_save   measure the saved weights unless this step was; snapshot beside the checkpoint
        on_train_end                     the end is measured if it was not; snapshot, summary, report

A measurement leaves no trace in the training (weights, gradients, RNG, modes); an error in it costs the run only where
``on_error: raise`` asks for that, and is written to the timeline, warned about and shown in the summary otherwise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from interp_rlhf.activations.reference import Reference, check_is_start, find_reference, reading_difference
from interp_rlhf.audit.store import RunStore
from interp_rlhf.audit.timeline import to_frame
from interp_rlhf.baseline import Baseline, baseline_from_snapshot, fit_baseline
from interp_rlhf.config import InterpConfig
from interp_rlhf.distributed import World, agree, barrier, join_world, run_on_main
from interp_rlhf.errors import InterpError, MeasurementError
from interp_rlhf.measurement import Measurement
from interp_rlhf.measuring import cost_rows, drift_rows
from interp_rlhf.plan import Plan, make_plan
from interp_rlhf.provenance import run_info
from interp_rlhf.reading import Reading, ShardedForwardError, read_table
from interp_rlhf.report.tables import headline, render_text, summarise

if TYPE_CHECKING:
    import pandas as pd

    from interp_rlhf.report.tables import Summary

log = logging.getLogger("interp_rlhf")


@dataclass
class _Run:
    """What changes while one ``train()`` runs. Files and statistics belong to the main process (``store``)."""

    model: nn.Module
    world: World
    store: RunStore | None
    segment: int
    reference: Reference
    baseline: Baseline | None = None
    measured_step: int = -1
    saved_step: int = -1
    rows: tuple[Measurement, ...] = ()
    began: float = field(default_factory=time.monotonic)
    spent: float = 0.0
    failures: int = 0


class InterpCallback(TrainerCallback):
    """Measures on a schedule. Used through :func:`~interp_rlhf.attach`, or on its own to observe only.

    Args:
        config: as for :func:`~interp_rlhf.attach`.

    A bare callback (``trainer.add_callback(InterpCallback())``) writes timeline, snapshots and report but cannot add
    rows to the trainer's log; it says so once.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = InterpConfig.resolve(config)
        self.rows_reach_the_log = False
        self.trainer_class = ""
        self._plan: Plan | None = None
        self._ref_model: nn.Module | None = None
        self._tokenizer: Any = None
        self._run: _Run | None = None

    # -- before training -------------------------------------------------------------------------------------------

    def prepare(
        self, *, model: nn.Module, tokenizer: Any, train_dataset: Any, eval_dataset: Any, args: Any, ref_model: Any
    ) -> None:
        """Plan the run. Raises :class:`InterpError` for wrong input, before anything has been trained."""
        self._plan = make_plan(
            self.config, model, tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset
        )
        self._tokenizer = tokenizer
        self._ref_model = ref_model
        find_reference("auto" if self.config.reference == "copy" else self.config.reference, model, ref_model)
        every, logging_steps = self.config.schedule.every, getattr(args, "logging_steps", 0)
        if logging_steps and logging_steps >= 1 and every % int(logging_steps):
            log.warning("schedule.every=%d rounds up to steps that log (logging_steps=%d)", every, logging_steps)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the segment and measure step 0 (or load its readings when a run is resumed)."""
        model = kwargs["model"]
        if self._plan is None:
            self._prepare_bare(args, model, kwargs)
        world = join_world()
        store = RunStore(Path(args.output_dir)) if world.is_main else None
        resumed_from = state.global_step or None
        info = run_info(self.config, self._plan, model, self._tokenizer, self.trainer_class, world)
        segment = run_on_main(lambda: store.start(info, resumed_from=resumed_from), world)
        self._run = _Run(model, world, store, segment, find_reference(self.config.reference, model, self._ref_model))
        self._guarded(state.global_step, "the baseline", lambda: self._measure_start(state.global_step))

    def _prepare_bare(self, args: Any, model: nn.Module, kwargs: Mapping[str, Any]) -> None:
        log.warning("bare InterpCallback: timeline and snapshots only; attach(trainer) also fills the trainer's log")
        data = {name: getattr(kwargs.get(f"{name}_dataloader"), "dataset", None) for name in ("train", "eval")}
        self.prepare(
            model=model,
            tokenizer=kwargs.get("processing_class"),
            train_dataset=data["train"],
            eval_dataset=data["eval"],
            args=args,
            ref_model=None,
        )

    def _measure_start(self, step: int) -> None:
        run, plan = self._current(), self._plan
        table = plan.table(self.config, fit=True)
        stored = run_on_main(run.store.baseline, run.world) if step else None
        if stored is not None:
            run.baseline = baseline_from_snapshot(plan, table, stored, self.config)
            run.measured_step = step
            return
        began = time.monotonic()
        first = self._read(table, run.model)
        again = self._read(table, run.model, side="left", longest_first=False)
        if run.reference.kind != "cached":
            with run.reference.reading() as frozen:
                check_is_start(run.reference.kind, reading_difference(first.means, self._read(table, frozen).means))
        run.baseline = run_on_main(lambda: fit_baseline(plan, first, again, self.config), run.world)
        self._record(step, first, run.baseline.start_rows(run.segment, step), began)
        run_on_main(lambda: self._snapshot(step, first), run.world)

    # -- during training -------------------------------------------------------------------------------------------

    def before_log(self, logs: Mapping[str, float], state: Any) -> dict[str, float]:
        """The headline scalars of a due measurement, for the row that is about to be logged; usually empty."""
        if self._run is None or any(key.startswith("eval_") for key in logs):
            return {}
        step = state.global_step
        if step != self._run.measured_step and (self._due(step, state) or "train_runtime" in logs):
            self._guarded(step, "a measurement", lambda: self._measure(step))
            return headline(self._run.rows, self.config.headline) if self._run.measured_step == step else {}
        return {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """A bare callback measures here; an attached one has done so before the row was logged."""
        if not self.rows_reach_the_log:
            self.before_log(logs or {}, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure exactly the saved weights and write the snapshot beside them."""
        if self._run is None or self._run.saved_step == state.global_step:
            return
        step = state.global_step
        checkpoint = Path(args.output_dir) / f"checkpoint-{step}"

        def measure_and_snapshot() -> None:
            run = self._current()
            reading = self._measure(step) if run.measured_step != step else None
            barrier(run.world)
            run_on_main(lambda: self._snapshot(step, reading, checkpoint), run.world)
            run.saved_step = step

        self._guarded(step, "the snapshot of a checkpoint", measure_and_snapshot)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the end where it was not, write the last snapshot, the summary and the report."""
        run = self._run
        if run is None:
            return
        step = state.global_step

        def finish() -> None:
            reading = self._measure(step) if run.measured_step != step else None
            if run.saved_step != step:
                run_on_main(lambda: self._snapshot(step, reading), run.world)

        self._guarded(step, "the end", finish)
        if run.world.is_main:
            self._guarded_main(step, "the report", self._tell)

    # -- one measurement -------------------------------------------------------------------------------------------

    def _due(self, step: int, state: Any) -> bool:
        every, last = self.config.schedule.every, max(self._current().measured_step, 0)
        return step >= (last // every + 1) * every or step >= state.max_steps

    def _measure(self, step: int) -> Reading:
        """Capture → read → drift → record, on all ranks; statistics and files on the main process."""
        run = self._current()
        if run.baseline is None:
            raise MeasurementError(f"step {step}: there is no baseline to compare with (it failed at the start)")
        began = time.monotonic()
        baseline = run.baseline
        reading = self._read(baseline.table, run.model)
        if run.reference.kind != "cached":
            with run.reference.reading() as frozen:
                moved = reading_difference(baseline.start_means, self._read(baseline.table, frozen).means)
            check_is_start(run.reference.kind, moved)
        rows = run_on_main(lambda: drift_rows(baseline, reading, self.config, run.segment, step), run.world)
        self._record(step, reading, rows, began)
        return reading

    def _read(self, table: Any, model: nn.Module, **order: Any) -> Reading:
        return read_table(model, table, self._plan, self.config, self._current().world, **order)

    def _record(self, step: int, reading: Reading, rows: Sequence[Measurement], began: float) -> None:
        run = self._current()
        run.spent += time.monotonic() - began
        elapsed = time.monotonic() - run.began
        cost = run_on_main(
            lambda: cost_rows(run.segment, step, time.monotonic() - began, run.spent / elapsed, reading.tokens), run.world
        )
        run.rows = (*rows, *cost)
        run_on_main(lambda: run.store.append(run.rows), run.world)
        run.measured_step = step
