"""Capture on every architecture, against what the models report and against algebra of the residual stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, LAYERS, PLAIN_RESIDUAL, counting, make_batch, make_model, make_prompts
from torch import Tensor

from interp_rlhf.activations.capturing import (
    Activations,
    Readings,
    capture,
    check_lengths,
    last_marked,
    masked_mean,
    read_prompts,
    recording,
)
from interp_rlhf.activations.hookpoints import layout, resolve_hookpoints
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.errors import HookpointError, MeasurementError, PromptError

RESIDUAL = ["embed", *(f"layers.{layer}.resid_post" for layer in range(LAYERS))]
EVERYWHERE = [
    "embed",
    *(f"layers.{layer}.{site}" for layer in range(LAYERS) for site in ("heads", "attn_out", "mlp_out", "resid_post")),
]


def real_tokens(value: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return value[inputs["attention_mask"].bool()]


def with_positions(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same arguments for the model's own forward; models with ALiBi take no positions."""
    if model.config.model_type in ("bloom", "mpt"):
        return inputs
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


# ------------------------------------------------------------------------------------------------ every architecture


@pytest.mark.parametrize("model_type", CONFIGS)
def test_residual_stream_is_what_the_model_reports(model_type: str) -> None:
    model, inputs = make_model(model_type), make_batch()
    found = capture(model, inputs, RESIDUAL)
    with torch.no_grad():
        output = model(**with_positions(model, inputs), output_hidden_states=True, use_cache=False)
    for layer, name in enumerate(RESIDUAL[:-1]):
        torch.testing.assert_close(
            real_tokens(found[name], inputs), real_tokens(output.hidden_states[layer], inputs), atol=1e-6, rtol=1e-5
        )
    normed = _final(model, found[RESIDUAL[-1]])
    torch.testing.assert_close(
        real_tokens(normed, inputs), real_tokens(output.hidden_states[-1], inputs), atol=1e-5, rtol=1e-5
    )
    assert found["embed"].std() > 0.05


def _final(model: Any, stream: Tensor) -> Tensor:
    """What stands between the last layer and the head, looked up by name and independent of the package."""
    base = model.model.decoder if model.config.model_type == "opt" else model.base_model
    norms = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
    norm = next(getattr(base, name) for name in norms if getattr(base, name, None) is not None)
    with torch.no_grad():
        out = norm(stream)
        return base.project_out(out) if getattr(base, "project_out", None) is not None else out


@pytest.mark.parametrize("model_type", CONFIGS)
def test_heads_sum_to_the_attention_output(model_type: str) -> None:
    model, inputs = make_model(model_type), make_batch()
    found = capture(model, inputs, [f"layers.{layer}.{site}" for layer in (0, 2) for site in ("heads", "attn_out")])
    parts = layout(model)
    for layer in (0, 2):
        projection = parts.output_projection(layer)
        weight = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T  # [H*dh, d]
        z = found[f"layers.{layer}.heads"]
        assert z.shape == (3, 9, 4, parts.head_dim)
        per_head = torch.einsum("bthk,hkd->bthd", z, weight.detach().reshape(4, parts.head_dim, -1))
        total = per_head.sum(2) + (0 if projection.bias is None else projection.bias.detach())
        torch.testing.assert_close(total, found[f"layers.{layer}.attn_out"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name not in ("bloom", "mpt")])
