"""Names of hookpoints, layouts of architectures, and the model inside its wrappers."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from tiny_models import CONFIGS, LAYERS, make_model
from torch import nn

from interp_rlhf.activations.hookpoints import (
    Hookpoint,
    layer_index,
    layout,
    parse_hookpoint,
    resolve_hookpoints,
    unwrap_model,
    wrappers,
)
from interp_rlhf.errors import HookpointError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embed", Hookpoint("embed")),
        ("layers.3.resid_post", Hookpoint("resid_post", layer=3)),
        ("layers.-1.heads", Hookpoint("heads", layer=-1)),
        ("layers.50%.attn_out", Hookpoint("attn_out", depth=Fraction(1, 2))),
        ("layers.12.5%.mlp_out", Hookpoint("mlp_out", depth=Fraction(1, 8))),
    ],
)
def test_names_are_parsed(name: str, expected: Hookpoint) -> None:
    assert parse_hookpoint(name) == expected


@pytest.mark.parametrize(
    "name",
    ["", "embed.0", "layers.3", "layers.x.resid_post", "layers.3.resid_pre", "layers.1.5.heads", "layers.101%.heads",
     "layers.-5%.heads", "layers.3.resid_post ", "Layers.3.resid_post", "layers.3.embed"],
)  # fmt: skip
def test_malformed_names_are_refused_by_name(name: str) -> None:
    with pytest.raises(HookpointError) as caught:
        parse_hookpoint(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("percent", "layers", "expected"),
    [("0", 5, 0), ("100", 5, 4), ("50", 5, 2), ("50", 4, 2), ("25", 3, 1), ("75", 3, 2), ("50", 2, 1), ("30", 1, 0)],
)
def test_depth_is_rounded_half_up(percent: str, layers: int, expected: int) -> None:
    assert layer_index(parse_hookpoint(f"layers.{percent}%.resid_post"), layers) == expected


def test_resolving_deduplicates_and_orders() -> None:
    parts = layout(make_model("llama"))
    asked = ["layers.-1.resid_post", "layers.2.heads", "embed", "layers.100%.resid_post", "layers.0.mlp_out"]
    resolved = resolve_hookpoints(asked, parts)
    assert [point.name for point in resolved] == ["embed", "layers.0.mlp_out", "layers.2.heads", "layers.2.resid_post"]
    assert resolved[-1].asked == ("layers.-1.resid_post", "layers.100%.resid_post")
    assert [point.kind for point in resolved] == ["input", "output", "input", "output"]


@pytest.mark.parametrize("name", ["layers.3.resid_post", "layers.-4.heads"])
def test_a_layer_outside_the_model_is_refused(name: str) -> None:
    with pytest.raises(HookpointError, match=r"the model has layers 0\.\.2") as caught:
        resolve_hookpoints([name], layout(make_model("llama")))
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_layout_of_each_architecture(model_type: str) -> None:
    model = make_model(model_type)
    parts = layout(model)
    config = model.config
    assert parts.causal_lm is model and parts.architecture == type(model).__name__
    assert parts.n_layers == len(parts.layers) == LAYERS
    assert (parts.d_model, parts.n_heads) == (32, 4)
    assert parts.head_dim == (getattr(config, "head_dim", None) or 8)
    assert parts.embed is model.get_input_embeddings()
    assert parts.max_positions == {"bloom": None, "mpt": None}.get(model_type, 64)
    for layer in range(LAYERS):
        projection = parts.output_projection(layer)
        assert any(module is projection for module in parts.attention(layer).modules())
        width = projection.weight.shape[0 if type(projection).__name__ == "Conv1D" else 1]
        assert width == 4 * parts.head_dim
        assert any(module is parts.mlp(layer) for module in parts.layers[layer].modules())


class _Odd(nn.Module):
    """A decoder whose layers nobody can tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda decoder: self.text)
        self.text = SimpleNamespace(num_hidden_layers=2, hidden_size=4, num_attention_heads=2, model_type="odd")
        self.first = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.second = nn.ModuleList(nn.ReLU() for _ in range(2))
        self.embedding = nn.Embedding(8, 4)

    def get_decoder(self) -> nn.Module:
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def test_an_unknown_architecture_lists_its_candidates_and_can_be_overridden() -> None:
    model = _Odd()
    with pytest.raises(HookpointError) as caught:
        layout(model)
    message = str(caught.value)
    assert all(part in message for part in ("first (2 of Linear)", "second (2 of ReLU)", 'layers="path"', "_Odd"))
    parts = layout(model, layers="second")
    assert parts.layers is model.second and parts.path == "second"
    with pytest.raises(HookpointError, match="no attention output projection in ReLU"):
        resolve_hookpoints(["layers.0.heads"], parts)
    with pytest.raises(HookpointError, match=r"hookpoint 'layers\.0\.mlp_out': layers\.0: no MLP"):
        resolve_hookpoints(["layers.0.mlp_out"], parts)
    with pytest.raises(HookpointError, match="layers='nowhere': expected a ModuleList, found nothing"):
        layout(model, layers="nowhere")
    with pytest.raises(HookpointError, match="layers='embedding': expected a ModuleList, found Embedding"):
        layout(model, layers="embedding")


def test_experts_lists_as_long_as_the_model_are_not_taken_for_its_layers() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.experts = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
    assert layout(model).path == "model.layers"


def test_a_layer_with_two_mlp_branches_has_no_mlp_out() -> None:
    model = make_model("llama")
    model.model.layers[1].shared_mlp = nn.Identity()
    with pytest.raises(HookpointError, match="shared_mlp"):
        resolve_hookpoints(["layers.1.mlp_out"], layout(model))


def test_encoder_decoders_and_strangers_are_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1, decoder_start_token_id=0)
    )
    with pytest.raises(HookpointError, match="found an encoder-decoder"):
        layout(t5)
    with pytest.raises(HookpointError, match="found Linear"):
        layout(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------------------ wrappers


def test_plain_and_compiled_models_and_classifiers() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    model = make_model("llama")
    assert unwrap_model(model) is model
    assert unwrap_model(torch.compile(model)) is model
    classifier = LlamaForSequenceClassification(LlamaConfig(**CONFIGS["llama"], num_labels=1))
    assert layout(classifier).n_layers == LAYERS


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_peft(kind: str) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model = make_model("llama")
    config = (
        LoraConfig(target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
        if kind == "lora"
        else PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    wrapped = get_peft_model(model, config)
    assert unwrap_model(wrapped) is model
    assert unwrap_model(torch.compile(wrapped)) is model
    if kind == "lora":
        assert "lora" in type(layout(wrapped).output_projection(0)).__module__


def test_engines_and_trl_wrappers_by_structure() -> None:
    model = make_model("llama")
    engine = type("DeepSpeedEngine", (nn.Module,), {})()
    engine.module = model
    assert [type(item).__name__ for item in wrappers(engine)] == ["DeepSpeedEngine", "LlamaForCausalLM"]
    ppo = nn.Module()
    ppo.policy, ppo.value_model = model, make_model("llama")
    outer = type("DeepSpeedEngine", (nn.Module,), {})()
    outer.module = ppo
    assert unwrap_model(outer) is model
    valued = nn.Module()
    valued.pretrained_model, valued.v_head = model, nn.Linear(32, 1)
    assert unwrap_model(valued) is model
    assert unwrap_model(nn.DataParallel(model)) is model
