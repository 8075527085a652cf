"""Which node of one model does what a node of another did? Nodes are matched by what they output on the same prompts.

Training can move a mechanism to other heads (phantom specialisation, 2606.06267): a circuit that fails node by node of
the same index may still be the circuit, in other places. The assignment is the Hungarian one (Kuhn 1955), by SciPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from interp_rlhf.circuits.graph import Graph
from interp_rlhf.errors import MeasurementError

#: Similarity added for equal scale, which tells apart nodes whose outputs are multiples of each other.
_SCALE = 1e-6
#: Similarity added for the same index, which decides between nodes that nothing else tells apart.
_IDENTITY = 1e-9
#: Outputs that vary over prompts by less than this share of their size do not vary: one float32 rounding and some.
_DEAD = 1e-6


def match_nodes(outputs_0: Float[Tensor, "n p k"], outputs_t: Float[Tensor, "m p k"]) -> Int[Tensor, " n"]:
    """The one-to-one assignment of nodes that has the largest summed cosine similarity of their outputs.

    Outputs are centred over prompts, node by node and coordinate by coordinate, and flattened to ``[n, p·k]``; no
    coordinate is rescaled. A node whose output does not vary over prompts is as similar to another such node as can
    be (1), and unlike all others (0). Exact permutations are recovered exactly. Among equally good assignments the one
    with equal scales wins, then the one with most nodes at their own index.

    Args:
        outputs_0: ``[n, p, k]`` output of each of n nodes on p prompts (or positions of prompts), in coordinates that
            all nodes share: what a head or an MLP adds to the residual stream.
        outputs_t: ``[m, p, k]`` of the other model on the same prompts; m may differ from n. Models of another width
            have to be brought to common coordinates first.

    Returns:
        ``[n]`` the index in ``outputs_t`` of each node's match; −1 where there is none (only with m < n). With
        n = m a permutation.

    Raises:
        MeasurementError: shapes that do not fit, fewer than 2 prompts, or NaN.

    >>> outputs = torch.tensor([[[1.0], [0.0], [0.0]], [[0.0], [2.0], [0.0]], [[0.0], [0.0], [5.0]]])
    >>> match_nodes(outputs, 3 * outputs[[2, 0, 1]])
    tensor([1, 2, 0])
    """
    shapes = tuple(outputs_0.shape), tuple(outputs_t.shape)
    if any(len(shape) != 3 or 0 in shape for shape in shapes) or shapes[0][1:] != shapes[1][1:] or shapes[0][1] < 2:
        raise MeasurementError(
            f"node matching: expected outputs [nodes, prompts, width] of the same 2 or more prompts, found {shapes}"
        )
    (unit_0, length_0), (unit_t, length_t) = (_directions(outputs) for outputs in (outputs_0, outputs_t))
    similarity = unit_0 @ unit_t.T + ((length_0 == 0)[:, None] & (length_t == 0)[None]).double()
    squares = (length_0**2)[:, None] + (length_t**2)[None]
    equal = torch.where(squares > 0, 2 * torch.outer(length_0, length_t) / squares.clamp_min(1e-300), 1.0)
    return _assign(similarity + _SCALE * equal + _IDENTITY * torch.eye(*similarity.shape, dtype=torch.float64))


@dataclass(frozen=True, slots=True, eq=False)
class NodeMatching:
    """Where each node of the start is found now, within one kind of node and across all layers.

    Embeddings and logits stay where they are. Both models have the same graph; matching other sizes needs a graph for
    each side in :meth:`map_edges`, the vectors here can already hold it (−1: no match).

    Attributes:
        heads: ``[L·H]`` query heads in the order layer, head: the match of head h of layer l is at ``l·H + h``.
        groups: ``[L·G]`` key-value heads, likewise.
        mlps: ``[L]`` MLPs.
    """

    heads: Int[Tensor, " lh"]
    groups: Int[Tensor, " lg"]
    mlps: Int[Tensor, " l"]

    @classmethod
    def of_outputs(
        cls,
        graph: Graph,
        heads_0: Float[Tensor, "lh p d"],
        heads_t: Float[Tensor, "lh p d"],
        mlps_0: Float[Tensor, "l p d"],
        mlps_t: Float[Tensor, "l p d"],
    ) -> NodeMatching:
        """Match all nodes of a model with those of its start.

        Key-value heads have no output of their own: each goes where most of its query heads went, one to one.

        Args:
            graph: of both models.
            heads_0, heads_t: ``[L·H, p, d]`` what each query head adds to the residual stream, at step 0 and now, on
                the same prompts.
            mlps_0, mlps_t: ``[L, p, d]`` likewise.

        Raises:
            MeasurementError: as :func:`match_nodes`, or numbers of nodes that are not the graph's.
        """
        expected = {"heads": graph.n_layers * graph.n_heads, "mlps": graph.n_layers}
        for kind, pair in (("heads", (heads_0, heads_t)), ("mlps", (mlps_0, mlps_t))):
            if {len(outputs) for outputs in pair} != {expected[kind]}:
                found = [len(outputs) for outputs in pair]
                raise MeasurementError(f"node matching: {kind}: expected {expected[kind]} on both sides, found {found}")
        heads = match_nodes(heads_0, heads_t)
        speaks = (_directions(heads_0)[1] > 0) & (_directions(heads_t)[1] > 0)[heads]
        return cls(heads, _match_groups(heads, speaks, graph), match_nodes(mlps_0, mlps_t))

    def map_edges(self, selected: Bool[Tensor, "s t"], graph: Graph) -> tuple[Bool[Tensor, "s t"], int]:
        """The same circuit between the nodes that now do what its nodes did.

        Args:
            selected: ``[S, T]`` edges of the start's circuit.
            graph: of both models.

        Returns:
            ``[S, T]`` the mapped edges, and how many were dropped: where the reader's match comes before the
            writer's, there is no such edge.

        Raises:
            MeasurementError: another shape, edges that the graph does not have, or a matching of another model.
        """
        possible = graph.possible
        if selected.shape != possible.shape or bool((selected & ~possible).any()):
            raise MeasurementError(
                f"node matching: expected a selection among the {int(possible.sum())} edges of the graph "
                f"{tuple(possible.shape)}, found {tuple(selected.shape)}"
            )
        heads, groups, mlps = (self.heads, graph.n_heads), (self.groups, graph.n_kv_heads), (self.mlps, 1)
        if any(len(matches) != graph.n_layers * width for matches, width in (heads, groups, mlps)):
            raise MeasurementError(
                f"node matching: of {len(self.heads)} heads, {len(self.groups)} key-value heads and {len(self.mlps)} "
                f"MLPs, expected those of {graph.n_layers} layers of {graph.n_heads}, {graph.n_kv_heads} and 1"
            )
        sources = _places(1, (heads, mlps), graph.n_layers, len(graph.sources))
        targets = _places(0, (heads, groups, groups, mlps), graph.n_layers, len(graph.targets))
        rows, columns = selected.nonzero(as_tuple=True)
        rows, columns = sources[rows], targets[columns]
        found = (rows >= 0) & (columns >= 0)
        mapped = torch.zeros_like(possible)
        mapped[rows[found], columns[found]] = True
        mapped &= possible
        return mapped, int(selected.sum()) - int(mapped.sum())


def _directions(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Centred outputs at length 1 ``[n, p·k]`` float64, and their lengths ``[n]``; both 0 where nothing varies."""
    if not bool(torch.isfinite(outputs).all()):
        raise MeasurementError("node matching: expected finite outputs, found NaN or infinite ones")
    values = outputs.detach().cpu().double()
    flat = (values - values.mean(1, keepdim=True)).flatten(1)
    lengths = flat.norm(dim=1)
    lengths = torch.where(lengths > _DEAD * values.flatten(1).norm(dim=1), lengths, 0.0)
    return torch.where(lengths[:, None] > 0, flat / lengths[:, None], 0.0), lengths


