"""Moving one component of the residual stream during a pass: to what another model has there on the same text.

At one ``resid_post`` hookpoint every token's stream h becomes ``h + (target − h·v)·w``. With ``w = v`` its component
along v is the target; with another unit vector w it is moved along w by the same amount. Only what the layer hands on
is changed, inside the pass; weights and model stay as they are (activation patching of a subspace: Geiger et al. 2021,
arXiv 2106.02997; Makelov et al. 2023, arXiv 2311.17030, on what it can mislead about).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp_rlhf.activations.capturing import check_lengths, first_tensor
from interp_rlhf.activations.engines import Engine, find_engine, gathered, measuring
from interp_rlhf.activations.hookpoints import ModelLayout, ResolvedHookpoint, layout, resolve_hookpoints
from interp_rlhf.activations.prompts import Batch, Prompt, batches
from interp_rlhf.activations.scoring import completion_log_probs
from interp_rlhf.errors import HookpointError, MeasurementError

#: What a pass measures of each text: from the model's parts, the backbone's output ``[B, T, d]`` and the batch, all on
#: one device, to ``[B]``. It runs in the pass, on what the changed stream led to.
Behaviour = Callable[[ModelLayout, Tensor, Batch], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """One pass over N texts.

    Attributes:
        values: ``[N]`` float64, the behaviour of each text.
        components: ``[N, T]`` float32, every token's ``h·v`` before it was moved; 0 beyond a text's end.
        nll: ``[N]`` float64, negative log-probability (nats) of each text's tokens but the first; NaN unless asked
            for.

    All on the CPU, in the order of the texts.
    """

    values: Tensor
    components: Tensor
    nll: Tensor


def moved(
    stream: Float[Tensor, "*batch d"],
    v: Float[Tensor, " d"],
    target: Float[Tensor, "*batch"],
    along: Float[Tensor, " d"],
    where: Bool[Tensor, "*batch"],
) -> Float[Tensor, "*batch d"]:
    """``h + (target − h·v)·along`` at marked tokens, computed in float32 and given in the stream's dtype.

    Args:
        stream: ``[..., d]`` residual stream.
        v: ``[d]`` unit vector whose component is compared with the target.
        target: ``[...]`` the component to reach; not looked at where ``where`` is false.
        along: ``[d]`` unit vector that the token is moved along.
        where: ``[...]`` the tokens to move.

    >>> h, v, w = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> moved(h, v, torch.tensor([5.0]), v, torch.tensor([True]))
    tensor([[5., 4.]])
    >>> moved(h, v, torch.tensor([5.0]), w, torch.tensor([True]))
    tensor([[3., 6.]])
    """
    full = stream.float()
    amount = torch.where(where, target - full @ v, 0.0)
    return (full + amount.unsqueeze(-1) * along).to(stream.dtype)


def summed_log_probs(parts: ModelLayout, hidden: Tensor, batch: Batch) -> Tensor:
    """The default behaviour: summed log-probability of each text's completion, ``[B]`` nats."""
    return completion_log_probs(parts, hidden, batch.input_ids, batch.attention_mask, batch.completion_mask)


