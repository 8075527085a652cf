"""Whether the columns that are taken for a head's query, key and value are that: attention is asked, names are not.

A causal attention says which they are. On the first token it can only look at that token, so that a head gives out its
value, or a share of it where there are sinks. A query at the first token is nobody else's business. And changing one
head's query or key changes that head, or that key's heads, and no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp_rlhf.activations.capturing import recording
from interp_rlhf.activations.hookpoints import ModelLayout, resolve_hookpoints
from interp_rlhf.errors import HookpointError

if TYPE_CHECKING:
    from interp_rlhf.activations.engines import Engine
    from interp_rlhf.circuits.wiring import Block


def check_values(place: str, block: Block, values: Tensor, heads: Tensor) -> None:
    """Refuse a layer whose heads do not give out their values on the first token.

    Args:
        place: the layer's name.
        values: output ``[1, T, out]`` of the module that makes the values.
        heads: what the heads give out side by side, ``[1, T, H·dh]``.

    Raises:
        HookpointError: they give out something else.
    """
    n, groups = block.q.columns.shape[0], block.v.columns.shape[0]
    value = values[0, 0][block.v.columns].float().repeat_interleave(n // groups, 0)
    given = heads[0, 0].float().unflatten(0, (n, -1))
    if given.shape == value.shape:
        share = (given * value).sum(1) / value.square().sum(1).clamp(min=1e-30)
        off = (given - share[:, None] * value).abs().amax()
        if bool((share >= 0).all()) and bool(off <= _tolerance(heads) * value.abs().amax().clamp(min=1e-30)):
            return
    raise _unsupported(place, block, "on the first token every head gives out its value")


def check_queries_and_keys(
    blocks: Sequence[Block],
    parts: ModelLayout,
    streams: Mapping[nn.Module, Tensor],
    engine: Engine,
    inputs: Mapping[str, Tensor],
) -> None:
    """Refuse an attention in which the columns of a head's query or key act on another head, or at another token.

    One layer of every class of attention is asked, in one pass that has a row for every head and ends there.

    Args:
        blocks: of all layers, wired alike.
        streams: input ``[1, T, d]`` of every layer on these inputs.
        inputs: of one text, ``[1, T]`` each.

    Raises:
        HookpointError: names the layer.
    """
    first = {type(parts.attention(index)): index for index in reversed(range(len(blocks)))}
    asked = {f"layers.{index}.heads": blocks[index] for index in sorted(first.values())}
    rows = 2 + blocks[0].q.columns.shape[0] + blocks[0].k.columns.shape[0]
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for block in asked.values():
            hooks.callback(_restart(block.layer, streams[block.layer], rows).remove)
            for module in dict.fromkeys((block.q.module, block.k.module)):
                hooks.callback(module.register_forward_hook(_changer(block, module)).remove)
        with recording(
            resolve_hookpoints([*asked], parts),
            lambda point, value: found.update({point.name: value}),
            stop_after_last=engine.may_stop,
        ):
            engine.run({name: value.expand(rows, -1) for name, value in inputs.items()})
    for name, block in asked.items():
        _check_rows(name.removesuffix(".heads"), block, found[name])


def _restart(layer: nn.Module, stream: Tensor, rows: int) -> Any:
    """Let every row of a layer begin with the same stream, whatever the layers before it did."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = stream.expand(rows, -1, -1).clone()
        return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

    return layer.register_forward_pre_hook(before, with_kwargs=True)


def _changer(block: Block, module: nn.Module) -> Any:
    """Row ``h`` gets another query of head h, row ``H + g`` another key g, the last but one other first queries.

    Signs are flipped at random: a norm over all heads (OLMo 2) then stays what it was.
    """
    n, groups = block.q.columns.shape[0], block.k.columns.shape[0]

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        value = output.clone()
        signs = torch.randint(2, value.shape[1:], generator=torch.Generator().manual_seed(0)).to(value) * 2 - 1
        if block.q.module is module:
            for head in range(n):
                value[head][:, block.q.columns[head]] *= signs[:, block.q.columns[head]]
            every = block.q.columns.flatten()
            value[-2, 0, every] *= signs[0, every]
        if block.k.module is module:
            for group in range(groups):
                value[n + group][:, block.k.columns[group]] *= signs[:, block.k.columns[group]]
        return value

    return after


def _check_rows(place: str, block: Block, heads: Tensor) -> None:
    """``heads`` ``[rows, T, H·dh]``, the last row unchanged."""
    n, groups = block.q.columns.shape[0], block.k.columns.shape[0]
    tolerance = _tolerance(heads) * heads[-1].float().abs().amax()
    changed = ((heads - heads[-1]).abs() > tolerance).unflatten(2, (n, -1)).any(3)  # [rows, T, H]
    own = torch.eye(n, dtype=torch.bool, device=heads.device)
    if bool((changed[:n].any(1) & ~own).any()):
        raise _unsupported(place, block, "a head's query acts on that head alone")
    of_group = torch.eye(groups, dtype=torch.bool, device=heads.device).repeat_interleave(n // groups, 1)
    if bool((changed[n : n + groups].any(1) & ~of_group).any()):
        raise _unsupported(place, block, "a key acts on the heads of its group alone")
    if bool(changed[-2, 1:].any()):
        raise _unsupported(place, block, "a query acts at its own token alone")


def _tolerance(of: Tensor) -> float:
    return 1e-4 if of.dtype in (torch.float32, torch.float64) else 8 * torch.finfo(of.dtype).eps


def _unsupported(place: str, block: Block, what: str) -> HookpointError:
    return HookpointError(
        f"{place}: {type(block.layer).__name__} is not supported for circuits: expected that {what}, found that it "
        "does not hold for the columns taken for queries, keys and values"
    )
