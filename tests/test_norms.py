"""Norms as formulas: those of the modules themselves, their gradient, and what is no norm."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model
from torch import Tensor, nn

from interp_rlhf.circuits.norms import Norm, find_norm

PLACES = {
    "llama": "model.layers.0.input_layernorm",
    "gemma2": "model.layers.0.post_attention_layernorm",
    "gpt2": "transformer.h.0.ln_1",
    "gpt_neox": "gpt_neox.layers.0.input_layernorm",
    "phi": "model.layers.0.input_layernorm",
    "cohere": "model.layers.0.input_layernorm",
    "qwen3": "model.norm",
}


def norm_of(model_type: str) -> tuple[nn.Module, Norm]:
    module = make_model(model_type).get_submodule(PLACES[model_type])
    norm = find_norm(module, 32, torch.device("cpu"), torch.float32)
    assert norm is not None
    return module, norm


@pytest.mark.parametrize("model_type", PLACES)
def test_value_and_gradient_are_the_modules(model_type: str):
    module, norm = norm_of(model_type)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    g = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    y: Tensor = module(x)
    (expected,) = torch.autograd.grad((y * g).sum(), x)
    assert torch.allclose(norm(x), y, atol=1e-5)
    assert torch.allclose(norm.backward(x.detach(), g), expected, atol=1e-5)
    assert norm.centred == (model_type in ("gpt2", "gpt_neox", "phi", "cohere"))


@pytest.mark.parametrize("model_type", PLACES)
def test_shares_of_a_sum_add_up_to_its_normed_value(model_type: str):
    _, norm = norm_of(model_type)
    parts = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(1))
    whole = parts.sum(0)
    shares = norm.linear(parts) * norm.inverse_rms(whole)
    assert torch.allclose(shares.sum(0) + norm.shift, norm(whole), atol=1e-5)
    flat = parts.flatten(0, 1)
    assert torch.allclose((norm.linear(flat) * whole[0]).sum(-1), (flat * norm.transposed(whole[0])).sum(-1), atol=1e-4)


def test_half_precision_is_recognised_within_its_rounding():
    module = make_model("gemma2").get_submodule(PLACES["gemma2"]).to(torch.bfloat16)
    norm = find_norm(module, 32, torch.device("cpu"), torch.bfloat16)
    assert norm is not None and norm.scale.dtype == torch.float32


@pytest.mark.parametrize(
    "module", [nn.Identity(), nn.Linear(32, 32), nn.Dropout(), nn.LayerNorm(16), nn.BatchNorm1d(32)]
)
def test_what_is_no_norm_over_the_channels_is_not_taken_for_one(module: nn.Module):
    assert find_norm(module.eval(), 32, torch.device("cpu"), torch.float32) is None
