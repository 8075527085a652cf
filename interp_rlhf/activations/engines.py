"""How to run a measuring pass on the engine a model lives in, and how to leave it as it was."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from interp_rlhf.activations.hookpoints import ModelLayout, wrappers
from interp_rlhf.errors import MeasurementError


@dataclass(frozen=True, slots=True)
class Engine:
    """What to call to run the backbone.

    Attributes:
        call: the backbone; a prompt-learning adapter's PEFT model; or the root of a model sharded by FSDP2.
        sharded: the FSDP2 root, else ``None``.
        may_stop: whether a forward pass may end early (not where ranks run collectives in step).
        device: where inputs go.
        options: further arguments of the call.
        takes_positions: whether ``position_ids`` may be passed (models with ALiBi take none).
        pads_left: whether padding on the left changes nothing: PEFT drops ``position_ids`` where it adds virtual
            tokens, so that padding between those and the text would move the text away from them.
    """

    call: nn.Module
    sharded: FSDPModule | None
    may_stop: bool
    device: torch.device
    options: Mapping[str, Any]
    takes_positions: bool
    pads_left: bool

    def run(self, inputs: Mapping[str, Tensor]) -> None:
        """One forward pass over ``input_ids``, ``attention_mask`` and ``position_ids``, each ``[B, T]``."""
        arguments = {name: value for name, value in inputs.items() if name != "position_ids" or self.takes_positions}
        self.call(**arguments, use_cache=False, **self.options)


def find_engine(model: nn.Module, parts: ModelLayout) -> Engine:
    """How to run a model that lives in ``model``'s wrappers.

    The backbone is called where possible: no logits, and it is safe before a trainer's first step (TRL 1.16 under
    ZeRO-3 fails after a forward of the whole model). An FSDP2 root must be called itself; a prompt-learning adapter
    adds its virtual tokens in the PEFT model's forward.

    Raises:
        MeasurementError: the model is sharded by FSDP1.
    """
    chain = tuple(wrappers(model))
    if any(isinstance(module, FullyShardedDataParallel) for module in chain):
        raise MeasurementError("model: sharded by FSDP1, expected FSDP2 (fsdp_version: 2 in the accelerate config)")
    root = next((module for module in chain if isinstance(module, FSDPModule)), None)
    prompted = next((module for module in chain if _learns_prompt(module)), None)
    call = root or prompted or parts.decoder
    taken = inspect.signature(type(parts.decoder if call is parts.decoder else parts.causal_lm).forward).parameters
    partitioned = any(hasattr(parameter, "ds_id") for parameter in parts.causal_lm.parameters())
    return Engine(
        call=call,
        sharded=root,
        may_stop=root is None and not partitioned,
        device=next(parts.causal_lm.parameters()).device,
        options={"logits_to_keep": 1} if "logits_to_keep" in taken else {},
        takes_positions="position_ids" in taken and prompted is None,
        pads_left=prompted is None,
    )


def _learns_prompt(module: nn.Module) -> bool:
    if "base_model" not in module._modules or not hasattr(module, "peft_config"):
        return False
    configs: Any = module.peft_config
    return any(config.is_prompt_learning for config in configs.values())


@contextmanager
def gathered(engine: Engine) -> Iterator[None]:
    """The weights outside the decoder layers are whole inside the block: the head of an FSDP2 model can be called."""
    if engine.sharded is None:
        yield
        return
    engine.sharded.unshard()
    try:
        yield
    finally:
        engine.sharded.reshard()


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """A measurement leaves no trace: inside, no gradients, evaluation mode, no autocast, nothing compiled.

    On exit every submodule's ``training`` flag, the Python, NumPy and torch random states, the rotary embeddings'
    caches (they grow with the length of a text) and FSDP2's sharding are exactly as before, whatever happened.
    Nothing inside draws random numbers; their states are put back all the same.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    rotary = [(module, dict(vars(module)), dict(module._buffers)) for module in modules if hasattr(module, "rope_type")]
    device = next(model.parameters()).device
    try:
        for module in modules:
            module.training = False
        no_autocast = torch.autocast(device.type, enabled=False)
        with torch.inference_mode(False), unchanged_random_states(), torch.no_grad(), no_autocast, _uncompiled(modules):
            yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        for module, attributes, buffers in rotary:
            module._buffers.clear()
            module._buffers.update(buffers)
            vars(module).clear()
            vars(module).update(attributes)
        for module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def _uncompiled(modules: list[nn.Module]) -> Iterator[None]:
    """Run eagerly what ``torch.compile`` has compiled: compiled code skips hooks that were added after it."""
    compiled = any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in modules)
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def unchanged_random_states() -> Iterator[None]:
    """Whatever draws inside (a dataset that augments its rows, say), Python, NumPy and torch go on as if it had not."""
    states = _random_states()
    try:
        yield
    finally:
        _restore_random_states(states)


def _random_states() -> tuple[Any, Any, Tensor, list[Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _restore_random_states(states: tuple[Any, Any, Tensor, list[Tensor]]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
