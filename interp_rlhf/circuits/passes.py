"""The passes that edge attribution is made of: what every component writes, and the gradient where each reader reads.

A pass keeps what is compact: the heads' outputs before ``W_O`` (``[N, H·dh]`` instead of ``[N, H, d]``) and the
gradients at the projections' outputs instead of one residual stream per head. ``N`` counts the tokens of the batch
without padding, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interp_rlhf.activations.capturing import first_tensor
from interp_rlhf.activations.hookpoints import resolve_hookpoints
from interp_rlhf.activations.scoring import head_logits
from interp_rlhf.circuits.wiring import Block, Wiring, first_input, replaced_input
from interp_rlhf.errors import HookpointError, MeasurementError

#: ``metric(logits [B, T, V], clean_logits [B, T, V]) -> [B]``; of another hookpoint than the logits, ``[B, T, d]``.
Metric = Callable[[Tensor, Tensor], Tensor]

#: Clean and corrupt arguments of the model, as :func:`paired_inputs` gives them.
Pair = tuple[dict[str, Tensor], dict[str, Tensor]]


class _Enough(Exception):
    """Ends a forward pass after the last layer that is read."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What the components write: ``embed [N, d]``, ``heads`` per layer ``[N, H·dh]`` and ``mlps`` per layer ``[N, d]``.

    A head adds ``z_h W_O[h]`` (:meth:`Block.output_weight`) to the residual stream. Where a norm follows the attention,
    ``heads`` holds ``r·z``, with ``r`` of the sum of all heads, so that the heads still add up to what is added.
    """

    embed: Tensor
    heads: tuple[Tensor, ...]
    mlps: tuple[Tensor, ...]

    def minus(self, other: Sources) -> Sources:
        """Component by component."""
        heads, mlps = (
            tuple(a - b for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in ((self.heads, other.heads), (self.mlps, other.mlps))
        )
        return Sources(self.embed - other.embed, heads, mlps)

    def map(self, change: Callable[[Tensor], Tensor]) -> Sources:
        """``change`` of every component."""
        return Sources(change(self.embed), tuple(map(change, self.heads)), tuple(map(change, self.mlps)))


@dataclass(frozen=True, slots=True)
class Gradients:
    """Where the readers of one layer read, and ∂metric there.

    Attributes:
        x, x_mlp: residual streams that attention and MLP read, before any norm, ``[N, d]``.
        q, k, v: at the projections' outputs, ``[N, n, dh]``.
        mlp: at the MLP's input, after the norm, ``[N, d]``.
    """

    x: Tensor
    x_mlp: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mlp: Tensor


@dataclass
class Pass:
    """One forward pass over a batch: hooks record, ``result`` is the logits, or the residual stream that is read.

    Attributes:
        wiring: the model's.
        inputs: ``input_ids``, ``attention_mask``, ``position_ids``, each ``[B, T]``.
        reads: hookpoint ``layers.<l>.resid_post`` that the metric reads instead of the logits.
        depth: layers that are run.
    """

    wiring: Wiring
    inputs: Mapping[str, Tensor]
    reads: str | None = None
    depth: int = field(init=False)
    hidden: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.depth = self.wiring.parts.n_layers
        if self.reads is not None:
            (point,) = resolve_hookpoints([self.reads], self.wiring.parts)
            if point.site != "resid_post" or point.layer is None:
                raise HookpointError(f"hookpoint {self.reads!r}: expected a metric to read a resid_post")
            self.depth = point.layer + 1

    @property
    def mask(self) -> Tensor:
        """Tokens that are no padding, ``[B, T]``."""
        return self.inputs["attention_mask"].bool()

    def run(self, finish: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Run the backbone under the hooks that are on; logits ``[B, T, V]``, or what ``reads`` names ``[B, T, d]``.

        Args:
            finish: changes the residual stream that the metric, or the head of a model without a final norm, reads.
        """
        last = self.wiring.blocks[self.depth - 1].layer
        with ExitStack() as hooks:
            if self.reads is None:
                hooks.enter_context(output_hook(self.wiring.parts.decoder, self._keep_hidden))
            else:
                hooks.enter_context(output_hook(last, self._stop))
            with suppress(_Enough):
                self.wiring.engine.run(self.inputs)
        if self.hidden is None:
            raise MeasurementError("circuit: the forward pass gave no hidden state, expected one")
        if finish is not None:
            self.hidden = finish(self.hidden)
        return self.hidden if self.reads is not None else head_logits(self.wiring.parts, self.hidden)

    def _keep_hidden(self, value: Tensor) -> None:
        self.hidden = value

    def _stop(self, value: Tensor) -> None:
        self.hidden = value
        raise _Enough

    def flat(self, value: Tensor) -> Tensor:
        """``[B, T, ...]`` without padding, ``[N, ...]`` float32, detached."""
        value = value.detach().reshape(*self.inputs["input_ids"].shape, *value.shape[value.dim() - 1 :])
        return value[self.mask].float()


