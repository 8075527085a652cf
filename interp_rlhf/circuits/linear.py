"""Linear modules as matrices: plain ones, adapted ones, and a check that a module does what its matrix says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interp_rlhf.errors import HookpointError


def effective_weight(module: nn.Module) -> Tensor:
    """Weight ``[out, in]`` float32 of a linear module as it acts now, LoRA or another linear adapter included.

    LoRA's product is put together in float32: in the model's own type a small change would be lost. Any other adapter
    is asked for its answer to the unit vectors. No hooks run.

    Raises:
        HookpointError: the module is not linear, or its weights are not floating point.
    """
    if type(module) is nn.Linear:
        return _floating(module, module.weight)
    if type(module) is Conv1D:
        return _floating(module, module.weight).T
    given: Any = module
    if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        active = [name for name in given.active_adapters if name in given.lora_A]
        if not any(name in getattr(given, "lora_variant", ()) for name in active):
            return _with_lora(given, active)
    return _answers(module)


def _floating(module: nn.Module, weight: Tensor) -> Tensor:
    if not weight.is_floating_point():
        kind = str(weight.dtype).removeprefix("torch.")
        raise HookpointError(f"{type(module).__name__}: expected floating-point weights, found {kind}")
    return weight.detach().float()


def _with_lora(module: Any, active: list[str]) -> Tensor:
    matrix = effective_weight(module.base_layer)
    if not (module.merged or module.disable_adapters):
        for name in active:
            down, up = (effective_weight(pair[name]) for pair in (module.lora_A, module.lora_B))
            matrix = matrix + up @ down * module.scaling[name]
    return matrix


def _answers(module: nn.Module) -> Tensor:
    weight, width = next(module.parameters()), vars(module).get("in_features")
    if not isinstance(width, int):
        raise HookpointError(f"{type(module).__name__}: expected a linear module with in_features, found none")
    _floating(module, weight)
    with torch.no_grad():
        basis = torch.eye(width, device=weight.device, dtype=weight.dtype)
        rows: Tensor = module.forward(torch.cat((basis, torch.zeros_like(basis[:1]))))
    return (rows[:-1].float() - rows[-1:].float()).T


def constant(module: nn.Module, width: int) -> Tensor:
    """What a linear module gives for a zero input of this width, ``[out]`` float32; its hooks do not run."""
    weight = next(module.parameters())
    with torch.no_grad():
        zero = torch.zeros(1, width, device=weight.device, dtype=weight.dtype)
        return module.forward(zero)[0].float()


def check_linear(name: str, module: nn.Module, given: Tensor, output: Tensor) -> None:
    """Refuse a module that did not give ``W·x + b`` on a traced pass.

    Args:
        name: the module's place, for the message.
        given, output: ``[…, in]`` and ``[…, out]`` of the pass.

    Raises:
        HookpointError: as above.
    """
    expected = given.reshape(-1, given.shape[-1]).float() @ effective_weight(module).T + constant(
        module, given.shape[-1]
    )
    found = output.reshape(expected.shape).float()
    tolerance = 1e-3 if output.dtype in (torch.float32, torch.float64) else 16 * torch.finfo(output.dtype).eps
    if bool((found - expected).abs().amax() > tolerance * expected.abs().amax().clamp(min=1e-6)):
        raise HookpointError(
            f"{name}: {type(module).__name__}: expected its output to be W·x + b, found another one: is there a hook "
            "on it, or an adapter that is not linear?"
        )