@contextmanager
def changing(point: ResolvedHookpoint, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block, the layer's output is what ``change`` makes of it, in exactly one forward pass.

    Layers that output a tuple (Falcon, MPT …) keep everything but its first item.

    Raises:
        MeasurementError: the layer was not reached, was reached twice, or outputs something else.
    """
    reached = 0

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal reached
        reached += 1
        if reached > 1:
            raise MeasurementError(f"hookpoint {point.name!r}: reached twice in one forward pass, expected once")
        if isinstance(output, Tensor):
            return change(output)
        if type(output) is not tuple or not output or not isinstance(output[0], Tensor):
            raise MeasurementError(
                f"hookpoint {point.name!r}: expected a tensor, or a tuple that starts with one; found "
                f"{type(output).__name__}"
            )
        return change(output[0]), *output[1:]

    handle = point.module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()
    if not reached:
        raise MeasurementError(f"hookpoint {point.name!r}: not reached by the forward pass, expected once")


def read_moved(
    model: nn.Module,
    prompts: Sequence[Prompt],
    hookpoint: str,
    v: Float[Tensor, " d"],
    *,
    batch_size: int,
    pad_token_id: int,
    target: Float[Tensor, "n t"] | None = None,
    along: Float[Tensor, " d"] | None = None,
    behaviour: Behaviour = summed_log_probs,
    nll: bool = False,
    layers: str | None = None,
) -> Moved:
    """Behaviour of every text while its tokens' component along ``v`` is another one, and that component itself.

    Leaves no trace, as :func:`~interp_rlhf.activations.capturing.read_prompts`. Texts are padded on the right, so that
    token j of a text is column j in any model. On a sharded engine every rank has to make the same call.

    Args:
        model: as in :func:`~interp_rlhf.activations.capturing.capture`.
        prompts: the texts.
        hookpoint: a ``resid_post``.
        v: ``[d]`` direction, scaled to length 1 here.
        batch_size, pad_token_id: see :func:`~interp_rlhf.activations.prompts.batches`.
        target: ``[N, T]`` components to move to (:attr:`Moved.components` of another model's pass over the same
            texts); ``None`` moves nothing.
        along: ``[d]`` the direction to move along, scaled to length 1 here; ``None`` for ``v``.
        behaviour: what is measured of each text.
        nll: also read the texts' negative log-probability.
        layers: path of the decoder layers, for architectures that are not recognised.

    Raises:
        HookpointError: the hookpoint does not exist on this model, or is no ``resid_post``.
        PromptError: there is no text, or one is longer than the model's context.
        MeasurementError: a direction or target that does not fit, or a value that is not finite; names the text.
    """
    parts = layout(model, layers=layers)
    (point,) = resolve_hookpoints([hookpoint], parts)
    if point.site != "resid_post":
        raise HookpointError(f"hookpoint {hookpoint!r}: expected a resid_post, where the whole residual stream passes")
    check_lengths(prompts, parts)
    shape = (len(prompts), max(len(prompt.input_ids) for prompt in prompts))
    if target is not None and (target.shape != shape or not bool(target.isfinite().all())):
        raise MeasurementError(
            f"hookpoint {hookpoint!r}: expected finite targets of shape {list(shape)}, one per text and token; found "
            f"{'NaN or infinity' if target.shape == shape else list(target.shape)}"
        )
    reader = unit(v, parts.d_model, "direction")
    writer = reader if along is None else unit(along, parts.d_model, "direction to move along")
    one = _Pass(find_engine(model, parts), parts, point, reader, writer, behaviour, nll)
    empty = torch.full(shape[:1], float("nan"), dtype=torch.float64)
    found = Moved(empty, torch.zeros(shape), empty.clone())
    with measuring(model):
        for batch in batches(prompts, batch_size=batch_size, pad_token_id=pad_token_id, tokens="all"):
            one.run(batch, None if target is None else target[list(batch.rows), : batch.input_ids.shape[1]], found)
    _check_finite(found, prompts, hookpoint, nll=nll)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """What stays the same from batch to batch."""

    engine: Engine
    parts: ModelLayout
    point: ResolvedHookpoint
    v: Tensor
    along: Tensor
    behaviour: Behaviour
    nll: bool

    def run(self, batch: Batch, target: Tensor | None, into: Moved) -> None:
        """One batch; ``target`` is ``[B, T]``. Results go to the texts' rows of ``into``."""
        here = _on(batch, self.engine.device)
        rows, width = list(batch.rows), batch.input_ids.shape[1]
        hidden: list[Tensor] = []

        def change(stream: Tensor) -> Tensor:
            text = stream[:, -width:]  # virtual tokens (prompt-learning adapters) come before
            where, v = here.attention_mask.bool().to(text.device), self.v.to(text.device)
            into.components[rows, :width] = torch.where(where, text.float() @ v, 0.0).cpu()
            if target is None:
                return stream
            now = moved(text, v, target.to(text.device), self.along.to(text.device), where)
            return torch.cat([stream[:, :-width], now], dim=1)

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden.append(first_tensor(output)[:, -width:])

        handle = self.parts.decoder.register_forward_hook(keep)
        try:
            with changing(self.point, change):
                inputs = {name: getattr(here, name) for name in ("input_ids", "attention_mask", "position_ids")}
                self.engine.run(inputs)
        finally:
            handle.remove()
        with gathered(self.engine):
            into.values[rows] = self._behaviour(hidden[-1], here)
            if self.nll:
                mask = here.attention_mask
                scores = completion_log_probs(self.parts, hidden[-1], here.input_ids, mask, mask)
                into.nll[rows] = -scores.cpu()

    def _behaviour(self, hidden: Tensor, batch: Batch) -> Tensor:
        values = self.behaviour(self.parts, hidden, batch)
        if not isinstance(values, Tensor) or values.shape != (len(batch.rows),):
            found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise MeasurementError(f"behaviour: expected one value per text [{len(batch.rows)}], found {found}")
        return values.detach().double().cpu()


def unit(v: Tensor, d: int, what: str) -> Tensor:
    """``v`` scaled to length 1, ``[d]`` float32 on the CPU.

    Raises:
        MeasurementError: it is not ``[d]``, is 0, or holds NaN.
    """
    vector = v.detach().cpu().double()
    length = float(vector.norm())
    if vector.shape != (d,) or not 0 < length < float("inf"):
        raise MeasurementError(
            f"{what}: expected a finite non-zero vector of shape [{d}], found shape {list(vector.shape)} and length "
            f"{length:g}"
        )
    return (vector / length).float()


def _on(batch: Batch, device: torch.device) -> Batch:
    masks = (batch.attention_mask, batch.position_ids, batch.content_mask, batch.completion_mask)
    return Batch(batch.rows, batch.input_ids.to(device), *(mask.to(device) for mask in masks))


def _check_finite(found: Moved, prompts: Sequence[Prompt], hookpoint: str, *, nll: bool) -> None:
    checked = {f"hookpoint {hookpoint!r}": found.components.sum(1), "behaviour": found.values}
    for what, values in {**checked, "log-probabilities": found.nll}.items() if nll else checked.items():
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise MeasurementError(
                f"{what}: prompt {prompts[bad[0]].id}: expected finite values, found NaN or infinity "
                f"({len(bad)} of {len(prompts)} prompts)"
            )
