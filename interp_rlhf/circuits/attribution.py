"""Edge attribution on the live model: which connections between heads and MLPs carry a behaviour.

    clean, corrupt ─► what every component writes (passes) ─► Δ = corrupt − clean
    clean (EAP), or embeddings from corrupt to clean (EAP-IG) ─► ∂metric where every reader reads (passes)
    Δ · ∂metric, chunk by chunk (contraction) ─► scores [S, T] ─► Circuit

EAP: Syed et al. 2023, arXiv 2310.10348; EAP-IG: Hanna et al. 2024, arXiv 2403.17806.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp_rlhf.activations.engines import measuring
from interp_rlhf.circuits.contraction import Weights, chunk_size, edge_scores
from interp_rlhf.circuits.graph import Circuit
from interp_rlhf.circuits.interventions import Ablation, Intervention, RunWeights, ablated, difference, measured
from interp_rlhf.circuits.passes import (
    GradientPass,
    Metric,
    Pair,
    Pass,
    Sources,
    paired_inputs,
    read_gradients,
    read_sources,
)
from interp_rlhf.circuits.wiring import Wiring, find_wiring
from interp_rlhf.errors import MeasurementError

Method = Literal["eap", "eap-ig", "exact"]

#: Edges from which on exact patching shows its progress.
_MANY = 500


def attribute_edges(
    model: nn.Module,
    clean: Mapping[str, Tensor],
    corrupt: Mapping[str, Tensor],
    metric: Metric,
    *,
    method: Method = "eap",
    steps: int = 5,
    ablation: Ablation = "patching",
    reads: str | None = None,
    memory: float = 512,
    layers: str | None = None,
) -> Circuit:
    """Score of every edge between the components of a model, as it is: wrapped, adapted, in training.

    ``score(u, v) = mean over examples of Σ_tokens (a_u^corrupt − a_u^clean)·∂metric/∂in_v``, the estimated change of
    the metric when edge u → v alone is corrupted; ``in_v`` is v's own copy of the residual stream, before the norm.

    ============  ====================================================================================================
    method        gradient
    ============  ====================================================================================================
    ``eap``       at the clean input: two forward passes, one backward pass
    ``eap-ig``    mean over embeddings ``corrupt + k/m·(clean − corrupt)``, k = 0 … m − 1: 2 + m forward passes, m
                  backward passes (Hanna et al. 2024)
    ``exact``     none: every edge is corrupted in a forward pass of its own, score = metric then − clean metric
    ============  ====================================================================================================

    No parameter gets a gradient, and the model is left as it was: hooks, modes, random states, ``.grad``.

    Args:
        model: a Hugging Face decoder model, plain or inside DDP, DeepSpeed (ZeRO-1/2), PEFT or TRL's wrappers.
        clean, corrupt: ``input_ids`` and ``attention_mask``, each ``[B, T]``; padded alike.
        metric: ``metric(logits [B, T, V], clean_logits [B, T, V]) -> [B]``, differentiable in the first.
        method: as above.
        steps: m of EAP-IG.
        ablation: what a corrupted component writes: what it writes on ``corrupt`` (``patching``), the mean of that over
            all tokens (``mean``), or nothing (``zero``). The output projection's bias belongs to no head.
        reads: a hookpoint ``layers.<l>.resid_post`` that the metric reads instead of the logits, ``[B, T, d]``; the
            target ``logits`` stands for that reader then, and later layers are not run.
        memory: MiB that attribution may take beyond the passes and one pass's compact activations; EAP-IG is faster
            where those of several fit into it.
        layers: path of the decoder layers, for architectures that are not recognised.

    Returns:
        The :class:`Circuit` with ``scores [S, T]``, nothing selected yet.

    Raises:
        HookpointError: an architecture whose layers are not the sum of input, attention and MLP.
        MeasurementError: partitioned weights (ZeRO-3, FSDP2); inputs of unequal length; a metric that gives anything
            but finite ``[B]`` or writes into what it is given; too little memory.
    """
    _check_settings(metric, method, steps, ablation, memory)
    wiring = find_wiring(model, layers=layers)
    pair = paired_inputs(clean, corrupt, wiring.engine.device)
    _check_tokens(wiring, pair)
    with measuring(model):
        scores = attribute_pair(
            wiring, pair, metric, method=method, steps=steps, ablation=ablation, reads=reads, memory=memory
        )
    return Circuit(
        graph=wiring.graph,
        scores=scores,
        selected=None,
        method=method,
        steps=steps if method == "eap-ig" else 1,
        ablation=ablation,
        n=len(pair[0]["input_ids"]),
    )


def _check_settings(metric: Metric, method: Method, steps: int, ablation: Ablation, memory: float) -> None:
    whole = type(steps) is int and steps >= 1
    if method not in get_args(Method) or ablation not in get_args(Ablation) or not whole:
        raise MeasurementError(
            f"attribute_edges: expected a method of {', '.join(get_args(Method))}, an ablation of "
            f"{', '.join(get_args(Ablation))} and steps of at least 1; found {method!r}, {ablation!r}, {steps!r}"
        )
    if not callable(metric) or not isinstance(memory, int | float) or not 0 <= memory < float("inf"):
        raise MeasurementError(
            f"attribute_edges: expected a metric to call and a memory of MiB, found {metric!r} and {memory!r}"
        )


def _check_tokens(wiring: Wiring, pair: Pair) -> None:
    known = getattr(wiring.parts.embed, "num_embeddings", None)
    for name, inputs in zip(("clean", "corrupt"), pair, strict=True):
        largest = int(inputs["input_ids"].max())
        if isinstance(known, int) and largest >= known:
            raise MeasurementError(f"{name}: input_ids: expected ids below {known}, the model's, found {largest}")


def attribute_pair(
    wiring: Wiring,
    pair: Pair,
    metric: Metric,
    *,
    method: Method,
    steps: int,
    ablation: Ablation,
    reads: str | None,
    memory: float,
    baseline: Sources | None = None,
) -> Tensor:
    """Scores ``[S, T]`` on one batch of a model whose wiring is known, inside ``measuring``; see above."""
    if method == "exact":
        return _exact(wiring, pair, metric, ablation, reads, memory, baseline)
    return _attribute(wiring, pair, metric, steps if method == "eap-ig" else 0, ablation, reads, memory, baseline)


def _attribute(
    wiring: Wiring,
    pair: Pair,
    metric: Metric,
    steps: int,
    ablation: Ablation,
    reads: str | None,
    memory: float,
    baseline: Sources | None,
) -> Tensor:
    """Mean scores ``[S, T]``; ``steps = 0`` is EAP."""
    clean = Pass(wiring, pair[0], reads)
    rows, memory = len(pair[0]["input_ids"]), int(memory * 2**20)
    weights = Weights(wiring, memory)
    baseline = ablated(wiring, pair[1], ablation, reads, baseline)
    if not steps:
        found = read_gradients(clean, lambda now: measured(metric, now, now.detach()), sources=True)
        deltas = difference(baseline, found.sources)
        return (edge_scores(deltas, [found], wiring, weights, memory) / rows).float().cpu()
    written, result = read_sources(clean)
    deltas = difference(baseline, written)
    total: Tensor | float = 0.0
    waiting: list[GradientPass] = []
    for k in range(steps):
        embed = _towards(clean, deltas.embed, 1 - k / steps)
        waiting.append(read_gradients(clean, lambda now: measured(metric, now, result), embed=embed))
        if k == steps - 1 or len(waiting) > chunk_size(wiring, weights, memory)[1] // waiting[0].bytes:
            total = total + edge_scores(deltas, waiting, wiring, weights, memory)
            waiting = []
    return (torch.as_tensor(total) / (steps * rows)).float().cpu()


def _towards(clean: Pass, delta: Tensor, share: float) -> Callable[[Tensor], Tensor]:
    """Moves the clean embeddings ``[B, T, d]`` by a share of ``delta [N, d]``."""

    def move(embed: Tensor) -> Tensor:
        moved = embed.clone()
        moved[clean.mask] = (moved[clean.mask].float() + share * delta).to(embed.dtype)
        return moved

    return move


def _exact(
    wiring: Wiring,
    pair: Pair,
    metric: Metric,
    ablation: Ablation,
    reads: str | None,
    memory: float,
    baseline: Sources | None,
) -> Tensor:
    """Metric with one edge corrupted − clean metric, for every edge, mean over examples ``[S, T]``."""
    graph = wiring.graph
    run = Intervention(wiring, pair, metric, ablation, reads, baseline=baseline, weights=RunWeights(wiring, memory))
    scores = torch.zeros(len(graph.sources), len(graph.targets))
    edges = graph.possible.nonzero().tolist()
    for source, target in tqdm(edges, desc="exact edge patching", unit="edge", disable=len(edges) < _MANY):
        kept = graph.possible.clone()
        kept[source, target] = False
        scores[source, target] = (run(kept) - run.clean).mean().cpu()
    return scores
