"""The graph of heads and MLPs, and circuits in it: edge scores, and a selection among the edges.

A node writes to the residual stream once and may read it several times. Sources, in the order of a forward pass:
``embed``, then of every layer its heads ``a{l}.h{h}`` and its MLP ``m{l}``. Targets, likewise: of every layer the
queries ``a{l}.h{h}.q``, the keys and values of its key-value heads ``a{l}.h{g}.k`` and ``a{l}.h{g}.v``, and ``m{l}``;
at the end ``logits``. Query head h uses key-value head ``h // (H / G)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from interp_rlhf.errors import MeasurementError

if TYPE_CHECKING:
    from pathlib import Path

    import networkx as nx
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Graph:
    """The graph of one architecture.

    Attributes:
        n_layers: L.
        n_heads: H, query heads per layer.
        n_kv_heads: G, key-value heads per layer.
        parallel: whether an MLP reads what its layer's attention reads, and not what that writes (GPT-NeoX, Phi).
        architecture: class name of the model; two graphs are equal only if it is.

    >>> graph = Graph(n_layers=1, n_heads=2, n_kv_heads=1, parallel=False, architecture="LlamaForCausalLM")
    >>> graph.sources
    ('embed', 'a0.h0', 'a0.h1', 'm0')
    >>> graph.targets
    ('a0.h0.q', 'a0.h1.q', 'a0.h0.k', 'a0.h0.v', 'm0', 'logits')
    >>> graph.size
    11
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool
    architecture: str

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the S = 1 + L(H + 1) sources."""
        return _sources(self)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the T = L(H + 2G + 1) + 1 targets."""
        return _targets(self)

    @property
    def possible(self) -> Tensor:
        """Which edges there are, ``[S, T]`` bool: the source is written before the target reads."""
        return _possible(self).clone()

    @property
    def size(self) -> int:
        """How many edges there are."""
        return int(_possible(self).sum())


@lru_cache(maxsize=16)
def _sources(graph: Graph) -> tuple[str, ...]:
    names = ["embed"]
    for layer in range(graph.n_layers):
        names += [*(f"a{layer}.h{head}" for head in range(graph.n_heads)), f"m{layer}"]
    return tuple(names)


@lru_cache(maxsize=16)
def _targets(graph: Graph) -> tuple[str, ...]:
    names = []
    for layer in range(graph.n_layers):
        names += [f"a{layer}.h{head}.q" for head in range(graph.n_heads)]
        names += [f"a{layer}.h{group}.{role}" for role in "kv" for group in range(graph.n_kv_heads)]
        names.append(f"m{layer}")
    return (*names, "logits")


@lru_cache(maxsize=16)
def _possible(graph: Graph) -> Tensor:
    """By time: a source is written at the end of its half of a layer, a target read at the beginning of its."""
    heads, readers = graph.n_heads, graph.n_heads + 2 * graph.n_kv_heads
    written, read = [-1], []
    for layer in range(graph.n_layers):
        written += [2 * layer] * heads + [2 * layer + 1]
        read += [2 * layer] * readers + [2 * layer + (0 if graph.parallel else 1)]
    read.append(2 * graph.n_layers)
    return torch.tensor(written)[:, None] < torch.tensor(read)[None]


