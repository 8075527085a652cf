"""Circuits of checkpoints: what the start's were, from a run's files or its weights, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from interp_rlhf.circuits.graph import Graph
from interp_rlhf.config import InterpConfig
from interp_rlhf.distributed import World
from interp_rlhf.errors import FormatError
from interp_rlhf.measurement import Measurement
from interp_rlhf.mechanism_rows import drawn_circuit, mechanism_estimates, mechanism_rows, stored_mechanism
from interp_rlhf.mechanisms import MechanismReading, MechanismStart, Reader, read_mechanism, start_mechanism
from interp_rlhf.plan import Plan

#: Of a circuit's rows, the one that tells of cost; a checkpoint's rows have none.
_COST = "circuit/seconds"


def read_mechanisms(model: nn.Module, plan: Plan, config: InterpConfig) -> tuple[MechanismStart, ...]:
    """The tasks' mechanisms on the weights of a start; errors of :func:`start_mechanism`."""
    if not plan.tasks:
        return ()
    reader = _reader(model, plan, config)
    control = None if plan.control_task is None else reader.control_scores(plan.control_task)
    return tuple(start_mechanism(reader, task, control) for task in plan.tasks)


def stored_mechanisms(
    tensors: Mapping[str, Tensor], events: Sequence[Mapping[str, Any]], plan: Plan, config: InterpConfig, where: str
) -> tuple[MechanismStart, ...]:
    """The tasks' mechanisms at the start of an attached run; without tasks that the run itself could not read.

    Args:
        tensors: of the snapshot of the start.
        events: of the timeline; ``circuit`` events tell the graph.
        where: what they were read from, for messages.

    Raises:
        FormatError: an event that tells no graph, or tensors that are missing.
    """
    found = []
    for task in plan.tasks:
        told = next((e for e in events if e["event"] == "circuit" and e.get("task") == task.name), None)
        if told is not None:
            found.append(stored_mechanism(tensors, task, _graph(told, where)))
    return tuple(found)


def circuits_of(
    starts: Sequence[MechanismStart], model: nn.Module, plan: Plan, config: InterpConfig
) -> tuple[MechanismReading, ...]:
    """What became of the mechanisms on a checkpoint's weights; errors of :func:`read_mechanism`."""
    if not starts:
        return ()
    reader = _reader(model, plan, config)
    return tuple(read_mechanism(reader, start) for start in starts)


def circuit_rows(
    starts: Sequence[MechanismStart],
    readings: Sequence[MechanismReading],
    config: InterpConfig,
    segment: int,
    step: int,
) -> tuple[Measurement, ...]:
    """Rows ``circuit/*`` of readings at ``step``, as a live run writes them, without cost."""
    rows: list[Measurement] = []
    for start, reading in zip(starts, readings, strict=True):
        found = mechanism_estimates(start, reading, config)
        rows += mechanism_rows(start, {name: value for name, value in found.items() if name != _COST}, segment, step)
    return tuple(rows)


def circuit_events(
    starts: Sequence[MechanismStart], readings: Sequence[MechanismReading], step: int
) -> list[dict[str, Any]]:
    """``circuit`` events of readings at ``step``, for drawing."""
    pairs = zip(starts, readings, strict=True)
    return [{"event": "circuit", "step": step, **drawn_circuit(start, reading)} for start, reading in pairs]


def _reader(model: nn.Module, plan: Plan, config: InterpConfig) -> Reader:
    return Reader.of(model, config.circuits, plan.pad_token_id, config.seed, World(), config.layers)


def _graph(event: Mapping[str, Any], where: str) -> Graph:
    try:
        sizes = [event[name] for name in ("layers", "heads", "kv_heads")]
        if not all(type(size) is int and size > 0 for size in sizes) or sizes[1] % sizes[2]:
            raise ValueError(f"found {sizes}")
        return Graph(*sizes, parallel=bool(event["parallel"]), architecture=str(event["architecture"]))
    except (KeyError, ValueError) as error:
        raise FormatError(f"{where}: circuit event: expected the sizes of a model's graph, {error}") from None
