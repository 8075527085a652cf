"""When things are measured, and what a failure costs. What is done then: :mod:`interp_rlhf.session`.

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
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from interp_rlhf.activations.engines import unchanged_random_states
from interp_rlhf.activations.reference import find_reference
from interp_rlhf.audit.layout import check_folder
from interp_rlhf.audit.store import Run, RunStore, load_run
from interp_rlhf.audit.timeline import to_frame
from interp_rlhf.config import SWITCH, InterpConfig, switched_off
from interp_rlhf.controls import Control
from interp_rlhf.distributed import join_world, run_on_main
from interp_rlhf.errors import InterpError, MeasurementError
from interp_rlhf.live_causes import standing_out
from interp_rlhf.plan import Plan, make_plan
from interp_rlhf.provenance import run_info
from interp_rlhf.reading import ShardedForwardError
from interp_rlhf.report.controls import find_controls
from interp_rlhf.report.tables import headline, summarise
from interp_rlhf.rollout_labels import Labeller, load_labels
from interp_rlhf.session import Session

if TYPE_CHECKING:
    import pandas as pd

    from interp_rlhf.report.tables import Summary

log = logging.getLogger("interp_rlhf")


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
        self.control: Control | None = None
        self.training: Mapping[str, Any] | None = None
        self._plan: Plan | None = None
        self._ref_model: nn.Module | None = None
        self._tokenizer: Any = None
        self._samples = False
        self._labels: Labeller | None = None
        self._current: Session | None = None
        self._logged_step = -1  # whose rows have reached the trainer's log
        self._ended = False

    @property
    def _run(self) -> Session:
        if self._current is None:
            raise MeasurementError("InterpCallback: training has not begun")
        return self._current

    # -- before training -------------------------------------------------------------------------------------------

    def prepare(
        self,
        *,
        model: nn.Module,
        tokenizer: Any,
        train_dataset: Any,
        eval_dataset: Any,
        args: Any,
        ref_model: Any,
        samples: bool = False,
    ) -> Plan:
        """Plan the run. Raises :class:`InterpError` for wrong input, before anything has been trained.

        Args:
            samples: the trainer trains on completions of the policy: ``rollouts.enabled: auto`` then is true.
        """
        find_reference("auto" if self.config.reference == "copy" else self.config.reference, model, ref_model)
        check_folder(args.output_dir)
        with unchanged_random_states():
            plan = make_plan(self.config, model, tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset)
        self._plan, self._tokenizer, self._ref_model = plan, tokenizer, ref_model
        wanted = self.config.rollouts
        self._samples = samples if wanted.enabled == "auto" else wanted.enabled
        self._labels = load_labels(wanted.labels) if wanted.labels is not None else None
        every, logging_steps = self.config.schedule.every, getattr(args, "logging_steps", 0) or 0
        if logging_steps >= 1 and every % int(logging_steps):
            log.warning("schedule.every=%d rounds up to steps that log (logging_steps=%d)", every, logging_steps)
        return plan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the segment and measure step 0 (or take its readings from disk when a run is resumed)."""
        if switched_off():
            self._current = None
            print(f"interp_rlhf: off ({SWITCH}=off), nothing is measured")
            return
        model = kwargs["model"]
        plan = self._plan or self._prepare_bare(args, model, kwargs)
        world, step = join_world(), state.global_step
        reference = find_reference(self.config.reference, model, self._ref_model)
        run = self._current = Session(
            self.config, model, self._tokenizer, world, plan, reference, RunStore(args.output_dir), self._guarded,
            ref_model=self._ref_model, samples=self._samples, labels=self._labels,
        )  # fmt: skip
        self._logged_step, self._ended = -1, False
        info = run_info(
            self.config, plan, model, self._tokenizer, self.trainer_class, world,
            args=args, control=self.control, training=self.training,
        )  # fmt: skip
        run.segment = run_on_main(lambda: run.store.start(info, resumed_from=step or None), world)
        self._guarded(step, "the baseline", lambda: run.start(step))

    def _prepare_bare(self, args: Any, model: nn.Module, kwargs: Mapping[str, Any]) -> Plan:
        log.warning("bare InterpCallback: timeline and snapshots only; attach(trainer) also fills the trainer's log")
        data = {name: getattr(kwargs.get(f"{name}_dataloader"), "dataset", None) for name in ("train", "eval")}
        return self.prepare(
            model=model,
            tokenizer=kwargs.get("processing_class"),
            train_dataset=data["train"],
            eval_dataset=data["eval"],
            args=args,
            ref_model=None,
        )

    # -- during training -------------------------------------------------------------------------------------------

    def before_log(self, logs: Mapping[str, float], state: Any) -> dict[str, float]:
        """The headline scalars of a due measurement, for the row that is about to be logged; usually empty."""
        run, step = self._current, state.global_step
        if run is None or self._ended or step == self._logged_step or any(key.startswith("eval_") for key in logs):
            return {}
        if step != run.measured_step:
            if not (self._due(step, state) or "train_runtime" in logs):
                return {}
            self._guarded(step, "a measurement", lambda: run.measure(step, last=step >= state.max_steps))
        if step != run.measured_step:
            return {}
        self._logged_step = step
        return headline(run.rows, self.config.headline)

    def _due(self, step: int, state: Any) -> bool:
        every, last = self.config.schedule.every, max(self._run.tried_step, 0)
        return step >= (last // every + 1) * every or step >= state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """A bare callback measures here; an attached one has done so before the row was logged."""
        if not self.rows_reach_the_log:
            self.before_log(logs or {}, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure exactly the saved weights and write the snapshot beside them."""
        run, step = self._current, state.global_step
        if run is None or run.saved_step == step:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{step}"
        self._guarded(step, "the snapshot of a checkpoint", lambda: run.keep(step, checkpoint))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the end where it was not, write the last snapshot, the summary and the report."""
        run, step = self._current, state.global_step
        if run is None:
            return
        self._ended = True  # from here on the weights may be others than those of the last step
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if run.saved_step != step:
            self._guarded(step, "the end", lambda: self._keep_end(step, best))
        if best is None and run.measured_step == step:
            self._guarded(step, "causal shares", lambda: self._find_causes(step))
        self._guarded(step, "the report", lambda: run_on_main(self.tell, run.world))

    def _keep_end(self, step: int, best: str | None) -> None:
        """Snapshot of the last step. Where the best checkpoint has been loaded, nothing is read under its number."""
        if best is not None and self._run.measured_step != step:
            raise MeasurementError(f"step {step}: its weights are gone, {Path(best).name} was loaded in their place")
        self._run.keep(step, None, gone=best is not None)

    def _find_causes(self, step: int) -> None:
        """Ask of the drifts that stand out how much of the behaviour goes through them."""
        run = self._run
        run.find_causes(step, run_on_main(lambda: standing_out(self.summary(), self.config), run.world))

    # -- failures --------------------------------------------------------------------------------------------------

    def _guarded(self, step: int, what: str, work: Callable[[], None]) -> None:
        """Run ``work``; a failure is recorded and warned about, and ends the run only where that was asked for."""
        run = self._run
        try:
            with unchanged_random_states():  # even importing a library may draw: joblib does
                work()
        except ShardedForwardError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if self.config.on_error == "raise":
                raise
            log.warning("step %d: %s failed, training goes on: %s", step, what, reason)
            log.debug("traceback", exc_info=error)
            if run.world.is_main and run.segment:
                self._record_failure(step, what, reason.splitlines()[0])

    def _record_failure(self, step: int, what: str, reason: str) -> None:
        try:
            self._run.store.event("failure", step=step, what=what, reason=reason)
        except InterpError as error:  # what cannot be written has been warned about, and is not worth the training
            log.warning("step %d: the failure is not in the timeline: %s", step, error)

    # -- what was found --------------------------------------------------------------------------------------------

    def timeline(self) -> pd.DataFrame:
        """Rows of the timeline on disk; empty before training. Main process only."""
        run = self._stored_run()
        return to_frame([]) if run is None else run.timeline()

    def summary(self) -> Summary:
        """What moved, what did not, what could not be measured, from the timeline on disk."""
        options = {"tolerance": self.config.statistics.tolerance, "confidence": self.config.statistics.confidence}
        run = self._stored_run()
        if run is None:
            return summarise(to_frame([]), [], **options)
        return summarise(to_frame(run.rows), run.events, controls=find_controls(run), **options)

    def _stored_run(self) -> Run | None:
        run = self._current
        return load_run(run.store.folder) if run is not None and run.world.is_main else None

    def tell(self) -> None:
        """Print the summary and write the report, where that is wanted and can be. Main process only."""
        print(self.summary())
        if not self.config.report:
            return
        if any(find_spec(name) is None for name in ("plotly", "jinja2")):
            print("report: not written, it needs pip install interp-rlhf[report]")
            return
        from interp_rlhf.report.html import write_report

        folder = self._run.store.folder
        print(f"report: {write_report(load_run(folder), folder / 'report.html')}")
