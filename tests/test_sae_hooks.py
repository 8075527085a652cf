"""Names of other libraries' hooks: each leads to the place that reads the same numbers, or nowhere."""

from __future__ import annotations

import doctest
import re
from typing import Any

import pytest
import torch
from tiny_models import make_batch, make_model

from interp_rlhf.activations.capturing import capture
from interp_rlhf.errors import HookpointError
from interp_rlhf.readouts import sae_hooks
from interp_rlhf.readouts.sae_hooks import lens_name, translate_hook, translate_submodule

UNDERSTOOD = {
    "blocks.0.hook_resid_pre": "embed",
    "blocks.3.hook_resid_pre": "layers.2.resid_post",
    "blocks.3.hook_resid_post": "layers.3.resid_post",
    "blocks.3.hook_mlp_out": "layers.3.mlp_out",
    "blocks.3.hook_attn_out": "layers.3.attn_out",
    "blocks.13.attn.hook_z": "layers.13.heads",
    "layers.3": "layers.3.resid_post",
    "layers.3.mlp": "layers.3.mlp_out",
    "layers.0.attention": "layers.0.attn_out",
    "h.3": "layers.3.resid_post",
    "h.3.attn": "layers.3.attn_out",
    "model.layers.3": "layers.3.resid_post",
    "model.layers.3.output": "layers.3.resid_post",
    "model.layers.3.self_attn": "layers.3.attn_out",
    "model.layers.3.self_attn.o_proj": "layers.3.attn_out",
    "model.layers.3.mlp.output": "layers.3.mlp_out",
    "model.language_model.layers.3": "layers.3.resid_post",
    "model.decoder.layers.3": "layers.3.resid_post",
    "transformer.h.3": "layers.3.resid_post",
    "transformer.h.3.mlp": "layers.3.mlp_out",
    "transformer.h.3.attn.c_proj": "layers.3.attn_out",
    "gpt_neox.layers.3": "layers.3.resid_post",
    "gpt_neox.layers.3.attention": "layers.3.attn_out",
    "layers.3.resid_post": "layers.3.resid_post",
    "layers.-1.mlp_out": "layers.-1.mlp_out",
    "layers.50%.resid_post": "layers.50%.resid_post",
    "embed": "embed",
}
NOT_UNDERSTOOD = [
    "", "blocks.3", "blocks.3.hook_resid_mid", "blocks.3.hook_mlp_in", "blocks.3.mlp.hook_post", "blocks.3.attn.hook_q",
    "blocks.-1.hook_resid_post", "blocks.3.hook_resid_post.0", "hook_embed", "embed_tokens", "layers.3.mlp.act",
    "model.layers.3.input_layernorm", "model.layers.x", "vision_tower.layers.3", "encoder.layers.3", "ln_final.hook",
    "layers.3.resid_mid", "layers.3.attn_in", "model.layers", "blocks.3.hook_resid_post\n", "blocks.3.hook_resid_post ",
    f"blocks.{'9' * 50}.hook_mlp_out", f"blocks.{'9' * 5000}.hook_mlp_out", f"layers.{'9' * 5000}.mlp_out",
]  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_names_lead_to_our_hookpoints(name: str) -> None:
    assert translate_hook(name) == translate_hook(name, "tiny") == UNDERSTOOD[name]


@pytest.mark.parametrize("name", NOT_UNDERSTOOD, ids=lambda name: repr(name)[:40])
def test_other_names_are_refused_with_what_is_understood(name: str) -> None:
    with pytest.raises(HookpointError) as found:
        translate_hook(name)
    message = str(found.value)
    assert len(message.splitlines()) == 1 and len(message) < 600
    assert "hook_resid_pre" in message or "characters" in message


@pytest.mark.parametrize("model", ["gemma-2-2b", "google/gemma-3-4b-it", "Gemma2", "allenai/OLMo-2-0425-1B"])
def test_outputs_behind_a_norm_are_not_taken_for_those_before_it(model: str) -> None:
    for site in ("attn_out", "mlp_out"):
        with pytest.raises(HookpointError, match=f"{re.escape(model)}.*layers.3.{site} is read before it"):
            translate_hook(f"blocks.3.hook_{site}", model)
    assert translate_hook("model.layers.3.mlp", model) == "layers.3.mlp_out"
    assert translate_hook("blocks.3.hook_resid_post", model) == "layers.3.resid_post"
    assert translate_hook("blocks.3.hook_mlp_out", "gemma-2b") == "layers.3.mlp_out"


