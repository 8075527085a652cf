"""Reading activations of a live model: hooks for one forward, passes that leave no trace, means per text.

A pass runs without gradients, in evaluation mode, without autocast (in the dtype of the weights) and without a cache,
on the backbone alone, and ends at the last hookpoint asked for. Two engines do not allow that: under DeepSpeed ZeRO-3
every rank runs the whole backbone, under FSDP2 the sharded root is called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from interp_rlhf.activations.engines import Engine, find_engine, gathered, measuring
from interp_rlhf.activations.hookpoints import ModelLayout, ResolvedHookpoint, layout, resolve_hookpoints
from interp_rlhf.activations.prompts import Batch, PaddingSide, Prompt, Tokens, batches
from interp_rlhf.activations.reductions import last_marked, masked_mean
from interp_rlhf.activations.scoring import completion_log_probs
from interp_rlhf.errors import HookpointError, MeasurementError, PromptError

Reduce = Literal["mean", "last"] | Callable[[Tensor, Tensor], Tensor]

#: Gets the rows of a batch (indices into the list of texts), a hookpoint's value ``[B, T, d]`` as the model computes it
#: (heads side by side), and the content mask ``[B, T]``. It must not change the value: the model goes on with it.
Observer = Callable[[Sequence[int], Tensor, Tensor], None]

_INPUTS = ("input_ids", "attention_mask", "position_ids", "content_mask")


# -------------------------------------------------------------------------------------------------------------- hooks


class _Enough(Exception):
    """Ends a forward pass after the last hookpoint; never leaves :func:`recording`."""


@contextmanager
def recording(
    resolved: Sequence[ResolvedHookpoint],
    on_value: Callable[[ResolvedHookpoint, Tensor], None],
    *,
    stop_after_last: bool,
) -> Iterator[None]:
    """Hand each hookpoint's value to ``on_value`` during exactly one forward pass inside the block.

    Hooks change nothing in the model's computation and are removed whatever happens.

    Args:
        resolved: where to read.
        on_value: gets the hookpoint and the raw value (its first tensor, as the model computes it).
        stop_after_last: leave the block as soon as every hookpoint was read; later layers do not run.

    Raises:
        MeasurementError: a hookpoint was not reached, or reached twice.
    """
    missing = {point.name for point in resolved}

    def read(point: ResolvedHookpoint, value: Any) -> None:
        if point.name not in missing:
            raise MeasurementError(f"hookpoint {point.name!r}: reached twice in one forward pass, expected once")
        missing.remove(point.name)
        on_value(point, first_tensor(value).detach())
        if stop_after_last and not missing:
            raise _Enough

    with ExitStack() as hooks:
        for point in resolved:
            hooks.callback(_register(point, read).remove)
        try:
            yield
        except _Enough:
            return
    if missing:
        raise MeasurementError(f"hookpoint {min(missing)!r}: not reached by the forward pass, expected once")


def _register(point: ResolvedHookpoint, read: Callable[[ResolvedHookpoint, Any], None]) -> Any:
    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read(point, args[0] if args else next(iter(kwargs.values())))

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        read(point, output)

    if point.kind == "input":
        return point.module.register_forward_pre_hook(on_input, with_kwargs=True)
    return point.module.register_forward_hook(on_output)


def first_tensor(value: Any) -> Tensor:
    """A module's value itself, or the first item of a tuple or model output (bloom's layers, routers' logits)."""
    return value if isinstance(value, Tensor) else value[0]


# ------------------------------------------------------------------------------------------------------------ values


def _as_tokens(value: Tensor, point: ResolvedHookpoint, shape: tuple[int, int], parts: ModelLayout) -> Tensor:
    """Bring a raw value to ``[B, T, d]`` or ``[B, T, H, dh]``.

    Flattened tokens (OPT's MLP) are unfolded; virtual tokens in front (prompt-learning adapters) are cut off.
    """
    rows, width = shape
    if value.dim() == 2 and value.shape[0] % rows == 0:
        value = value.reshape(rows, -1, value.shape[-1])
    if value.dim() != 3 or value.shape[0] != rows or value.shape[1] < width:
        raise MeasurementError(
            f"hookpoint {point.name!r}: expected a value of shape {[rows, width, 'd']}, found {list(value.shape)}"
        )
    value = value[:, -width:]
    if point.site != "heads":
        return value
    if value.shape[-1] % parts.n_heads:
        raise MeasurementError(
            f"hookpoint {point.name!r}: expected {parts.n_heads} heads of equal width, found {value.shape[-1]} channels"
        )
    return value.unflatten(-1, (parts.n_heads, -1))


# ------------------------------------------------------------------------------------------------------------ capture