class Edge(NamedTuple):
    """One edge by the names of its ends."""

    source: str
    target: str
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class Circuit:
    """Edge scores of one model on one task, and which of the edges are in the circuit.

    Attributes:
        graph: of the model.
        scores: ``[S, T]`` float32 on the CPU, in the metric's unit: what corrupting that edge alone does to the metric,
            estimated (``eap``, ``eap-ig``) or measured (``exact``). Impossible edges are 0.
        selected: ``[S, T]`` bool, ``None`` where nothing has been selected yet.
        method, steps, ablation: how the scores were had (:func:`~interp_rlhf.attribute_edges`).
        n: examples they are the mean over.
        task: its name, where there is one.

    Raises:
        MeasurementError: scores of another shape or type or with NaN, or a selection that the graph does not have.
    """

    graph: Graph
    scores: Tensor
    selected: Tensor | None = None
    method: str = "eap"
    steps: int = 1
    ablation: str = "patching"
    n: int = 0
    task: str = ""

    def __post_init__(self) -> None:
        possible = _possible(self.graph)
        scores = self.scores
        if scores.shape != possible.shape or scores.dtype != torch.float32 or not bool(scores.isfinite().all()):
            raise MeasurementError(
                f"circuit: scores: expected finite float32 {list(possible.shape)}, found {scores.dtype} "
                f"{list(scores.shape)} with {int((~scores.isfinite()).sum())} that are not finite"
            )
        if bool(scores[~possible].any()):
            raise MeasurementError("circuit: scores: expected 0 for every edge that is not possible, found others")
        selected = self.selected
        if selected is None:
            return
        if selected.shape != possible.shape or selected.dtype != torch.bool or bool(selected[~possible].any()):
            raise MeasurementError(
                f"circuit: selected: expected possible edges as bool {list(possible.shape)}, found impossible ones or "
                f"{selected.dtype} {list(selected.shape)}"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """Row names of ``scores``."""
        return self.graph.sources

    @property
    def targets(self) -> tuple[str, ...]:
        """Column names of ``scores``."""
        return self.graph.targets

    # -- selection -------------------------------------------------------------------------------------------------

    def top(self, n: int, *, absolute: bool = True) -> Self:
        """Select the ``n`` edges of largest ``|score|`` (or, not ``absolute``, of the most negative score).

        Raises:
            MeasurementError: the graph does not have that many edges.
        """
        return replace(self, selected=strongest(self.graph, self.scores, n, absolute=absolute))

    def threshold(self, value: float, *, absolute: bool = True) -> Self:
        """Select the edges with ``|score| ≥ value`` (or, not ``absolute``, with ``score ≤ −value``).

        Raises:
            MeasurementError: ``value`` is NaN.
        """
        if value != value:
            raise MeasurementError("threshold: expected a number, found nan")
        key = self.scores.abs() if absolute else -self.scores
        return replace(self, selected=(key >= value) & _possible(self.graph))

    def greedy(self, n: int, *, absolute: bool = True) -> Self:
        """Select ``n`` edges from the logits backwards, so that every edge leads there.

        The strongest edge into a node that has been reached comes next; its source is then reached: a head with its
        query and its key-value head's key and value, an MLP with its input (Hanna et al. 2024, arXiv 2403.17806).

        Raises:
            MeasurementError: the graph does not have that many edges.
        """
        order, width = _ranked(self.graph, self.scores, n, absolute), len(self.targets)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        rank, possible = rank.view_as(self.scores), _possible(self.graph)
        waiting: list[int] = []
        opened, new = set[int](), {width - 1}
        taken: list[int] = []
        for _ in range(n):
            for column in new:
                for place in rank[possible[:, column], column].tolist():
                    heappush(waiting, place)
            opened |= new
            taken.append(heappop(waiting))
            new = {*_inputs(self.graph, int(order[taken[-1]]) // width)} - opened
        selected = torch.zeros(len(order), dtype=torch.bool)
        selected[order[taken]] = True
        return replace(self, selected=selected.view_as(self.scores))

    def pruned(self) -> Self:
        """The selection without the edges that lie on no path from ``embed`` to ``logits``.

        None may be left. A key or value edge leads into every query head of its group. Under patching the pruned
        circuit does what the whole one did: what no input reaches writes its corrupt output, and what leads nowhere is
        not read. That fails under mean and zero ablation (a component without inputs then writes something else than
        its ablated value) and behind post-norms (Gemma 2 and 3, OLMo 2), where one head's output scales the others'.

        Raises:
            MeasurementError: nothing has been selected.

        >>> graph = Graph(n_layers=1, n_heads=1, n_kv_heads=1, parallel=False, architecture="M")
        >>> scores = torch.zeros(3, 5)
        >>> scores[0, 4], scores[1, 4], scores[0, 3], scores[2, 4] = 4.0, 3.0, 2.0, 1.0
        >>> [edge[:2] for edge in Circuit(graph, scores).top(3).pruned().edges()]
        [('embed', 'logits')]
        """
        if self.selected is None:
            raise MeasurementError("circuit: pruned: expected a selection, found none; call top, greedy or threshold")
        selected = self.selected
        reads = [list(_inputs(self.graph, source)) for source in range(len(self.sources))]
        reached = torch.zeros(len(self.sources), dtype=torch.bool)
        leads = torch.zeros(len(self.targets), dtype=torch.bool)
        reached[0], leads[-1] = True, True
        for source in range(1, len(self.sources)):
            reached[source] = bool(selected[:, reads[source]][reached].any())
        for source in reversed(range(len(self.sources))):
            if bool(selected[source, leads].any()):
                leads[reads[source]] = True
        return replace(self, selected=selected & reached[:, None] & leads)

    def edges(self) -> list[Edge]:
        """The selected edges, or all possible ones where nothing was selected, by falling ``|score|``."""
        chosen = _possible(self.graph) if self.selected is None else self.selected
        sources, targets = self.sources, self.targets
        places, scores = chosen.nonzero().tolist(), self.scores[chosen].tolist()
        found = [Edge(sources[i], targets[j], score) for (i, j), score in zip(places, scores, strict=True)]
        return sorted(found, key=lambda edge: -abs(edge.score))

    # -- views -----------------------------------------------------------------------------------------------------

    def to_networkx(self) -> nx.MultiDiGraph:
        """Nodes are components; every edge's key is what it feeds (``q``, ``k``, ``v`` or ``in``), ``score`` its score.

        A key-value head's edges go to each query head of its group.
        """
        import networkx as nx

        graph = nx.MultiDiGraph(architecture=self.graph.architecture, task=self.task, method=self.method)
        graph.add_nodes_from([*self.sources, "logits"])
        for edge in self.edges():
            for node, role in readers_of(self.graph, edge.target):
                graph.add_edge(edge.source, node, key=role, score=edge.score)
        return graph

    def to_frame(self) -> pd.DataFrame:
        """One row per possible edge: ``source``, ``target``, ``score``, ``selected``."""
        import pandas as pd

        possible = _possible(self.graph)
        selected = torch.zeros_like(possible) if self.selected is None else self.selected
        rows, columns = possible.nonzero(as_tuple=True)
        return pd.DataFrame(
            {
                "source": [self.sources[i] for i in rows.tolist()],
                "target": [self.targets[j] for j in columns.tolist()],
                "score": self.scores[possible].double().numpy(),
                "selected": selected[possible].numpy(),
            }
        )

    def per_query_head(self) -> Self:
        """The same circuit on a graph with one key and one value per query head, as tools that ungroup attention do.

        Every query head of a group gets an equal share of its key's and value's scores, so that they sum to the
        group's; a selected edge is selected for each of them.
        """
        graph = replace(self.graph, n_kv_heads=self.graph.n_heads)
        each = self.graph.n_heads // self.graph.n_kv_heads
        place, shares = [], []
        for layer in range(self.graph.n_layers):
            start = layer * (self.graph.n_heads + 2 * self.graph.n_kv_heads + 1)
            place += [start + head for head in range(self.graph.n_heads)]
            shares += [1.0] * self.graph.n_heads
            for role in (1, 2):
                first = start + self.graph.n_heads + (role - 1) * self.graph.n_kv_heads
                place += [first + head // each for head in range(self.graph.n_heads)]
                shares += [1.0 / each] * self.graph.n_heads
            place.append(start + self.graph.n_heads + 2 * self.graph.n_kv_heads)
            shares.append(1.0)
        columns = torch.tensor([*place, len(self.targets) - 1])
        scores = self.scores[:, columns] * torch.tensor([*shares, 1.0])
        return replace(
            self, graph=graph, scores=scores, selected=None if self.selected is None else self.selected[:, columns]
        )

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write it to ``.json`` or ``.parquet`` (``docs/formats.md``). Scores come back exactly."""
        from interp_rlhf.circuits.files import save_circuit

        save_circuit(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what :meth:`save` wrote.

        Raises:
            FormatError: a missing or damaged file, or another format version; names file and field.
        """
        from interp_rlhf.circuits.files import load_circuit

        return load_circuit(path)


def strongest(graph: Graph, scores: Tensor, n: int, *, absolute: bool = True) -> Tensor:
    """The ``n`` strongest edges of ``scores [S, T]`` as a selection ``[S, T]`` bool; of equal ones the earlier.

    Raises:
        MeasurementError: the graph does not have that many edges.
    """
    selected = torch.zeros(scores.numel(), dtype=torch.bool)
    selected[_ranked(graph, scores, n, absolute)[:n]] = True
    return selected.view_as(scores)


def check_graph(circuit: Circuit, graph: Graph) -> None:
    """Refuse a circuit that is of another model than the one it is to be used on.

    Raises:
        MeasurementError: names both.
    """
    if circuit.graph != graph:
        raise MeasurementError(f"circuit: expected one of {_sizes(graph)}, found one of {_sizes(circuit.graph)}")


def readers_of(graph: Graph, target: str) -> Iterator[tuple[str, str]]:
    """The components that a target belongs to, each with its role: a key of a group belongs to several heads.

    >>> list(readers_of(Graph(1, 4, 2, False, "M"), "a0.h1.k"))
    [('a0.h2', 'k'), ('a0.h3', 'k')]
    """
    node, _, role = target.rpartition(".")
    if role not in ("k", "v"):
        yield (node, role) if node else (target, "in")
        return
    layer, _, group = node.partition(".h")
    each = graph.n_heads // graph.n_kv_heads
    for head in range(int(group) * each, (int(group) + 1) * each):
        yield f"{layer}.h{head}", role


def _inputs(graph: Graph, source: int) -> Iterator[int]:
    """Columns of what the component in row ``source`` reads."""
    if source == 0:
        return
    layer, within = divmod(source - 1, graph.n_heads + 1)
    readers = graph.n_heads + 2 * graph.n_kv_heads
    start = layer * (readers + 1)
    if within == graph.n_heads:
        yield start + readers
        return
    group = within // (graph.n_heads // graph.n_kv_heads)
    yield start + within
    yield start + graph.n_heads + group
    yield start + graph.n_heads + graph.n_kv_heads + group


def _ranked(graph: Graph, scores: Tensor, n: int, absolute: bool) -> Tensor:
    """Places in ``scores`` from the strongest edge to the weakest, of equal ones the earlier first: ``[S * T]``."""
    if not 1 <= n <= graph.size:
        raise MeasurementError(f"circuit: expected 1 to {graph.size} edges, found {n}")
    key = scores.abs() if absolute else -scores
    return torch.where(_possible(graph), key, -torch.inf).flatten().argsort(descending=True, stable=True)


def _sizes(graph: Graph) -> str:
    heads = f"{graph.n_heads} heads ({graph.n_kv_heads} key-value)"
    return f"{graph.architecture} with {graph.n_layers} layers of {heads}{', parallel' if graph.parallel else ''}"
