"""Circuits during one ``train()``: found at the start, read again when they are due, recorded.

A task that fails costs its own rows and nothing else. Every method but :meth:`LiveCircuits.due`,
:meth:`LiveCircuits.record_start` and the tensors is a collective call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor, nn

from interp_rlhf.audit.store import RunStore
from interp_rlhf.circuits.tasks import Task
from interp_rlhf.circuits.wiring import partition_problem
from interp_rlhf.config import InterpConfig
from interp_rlhf.distributed import World, run_on_main
from interp_rlhf.drift.circuit_verdict import circuit_evidence, circuit_verdict
from interp_rlhf.drift.estimates import Estimate
from interp_rlhf.measurement import Measurement
from interp_rlhf.mechanism_rows import (
    drawn_circuit,
    mechanism_estimates,
    mechanism_rows,
    mechanism_tensors,
    stored_mechanism,
)
from interp_rlhf.mechanisms import MechanismReading, MechanismStart, Reader, read_mechanism, start_mechanism
from interp_rlhf.plan import Plan, Refusal

log = logging.getLogger("interp_rlhf")


@dataclass
class LiveCircuits:
    """The mechanisms of a run's tasks and where following them stands. ``store`` is the main process's.

    Attributes:
        attempt: ``(step, what, work)`` runs what may fail without costing the rest.
        starts: the tasks that could be read at the start.
        traced: what they were on the weights of ``step``, by task; without those that failed.
        step: at which circuits were last read, or tried to be; -1 before the start.
        seconds: spent since the start, failures included.
    """

    model: nn.Module
    config: InterpConfig
    plan: Plan
    world: World
    store: RunStore
    attempt: Callable[[int, str, Callable[[], None]], None]
    starts: tuple[MechanismStart, ...] = ()
    traced: Mapping[str, MechanismReading] = field(default_factory=dict)
    step: int = -1
    seconds: float = 0.0
    _first: dict[str, dict[str, Estimate]] = field(default_factory=dict)  # metrics of the start by task

    def _reader(self) -> Reader:
        config = self.config
        return Reader.of(self.model, config.circuits, self.plan.pad_token_id, config.seed, self.world, config.layers)

    def start(self, step: int, *, resumed: bool) -> None:
        """Find the circuits of the start, or take them from step 0's snapshot. Partitioned weights are refused."""
        problem = partition_problem(self.model, layers=self.config.layers)
        if problem is not None:
            log.warning("circuits are not measured: %s", problem)
            run_on_main(lambda: self._refuse("circuits", problem), self.world)
            return
        reader = self._reader()
        tensors = run_on_main(lambda: dict(self.store.baseline() or {}), self.world) if resumed else None
        control: list[Tensor] = []
        if tensors is None and (other := self.plan.control_task) is not None:
            self.attempt(step, f"circuit of {other.name}", lambda: control.append(reader.control_scores(other)))

        def begin(task: Task) -> None:
            if tensors is None:
                found = start_mechanism(reader, task, control[0] if control else None)
            else:
                found = stored_mechanism(tensors, task, reader.wiring.graph)
            self.starts = (*self.starts, found)

        for task in self.plan.tasks:
            self.attempt(step, f"circuit of {task.name} at the start", lambda task=task: begin(task))
        self.step = step

    def record_start(self, segment: int, step: int) -> tuple[Measurement, ...]:
        """Rows and events of the start; gives the rows. Main process only."""
        rows: list[Measurement] = []
        for start in self.starts:
            self.attempt(
                step,
                f"circuit of {start.task.name} at the start",
                lambda start=start: rows.extend(self._record(segment, step, start, start.reading)),
            )
        return tuple(rows)

    def due(self, step: int, *, last: bool = False) -> bool:
        """Whether circuits are to be read with the measurement of ``step``; at the ``last`` step always."""
        every = self.config.circuits.every
        wanted = last or every is None or step - self.step >= every
        return wanted and bool(self.starts) and step != self.step

    def trace(self, segment: int, step: int) -> tuple[Measurement, ...]:
        """Read every task on the weights of now, unless that was tried at this step; gives the rows."""
        if step == self.step or not self.starts:
            return ()
        began, self.traced, self.step = time.monotonic(), {}, step
        rows: list[Measurement] = []

        def read(start: MechanismStart) -> None:
            found = read_mechanism(reader, start)
            self.traced = {**self.traced, start.task.name: found}
            rows.extend(run_on_main(lambda: self._record(segment, step, start, found), self.world))

        try:
            reader = self._reader()
            for start in self.starts:
                self.attempt(step, f"circuit of {start.task.name}", lambda start=start: read(start))
        finally:
            self.seconds += time.monotonic() - began
        return tuple(rows)

    def _record(
        self, segment: int, step: int, start: MechanismStart, found: MechanismReading
    ) -> tuple[Measurement, ...]:
        name = start.task.name
        if name not in self._first:
            self._first[name] = mechanism_estimates(start, start.reading, self.config)
        before = self._first[name]
        now = before if found is start.reading else mechanism_estimates(start, found, self.config)
        rows = mechanism_rows(start, now, segment, step)
        self.store.append(rows)
        self.store.event("circuit", step=step, **drawn_circuit(start, found))
        verdict = circuit_verdict(circuit_evidence(before, now))
        if found is start.reading and verdict.word == "undetermined":
            self._refuse(f"circuit of {name}", verdict.why)
        if verdict.alarm:
            log.warning("step %d: circuit of %s: %s. %s", step, name, verdict.word, verdict.why)
            self.store.event("alarm", step=step, task=name, word=verdict.word, reason=verdict.why)
        return rows

    def _refuse(self, readout: str, reason: str) -> None:
        self.store.event("refused", **asdict(Refusal(readout, "", reason)))

    def start_tensors(self) -> dict[str, Tensor]:
        """What step 0's snapshot keeps of all tasks."""
        return {name: value for start in self.starts for name, value in mechanism_tensors(start).items()}

    def tensors(self, step: int) -> dict[str, Tensor]:
        """What the snapshot of ``step`` keeps; nothing where circuits were not read at that step."""
        if step != self.step:
            return {}
        found = ((start, self.traced[start.task.name]) for start in self.starts if start.task.name in self.traced)
        return {name: value for pair in found for name, value in mechanism_tensors(*pair).items()}