@contextmanager
def output_hook(module: nn.Module, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside the block ``keep`` gets the module's output."""

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(first_tensor(output))

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def input_hook(module: nn.Module, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside the block ``keep`` gets the module's first input."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(first_input(args, kwargs))

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------------ what is written


class SourceRecorder:
    """Records :class:`Sources` of the pass ``of`` while its hooks are on."""

    def __init__(self, of: Pass) -> None:
        self._pass = of
        self._embed: list[Tensor] = []
        self._heads: list[Tensor] = []
        self._mlps: list[Tensor] = []
        self._scale: list[Tensor] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        """The hooks are on inside the block."""
        one, blocks = self._pass, self._pass.wiring.blocks[: self._pass.depth]
        with ExitStack() as hooks:
            hooks.enter_context(input_hook(blocks[0].layer, lambda value: self._embed.append(one.flat(value))))
            for block in blocks:
                hooks.enter_context(input_hook(block.output, lambda value: self._heads.append(one.flat(value))))
                if block.attention_post is not None:
                    hooks.enter_context(output_hook(block.output, self._scaled(block)))
                hooks.enter_context(output_hook(block.mlp_end, lambda value: self._mlps.append(one.flat(value))))
            yield

    def _scaled(self, block: Block) -> Callable[[Tensor], None]:
        def scale(value: Tensor) -> None:
            norm = block.attention_post
            if norm is not None:
                self._heads[-1] = self._heads[-1] * norm.inverse_rms(self._pass.flat(value))

        return scale

    @property
    def sources(self) -> Sources:
        """What was recorded so far, ``heads`` and ``mlps`` up to the layer reached."""
        return Sources(self._embed[0], tuple(self._heads), tuple(self._mlps))


def written_on(wiring: Wiring, inputs: Mapping[str, Tensor], reads: str | None = None) -> Sources:
    """What every component writes on these inputs, up to the layer that is read; no logits are computed."""
    return read_sources(Pass(wiring, inputs, reads or f"layers.{wiring.parts.n_layers - 1}.resid_post"))[0]


def read_sources(one: Pass) -> tuple[Sources, Tensor]:
    """What every component writes on a pass without gradients, and the pass's logits (or what the metric reads)."""
    recorder = SourceRecorder(one)
    with torch.no_grad(), recorder.on():
        result = one.run()
    return recorder.sources, result


# -------------------------------------------------------------------------------------------------------- the gradients


@dataclass(frozen=True, slots=True)
class GradientPass:
    """What one forward and backward pass leaves.

    Attributes:
        layers: gradients of each layer that was run.
        end: gradient ``[N, d]`` of the residual stream before the final norm, or at the hookpoint the metric reads.
        sources: what the components wrote, where that was asked for.
    """

    layers: tuple[Gradients, ...]
    end: Tensor
    sources: Sources | None

    @property
    def bytes(self) -> int:
        """What the gradients, and the streams beside them, take; sources not counted."""
        parts = [part for g in self.layers for part in (g.x, g.x_mlp, g.q, g.k, g.v, g.mlp)]
        return sum({id(part): part.nbytes for part in (*parts, self.end)}.values())


def read_gradients(
    one: Pass,
    metric: Callable[[Tensor], Tensor],
    *,
    embed: Callable[[Tensor], Tensor] = lambda value: value,
    sources: bool = False,
) -> GradientPass:
    """∂(summed metric) where every reader reads. The backward pass goes to activations only: no parameter gradients.

    Args:
        one: the pass.
        metric: from the pass's result to ``[B]``.
        embed: the residual stream ``[B, T, d]`` to start from, given the one the pass begins with.
        sources: also record what the components write.
    """
    recorder, blocks = SourceRecorder(one), one.wiring.blocks[: one.depth]
    streams: dict[tuple[int, str], Tensor] = {}
    graph: dict[nn.Module, Tensor] = {}
    with torch.enable_grad(), ExitStack() as hooks:
        hooks.enter_context(replaced_input(blocks[0].layer, lambda x: embed(x.detach()).detach().requires_grad_()))
        if sources:
            hooks.enter_context(recorder.on())
        for index, block in enumerate(blocks):
            _watch(hooks, one, index, block, streams, graph)
        final = one.wiring.final if one.reads is None else None
        if final is not None:
            hooks.enter_context(replaced_input(final, _alias(graph, final)))
        result = one.run()
        values = metric(result)
        end = graph.pop(final) if final is not None else one.hidden
        if not values.requires_grad or end is None:
            raise MeasurementError("metric: its values do not depend on what it reads, expected them to (no detach)")
        *found, last = torch.autograd.grad(values.sum(), [*graph.values(), end], allow_unused=True)
    at = {module: _or_zero(g, graph[module]) for module, g in zip(graph, found, strict=True)}
    layers = tuple(_gradients(one, index, block, streams, at) for index, block in enumerate(blocks))
    written = recorder.sources if sources else None
    return GradientPass(layers, one.flat(_or_zero(last, end)), written)


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _alias(graph: dict[nn.Module, Tensor], module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Gives a module its own view of its input, so that the gradient there is this reader's alone."""

    def alias(value: Tensor) -> Tensor:
        graph[module] = value.view_as(value)
        return graph[module]

    return alias


def _watch(
    hooks: ExitStack,
    one: Pass,
    index: int,
    block: Block,
    streams: dict[tuple[int, str], Tensor],
    graph: dict[nn.Module, Tensor],
) -> None:
    """Hooks of one layer: the streams that are read, the projections' outputs, the MLP's input."""

    def stream(role: str) -> Callable[[Tensor], None]:
        return lambda value: streams.update({(index, role): one.flat(value)})

    def keep(module: nn.Module) -> Callable[[Tensor], None]:
        return lambda value: graph.update({module: value})

    hooks.enter_context(input_hook(block.layer, stream("x")))
    if not block.parallel:
        hooks.enter_context(input_hook(block.mlp if block.mlp_reader is None else block.mlp_reader, stream("x_mlp")))
    for module in dict.fromkeys((block.q.module, block.k.module, block.v.module)):
        hooks.enter_context(output_hook(module, keep(module)))
    hooks.enter_context(replaced_input(block.mlp, _alias(graph, block.mlp)))


def _gradients(
    one: Pass, index: int, block: Block, streams: Mapping[tuple[int, str], Tensor], at: Mapping[nn.Module, Tensor]
) -> Gradients:
    q, k, v = (one.flat(at[role.module])[:, role.columns] for role in (block.q, block.k, block.v))
    x = streams[index, "x"]
    return Gradients(x, streams.get((index, "x_mlp"), x), q, k, v, one.flat(at[block.mlp]))


# ----------------------------------------------------------------------------------------------------------- the inputs


def paired_inputs(clean: Mapping[str, Tensor], corrupt: Mapping[str, Tensor], device: torch.device) -> Pair:
    """Clean and corrupt arguments of the model, ``input_ids``, ``attention_mask``, ``position_ids``, each ``[B, T]``.

    Raises:
        MeasurementError: other shapes, or a row whose clean and corrupt texts differ in length or padding.
    """
    with torch.inference_mode(False):  # autograd takes no tensors that were made in inference mode
        clean, corrupt = _arguments("clean", clean, device), _arguments("corrupt", corrupt, device)
    shapes = [list(each["input_ids"].shape) for each in (clean, corrupt)]
    if shapes[0] != shapes[1]:
        raise MeasurementError(f"corrupt: input_ids: expected shape {shapes[0]} like clean, found {shapes[1]}")
    unequal = (clean["attention_mask"] != corrupt["attention_mask"]).any(1).nonzero().flatten().tolist()
    if unequal:
        lengths = [int(each["attention_mask"][unequal[0]].sum()) for each in (clean, corrupt)]
        raise MeasurementError(
            f"corrupt: row {unequal[0]}: expected the same tokens to be padding as in clean ({lengths[0]} tokens), "
            f"found {lengths[1]} tokens"
        )
    return clean, corrupt


def _arguments(name: str, given: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    unknown = sorted(set(given) - {"input_ids", "attention_mask"})
    if unknown or "input_ids" not in given:
        raise MeasurementError(
            f"{name}: expected input_ids and attention_mask, found {', '.join(sorted(given)) or 'nothing'}"
        )
    strange = [key for key, value in given.items() if not isinstance(value, Tensor)]
    if strange:
        raise MeasurementError(f"{name}: {strange[0]}: expected a tensor, found {type(given[strange[0]]).__name__}")
    ids = given["input_ids"]
    mask = given.get("attention_mask", torch.ones_like(ids))
    if ids.dim() != 2 or 0 in ids.shape or mask.shape != ids.shape:
        raise MeasurementError(
            f"{name}: expected input_ids and attention_mask of one shape [B, T], found {list(ids.shape)} and "
            f"{list(mask.shape)}"
        )
    if ids.is_floating_point() or bool((ids < 0).any()) or not bool(((mask == 0) | (mask == 1)).all()):
        raise MeasurementError(f"{name}: expected token ids of 0 or more and a mask of 0 and 1, found others")
    empty = (~mask.bool().any(1)).nonzero().flatten().tolist()
    if empty:
        raise MeasurementError(f"{name}: row {empty[0]}: expected a token that is no padding, found none")
    ids, mask = (value.to(device, torch.long, copy=value.is_inference()) for value in (ids, mask))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}
