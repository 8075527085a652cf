"""A measurement leaves no trace, and the same readings come out of every wrapper a model can be in."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, counting, make_batch, make_model, make_prompts
from torch import nn

from interp_rlhf.activations.capturing import Readings, capture, read_prompts
from interp_rlhf.activations.engines import find_engine, measuring
from interp_rlhf.activations.hookpoints import layout

NAMES = [
    "embed",
    "layers.0.heads",
    "layers.1.attn_out",
    "layers.1.mlp_out",
    "layers.1.resid_post",
    "layers.2.resid_post",
]


def read(model: Any, names: list[str] = NAMES, **changes: Any) -> Readings:
    settings: dict[str, Any] = {"batch_size": 3, "pad_token_id": 0, "log_probs": True, **changes}
    return read_prompts(model, make_prompts(), names, **settings)


def assert_same(found: Readings, expected: Readings, *, exactly: bool = True) -> None:
    tolerance = 0.0 if exactly else 1e-5
    for name in expected.means:
        torch.testing.assert_close(found.means[name], expected.means[name], atol=tolerance, rtol=tolerance)
    if expected.log_probs is not None:
        torch.testing.assert_close(found.log_probs, expected.log_probs, atol=10 * tolerance, rtol=0)


# ----------------------------------------------------------------------------------------------------------- no trace


def trace_of(model: nn.Module) -> list[Any]:
    """Everything a measurement could leave behind, as comparable values."""
    numpy_state = np.random.get_state()
    modules = list(model.modules())
    return [
        random.getstate(),
        (numpy_state[0], numpy_state[1].tobytes(), *numpy_state[2:]),
        torch.get_rng_state().tolist(),
        [module.training for module in modules],
        [list(module._forward_hooks) + list(module._forward_pre_hooks) for module in modules],
        [sorted(name for name in vars(module)) for module in modules],
        [None if p.grad is None else p.grad.double().sum().item() for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [(name, b.data_ptr(), b.double().sum().item()) for name, b in model.named_buffers()],
        [getattr(module, "max_seq_len_cached", None) for module in modules],
        getattr(model.config, "use_cache", None),
        torch.is_grad_enabled(),
    ]


def train_a_step(model: Any) -> None:
    inputs = make_batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_a_measurement_in_the_middle_of_training_leaves_no_trace(model_type: str, checkpointing: bool | None) -> None:
    dropout = {"attention_dropout": 0.3} if model_type != "gpt2" else {"resid_pdrop": 0.3}
    model = make_model(model_type, **dropout)
    expected = read(model)
    model.train()
    model.base_model.get_input_embeddings().eval()  # a flag that differs from its parent's
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    train_a_step(model)
    torch.manual_seed(3)
    before = trace_of(model)
    found = read(model)
    capture(model, make_batch(), NAMES[:3])
    assert trace_of(model) == before
    assert_same(found, expected)


def test_state_is_restored_after_an_error_and_after_draws() -> None:
    model = make_model("llama").train()
    before = trace_of(model)
    with pytest.raises(ZeroDivisionError), measuring(model):
        assert not model.training and not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(2)
        raise ZeroDivisionError
    assert trace_of(model) == before


def test_rotary_tables_that_grow_with_the_text_shrink_again() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = make_model("llama", max_position_embeddings=8, rope_parameters=rope).train()
    ids = torch.randint(3, 64, (1, 20))
    before = trace_of(model)
    capture(model, {"input_ids": ids}, ["layers.1.resid_post"])
    assert trace_of(model) == before
    with torch.no_grad():
        model(input_ids=ids)
    assert trace_of(model) != before  # the model's own forward does leave this trace


def test_autocast_around_a_measurement_does_not_reach_it() -> None:
    model = make_model("llama")
    expected = read(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(read(model), expected)


def test_bfloat16_models_are_averaged_in_float32() -> None:
    model = make_model("llama").to(torch.bfloat16)
    readings = read(model)
    assert readings.means["embed"].dtype == torch.float32 and readings.log_probs is not None
    whole = capture(model, make_batch(), ["embed"])["embed"]
    assert whole.dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("part", ["model", "layers"])
def test_compiled_models_are_read_although_they_ran_before(part: str, in_place: bool) -> None:
    model = make_model("llama")
    expected = read(model)
    compiled = model
    if in_place:
        for module in [model] if part == "model" else model.model.layers:
            module.compile(backend="eager")
    elif part == "model":
        compiled = torch.compile(model, backend="eager")
    else:
        for index in range(3):
            model.model.layers[index] = torch.compile(model.model.layers[index], backend="eager")
    compiled(**make_batch())
    names = NAMES if part == "model" or in_place else ["embed", "layers.1.resid_post", "layers.2.resid_post"]
    found = read(compiled, names)
    for name in names:
        assert torch.equal(found.means[name], expected.means[name])


def test_lora_changes_the_readings_and_off_gives_the_base_models() -> None:
    from peft import LoraConfig, get_peft_model

    base = read(make_model("llama"))
    model = get_peft_model(
        make_model("llama"), LoraConfig(target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.5)
    )
    assert_same(read(model), base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.train()
    found = read(model)
    assert all(not torch.allclose(found.means[name], base.means[name]) for name in NAMES if "layers.1" in name)
    torch.testing.assert_close(found.means["embed"], base.means["embed"])
    merged = read(model.merge_and_unload())
    assert_same(found, merged, exactly=False)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompt_learning_is_aligned_on_the_texts_own_tokens(kind: str) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    config = PromptTuningConfig if kind == "prompt" else PrefixTuningConfig
    model = get_peft_model(make_model("llama"), config(num_virtual_tokens=5, task_type="CAUSAL_LM")).eval()
    inputs, name = make_batch(), "layers.2.resid_post"
    found = capture(model, inputs, [name, "layers.0.heads"])
    with torch.no_grad():
        own = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -9:]
        normed = model.get_base_model().model.norm(found[name])
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(normed[kept], own[kept])
    assert found["layers.0.heads"].shape == (3, 9, 4, 8)
    plain = capture(make_model("llama"), inputs, [name])[name]
    assert not torch.allclose(found[name][kept], plain[kept], atol=1e-3)
    assert read(model).log_probs is not None
    prompt = make_prompts()[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt.input_ids])).logits[0, -len(prompt.input_ids) :].log_softmax(-1)
    expected = sum(logits[t - 1, prompt.input_ids[t]] for t in range(prompt.completion_start, len(prompt.input_ids)))
    assert float(read(model).log_probs[0]) == pytest.approx(float(expected), abs=1e-4)  # type: ignore[index]


@pytest.mark.parametrize("kind", ["none", "prompt", "prefix"])
def test_the_padding_side_changes_no_reading(kind: str) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    model: Any = make_model("llama")
    if kind != "none":
        config = PromptTuningConfig if kind == "prompt" else PrefixTuningConfig
        model = get_peft_model(model, config(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    assert len({len(prompt.input_ids) for prompt in make_prompts()}) > 1  # some are padded
    assert_same(read(model, side="left", longest_first=False), read(model), exactly=False)


def test_trls_value_head_model() -> None:
    heads = pytest.importorskip("trl.experimental.ppo", reason="this TRL has no PPO (removed in 1.13)")
    model = make_model("gpt2")
    expected = read(model)
    assert_same(read(heads.AutoModelForCausalLMWithValueHead(model)), expected)


def test_trls_policy_and_value_wrapper_reads_the_policy_only() -> None:
    ppo = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="this TRL has no PPO (removed in 1.13)")
    from transformers import AutoConfig, AutoModelForSequenceClassification

    model = make_model("llama")
    expected = read(model)
    value = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("llama", **CONFIGS["llama"], num_labels=1)
    )
    wrapper = ppo.PolicyAndValueWrapper(model, value).train()
    with counting(value.model) as calls:
        assert_same(read(wrapper), expected)
    assert not calls and wrapper.training and value.training and model.training


def test_reward_models_are_read_too() -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("llama", **CONFIGS["llama"], num_labels=1)
    )
    inputs = make_batch()
    found = capture(model.eval(), inputs, ["layers.1.resid_post"])["layers.1.resid_post"]
    with torch.no_grad():
        own = model(**inputs, output_hidden_states=True).hidden_states[2]
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[kept], own[kept])


def test_the_backbone_alone_runs_and_partitioned_weights_forbid_stopping() -> None:
    model = make_model("llama")
    engine = find_engine(model, layout(model))
    assert engine.call is model.model and engine.may_stop and engine.sharded is None
    with counting(model.lm_head) as calls:
        read(model, log_probs=False)
    assert not calls
    model.lm_head.weight.ds_id = 1  # the mark DeepSpeed ZeRO-3 leaves on what it partitions
    assert not find_engine(model, layout(model)).may_stop
