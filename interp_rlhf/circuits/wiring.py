"""How a model's heads and MLPs are wired to its residual stream: found on the live modules, then checked by arithmetic.

Where queries, keys and values come out of a projection is guessed by the projection's name (table below), and the
attention is asked whether that is so (:mod:`interp_rlhf.circuits.roles`). All the rest is traced on one short forward
pass: the norm before a reader is the module that gave it its input, a norm after a component is the one that took its
output, and a block is parallel when its MLP reads what its attention reads. The trace ends with the sum that every edge
score rests on: ``layer output = layer input + attention + MLP``. An architecture where it does not hold is refused.

========================================  =============================================================  ===============
projection inside the attention           output columns of a head                                       seen in
========================================  =============================================================  ===============
``q_proj``, ``k_proj``, ``v_proj``        one block per head in each                                     Llama, Qwen, …
``c_attn``                                all queries, all keys, all values                              GPT-2
``qkv_proj``                              all queries, all keys, all values                              Phi-3
``query_key_value``                       per head: query, key, value                                    GPT-NeoX
========================================  =============================================================  ===============
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interp_rlhf.activations.capturing import first_tensor
from interp_rlhf.activations.engines import Engine, find_engine, measuring
from interp_rlhf.activations.hookpoints import ModelLayout, layout
from interp_rlhf.circuits.graph import Graph
from interp_rlhf.circuits.linear import check_linear, effective_weight
from interp_rlhf.circuits.norms import Norm, close, find_norm
from interp_rlhf.circuits.roles import check_queries_and_keys, check_values
from interp_rlhf.errors import HookpointError, MeasurementError

#: Tokens of the pass on which the wiring is traced.
_TRACED = 4


@dataclass(frozen=True, slots=True)
class Projection:
    """The part of a linear module that makes one role (query, key or value) of every head.

    Attributes:
        module: the module, adapters included.
        columns: ``[n, dh]`` its output channels, head by head.
    """

    module: nn.Module
    columns: Tensor

    def weight(self) -> Tensor:
        """Rows of the effective weight, ``[n, dh, d]`` float32."""
        return effective_weight(self.module)[self.columns]


@dataclass(frozen=True, slots=True)
class Block:
    """One layer's wiring. A norm is ``None`` where there is none; ``attention`` and ``mlp`` stand for the two branches.

    Attributes:
        layer: the decoder layer.
        q, k, v: projections, one head per row (``k`` and ``v``: one key-value head per row).
        output: the attention's output projection, whose input holds the heads' outputs side by side.
        mlp: the module that reads the MLP's input; ``mlp_out``: the one that gives its output.
        attention_norm, mlp_norm: before the readers; ``mlp_reader`` is the module of the latter, where it is its own.
        attention_post, mlp_post: after the components, with their modules (Gemma 2/3).
        parallel: whether the MLP reads what the attention reads (GPT-NeoX, Phi); ``None`` where the attention adds
            exactly nothing and it makes no difference.
    """

    layer: nn.Module
    q: Projection
    k: Projection
    v: Projection
    output: nn.Module
    mlp: nn.Module
    mlp_out: nn.Module
    attention_norm: Norm | None
    mlp_norm: Norm | None
    attention_post: Norm | None
    mlp_post: Norm | None
    mlp_reader: nn.Module | None
    attention_end: nn.Module
    mlp_end: nn.Module
    parallel: bool | None

    def output_weight(self) -> Tensor:
        """``W_O`` per head with the linear part of a norm that follows: ``[H, dh, d]`` float32."""
        weight = effective_weight(self.output).T.unflatten(0, (self.q.columns.shape[0], -1))
        return weight if self.attention_post is None else self.attention_post.linear(weight)


@dataclass(frozen=True, slots=True)
class Wiring:
    """A model's wiring: its ``blocks``, the module of its final norm (``None``: there is none) and the ``graph``."""

    parts: ModelLayout
    engine: Engine
    blocks: tuple[Block, ...]
    final: nn.Module | None
    graph: Graph


