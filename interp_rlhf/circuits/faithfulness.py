"""How much of a behaviour a circuit carries, over circuit sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interp_rlhf.circuits.graph import Circuit, Graph, strongest
from interp_rlhf.errors import MeasurementError

#: Shares of all edges at which circuits are cut (those of the benchmark by Mueller et al. 2025, arXiv 2504.13151).
SHARES: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class FaithfulnessCurve:
    """Faithfulness of the strongest edges, by how many there are.

    Attributes:
        shares: of all possible edges, increasing.
        faithfulness: F of the circuit of that size.
        cpr: area under the curve over the share of edges, from F = 0 at no edge: higher is better, 1 for a circuit
            that carries everything at once (CPR of Mueller et al. 2025).
        cmd: area between the curve and 1, lower is better (CMD, ibid.).
    """

    shares: tuple[float, ...]
    faithfulness: tuple[float, ...]
    cpr: float
    cmd: float


def faithfulness_curve(
    run: Callable[[Tensor], Tensor],
    circuit: Circuit,
    full: Tensor,
    empty: Tensor,
    *,
    shares: Sequence[float] = SHARES,
    absolute: bool = True,
) -> FaithfulnessCurve:
    """F of the ``n`` strongest edges for several ``n``, with ``F = (M(C) − M(∅)) / (M(full) − M(∅))``.

    Args:
        run: metric ``[n]`` of a run restricted to the edges ``[S, T]``.
        circuit: edge scores.
        full, empty: metric ``[n]`` with all edges, with none.
        shares: of all possible edges; each gives at least one edge.
        absolute: by size of the score; else by the score itself, most negative (most helpful) first.

    Raises:
        MeasurementError: corrupting everything has no effect, or none that is a number; shares that do not increase
            from above 0 to at most 1.
    """
    whole = float((full - empty).mean())
    if not whole or not math.isfinite(whole):
        raise MeasurementError(f"faithfulness: M(full) − M(∅) is {whole:g}, a share of that effect is undefined")
    if not shares or not all(a < b for a, b in zip((0.0, *shares), (*shares, math.inf), strict=True)) or shares[-1] > 1:
        raise MeasurementError(f"faithfulness: shares: expected increasing ones in (0, 1], found {list(shares)}")
    sizes = [max(1, round(share * circuit.graph.size)) for share in shares]
    found = []
    for size in sizes:
        chosen = strongest(circuit.graph, circuit.scores, size, absolute=absolute)
        found.append(float((run(chosen) - empty).mean()) / whole)
    points = [0.0, *(size / circuit.graph.size for size in sizes)]
    values = torch.tensor([0.0, *found], dtype=torch.float64)
    x = torch.tensor(points, dtype=torch.float64)
    cpr, cmd = (float(torch.trapezoid(y, x)) for y in (values, (1 - values).abs()))
    return FaithfulnessCurve(tuple(points[1:]), tuple(found), cpr, cmd)


def random_circuits(graph: Graph, n: int, count: int, seed: int) -> list[Tensor]:
    """``count`` selections ``[S, T]`` of ``n`` edges each, drawn uniformly from those that are possible."""
    generator = torch.Generator().manual_seed(seed)
    edges = graph.possible.flatten().nonzero().squeeze(1)
    drawn = []
    for _ in range(count):
        selected = torch.zeros(graph.possible.numel(), dtype=torch.bool)
        selected[edges[torch.randperm(len(edges), generator=generator)[:n]]] = True
        drawn.append(selected.view_as(graph.possible))
    return drawn
