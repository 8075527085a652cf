"""roles.py: columns that are not what they are taken for are noticed, whatever the modules are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import make_model
from torch import Tensor
from transformers import CodeGenConfig, CodeGenForCausalLM, GPTBigCodeConfig, GPTBigCodeForCausalLM

from interp_rlhf import HookpointError, attribute_edges
from interp_rlhf.circuits import wiring
from interp_rlhf.circuits.wiring import Projection, find_wiring

SMALL: dict[str, Any] = {
    "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("many", [True, False])
def test_fused_projections_of_another_order_are_refused(many: bool) -> None:
    model: Any = CodeGenForCausalLM(CodeGenConfig(**SMALL, rotary_dim=4))
    if many:
        model = GPTBigCodeForCausalLM(GPTBigCodeConfig(**SMALL, multi_query=False))
    with pytest.raises(HookpointError, match=r"layers\.0: \w+Block is not supported for circuits: expected that on"):
        find_wiring(model.eval())


def test_one_shared_key_and_value_is_supported_and_one_token_has_no_use_for_queries_and_keys() -> None:
    model = GPTBigCodeForCausalLM(GPTBigCodeConfig(**SMALL, multi_query=True)).eval()
    clean, corrupt = (
        {"input_ids": torch.randint(3, 60, (4, 1), generator=torch.Generator().manual_seed(s))} for s in (0, 1)
    )
    circuit = attribute_edges(model, clean, corrupt, lambda now, then: now[:, -1, 5] - now[:, -1, 9])
    by_role = {role: [i for i, t in enumerate(circuit.targets) if t.endswith(role)] for role in (".q", ".k", ".v")}
    largest = {role: float(circuit.scores[:, columns].abs().max()) for role, columns in by_role.items()}
    assert largest[".q"] == largest[".k"] == 0 and largest[".v"] > 1e-4


def swapped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return k, q, v


def values_for_queries(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return v, k, q


def other_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.flip(0), k, v


def other_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k.flip(0), v


def other_values(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k, v.flip(0)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "qwen3", "gemma2", "llama"])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (swapped, "a query acts at its own token alone|a key acts on the heads"),
        (values_for_queries, "on the first token every head gives out its value"),
        (other_heads, "a head's query acts on that head alone"),
        (other_groups, "a key acts on the heads of its group alone"),
        (other_values, "on the first token every head gives out its value"),
    ],
)
def test_wrong_columns_are_noticed(
    model_type: str, wrong: Callable[..., Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (
        {} if model_type in ("gpt2", "gpt_neox") else {"num_key_value_heads": 4}
    )  # as many as heads: to be swapped
    model = make_model(model_type, **changes)
    find_wiring(model)
    right = wiring._projections

    def mistaken(parts: Any, index: int) -> tuple[Projection, ...]:
        found = right(parts, index)
        columns = wrong(*(role.columns for role in found))
        return tuple(replace(role, columns=mine) for role, mine in zip(found, columns, strict=True))

    if wrong in (swapped, values_for_queries) and model_type not in ("gpt2", "gpt_neox"):
        order = (1, 0, 2) if wrong is swapped else (2, 1, 0)

        def mistaken(parts: Any, index: int) -> tuple[Projection, ...]:
            found = right(parts, index)
            return tuple(found[i] for i in order)

    monkeypatch.setattr(wiring, "_projections", mistaken)
    with pytest.raises(HookpointError, match=words):
        find_wiring(model)