def find_wiring(model: nn.Module, *, layers: str | None = None) -> Wiring:
    """Trace and check the wiring of a model in whatever wraps it.

    Raises:
        HookpointError: a layer has no such parts, or its output is not input plus attention plus MLP; names the layer.
        MeasurementError: the weights are partitioned over processes (ZeRO-3, FSDP2), or an adapter adds virtual tokens.
    """
    problem = partition_problem(model, layers=layers)
    if problem is not None:
        raise MeasurementError(problem)
    parts = layout(model, layers=layers)
    engine = find_engine(model, parts)
    if not engine.pads_left:
        raise MeasurementError("model: a prompt-learning adapter adds virtual tokens, expected none for circuits")
    with measuring(model):
        inputs = _inputs(parts, engine)
        seen = _trace(parts, engine, inputs)
        blocks = [_block(parts, seen, index) for index in range(parts.n_layers)]
        final = _final_norm(parts, seen)
        parallel = {block.parallel for block in blocks if block.parallel is not None}
        groups = {block.k.columns.shape[0] for block in blocks}
        if len(parallel) > 1 or len(groups) > 1:
            raise HookpointError(
                f"{parts.architecture}: expected all layers to be wired alike, found layers that differ"
            )
        streams = {layer: seen[layer].input for layer in parts.layers}
        check_queries_and_keys(blocks, parts, streams, engine, inputs)
    graph = Graph(parts.n_layers, parts.n_heads, groups.pop(), True in parallel, parts.architecture)
    return Wiring(parts, engine, tuple(blocks), final, graph)


def partition_problem(model: nn.Module, *, layers: str | None = None) -> str | None:
    """Why circuits cannot be found while the model's weights are spread over processes; ``None`` where they are whole.

    Every process gets the same answer; nothing is run.
    """
    parts = layout(model, layers=layers)
    partitioned = any(hasattr(parameter, "ds_id") for parameter in parts.causal_lm.parameters())
    if not partitioned and find_engine(model, parts).sharded is None:
        return None
    return (
        f"model: its weights are partitioned by {'ZeRO-3' if partitioned else 'FSDP2'}, expected whole weights for "
        "circuits: use ZeRO-2 or DDP, or measure the saved checkpoints afterwards with interp-rlhf compare"
    )


# ---------------------------------------------------------------------------------------------------------- the trace


@dataclass(frozen=True, slots=True)
class _Seen:
    """A module's first input and first output on the traced pass."""

    input: Tensor
    output: Tensor


def _inputs(parts: ModelLayout, engine: Engine) -> dict[str, Tensor]:
    """A short text, ``[1, T]`` each."""
    config: Any = parts.causal_lm.config
    ids = torch.arange(1, 1 + _TRACED, device=engine.device)[None] % config.get_text_config(decoder=True).vocab_size
    positions = torch.arange(_TRACED, device=engine.device)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


