"""Readings of the frozen start θ_0 on the same text: adapter off, the trainer's reference model, a copy, or cached.

A model that is offered as the frozen start is only believed after it gave the readings that the policy gave at step 0
(continued or PiSSA adapters, a foreign or a moving ``ref_model`` do not).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from interp_rlhf.activations.hookpoints import unwrap_model, wrappers
from interp_rlhf.errors import ReferenceMismatch

if TYPE_CHECKING:
    from peft import PeftModel

Kind = Literal["cached", "adapter", "ref_model", "copy"]

#: Largest relative difference of two readings that still counts as the same weights (covers bfloat16 and reordering).
SAME_READING = 1e-3


@dataclass(frozen=True, slots=True)
class Reference:
    """Where θ_0 is read. ``model`` is ``None`` for cached readings."""

    kind: Kind
    model: nn.Module | None = None

    @contextmanager
    def reading(self) -> Iterator[nn.Module]:
        """The model to run for a reading under θ_0; everything about it is as before on exit."""
        if self.model is None:
            raise ReferenceMismatch("reference: cached readings exist for the fixed prompts only")
        if self.kind != "adapter":
            yield self.model
            return
        with _adapter_off(cast("PeftModel", self.model)) as model:
            yield model


def find_reference(kind: str, policy: nn.Module, ref_model: nn.Module | None) -> Reference:
    """The reference that a config asks for; ``auto`` caches.

    Args:
        kind: ``auto``, ``cached``, ``adapter``, ``ref_model`` or ``copy``.
        policy: the training model, wrapped or not.
        ref_model: the trainer's reference model, if it has one.

    Raises:
        ReferenceMismatch: the trainer has no such reference.
    """
    if kind in ("auto", "cached"):
        return Reference("cached")
    if kind == "adapter":
        peft_model = find_peft(policy)
        if peft_model is None:
            raise ReferenceMismatch("reference: adapter: the model has no PEFT adapter to switch off")
        return Reference("adapter", peft_model)
    if kind == "ref_model":
        if ref_model is None:
            raise ReferenceMismatch("reference: ref_model: the trainer has no reference model, found none")
        return Reference("ref_model", ref_model)
    return Reference("copy", _frozen_copy(find_peft(policy) or unwrap_model(policy)))


def find_frozen(policy: nn.Module, ref_model: nn.Module | None) -> Reference | None:
    """A model that may be θ_0 and can read new texts: the policy without its adapter, else the trainer's reference.

    Whether it is θ_0 has to be checked on texts that were read at step 0. ``None`` where there is none.
    """
    peft_model = find_peft(policy)
    if peft_model is not None:
        return Reference("adapter", peft_model)
    return None if ref_model is None else Reference("ref_model", ref_model)


def find_peft(model: nn.Module) -> PeftModel | None:
    """The PEFT model around the policy, which its ``disable_adapter`` tells; ``None`` where there is none."""
    for module in wrappers(model):
        if hasattr(module, "disable_adapter") and hasattr(module, "peft_config"):
            return cast("PeftModel", module)
    return None


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy with its adapter (a learned prompt lies outside the model) and with the ``forward`` of each class.

    Trainers and accelerate replace ``forward`` on the instance by functions that go on calling the original.
    """
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    for module in frozen.modules():
        vars(module).pop("forward", None)
    return frozen


@contextmanager
def _adapter_off(peft_model: PeftModel) -> Iterator[nn.Module]:
    """Base weights only. Which parameters require gradients is put back exactly: PEFT's own switch re-enables all.

    A merged adapter is refused: PEFT would unmerge it on the way, and the weights would no longer be what they were.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = ((name, module) for name, module in peft_model.named_modules() if isinstance(module, BaseTunerLayer))
    merged = next((name for name, layer in layers if layer.merged), None)
    if merged is not None:
        raise ReferenceMismatch(
            f"reference: adapter: found merged into the weights at {merged}, expected an adapter apart from them"
        )
    trainable = {name: p.requires_grad for name, p in peft_model.named_parameters()}
    try:
        with peft_model.disable_adapter():
            yield peft_model
    finally:
        for name, parameter in peft_model.named_parameters():
            parameter.requires_grad_(trainable[name])


def reading_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Largest ‖a − b‖ / mean ‖a‖ over texts and hookpoints of two readings ``hookpoint -> [N, d]``."""
    largest = 0.0
    for name, reading in first.items():
        scale = reading.norm(dim=-1).mean().clamp(min=torch.finfo(reading.dtype).tiny)
        largest = max(largest, float((reading - second[name]).norm(dim=-1).max() / scale))
    return largest


def check_is_start(kind: Kind, difference: float) -> None:
    """Refuse a reference whose readings are not the policy's at step 0.

    Raises:
        ReferenceMismatch: with the difference found and the largest one accepted.
    """
    if not difference <= SAME_READING:
        raise ReferenceMismatch(
            f"reference: {kind}: its readings differ from the policy's at step 0 by {difference:.2g} of the mean "
            f"norm, expected at most {SAME_READING:g}; it is not the frozen start (reference: cached is)"
        )
