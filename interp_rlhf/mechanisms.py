"""The mechanism behind a task, at the start and now: edge scores on one half of its pairs, circuits run on the other.

    half A ─► edge scores in blocks ─► the strongest edges: the circuit of now ─┐
    half B ─► edge scores in blocks ─► (structure only)                          ├─► run on half B ─► metric per pair
    the start's circuit: by index, and after matching nodes by their outputs ───┤
    the control task's circuit, random circuits of the same size ───────────────┘

Everything here is a reading: numbers per pair and per edge, no statistics (:mod:`interp_rlhf.mechanism_rows`). In a job
of several processes with whole weights each takes its share of the blocks and circuits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from interp_rlhf.circuits.faithfulness import random_circuits
from interp_rlhf.circuits.graph import Graph, strongest
from interp_rlhf.circuits.matching import NodeMatching
from interp_rlhf.circuits.node_outputs import NodeOutputs, node_outputs
from interp_rlhf.circuits.passes import Sources
from interp_rlhf.circuits.task_runs import TaskRuns, attribute_task, task_mean
from interp_rlhf.circuits.tasks import Task
from interp_rlhf.circuits.wiring import Wiring, find_wiring
from interp_rlhf.config import CircuitsConfig
from interp_rlhf.distributed import World, run_on_main, spread, together
from interp_rlhf.errors import MeasurementError

#: Blocks of pairs in each half, over which structure gets its interval; fewer where a half has fewer pairs.
BLOCKS = 8
#: Shares of all edges that are tried as the size of a circuit.
SIZES: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
#: Faithfulness on the selecting half that a circuit is grown to.
FAITHFUL = 0.8


@dataclass(frozen=True, slots=True, eq=False)
class MechanismReading:
    """One task read on one set of weights. ``E`` possible edges, ``n`` pairs of the evaluation half.

    Attributes:
        blocks_a, blocks_b: ``[K, E]`` mean edge scores of each block of pairs, selecting and evaluation half.
        own: ``[S, T]`` the circuit selected on these weights.
        nodes: what the nodes output.
        full, empty: ``[n]`` metric with nothing and with everything corrupted.
        index, matched, extracted, control: ``[n]`` metric in the start's circuit by index, after matching, in ``own``,
            in the control task's circuit of the start (``None``: there is no control task).
        random: ``[R, n]`` metric in random circuits of the same size.
        dropped: edges of the start's circuit that have no place after matching.
        seconds: wall-clock time.
    """

    blocks_a: Tensor
    blocks_b: Tensor
    own: Tensor
    nodes: NodeOutputs
    full: Tensor
    empty: Tensor
    index: Tensor
    matched: Tensor
    extracted: Tensor
    control: Tensor | None
    random: Tensor
    dropped: int
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class MechanismStart:
    """One task at the start.

    Attributes:
        task: its pairs and metric.
        select, evaluate: the halves of the pairs.
        graph: the model's.
        size: edges of a circuit.
        reading: of the start's weights; ``own`` is the circuit that later ones are compared with.
        control: ``[S, T]`` circuit of the control task, of the same size, at the start.
    """

    task: Task
    select: tuple[int, ...]
    evaluate: tuple[int, ...]
    graph: Graph
    size: int
    reading: MechanismReading
    control: Tensor | None


@dataclass(frozen=True, slots=True)
class Reader:
    """What reading a mechanism needs: the model and its wiring, the settings, the processes."""

    model: nn.Module
    wiring: Wiring
    config: CircuitsConfig
    pad_token_id: int
    seed: int
    world: World

    @classmethod
    def of(
        cls, model: nn.Module, config: CircuitsConfig, pad_token_id: int, seed: int, world: World, layers: str | None
    ) -> Reader:
        """Trace the wiring and put the rest together; errors of :func:`find_wiring`. Collective, like its methods."""
        wiring = together(lambda: find_wiring(model, layers=layers), world)
        return cls(model, wiring, config, pad_token_id, seed, world)

    def baseline(self, task: Task, pairs: Sequence[int]) -> Sources | None:
        """What the ablation ``mean`` puts in, over the corrupt texts of some pairs; ``None`` for other ablations."""
        if self.config.ablation != "mean":
            return None
        options = {"pad_token_id": self.pad_token_id, "batch_size": self.config.batch_size}
        return together(lambda: task_mean(self.model, self.wiring, task, pairs, **options), self.world)

    def scores(self, task: Task, pairs: Sequence[int], baseline: Sources | None = None) -> Tensor:
        """Mean edge scores of some pairs, ``[S, T]``."""
        config = self.config
        circuit = attribute_task(
            self.model,
            self.wiring,
            task,
            pairs,
            pad_token_id=self.pad_token_id,
            batch_size=config.batch_size,
            method=config.method,
            steps=config.steps,
            ablation=config.ablation,
            memory=config.memory,
            baseline=baseline,
        )
        return circuit.scores

    def control_scores(self, control: Task) -> Tensor:
        """Edge scores ``[S, T]`` of a control task on its selecting half, for :func:`start_mechanism`."""
        half, _ = control.halves(self.seed)
        return self.blocks(control, half, self.baseline(control, half)).mean(0)

    def blocks(self, task: Task, pairs: Sequence[int], baseline: Sources | None = None) -> Tensor:
        """Mean edge scores of each of K blocks of pairs of equal size, ``[K, S, T]``; a rest of pairs is left out."""
        k = min(BLOCKS, len(pairs))
        even = pairs[: len(pairs) - len(pairs) % k]
        return torch.stack(spread(k, lambda i: self.scores(task, even[i::k], baseline), self.world))

    def runs(self, task: Task, pairs: Sequence[int], baseline: Sources | None = None) -> TaskRuns:
        """The model as any circuit, on some pairs."""
        config = self.config
        options = {"pad_token_id": self.pad_token_id, "batch_size": config.batch_size, "memory": config.memory}
        ablated = {"ablation": config.ablation, "baseline": baseline}
        return together(lambda: TaskRuns(self.model, self.wiring, task, pairs, **options, **ablated), self.world)

    def nodes(self, task: Task, pairs: Sequence[int]) -> NodeOutputs:
        """What the nodes output, the same numbers on all ranks: nodes are matched by them."""
        options = (self.pad_token_id, self.config.batch_size)
        return spread(1, lambda _: node_outputs(self.model, self.wiring, task, pairs, *options), self.world)[0]


def start_mechanism(reader: Reader, task: Task, control: Tensor | None) -> MechanismStart:
    """Read a task on the start's weights and fix the circuit that later weights are compared with. Collective.

    Args:
        control: edge scores ``[S, T]`` of the control task (:meth:`Reader.control_scores`); ``None``: there is none.
    """
    began = time.monotonic()
    graph = reader.wiring.graph
    select, evaluate = task.halves(reader.seed)
    baseline = reader.baseline(task, select)
    blocks = [reader.blocks(task, half, baseline) for half in (select, evaluate)]
    scores = blocks[0].mean(0)
    size = _size(reader, task, select, scores, baseline)
    chosen = strongest(graph, scores, size)
    other = None if control is None else strongest(graph, control, size)
    nodes = reader.nodes(task, select)
    runs = reader.runs(task, evaluate, baseline)
    reading = _read(reader, runs, blocks, nodes, [chosen, chosen, chosen], other, size, 0, began)
    return MechanismStart(task, select, evaluate, graph, size, reading, other)


def read_mechanism(reader: Reader, start: MechanismStart) -> MechanismReading:
    """Read a task on the weights of now. Collective.

    Raises:
        MeasurementError: the model's graph is not the start's.
    """
    began = time.monotonic()
    graph, task = reader.wiring.graph, start.task
    if graph != start.graph:
        raise MeasurementError(f"task {task.name!r}: circuits of {start.graph} cannot be compared with {graph}")
    baseline = reader.baseline(task, start.select)
    blocks = [reader.blocks(task, half, baseline) for half in (start.select, start.evaluate)]
    own = strongest(graph, blocks[0].mean(0), start.size)
    nodes, then = reader.nodes(task, start.select), start.reading.nodes
    matching = NodeMatching.of_outputs(graph, then.heads, nodes.heads, then.mlps, nodes.mlps)
    matched, dropped = matching.map_edges(start.reading.own, graph)
    chosen = [start.reading.own, matched, own]
    runs = reader.runs(task, start.evaluate, baseline)
    return _read(reader, runs, blocks, nodes, chosen, start.control, start.size, dropped, began)


def _read(
    reader: Reader,
    runs: TaskRuns,
    blocks: Sequence[Tensor],
    nodes: NodeOutputs,
    chosen: Sequence[Tensor],
    control: Tensor | None,
    size: int,
    dropped: int,
    began: float,
) -> MechanismReading:
    """Run every circuit on the evaluation half."""
    graph = reader.wiring.graph
    drawn = random_circuits(graph, size, reader.config.random, reader.seed)
    circuits = [*chosen, *([] if control is None else [control]), *drawn]
    found = _each(circuits, runs, reader.world)
    named = found[: len(circuits) - len(drawn)]
    possible = graph.possible
    return MechanismReading(
        blocks_a=blocks[0][:, possible],
        blocks_b=blocks[1][:, possible],
        own=chosen[-1],
        nodes=nodes,
        full=runs.clean,
        empty=runs.corrupt,
        index=named[0],
        matched=named[1],
        extracted=named[2],
        control=None if control is None else named[3],
        random=torch.stack(found[len(named) :]),
        dropped=dropped,
        seconds=time.monotonic() - began,
    )


def _each(circuits: Sequence[Tensor], run: Callable[[Tensor], Tensor], world: World) -> list[Tensor]:
    """Every different circuit once, shared among the processes."""
    first = {circuit.numpy().tobytes(): circuit for circuit in reversed(circuits)}
    keys = list(first)
    done = dict(zip(keys, spread(len(keys), lambda i: run(first[keys[i]]), world), strict=True))
    return [done[circuit.numpy().tobytes()] for circuit in circuits]


def _size(reader: Reader, task: Task, select: Sequence[int], scores: Tensor, baseline: Sources | None) -> int:
    """Edges of a circuit: as configured, else the fewest of :data:`SIZES` that are faithful on the selecting half."""
    graph, wanted = reader.wiring.graph, reader.config.size
    if wanted != "auto":
        return max(1, round(wanted * graph.size))
    sizes = sorted({max(1, round(share * graph.size)) for share in SIZES})
    runs = reader.runs(task, select, baseline)
    whole = run_on_main(lambda: float((runs.clean - runs.corrupt).mean()), reader.world)

    def effect(i: int) -> float:
        return float((runs(strongest(graph, scores, sizes[i])) - runs.corrupt).mean())

    values = spread(len(sizes), effect, reader.world)
    faithful = [size for size, value in zip(sizes, values, strict=True) if whole and value / whole >= FAITHFUL]
    return faithful[0] if faithful else sizes[-1]
