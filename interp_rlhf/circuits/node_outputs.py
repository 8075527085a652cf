"""What every head and MLP adds to the residual stream on a task's clean prompts: what nodes are matched by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from interp_rlhf.activations.engines import measuring
from interp_rlhf.circuits.passes import Pass, paired_inputs, written_on
from interp_rlhf.circuits.tasks import Task
from interp_rlhf.circuits.wiring import Wiring

#: Width to which outputs are brought by a fixed random projection (Johnson & Lindenstrauss 1984) where they are wider.
_WIDTH = 128


@dataclass(frozen=True, slots=True)
class NodeOutputs:
    """Of p prompts: ``heads [L·H, p, k]`` and ``mlps [L, p, k]``, mean over tokens and last token side by side."""

    heads: Tensor
    mlps: Tensor


def node_outputs(
    model: nn.Module, wiring: Wiring, task: Task, pairs: Sequence[int], pad_token_id: int, batch_size: int
) -> NodeOutputs:
    """Outputs on the clean prompts of these pairs, float32 on the CPU.

    Both parts are linear in what a node writes, so that they are taken of the heads' outputs before ``W_O``.
    """
    rows: list[list[Tensor]] = []
    with measuring(model):
        output = [block.output_weight() for block in wiring.blocks]
        for start in range(0, len(pairs), batch_size):
            batch = task.batch(pairs[start : start + batch_size], pad_token_id)
            inputs, _ = paired_inputs(batch.clean, batch.clean, wiring.engine.device)
            one, written = Pass(wiring, inputs), written_on(wiring, inputs)
            heads = [_summary(one, z).unflatten(-1, (wiring.graph.n_heads, -1)) for z in written.heads]
            heads = [torch.einsum("pshk,hkd->hpsd", z, weight) for z, weight in zip(heads, output, strict=True)]
            mlps = [_summary(one, value)[None] for value in written.mlps]
            rows.append([torch.cat(heads).flatten(2), torch.cat(mlps).flatten(2)])
    heads, mlps = (torch.cat(parts, dim=1) for parts in zip(*rows, strict=True))
    return NodeOutputs(_narrow(heads), _narrow(mlps))


def _summary(one: Pass, value: Tensor) -> Tensor:
    """Mean over tokens and last token of ``[N, w]``: ``[p, 2, w]``."""
    parts = value.split(one.mask.sum(1).tolist())
    return torch.stack([torch.stack((part.mean(0), part[-1])) for part in parts])


def _narrow(value: Tensor) -> Tensor:
    value = value.cpu()
    if value.shape[-1] <= _WIDTH:
        return value
    drawn = torch.randn(value.shape[-1], _WIDTH, generator=torch.Generator().manual_seed(0))
    return value @ (drawn / _WIDTH**0.5)
