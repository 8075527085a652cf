"""The linear layer that a component ends in: found on the live modules, checked, its weight seen along directions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interp_rlhf.circuits.linear import effective_weight
from interp_rlhf.circuits.norms import Norm
from interp_rlhf.circuits.passes import Pass, output_hook
from interp_rlhf.circuits.wiring import Wiring, first_input
from interp_rlhf.errors import MeasurementError

#: Tokens of the pass on which they are found.
_TRACED = 4


def weight_along(module: nn.Module, norm: Norm | None, vectors: Tensor) -> Tensor:
    """What the inputs of a linear module, its bias and the shift of a norm that follows add along ``vectors [P, d]``.

    Returns:
        ``[P, k + 2]`` float32: per input channel, of the bias, of the shift.
    """
    weight = next(module.parameters())
    if not weight.is_floating_point():
        kind = str(weight.dtype).removeprefix("torch.")
        raise MeasurementError(f"components: {type(module).__name__}: found {kind} weights, expected floating point")
    through = vectors if norm is None else norm.transposed(vectors)
    shift = vectors.new_zeros(len(vectors)) if norm is None else vectors @ norm.shift
    matrix = effective_weight(module)
    with torch.no_grad():
        bias = module.forward(weight.new_zeros(1, matrix.shape[1]))[0].float()
    return torch.cat((through @ matrix, (through @ bias)[:, None], shift[:, None]), 1)


def last_linears(wiring: Wiring, depth: int) -> list[nn.Module | None]:
    """Of each layer the linear module that gives its MLP's output, adapters included; ``None`` where none does.

    Traced on a short pass: of the modules inside the MLP whose output is the MLP's the last one called, if it was
    called once and is additive.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = first_input(args, kwargs)
        if isinstance(given, Tensor) and isinstance(output, Tensor):
            calls.append((module, given.detach(), output.detach()))

    ids = torch.arange(1, 1 + _TRACED, device=wiring.engine.device)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": ids - 1}
    ends, outputs = [0], list[Tensor]()

    def end(value: Tensor) -> None:
        ends.append(len(calls))
        outputs.append(value)

    with ExitStack() as hooks:
        for block in wiring.blocks[:depth]:
            for module in block.mlp_out.modules():
                if isinstance(module, Conv1D) or isinstance(getattr(module, "in_features", None), int):
                    hooks.callback(module.register_forward_hook(see, with_kwargs=True).remove)
            hooks.enter_context(output_hook(block.mlp_out, end))
        Pass(wiring, inputs, f"layers.{depth - 1}.resid_post").run()
    return [_giving(calls[begin:end], out) for (begin, end), out in zip(pairwise(ends), outputs, strict=True)]


def _giving(calls: Sequence[tuple[nn.Module, Tensor, Tensor]], output: Tensor) -> nn.Module | None:
    flat = output.reshape(-1)
    same = [i for i, call in enumerate(calls) if torch.equal(call[2].reshape(-1), flat)]
    if not same:
        return None
    module, given, _ = calls[same[-1]]
    once = sum(call[0] is module for call in calls) == 1
    return module if once and _additive(module, given) else None


def _additive(module: nn.Module, x: Tensor) -> bool:
    """Whether ``f(x + y) + f(0) = f(x) + f(y)`` up to rounding; the module's hooks do not run."""
    weight = next(module.parameters())
    if not weight.is_floating_point():
        return False
    x = x.reshape(-1, x.shape[-1])
    y = -2 * x.flip(0)
    with torch.no_grad():
        both, zero, one, other = (module.forward(value).float() for value in (x + y, 0 * x, x, y))
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 16 * torch.finfo(x.dtype).eps
    scale = torch.stack([value.abs().amax() for value in (both, zero, one, other)]).amax()
    return bool((both + zero - one - other).abs().amax() <= tolerance * scale)
