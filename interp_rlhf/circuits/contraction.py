"""From what components write and the gradients where readers read to a score per edge.

``score(u, v) = Σ_tokens ⟨Δ_u, ∂metric/∂in_v⟩`` where ``in_v`` is reader v's own copy of the residual stream, before
the norm. For a head's query, ``∂metric/∂in_v = Jᵀ W_Q[h]ᵀ g`` with ``g`` the gradient at the projection's output and
``J`` the norm's Jacobian; both are applied to a few tokens at a time, so that never more than ``memory`` is held. The
products over a chunk's tokens and channels are one matrix product per layer: ``2·N·d`` operations an edge. Scores are
linear in the gradients, so that those of several passes (EAP-IG) are added up first and multiplied once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from interp_rlhf.circuits.norms import Norm
from interp_rlhf.circuits.passes import GradientPass, Gradients, Sources
from interp_rlhf.circuits.wiring import Block, Wiring
from interp_rlhf.errors import MeasurementError

#: Tokens of a chunk: on a CPU as many as leave it in the cache, elsewhere as many as fill the device.
_CPU_TOKENS, _DEVICE_TOKENS = 64, 1024


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's maps between residual stream and heads, in float32.

    Attributes:
        readers: ``C(w ⊙ W[h])`` of queries, keys and values, stacked: ``[H + 2G, dh, d]``.
        output: ``W_O`` per head, ``[H, dh, d]``.
    """

    readers: Tensor
    output: Tensor


class Weights:
    """The layers' weights, kept while this lives where they fit into half of ``memory`` bytes, else made when asked."""

    def __init__(self, wiring: Wiring, memory: int) -> None:
        self._wiring = wiring
        parts, graph = wiring.parts, wiring.graph
        heads = 2 * (graph.n_heads + graph.n_kv_heads)
        #: Bytes that the kept weights take.
        self.bytes = 4 * parts.n_layers * heads * parts.head_dim * parts.d_model
        self._kept: dict[int, LayerWeights] | None = {} if self.bytes <= memory // 2 else None
        if self._kept is None:
            self.bytes //= parts.n_layers

    def __getitem__(self, layer: int) -> LayerWeights:
        if self._kept is not None and layer in self._kept:
            return self._kept[layer]
        block = self._wiring.blocks[layer]
        readers = torch.cat([role.weight() for role in (block.q, block.k, block.v)])
        if block.attention_norm is not None:
            readers = block.attention_norm.transposed(readers)
        made = LayerWeights(readers, block.output_weight())
        if self._kept is not None:
            self._kept[layer] = made
        return made


def edge_scores(
    deltas: Sources, found: Sequence[GradientPass], wiring: Wiring, weights: Weights, memory: int
) -> Tensor:
    """Scores summed over tokens and passes, ``[S, T]`` float64 on the model's device; impossible edges 0.

    Args:
        deltas: corrupt minus clean, of every component.
        found: gradients where the readers read, of one pass or several over the same tokens.
        wiring: the model's.
        weights: its weights.
        memory: bytes that chunks and weights may take together.

    Raises:
        MeasurementError: not even one token fits into ``memory``.
    """
    graph, n = wiring.graph, len(deltas.embed)
    scores = torch.zeros(len(graph.sources), len(graph.targets), dtype=torch.float64, device=deltas.embed.device)
    size, _ = chunk_size(wiring, weights, memory)
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        _add_chunk(scores, part, deltas, found, wiring, weights)
    return scores


def chunk_size(wiring: Wiring, weights: Weights, memory: int) -> tuple[int, int]:
    """Tokens per chunk, and the bytes of ``memory`` that are left then.

    Sources, one layer's readers and what is computed on the way stay within it.
    """
    graph, width = wiring.graph, wiring.parts.d_model
    readers = graph.n_heads + 2 * graph.n_kv_heads
    rows = len(graph.sources) + 2 * readers + graph.n_heads + 8
    fits = (memory - weights.bytes) // (4 * rows * width)
    if fits < 1:
        needed = math.ceil((weights.bytes + 4 * rows * width) / 2**20)
        raise MeasurementError(f"memory: expected at least {needed} MiB for this model, found {memory / 2**20:g}")
    size = min(_CPU_TOKENS if wiring.engine.device.type == "cpu" else _DEVICE_TOKENS, fits)
    return size, memory - weights.bytes - 4 * rows * width * size


def _add_chunk(
    scores: Tensor,
    part: slice,
    deltas: Sources,
    found: Sequence[GradientPass],
    wiring: Wiring,
    weights: Weights,
) -> None:
    graph, depth = wiring.graph, len(found[0].layers)
    written = deltas.embed.new_empty(len(graph.sources), part.stop - part.start, wiring.parts.d_model)
    written[0] = deltas.embed[part]
    known, column = 1, 0
    readers, heads = graph.n_heads + 2 * graph.n_kv_heads, graph.n_heads
    for layer, block in enumerate(wiring.blocks[:depth]):
        both, gradients = weights[layer], [one.layers[layer] for one in found]
        _add(scores, written[:known], attention_readers(block.attention_norm, gradients, both.readers, part), column)
        z = deltas.heads[layer][part].unflatten(1, (heads, -1)).transpose(0, 1)
        torch.bmm(z, both.output, out=written[known : known + heads])
        seen = known if graph.parallel else known + heads
        _add(scores, written[:seen], mlp_reader(block, gradients, part)[None], column + readers)
        known, column = known + heads + 1, column + readers + 1
        written[known - 1] = deltas.mlps[layer][part]
    _add(scores, written[:known], _sum([one.end[part] for one in found])[None], len(graph.targets) - 1)


def _add(scores: Tensor, written: Tensor, readers: Tensor, column: int) -> None:
    """Add ``⟨written [s, P, d], readers [t, P, d]⟩`` to the columns from ``column`` on."""
    scores[: len(written), column : column + len(readers)] += written.flatten(1) @ readers.flatten(1).T


def attention_readers(norm: Norm | None, gradients: Sequence[Gradients], weight: Tensor, part: slice) -> Tensor:
    """Gradient at each query's, key's and value's own copy of the residual stream, summed over passes.

    Args:
        norm: the norm before the attention.
        gradients: of the layer, in each pass.
        weight: :attr:`LayerWeights.readers`.
        part: tokens to compute, P of them.

    Returns:
        ``[H + 2G, P, d]``, queries, keys, values.
    """
    total: Tensor | None = None
    for one in gradients:
        g = torch.cat([role[part].transpose(0, 1) for role in (one.q, one.k, one.v)])
        hat: Tensor | None = None
        if norm is not None:
            x = one.x[part]
            r = norm.inverse_rms(x)
            hat, g = norm.centre(x) * r, g * r
        total = torch.bmm(g, weight) if total is None else total.baddbmm_(g, weight)
        if hat is not None:
            along = (torch.matmul(hat, weight.transpose(1, 2)) * g).sum(-1, keepdim=True) / hat.shape[-1]
            total.addcmul_(hat[None], along, value=-1)
    if total is None:
        raise MeasurementError("circuit: expected the gradients of a pass, found none")
    return total


def mlp_reader(block: Block, gradients: Sequence[Gradients], part: slice) -> Tensor:
    """Gradient ``[P, d]`` at the MLP's own copy of the residual stream, summed over passes."""
    norm = block.mlp_norm
    if norm is None:
        return _sum([one.mlp[part] for one in gradients])
    return reduce(torch.add, (norm.backward(one.x_mlp[part], one.mlp[part]) for one in gradients))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, parts)