class Activations(Mapping[str, Tensor]):
    """Captured values by canonical hookpoint name, in forward order; also found under the names asked for."""

    def __init__(self, values: Mapping[str, Tensor], asked: Mapping[str, str]) -> None:
        self._values = MappingProxyType(dict(values))
        self._asked = MappingProxyType(dict(asked))

    def __getitem__(self, name: str) -> Tensor:
        return self._values[self._asked.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._asked

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {list(value.shape)}" for name, value in self._values.items())
        return f"Activations({shapes})"


def capture(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    hookpoints: Sequence[str],
    *,
    reduce: Reduce | None = None,
    layers: str | None = None,
) -> Activations:
    """Activations of a model on one batch, read without leaving a trace.

    Args:
        model: a Hugging Face decoder model, plain or inside DDP, DeepSpeed, FSDP2, PEFT, ``torch.compile`` or TRL's
            value-head wrappers.
        inputs: ``input_ids``, and optionally ``attention_mask``, ``position_ids`` and ``content_mask`` (the tokens
            that reductions use; default: the attention mask), each ``[B, T]``.
        hookpoints: names as in :mod:`interp_rlhf.activations.hookpoints`.
        reduce: ``None`` keeps all tokens; ``"mean"`` is the float32 mean over content tokens; ``"last"`` the last
            content token; or a function of value ``[B, T, ...]`` and mask ``[B, T]``.
        layers: path of the decoder layers, for architectures that are not recognised.

    Returns:
        Name to detached tensor on the model's device: ``[B, T, d]`` (heads: ``[B, T, H, dh]``), or reduced.

    Raises:
        HookpointError: a name does not exist on this model.
        MeasurementError: inputs are malformed, or a row has no content token to reduce over.
    """
    parts = layout(model, layers=layers)
    resolved = resolve_hookpoints(hookpoints, parts)
    if not resolved:
        raise HookpointError("hookpoints: expected at least one, found none")
    engine = find_engine(model, parts)
    batch, mask = _capture_inputs(inputs, engine.device, needs_content=reduce is not None)
    values: dict[str, Tensor] = {}

    def keep(point: ResolvedHookpoint, value: Tensor) -> None:
        value = _as_tokens(value, point, (mask.shape[0], mask.shape[1]), parts)
        values[point.name] = value.clone() if reduce is None else _reduced(value, mask.to(value.device), reduce)

    with measuring(model), recording(resolved, keep, stop_after_last=engine.may_stop):
        engine.run(batch)
    asked = {name: point.name for point in resolved for name in point.asked}
    return Activations({point.name: values[point.name] for point in resolved}, asked)


def _reduced(value: Tensor, mask: Tensor, reduce: Reduce) -> Tensor:
    if reduce == "mean":
        return masked_mean(value, mask)
    return last_marked(value, mask) if reduce == "last" else reduce(value, mask)


def _capture_inputs(
    inputs: Mapping[str, Tensor], device: torch.device, *, needs_content: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The model's arguments on its device, and the content mask."""
    unknown = sorted(set(inputs) - set(_INPUTS))
    if unknown or "input_ids" not in inputs:
        found = ", ".join(sorted(inputs)) or "nothing"
        raise MeasurementError(f"inputs: expected input_ids and any of {', '.join(_INPUTS[1:])}; found {found}")
    shape = inputs["input_ids"].shape
    for name, value in inputs.items():
        if value.dim() != 2 or value.shape != shape:
            raise MeasurementError(f"inputs: {name}: expected shape {list(shape)} [B, T], found {list(value.shape)}")
    moved = {name: value.to(device) for name, value in inputs.items()}
    attention = moved.setdefault("attention_mask", torch.ones_like(moved["input_ids"]))
    moved.setdefault("position_ids", (attention.long().cumsum(1) - 1).clamp(min=0))
    content = moved.pop("content_mask", attention).bool()
    empty = (~content.any(1)).nonzero().flatten().tolist()
    if needs_content and empty:
        raise MeasurementError(f"inputs: row {empty[0]}: expected a content token, found none")
    return moved, content


# ------------------------------------------------------------------------------------------------- one measuring pass


@dataclass(frozen=True, slots=True)
class Readings:
    """One measuring pass over N texts.

    Attributes:
        means: resolved hookpoint to ``[N, d]`` float32 on the CPU, row i the mean over ``prompts[i]``'s content tokens
            (``[N, H·dh]`` for heads).
        log_probs: ``[N]`` float64 on the CPU: summed log-probability (nats) of the completion tokens given the prompt.
        tokens: non-padding tokens run through the model.
        seconds: wall-clock time of the pass.
    """

    means: Mapping[str, Tensor]
    log_probs: Tensor | None
    tokens: int
    seconds: float


def read_prompts(
    model: nn.Module,
    prompts: Sequence[Prompt],
    hookpoints: Sequence[str],
    *,
    batch_size: int,
    pad_token_id: int,
    tokens: Tokens = "completion",
    skip_ids: frozenset[int] = frozenset(),
    side: PaddingSide = "right",
    longest_first: bool = True,
    log_probs: bool = False,
    layers: str | None = None,
    observers: Mapping[str, Observer] = MappingProxyType({}),
) -> Readings:
    """Mean activation per text and hookpoint, and on request the completions' log-probabilities, in one pass.

    On a sharded engine every rank must call this with equally many texts. Checks of the values come after the last
    forward pass, so that a rank that raises leaves no other waiting inside one.

    Args:
        model: as in :func:`capture`.
        prompts: the texts.
        hookpoints: where to read; may be empty with ``log_probs`` or ``observers``.
        batch_size, pad_token_id, tokens, skip_ids, side, longest_first: see
            :func:`~interp_rlhf.activations.prompts.batches`. With a prompt-learning adapter texts are always padded on
            the right.
        log_probs: also score the completions.
        layers: path of the decoder layers, for architectures that are not recognised.
        observers: hookpoint to what is called with every batch's values while the pass runs (:data:`Observer`).
            ``means`` holds ``hookpoints`` only.

    Raises:
        HookpointError: a name does not exist on this model.
        PromptError: there is no text, or one is longer than the model's context.
        MeasurementError: a reading is not finite; names hookpoint and prompt.
    """
    started = time.perf_counter()
    parts = layout(model, layers=layers)
    resolved = resolve_hookpoints([*hookpoints, *observers], parts)
    if not resolved and not log_probs:
        raise HookpointError("hookpoints: expected at least one, found none")
    check_lengths(prompts, parts)
    engine = find_engine(model, parts)
    rows: list[int] = []
    means: dict[str, list[Tensor]] = {point.name: [] for point in resolve_hookpoints(hookpoints, parts)}
    watching = {point.name: point.asked for point in resolve_hookpoints([*observers], parts)}
    scores: list[Tensor] = []

    def observe(point: ResolvedHookpoint, value: Tensor, batch: Batch) -> None:
        mask = batch.content_mask.to(value.device)
        if point.name in means:
            means[point.name].append(masked_mean(value, mask))
        for name in watching.get(point.name, ()):
            observers[name](batch.rows, value, mask)

    with measuring(model):
        for batch in batches(
            prompts,
            batch_size=batch_size,
            pad_token_id=pad_token_id,
            tokens=tokens,
            skip_ids=skip_ids,
            side=side if engine.pads_left else "right",
            longest_first=longest_first,
        ):
            rows.extend(batch.rows)
            scores += _read_batch(engine, parts, resolved, batch, observe, log_probs=log_probs)
    order = torch.tensor(rows).argsort()
    ordered = {name: torch.cat(value).cpu()[order] for name, value in means.items()}
    scored = torch.cat(scores).cpu()[order] if log_probs else None
    _check_finite(ordered, scored, prompts)
    count = sum(len(prompt.input_ids) for prompt in prompts)
    return Readings(MappingProxyType(ordered), scored, count, time.perf_counter() - started)


def _read_batch(
    engine: Engine,
    parts: ModelLayout,
    resolved: Sequence[ResolvedHookpoint],
    batch: Batch,
    observe: Callable[[ResolvedHookpoint, Tensor, Batch], None],
    *,
    log_probs: bool,
) -> list[Tensor]:
    """Hand every hookpoint's value ``[B, T, d]`` to ``observe``; the ``[B]`` log-probabilities if asked for."""
    rows, width = batch.input_ids.shape
    hidden: list[Tensor] = []

    def keep_hidden(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden.append(first_tensor(output).detach()[:, -width:])

    def on_value(point: ResolvedHookpoint, value: Tensor) -> None:
        observe(point, _as_tokens(value, point, (rows, width), parts).flatten(2), batch)

    moved = {
        "input_ids": batch.input_ids.to(engine.device),
        "attention_mask": batch.attention_mask.to(engine.device),
        "position_ids": batch.position_ids.to(engine.device),
    }
    with ExitStack() as hooks:
        if log_probs:
            hooks.callback(parts.decoder.register_forward_hook(keep_hidden).remove)
        hooks.enter_context(recording(resolved, on_value, stop_after_last=engine.may_stop and not log_probs))
        engine.run(moved)
    if not log_probs:
        return []
    completion = batch.completion_mask.to(engine.device)
    with gathered(engine):
        score = completion_log_probs(parts, hidden[-1], moved["input_ids"], moved["attention_mask"], completion)
    return [score]


def check_lengths(prompts: Sequence[Prompt], layout: ModelLayout) -> None:
    """Refuse texts that the model's context cannot hold.

    Raises:
        PromptError: there is no text; or names the prompt, its length and the context length.
    """
    if not prompts:
        raise PromptError("prompts: expected at least one text, found none")
    limit = layout.max_positions
    for prompt in prompts:
        length = len(prompt.input_ids)
        if limit is not None and length > limit:
            raise PromptError(
                f"prompt {prompt.id}: {length} tokens, expected at most {limit} (context of {layout.architecture})"
            )


def _check_finite(means: Mapping[str, Tensor], scores: Tensor | None, prompts: Sequence[Prompt]) -> None:
    checked = dict(means) if scores is None else {**means, "log_probs": scores.unsqueeze(1)}
    for name, value in checked.items():
        bad = (~value.isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            what = f"hookpoint {name!r}" if name in means else "log-probabilities"
            raise MeasurementError(
                f"{what}: prompt {prompts[bad[0]].id}: expected finite values, found NaN or infinity "
                f"({len(bad)} of {len(value)} prompts)"
            )