def _assign(similarity: Float[Tensor, "n m"]) -> Int[Tensor, " n"]:
    rows, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    matches = torch.full((len(similarity),), -1)
    matches[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return matches


def _match_groups(heads: Int[Tensor, " lh"], speaks: Bool[Tensor, " lh"], graph: Graph) -> Int[Tensor, " lg"]:
    """One-to-one assignment of key-value heads that keeps most query heads with theirs, else at its own index.

    Only query heads in ``speaks`` count: where the output does not vary, the match says nothing about its group.
    """
    each, n = graph.n_heads // graph.n_kv_heads, graph.n_layers * graph.n_kv_heads
    votes = torch.zeros(n, n, dtype=torch.float64)
    votes.index_put_((torch.arange(len(heads)) // each, heads // each), speaks.double(), accumulate=True)
    return _assign(votes + torch.eye(n, dtype=torch.float64) / (2 * n))


def _places(first: int, parts: Sequence[tuple[Tensor, int]], n_layers: int, size: int) -> Tensor:
    """Where the match of each of ``size`` nodes is; −1 where it has none.

    Args:
        first: place of the first layer's first node; what is before it and after the last layer stays.
        parts: in the order within a layer the matches of a kind of node, ``[L·width]``, and its width in a layer.
    """
    block, places, offset = sum(width for _, width in parts), torch.arange(size), first
    for matches, width in parts:
        own = (offset + block * torch.arange(n_layers)[:, None] + torch.arange(width)).flatten()
        places[own] = torch.where(matches >= 0, own[matches], -1)
        offset += width
    return places