def test_attention_output_is_what_the_attention_module_returns(model_type: str) -> None:
    """BLOOM adds the residual inside its attention module, MPT returns the same without a place to compare."""
    model, inputs = make_model(model_type), make_batch()
    seen: list[Tensor] = []
    handle = layout(model).attention(1).register_forward_hook(lambda m, a, out: seen.append(_first(out)))
    with torch.no_grad():
        model(**with_positions(model, inputs), use_cache=False)
    handle.remove()
    torch.testing.assert_close(capture(model, inputs, ["layers.1.attn_out"])["layers.1.attn_out"], seen[0])


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("model_type", PLAIN_RESIDUAL)
def test_blocks_add_attention_and_mlp_to_the_stream(model_type: str) -> None:
    model, inputs = make_model(model_type), make_batch()
    found = capture(model, inputs, EVERYWHERE)
    before = found["embed"]
    for layer in range(LAYERS):
        total = before + found[f"layers.{layer}.attn_out"] + found[f"layers.{layer}.mlp_out"]
        after = found[f"layers.{layer}.resid_post"]
        torch.testing.assert_close(real_tokens(total, inputs), real_tokens(after, inputs), atol=1e-5, rtol=1e-4)
        assert real_tokens(found[f"layers.{layer}.mlp_out"], inputs).std() > 1e-3
        before = after


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2", "granite"])
def test_outputs_stand_before_post_norms_and_multipliers(model_type: str) -> None:
    model, inputs = make_model(model_type), make_batch()
    found, block = capture(model, inputs, EVERYWHERE), model.model.layers[1]
    attention, mlp = found["layers.1.attn_out"], found["layers.1.mlp_out"]
    with torch.no_grad():
        if model_type == "granite":
            added = 0.7 * (attention + mlp)
        else:
            added = block.post_attention_layernorm(attention) + block.post_feedforward_layernorm(mlp)
    torch.testing.assert_close(
        real_tokens(found["layers.0.resid_post"] + added, inputs),
        real_tokens(found["layers.1.resid_post"], inputs),
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("model_type", CONFIGS)
def test_means_do_not_depend_on_the_padding_side(model_type: str) -> None:
    model, prompts = make_model(model_type), make_prompts()
    settings: dict[str, Any] = {"batch_size": 3, "pad_token_id": 0, "log_probs": True}
    right = read_prompts(model, prompts, EVERYWHERE, side="right", **settings)
    left = read_prompts(model, prompts, EVERYWHERE, side="left", **settings)
    for name in right.means:
        torch.testing.assert_close(left.means[name], right.means[name], atol=1e-5, rtol=1e-4)
    assert left.log_probs is not None and right.log_probs is not None
    torch.testing.assert_close(left.log_probs, right.log_probs, atol=1e-4, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ capture


def test_capture_accepts_and_returns_both_names() -> None:
    model, inputs = make_model("llama"), make_batch()
    found = capture(model, inputs, ["layers.100%.resid_post", "layers.0.heads"])
    assert list(found) == ["layers.0.heads", "layers.2.resid_post"]
    assert found["layers.100%.resid_post"] is found["layers.2.resid_post"]
    assert "layers.100%.resid_post" in found and "layers.1.resid_post" not in found
    assert not found["layers.0.heads"].requires_grad and isinstance(found, Activations)
    with pytest.raises(KeyError):
        found["layers.1.resid_post"]
    with pytest.raises(TypeError):
        found["embed"] = found["layers.0.heads"]  # type: ignore[index]


def test_reductions_against_numpy() -> None:
    model, inputs = make_model("llama"), make_batch(side="left")
    content = inputs["attention_mask"].clone()
    content[:, -2:] = 0
    content[0, 4] = 0
    inputs = {**inputs, "content_mask": content}
    name = "layers.1.heads"
    whole = capture(model, inputs, [name])[name].numpy()
    mean = capture(model, inputs, [name], reduce="mean")[name]
    last = capture(model, inputs, [name], reduce="last")[name]
    own = capture(model, inputs, [name], reduce=lambda value, mask: (value * mask[..., None, None]).amax(1))[name]
    for row in range(3):
        marked = np.flatnonzero(content[row].numpy())
        np.testing.assert_allclose(mean[row].numpy(), whole[row, marked].mean(0), atol=1e-6)
        np.testing.assert_array_equal(last[row].numpy(), whole[row, marked[-1]])
    assert mean.dtype == torch.float32 and own.shape == (3, 4, 8)


def test_reductions_ignore_what_stands_at_unmarked_positions() -> None:
    values = torch.tensor([[[1.0], [float("nan")], [3.0]], [[float("inf")], [5.0], [float("nan")]]])
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    assert masked_mean(values, mask).flatten().tolist() == [2.0, 5.0]
    assert last_marked(values, mask).flatten().tolist() == [3.0, 5.0]
    assert masked_mean(torch.full((1, 300, 1), 257.0, dtype=torch.bfloat16), torch.ones(1, 300)).item() == 256.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, 9)}, "found attention_mask, input_ids, labels"),
        ({"attention_mask": torch.ones(3, 8)}, r"attention_mask: expected shape \[3, 9\]"),
        ({"content_mask": torch.tensor([[1], [0], [1]]).expand(3, 9)}, "row 1: expected a content token"),
    ],
)
def test_malformed_inputs_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        capture(make_model("llama"), {**make_batch(), **change}, ["embed"], reduce="mean")


