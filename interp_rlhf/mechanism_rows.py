"""From readings of a mechanism to rows, verdict, drawing and what a snapshot keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from interp_rlhf.baseline import statistics
from interp_rlhf.circuits.graph import Graph
from interp_rlhf.circuits.node_outputs import NodeOutputs
from interp_rlhf.circuits.tasks import Task
from interp_rlhf.config import InterpConfig
from interp_rlhf.drift.estimates import Estimate, estimate
from interp_rlhf.drift.mechanism import effect_estimates, faithfulness, random_faithfulness, structure_estimates
from interp_rlhf.errors import FormatError
from interp_rlhf.measurement import Measurement
from interp_rlhf.measuring import as_measurement
from interp_rlhf.mechanisms import MechanismReading, MechanismStart

#: Edges of a circuit that the timeline holds for drawing, strongest first.
DRAWN = 150
_PREFIX = "circuits/"


def mechanism_estimates(start: MechanismStart, reading: MechanismReading, config: InterpConfig) -> dict[str, Estimate]:
    """Every ``circuit/*`` metric of one task; those that are undefined are not there."""
    options, first = statistics(config), start.reading
    found = effect_estimates(reading.full, reading.empty, first.full, first.empty, **options)
    random = None
    if float((reading.full - reading.empty).mean()):
        random = random_faithfulness(reading.random, reading.full, reading.empty)
    circuits = {
        "index": reading.index,
        "matched": reading.matched,
        "own": reading.extracted,
        "control": reading.control,
    }
    for name, values in circuits.items():
        metric = f"circuit/faithfulness_{name}"
        if values is not None:
            value = faithfulness(metric, values, reading.full, reading.empty, random=random, **options)
            if value is not None:
                found[metric] = value
    pairs = len(start.select) + len(start.evaluate)
    found |= structure_estimates(
        first.blocks_a,
        first.blocks_b,
        reading.blocks_a,
        reading.blocks_b,
        top=start.size,
        n=pairs,
        confidence=options["confidence"],
        seed=options["seed"],
    )
    found["circuit/seconds"] = estimate("circuit/seconds", reading.seconds, pairs)
    return found


def mechanism_rows(
    start: MechanismStart, found: Mapping[str, Estimate], segment: int, step: int
) -> tuple[Measurement, ...]:
    """The estimates of one task as rows of the timeline."""
    return tuple(
        as_measurement(metric, start.task.name, "", value, "all", "named", segment, step)
        for metric, value in found.items()
    )


def drawn_circuit(start: MechanismStart, reading: MechanismReading) -> dict[str, Any]:
    """A circuit as the timeline's ``circuit`` event holds it: sizes of the graph and the strongest of its edges."""
    graph = start.graph
    scores = torch.zeros(graph.possible.shape)
    scores[graph.possible] = reading.blocks_a.mean(0)
    chosen = sorted(_edges(graph, reading.own, scores), key=lambda edge: -abs(edge[2]))
    return {
        "task": start.task.name,
        "architecture": graph.architecture,
        "layers": graph.n_layers,
        "heads": graph.n_heads,
        "kv_heads": graph.n_kv_heads,
        "parallel": graph.parallel,
        "size": start.size,
        "possible": int(graph.possible.sum()),
        "dropped": reading.dropped,
        "edges": chosen[:DRAWN],
    }


def _edges(graph: Graph, selected: Tensor, scores: Tensor) -> Iterator[list[Any]]:
    for source, target in selected.nonzero().tolist():
        yield [graph.sources[source], graph.targets[target], float(scores[source, target])]


# --------------------------------------------------------------------------------------------------- what is kept of it


def mechanism_tensors(start: MechanismStart, reading: MechanismReading | None = None) -> dict[str, Tensor]:
    """What a snapshot keeps: edge scores by block and the circuit; of the start (no ``reading``) all of its reading."""
    one, name = reading or start.reading, f"{_PREFIX}{start.task.name}/"
    kept = {"blocks_a": one.blocks_a, "blocks_b": one.blocks_b, "own": one.own.to(torch.uint8)}
    if reading is None:
        kept |= {
            "heads": one.nodes.heads,
            "mlps": one.nodes.mlps,
            "full": one.full,
            "empty": one.empty,
            "index": one.index,
            "random": one.random,
            "task": _hash(start.task),
            "evaluate": torch.tensor(start.evaluate),
        }
        if start.control is not None:
            kept |= {"control": start.control.to(torch.uint8), "control_metric": one.control}
    return {name + key: value.contiguous() for key, value in kept.items() if value is not None}


def _hash(task: Task) -> Tensor:
    return torch.tensor(list(bytes.fromhex(task.hash)), dtype=torch.uint8)


def stored_mechanism(tensors: Mapping[str, Tensor], task: Task, graph: Graph) -> MechanismStart:
    """The start of a resumed run, from what its step-0 snapshot keeps.

    Raises:
        FormatError: a tensor is missing, or the task or the model's graph is not that of step 0.
    """
    name = f"{_PREFIX}{task.name}/"
    found = {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
    expected = {"blocks_a", "blocks_b", "own", "heads", "mlps", "full", "empty", "index", "random", "task", "evaluate"}
    missing = expected - set(found)
    if missing:
        raise FormatError(f"step-0 snapshot: {name}{min(missing)}: not found, expected the circuits of the start")
    if not torch.equal(found["task"], _hash(task)):
        raise FormatError(f"task {task.name!r}: its pairs or metric are not those of step 0, expected the same task")
    own = found["own"].bool()
    if own.shape != graph.possible.shape:
        wanted = f"{list(graph.possible.shape)} of {graph.architecture}"
        raise FormatError(f"step-0 snapshot: {name}own: expected shape {wanted}, found {list(own.shape)}")
    reading = MechanismReading(
        blocks_a=found["blocks_a"],
        blocks_b=found["blocks_b"],
        own=own,
        nodes=NodeOutputs(found["heads"], found["mlps"]),
        full=found["full"],
        empty=found["empty"],
        index=found["index"],
        matched=found["index"],
        extracted=found["index"],
        control=found.get("control_metric"),
        random=found["random"],
        dropped=0,
        seconds=0.0,
    )
    evaluate = tuple(found["evaluate"].tolist())
    select = tuple(sorted(set(range(len(task.pairs))) - set(evaluate)))
    control = found["control"].bool() if "control" in found else None
    return MechanismStart(task, select, evaluate, graph, int(own.sum()), reading, control)