def _trace(parts: ModelLayout, engine: Engine, inputs: Mapping[str, Tensor]) -> Mapping[nn.Module, _Seen]:
    """Inputs and outputs of the layers, their children, the projections and the backbone's children."""
    watched = {parts.decoder, *parts.decoder.children(), *parts.layers}
    for index, layer in enumerate(parts.layers):
        attention = parts.attention(index)
        watched |= {*layer.children(), *attention.children(), parts.output_projection(index), parts.mlp(index)}
    seen: dict[nn.Module, _Seen] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = first_input(args, kwargs)
        if isinstance(given, Tensor) and isinstance(first_tensor(output), Tensor):
            seen[module] = _Seen(given.detach().clone(), first_tensor(output).detach().clone())

    with ExitStack() as hooks:
        for module in watched:
            if not isinstance(module, nn.ModuleList):
                hooks.callback(module.register_forward_hook(see, with_kwargs=True).remove)
        engine.run(inputs)
    return seen


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A module's first argument, however it was passed."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def _block(parts: ModelLayout, seen: Mapping[nn.Module, _Seen], index: int) -> Block:
    layer, output, mlp_out = parts.layers[index], parts.output_projection(index), parts.mlp(index)
    q, k, v = _projections(parts, index)
    mlp = next(child for child in layer.children() if any(module is mlp_out for module in child.modules()))
    for module in (layer, q.module, output, mlp, mlp_out):
        if module not in seen:
            raise HookpointError(f"layers.{index}: {type(module).__name__} was not called, expected one forward of it")
    x, attention = seen[layer].input, seen[output].output
    norms = list(_norms(parts, seen, layer))
    before, reader = (_norm_before(norms, seen, seen[module].input) for module in (q.module, mlp))
    after, after_mlp = (_norm_after(norms, seen, value) for value in (attention, seen[mlp_out].output))
    added = attention if after is None else seen[after[0]].output
    added_mlp = seen[mlp_out].output if after_mlp is None else seen[after_mlp[0]].output
    read, read_mlp = (
        (seen[module].input if norm is None else seen[norm[0]].input)
        for norm, module in ((before, q.module), (reader, mlp))
    )
    parallel = None if not added.any() else _same(read_mlp, x)
    _check_block(index, layer, parallel, x, read, read_mlp, added, added_mlp, seen[layer].output)
    for name, module in {"queries": q.module, "keys": k.module, "values": v.module, "attention output": output}.items():
        check_linear(f"layers.{index}: {name}", module, seen[module].input, seen[module].output)
    block = Block(
        layer=layer,
        q=q,
        k=k,
        v=v,
        output=output,
        mlp=mlp,
        mlp_out=mlp_out,
        attention_norm=before and before[1],
        mlp_norm=reader and reader[1],
        attention_post=after and after[1],
        mlp_post=after_mlp and after_mlp[1],
        mlp_reader=None if reader is None or parallel else reader[0],
        attention_end=output if after is None else after[0],
        mlp_end=mlp_out if after_mlp is None else after_mlp[0],
        parallel=parallel,
    )
    check_values(f"layers.{index}", block, seen[v.module].output, seen[output].input)
    return block


def _check_block(
    index: int,
    layer: nn.Module,
    parallel: bool | None,
    x: Tensor,
    read: Tensor,
    read_mlp: Tensor,
    added: Tensor,
    added_mlp: Tensor,
    out: Tensor,
) -> None:
    """Refuse a layer that is not the sum of its input ``x`` and what its two branches add."""
    _check_sum(index, layer, "its attention reads its input", read, x)
    _check_sum(index, layer, "its MLP reads its input plus attention", read_mlp, x if parallel else x + added)
    _check_sum(index, layer, "its output is its input plus attention plus MLP", out, x + added + added_mlp)
    _check_scale(index, layer, "attention", out - x - added_mlp if parallel else read_mlp - x, added, x)
    _check_scale(index, layer, "MLP", out - x - added, added_mlp, x)


def _check_sum(index: int, layer: nn.Module, what: str, found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-4 if found.dtype in (torch.float32, torch.float64) else 8 * torch.finfo(found.dtype).eps
    scale = expected.float().abs().amax()
    if found.shape != expected.shape or bool((found.float() - expected.float()).abs().amax() > tolerance * scale):
        raise HookpointError(
            f"layers.{index}: {type(layer).__name__} is not supported for circuits: expected that {what}, found that "
            "it does not hold on a traced pass"
        )


def _check_scale(index: int, layer: nn.Module, what: str, found: Tensor, branch: Tensor, stream: Tensor) -> None:
    """Refuse a branch that is scaled before it is added, where rounding of the stream lets that be seen."""
    found, branch, stream = (value.reshape(stream.shape).float() for value in (found, branch, stream))
    seen = branch.abs() > 64 * torch.finfo(layer_dtype(layer)).eps * (stream.abs() + found.abs())
    if int(seen.sum()) < 16:
        return
    slope = float((found[seen] * branch[seen]).sum() / branch[seen].square().sum())
    if abs(slope - 1) > 0.05:
        raise HookpointError(
            f"layers.{index}: {type(layer).__name__} is not supported for circuits: expected that it adds its {what} "
            f"as it is, found that it adds {slope:.2f} times it"
        )


def layer_dtype(layer: nn.Module) -> torch.dtype:
    """Floating type of a layer's parameters."""
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.float32)