def test_nothing_asked_is_refused() -> None:
    with pytest.raises(HookpointError, match="expected at least one"):
        capture(make_model("llama"), make_batch(), [])
    with pytest.raises(HookpointError, match=r"layers 0\.\.2"):
        capture(make_model("llama"), make_batch(), ["layers.7.resid_post"])


# ---------------------------------------------------------------------------------------------------------- recording


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "falcon"])
def test_the_pass_ends_after_the_last_hookpoint(model_type: str) -> None:
    model, parts = make_model(model_type), layout(make_model(model_type))
    parts = layout(model)
    with counting(parts.layers[1]) as reached, counting(parts.layers[2]) as later:
        capture(model, make_batch(), ["layers.0.heads", "layers.1.resid_post"])
        read_prompts(model, make_prompts(2), ["layers.1.mlp_out"], batch_size=2, pad_token_id=0)
        assert (len(reached), len(later)) == (2, 0)
        read_prompts(model, make_prompts(2), ["layers.1.mlp_out"], batch_size=2, pad_token_id=0, log_probs=True)
        assert len(later) == 1


def hook_count(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_after_an_error_in_the_model_and_in_the_reader() -> None:
    model = make_model("llama")
    before = hook_count(model)
    broken = {**make_batch(), "input_ids": torch.full((3, 9), 999)}
    with pytest.raises(IndexError):
        capture(model, broken, EVERYWHERE)
    assert hook_count(model) == before
    with pytest.raises(ZeroDivisionError):
        capture(model, make_batch(), EVERYWHERE, reduce=lambda value, mask: 1 // 0)
    assert hook_count(model) == before and not model.training


def test_a_hookpoint_that_is_not_reached_or_reached_twice_is_an_error() -> None:
    model, inputs = make_model("llama"), make_batch()
    resolved = resolve_hookpoints(["layers.1.resid_post"], layout(model))
    with (
        pytest.raises(MeasurementError, match=r"'layers.1.resid_post': not reached"),
        recording(resolved, lambda *_: None, stop_after_last=False),
    ):
        pass
    with (
        pytest.raises(MeasurementError, match="reached twice"),
        recording(resolved, lambda *_: None, stop_after_last=False),
    ):
        model(**inputs)
        model(**inputs)


# ------------------------------------------------------------------------------------------------------- read_prompts


def read(model: Any, prompts: list[Prompt], names: list[str], **changes: Any) -> Readings:
    return read_prompts(model, prompts, names, **{"batch_size": 3, "pad_token_id": 0, **changes})


@pytest.mark.parametrize("tokens", ["completion", "prompt", "all"])
def test_readings_are_means_over_content_tokens_in_prompt_order(tokens: Any) -> None:
    """Against one unpadded text at a time, averaged by NumPy."""
    model, prompts = make_model("qwen2"), make_prompts()
    readings = read(
        model, prompts, ["layers.1.resid_post"], tokens=tokens, skip_ids=frozenset({prompts[0].input_ids[2]})
    )
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids])
        with torch.no_grad():
            stream = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0].numpy()
        first = prompt.completion_start if tokens == "completion" else 1
        last = prompt.completion_start if tokens == "prompt" else len(prompt.input_ids)
        kept = [i for i in range(max(first, 1), last) if prompt.input_ids[i] != prompts[0].input_ids[2]]
        expected.append(stream[kept].astype(np.float64).mean(0))
    np.testing.assert_allclose(readings.means["layers.1.resid_post"].numpy(), np.stack(expected), atol=1e-5)
    assert readings.tokens == sum(len(prompt.input_ids) for prompt in prompts)
    assert readings.means["layers.1.resid_post"].dtype == torch.float32 and readings.seconds > 0