def test_modules_that_add_the_residual_stream_are_refused() -> None:
    with pytest.raises(HookpointError, match=r"bigscience/bloom.*adds the residual stream"):
        translate_hook("transformer.h.3.mlp", "bigscience/bloom-560m")
    with pytest.raises(HookpointError, match="adds the residual stream"):
        translate_submodule(3, "attn_out", "bigscience/bloom-560m")
    assert translate_hook("transformer.h.3", "bigscience/bloom-560m") == "layers.3.resid_post"


SUBMODULES: dict[tuple[int, str | None], str] = {
    (3, None): "layers.3.resid_post",
    (3, "resid"): "layers.3.resid_post",
    (3, "resid_post"): "layers.3.resid_post",
    (3, "resid_post_layer_3"): "layers.3.resid_post",
    (3, "resid_out_layer3"): "layers.3.resid_post",
    (3, "resid_pre"): "layers.2.resid_post",
    (0, "resid_pre_layer_0"): "embed",
    (3, "mlp"): "layers.3.mlp_out",
    (12, "mlp_out_layer_12"): "layers.12.mlp_out",
    (3, "attn"): "layers.3.attn_out",
    (3, "attention_layer_3"): "layers.3.attn_out",
    (3, "blocks.3.resid_post"): "layers.3.resid_post",
    (3, "model.layers.3.mlp"): "layers.3.mlp_out",
    (3, "gpt_neox.layers.3"): "layers.3.resid_post",
    (3, "blocks.3.hook_resid_pre"): "layers.2.resid_post",
}


@pytest.mark.parametrize(("layer", "submodule"), SUBMODULES)
def test_layers_and_submodules(layer: int, submodule: str | None) -> None:
    assert translate_submodule(layer, submodule) == SUBMODULES[layer, submodule]


@pytest.mark.parametrize("submodule", ["resid_post_layer_4", "blocks.4.resid_post", "model.layers.4", "mlp_layer_12"])
def test_another_layer_than_the_one_told_is_refused(submodule: str) -> None:
    with pytest.raises(HookpointError, match=r"expected layer 3, found (4|12)"):
        translate_submodule(3, submodule)


@pytest.mark.parametrize("submodule", ["", "resid_mid", "mlp_in", "residual", "resid_post_layer_", "model.layers.3.ln"])
def test_submodules_of_no_kind_are_refused(submodule: str) -> None:
    with pytest.raises(HookpointError, match="understood are resid, resid_post"):
        translate_submodule(3, submodule)


@pytest.mark.parametrize("site", ["resid_post", "attn_out", "mlp_out", "heads"])
def test_names_there_and_back(site: str) -> None:
    assert translate_hook(lens_name(f"layers.7.{site}")) == f"layers.7.{site}"
    assert lens_name("layers.50%.resid_post") == "layers.50%.resid_post"
    assert translate_hook(lens_name("embed")) == "embed"


PATHS = {
    "llama": ("model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.1.self_attn.o_proj"),
    "gemma2": ("model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp"),
    "gpt2": ("transformer.h.1", "transformer.h.1.attn", "transformer.h.1.mlp"),
    "gpt_neox": ("gpt_neox.layers.1", "gpt_neox.layers.1.attention", "gpt_neox.layers.1.mlp"),
    "opt": ("model.decoder.layers.1", "model.decoder.layers.1.self_attn"),
}


@pytest.mark.parametrize(("model_type", "path"), [(kind, path) for kind, paths in PATHS.items() for path in paths])
def test_a_modules_path_reads_what_the_module_puts_out(model_type: str, path: str) -> None:
    model, inputs, seen = make_model(model_type), make_batch(side="right"), []

    def record(module: Any, args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, torch.Tensor) else output[0])

    hookpoint, real = translate_hook(path), inputs["attention_mask"].bool()
    with torch.no_grad():
        handle = model.get_submodule(path).register_forward_hook(record)
        model(**inputs)
        handle.remove()
    found = capture(model, inputs, [hookpoint])[hookpoint]
    torch.testing.assert_close(found[real], seen[0].reshape(found.shape)[real].float())


def test_examples() -> None:
    assert doctest.testmod(sae_hooks).failed == 0