def _norms(parts: ModelLayout, seen: Mapping[nn.Module, _Seen], owner: nn.Module) -> Iterator[tuple[nn.Module, Norm]]:
    for module in owner.children():
        if module in seen:
            value = seen[module].output
            norm = find_norm(module, parts.d_model, value.device, seen[module].input.dtype)
            if norm is not None:
                if not close(norm(seen[module].input), value):
                    raise HookpointError(
                        f"{type(module).__name__}: expected its output to be its input, normed; found another one: is "
                        "there a hook on it?"
                    )
                yield module, norm


def _norm_before(
    norms: Sequence[tuple[nn.Module, Norm]], seen: Mapping[nn.Module, _Seen], value: Tensor
) -> tuple[nn.Module, Norm] | None:
    """The layer's norm that gave ``value``."""
    return next((pair for pair in norms if _same(seen[pair[0]].output, value)), None)


def _norm_after(
    norms: Sequence[tuple[nn.Module, Norm]], seen: Mapping[nn.Module, _Seen], value: Tensor
) -> tuple[nn.Module, Norm] | None:
    """The layer's norm that took ``value``."""
    return next((pair for pair in norms if _same(seen[pair[0]].input, value)), None)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def _final_norm(parts: ModelLayout, seen: Mapping[nn.Module, _Seen]) -> nn.Module | None:
    last, end = seen[parts.layers[-1]].output, seen[parts.decoder].output
    for module, _ in _norms(parts, seen, parts.decoder):
        if _same(seen[module].input, last) and _same(seen[module].output, end):
            return module
    _check_sum(parts.n_layers - 1, parts.layers[-1], "the backbone's output is its last layer's, normed", end, last)
    return None


# ---------------------------------------------------------------------------------------------------- the projections


def _projections(parts: ModelLayout, index: int) -> tuple[Projection, Projection, Projection]:
    attention = parts.attention(index)
    children, heads, width = attention._modules, parts.n_heads, parts.head_dim
    q, k, v = (children.get(name) for name in ("q_proj", "k_proj", "v_proj"))
    if q is not None and k is not None and v is not None:
        sizes = [_out_features(module) for module in (q, k, v)]
        if sizes[0] == heads * width and sizes[1] == sizes[2] and sizes[1] % width == 0:
            device = next(q.parameters()).device
            q_, k_, v_ = (torch.arange(size, device=device).view(-1, width) for size in sizes)
            return Projection(q, q_), Projection(k, k_), Projection(v, v_)
        raise HookpointError(
            f"layers.{index}: {type(attention).__name__}: expected {heads} query heads of width {width} and as many "
            f"keys as values, found projections to {sizes[0]}, {sizes[1]} and {sizes[2]} channels"
        )
    for name in ("c_attn", "qkv_proj", "query_key_value"):
        module = children.get(name)
        if module is not None and (name != "query_key_value" or type(attention).__name__ == "GPTNeoXAttention"):
            return _fused(module, name, heads, width)
    raise HookpointError(
        f"layers.{index}: {type(attention).__name__} is not supported for circuits: expected q_proj, k_proj and "
        f"v_proj, or c_attn, qkv_proj or GPT-NeoX's query_key_value; found {', '.join(children)}"
    )


def _fused(module: nn.Module, name: str, heads: int, width: int) -> tuple[Projection, Projection, Projection]:
    total = _out_features(module)
    columns = torch.arange(total, device=next(module.parameters()).device)
    if name == "query_key_value":
        q, k, v = columns.view(heads, 3, width).unbind(1)
    else:
        rest = (total - heads * width) // 2
        q, k, v = (part.view(-1, width) for part in columns.split([heads * width, rest, rest]))
    return Projection(module, q), Projection(module, k), Projection(module, v)


def _out_features(module: nn.Module) -> int:
    if isinstance(module, Conv1D):
        return module.nf
    size: Any = getattr(module, "out_features", None)
    if not isinstance(size, int):
        raise HookpointError(f"{type(module).__name__}: expected a linear module with out_features, found none")
    return size


@contextmanager
def replaced_input(module: nn.Module, replace: Any) -> Iterator[None]:
    """Inside the block ``replace`` changes the module's first input; it gets and gives a tensor."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, {**kwargs, name: replace(kwargs[name])}

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