def test_readings_do_not_depend_on_batches_or_order() -> None:
    model, prompts = make_model("gemma2"), make_prompts(9)
    names = ["layers.0.heads", "layers.2.resid_post"]
    reference = read(model, prompts, names, batch_size=1, log_probs=True)
    assert reference.means["layers.0.heads"].shape == (9, 64)
    for changes in ({"batch_size": 4}, {"batch_size": 9, "longest_first": False}, {"side": "left"}):
        other = read(model, prompts, names, log_probs=True, **changes)
        for name in names:
            torch.testing.assert_close(other.means[name], reference.means[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.log_probs, reference.log_probs, atol=1e-4, rtol=1e-5)
    shuffled = [prompts[i] for i in (3, 1, 8, 0, 2, 7, 5, 4, 6)]
    other = read(model, shuffled, names)
    torch.testing.assert_close(other.means[names[1]], reference.means[names[1]][[3, 1, 8, 0, 2, 7, 5, 4, 6]])
    assert other.log_probs is None


def test_asking_for_log_probabilities_does_not_change_the_means() -> None:
    model, prompts = make_model("llama"), make_prompts()
    plain = read(model, prompts, ["layers.1.resid_post"])
    scored = read(model, prompts, ["layers.1.resid_post"], log_probs=True)
    assert torch.equal(plain.means["layers.1.resid_post"], scored.means["layers.1.resid_post"])
    alone = read(model, prompts, [], log_probs=True)
    assert dict(alone.means) == {} and torch.equal(alone.log_probs, scored.log_probs)


def test_nan_in_the_weights_names_hookpoint_and_prompt() -> None:
    model, prompts = make_model("llama"), make_prompts()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    assert read(model, prompts, ["layers.0.resid_post"]).means["layers.0.resid_post"].isfinite().all()
    with pytest.raises(MeasurementError) as caught:
        read(model, prompts, ["layers.0.resid_post", "layers.1.resid_post"])
    assert "layers.1.resid_post" in str(caught.value) and prompts[0].id in str(caught.value)
    with pytest.raises(MeasurementError, match="log-probabilities: prompt"):
        read(model, prompts, [], log_probs=True)


def test_one_bad_text_is_named() -> None:
    model, prompts = make_model("llama"), make_prompts()
    with torch.no_grad():
        model.model.embed_tokens.weight[1] = float("inf")
    prompts[4] = Prompt((*prompts[4].input_ids[:-1], 1), prompts[4].completion_start, "bad")
    with pytest.raises(MeasurementError, match=rf"prompt {prompts[4].id}: .*\(1 of 7 prompts\)"):
        read(model, prompts, ["embed"])


def test_texts_longer_than_the_context_and_no_texts() -> None:
    model = make_model("gpt2")
    long = Prompt(tuple(range(3, 60)) + tuple(range(3, 11)), 5, "long")
    with pytest.raises(PromptError, match=rf"prompt {long.id}: 65 tokens, expected at most 64"):
        read(model, [long], ["embed"])
    with pytest.raises(PromptError, match="expected at least one text"):
        read(model, [], ["embed"])
    check_lengths([Prompt(long.input_ids[:64], 5, "fits")], layout(model))
    check_lengths([long], layout(make_model("bloom")))
