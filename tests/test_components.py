"""The change of a direction's reading as a sum over components: exact, and right about what was altered."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_model, make_prompts
from torch import Tensor

from interp_rlhf import HookpointError, MeasurementError
from interp_rlhf.activations.prompts import Prompt, content_tokens
from interp_rlhf.circuits.components import ComponentReading, component_changes, read_components

HOOKPOINTS = ("layers.0.resid_post", "layers.2.resid_post", "layers.2.resid_post")
SUPPORTED = ["llama", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "qwen3", "phi", "mixtral", "gpt_neo", "olmo2"]
OPAQUE = ["mixtral"]
PROMPTS = [*make_prompts(), Prompt((5, 6, 7, 8, 9), 2, "unit-3")]  # one unit has two texts


def directions(width: int = 32) -> list[tuple[str, Tensor]]:
    found = torch.randn(len(HOOKPOINTS), width, generator=torch.Generator().manual_seed(7))
    return list(zip(HOOKPOINTS, found / found.norm(dim=1, keepdim=True), strict=True))


def read(model: Any, where: list[tuple[str, Tensor]] | None = None, **changes: Any) -> ComponentReading:
    options: dict[str, Any] = {"batch_size": 3, "pad_token_id": 0, "skip_ids": frozenset({1}), **changes}
    return read_components(model, PROMPTS, where or directions(), **options)


def altered(model: Any, seed: int = 4, size: float = 0.05) -> Any:
    """The model with other weights everywhere."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return other


def plain_projections(model: Any) -> np.ndarray:
    """``[P, U]``, one text at a time from the hidden states that the model returns, units averaged in NumPy."""
    units = list(dict.fromkeys(prompt.unit for prompt in PROMPTS))
    found = np.zeros((len(HOOKPOINTS), len(units)))
    ends: list[Tensor] = []  # the last hidden state that a model returns has been through the final norm
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    handle = layers[-1].register_forward_hook(lambda m, a, o: ends.append(o if isinstance(o, Tensor) else o[0]))
    counts = [sum(prompt.unit == unit for prompt in PROMPTS) for unit in units]
    with torch.no_grad():
        for prompt in PROMPTS:
            states = model(input_ids=torch.tensor([prompt.input_ids]), output_hidden_states=True).hidden_states
            states = [*states[:-1], ends.pop()]
            keep = np.array(content_tokens(prompt, "completion", frozenset({1})))
            for p, (hookpoint, v) in enumerate(directions()):
                tokens = states[int(hookpoint.split(".")[1]) + 1][0].double().numpy()[keep]
                u = units.index(prompt.unit)
                found[p, u] += (tokens @ v.double().numpy()).mean() / counts[u]
    handle.remove()
    return found


# ------------------------------------------------------------------------------------------------------- it adds up


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_parts_sum_to_the_projection_and_to_its_change(model_type: str) -> None:
    model = make_model(model_type)
    now = altered(model)
    before, after = read(model), read(now)
    found = component_changes(before, after)
    expected = plain_projections(model), plain_projections(now)
    for reading, plain in zip((before, after), expected, strict=True):
        np.testing.assert_allclose(reading.total.numpy(), plain, atol=1e-5)
        np.testing.assert_allclose(reading.parts.double().sum(-1).numpy(), plain, atol=2e-5)
    total = expected[1] - expected[0]
    assert np.abs(total).max() > 1e-2
    np.testing.assert_allclose(found.total.numpy(), total, atol=1e-5)
    np.testing.assert_allclose(found.change.sum(-1).numpy(), total, atol=2e-5)
    opaque = model_type in OPAQUE
    assert [name for name, no in zip(after.names, after.opaque, strict=True) if no] == ["m0", "m1", "m2"] * opaque
    clear = ~after.opaque
    split = found.activation + found.weight
    np.testing.assert_allclose(split[:, clear].numpy(), found.change.mean(1)[:, clear].numpy(), atol=1e-5)
    assert found.weight[:, after.opaque].isnan().all() and found.activation[:, after.opaque].isnan().all()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_an_adapter_counts_with_its_weights(model_type: str) -> None:
    from peft import LoraConfig, get_peft_model

    targets = "all-linear" if model_type == "llama" else ["c_attn", "c_proj", "c_fc"]
    torch.manual_seed(0)
    model = get_peft_model(
        make_model(model_type), LoraConfig(r=4, target_modules=targets, fan_in_fan_out=model_type == "gpt2")
    )
    before = read(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    found = component_changes(before, read(model))
    merged = component_changes(before, read(copy.deepcopy(model).merge_and_unload()))
    assert found.total.abs().max() > 1e-2
    assert (found.change.sum(-1) - found.total).abs().max() < 2e-5
    assert not before.opaque.any() and (found.weight[:, 2:].abs().sum(1) > 1e-3).all()
    for part in ("change", "activation", "weight"):
        torch.testing.assert_close(getattr(found, part), getattr(merged, part), atol=2e-5, rtol=0)


def test_a_change_below_the_rounding_of_half_precision_is_seen_in_an_adapter() -> None:
    """Added to a bfloat16 weight it would be rounded away."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    half = get_peft_model(make_model("llama").bfloat16(), LoraConfig(r=2, target_modules=["down_proj"]))
    full = copy.deepcopy(half).float()
    starts = [read(model) for model in (half, full)]
    for model in (half, full):
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 1e-3)
    rounded, exact = (component_changes(start, read(model)) for start, model in zip(starts, (half, full), strict=True))
    m1 = starts[0].names.index("m1")
    assert rounded.weight[1:, m1] == pytest.approx(exact.weight[1:, m1], rel=0.05)
    assert exact.weight[1:, m1].abs().min() > 1e-5


# ----------------------------------------------------------------------------------------------- what was altered shows

ALTERED = {
    "unit's output": ("llama", "layers.1.mlp.down_proj", (slice(None), 5), "m1", "weight"),
    "unit's gate": ("llama", "layers.1.mlp.gate_proj", (5,), "m1", "activation"),
    "unit's input": ("llama", "layers.1.mlp.up_proj", (5,), "m1", "activation"),
    "unit's output, GPT-2": ("gpt2", "h.1.mlp.c_proj", (5,), "m1", "weight"),
    "unit's input, GPT-2": ("gpt2", "h.1.mlp.c_fc", (slice(None), 5), "m1", "activation"),
    "head's output": ("gpt_neox", "layers.1.attention.dense", (slice(None), slice(16, 24)), "a1.h2", "weight"),
    "head's value": ("gpt_neox", "layers.1.attention.query_key_value", (slice(64, 72),), "a1.h2", "activation"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_what_was_altered_gets_all_of_the_change(case: str) -> None:
    """Read at its own layer; GPT-NeoX has the MLP beside the attention, so that no other part hears of the head."""
    model_type, path, place, name, way = ALTERED[case]
    model = make_model(model_type)
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = other.base_model.get_submodule(path).weight[place]
        weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    where = [("layers.1.resid_post", directions()[0][1])]
    before, after = read(model, where), read(other, where)
    found = component_changes(before, after)
    mine = torch.tensor([each == name for each in before.names])
    total = found.total.mean(1)
    assert total.abs().min() > 1e-3
    assert not found.change[..., ~mine].any()
    assert not found.weight[:, ~mine].any() and not found.activation[:, ~mine].any()
    shares = {"weight": found.weight[:, mine][:, 0], "activation": found.activation[:, mine][:, 0]}
    assert shares[way] == pytest.approx(total, abs=1e-5)
    assert not shares["weight" if way == "activation" else "activation"].any()


def test_a_head_of_llama_moves_itself_and_the_mlp_that_reads_it() -> None:
    model = make_model("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight[:, 8:16] += 0.3
    where = [("layers.1.resid_post", directions()[0][1])]
    before = read(model, where)
    found = component_changes(before, read(other, where))
    moved = [name for name, change in zip(before.names, found.change[0].abs().sum(0), strict=True) if change]
    assert moved == ["a1.h1", "m1"]
    head, mlp = (before.names.index(name) for name in moved)
    assert found.weight[0, head] == pytest.approx(float(found.change[0, :, head].mean()), abs=1e-6)
    assert not found.activation[0, head] and not found.weight[0, mlp]
    assert found.change.sum(-1).numpy() == pytest.approx(found.total.numpy(), abs=1e-5)


def test_biases_and_embeddings_go_with_the_weights() -> None:
    model = make_model("gpt2")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.h[0].attn.c_proj.bias += 0.2
        other.transformer.wte.weight += 0.1
    before = read(model)
    found = component_changes(before, read(other))
    v = directions()[0][1]
    bias, embed = before.names.index("bias"), before.names.index("embed")
    assert found.weight[0, bias] == pytest.approx(0.2 * float(v.sum()), abs=1e-5)
    assert found.weight[0, embed] == pytest.approx(0.1 * float(v.sum()), abs=1e-5)
    assert not found.activation[:, [bias, embed]].any()


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
def test_where_nothing_changed_all_is_exactly_zero(model_type: str) -> None:
    model = make_model(model_type)
    found = component_changes(read(model), read(copy.deepcopy(model)))
    assert not found.change.any() and not found.total.any()
    assert not found.weight.nan_to_num().any() and not found.activation.nan_to_num().any()


def test_layers_after_the_hookpoint_have_no_part_and_are_not_run() -> None:
    model = make_model("llama")
    calls: list[int] = []
    model.model.layers[2].register_forward_hook(lambda m, a, o: calls.append(1))
    shallow = read(model, directions()[:1])
    assert len(calls) == 1  # the pass on which the wiring is traced
    assert shallow.names == ("embed", "bias", *(f"a0.h{head}" for head in range(4)), "m0")
    deep = read(model)
    later = [i for i, name in enumerate(deep.names) if name.startswith(("a1", "a2", "m1", "m2"))]
    assert not deep.parts[0][:, later].any() and not deep.weight[0, torch.isin(deep.owner, torch.tensor(later))].any()
    torch.testing.assert_close(deep.parts[0][:, : len(shallow.names)], shallow.parts[0])


def test_one_reading_whatever_the_batches() -> None:
    """Gemma's scale of each token must not see padding."""
    model = make_model("gemma2")
    first, second = read(model), read(model, batch_size=50)
    for name in ("parts", "total", "activation", "weight"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), atol=2e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------- traces and bad input


def test_nothing_is_left_behind() -> None:
    model = make_model("gemma2").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    read(model)
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_last_layer_that_is_not_linear_has_no_split() -> None:
    class Rounded(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return (super().forward(input) * 4).round() / 4

    model = make_model("llama")
    down = model.model.layers[1].mlp.down_proj
    rounded = Rounded(down.in_features, down.out_features, bias=False)
    rounded.load_state_dict(down.state_dict())
    model.model.layers[1].mlp.down_proj = rounded
    found = read(model)
    assert [name for name, no in zip(found.names, found.opaque, strict=True) if no] == ["m1"]
    assert (found.parts.sum(-1) - found.total).abs().max() < 2e-5


def test_bad_input_says_what_is_wrong() -> None:
    model, v = make_model("llama", num_hidden_layers=1), torch.ones(32)
    for where, words in [
        ([("layers.0.mlp_out", v)], r"'layers\.0\.mlp_out': expected one of layers\.0\.resid_post"),
        ([("layers.4.resid_post", v)], r"'layers\.4\.resid_post'"),
    ]:
        with pytest.raises(HookpointError, match=words):
            read(model, where)
    with pytest.raises(MeasurementError, match=r"expected directions \[32\], found \[5\]"):
        read(model, [("layers.0.resid_post", v[:5])])
    with pytest.raises(MeasurementError, match="at least one direction"):
        read_components(model, PROMPTS, [], batch_size=3, pad_token_id=0)
    with pytest.raises(HookpointError, match=r"layers\.0"):
        read(make_model("opt"))
    one, two = (read(model, [("layers.0.resid_post", v)] * n) for n in (1, 2))
    with pytest.raises(MeasurementError, match="weight: found shape"):
        component_changes(one, two)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises((MeasurementError, HookpointError)):
        read(model, [("layers.0.resid_post", v)])


# ------------------------------------------------------------------------------------------------------------ in a run


def test_in_a_run_the_parts_sum_to_the_drift_and_the_start_survives_a_resume(tmp_path: Path) -> None:
    from trainers.tiny_runs import live, train, verify

    from interp_rlhf import load_run

    folder = tmp_path / "run"
    config = quick(folder)
    brief = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-3}
    _, handle = train("dpo", folder, config, **brief)
    rows, events = live(handle.timeline()), told(folder, "components")
    assert [event["step"] for event in events] == [2, 4]
    for event in events:
        parts = event["parts"]
        drift = rows.loc[("concept/drift", "order", event["hookpoint"], event["step"])]
        others = rows.loc[("concept/drift", "order")].xs(event["step"], level="step").value
        assert abs(event["total"]) > 1e-2 and event["total"] == pytest.approx(drift.value, abs=1e-4)
        assert abs(drift.value) == others.abs().max() and event["readout"] == "order"
        assert sum(part[1] for part in parts) + event["rest"] == pytest.approx(event["total"], abs=1e-9)
        layer = int(event["hookpoint"].split(".")[1])
        assert len(parts) == 2 + 5 * (layer + 1) and abs(event["rest"]) < 1e-4
        assert [abs(part[1]) for part in parts] == sorted((abs(part[1]) for part in parts), reverse=True)
        assert all(low <= change <= high for _, change, low, high, _, _ in parts)
        assert all(
            activation + weight == pytest.approx(change, abs=1e-4) for _, change, *_, activation, weight in parts
        )
        share = rows.loc[("component/weight_share", "order", event["hookpoint"], event["step"])]
        sizes = [sum(abs(part[place]) for part in parts) for place in (4, 5)]
        assert share.value == pytest.approx(sizes[1] / sum(sizes), abs=1e-6) and 0 < share.value < 1
    refused = [event["readout"] for event in told(folder, "refused")]
    assert "components" not in refused and not told(folder, "failure") and verify(folder) == 0

    train("dpo", folder, config, resume=folder / "checkpoint-2", **brief)
    assert [event["readout"] for event in told(folder, "refused")] == 2 * refused and not told(folder, "failure")
    (end,) = told(folder, "components")[2:]
    assert end["step"] == 4 and end["total"] == pytest.approx(events[1]["total"], abs=1e-5)
    for mine, first in zip(end["parts"], events[1]["parts"], strict=True):
        assert mine[0] == first[0] and mine[1:] == pytest.approx(first[1:], abs=1e-5)
    assert load_run(folder).info["config"]["components"] == "auto"


def quick(folder: Path, **changes: Any) -> dict[str, Any]:
    from trainers.tiny_runs import small

    config = small(folder, probes={"enabled": False}, **changes)
    return {**config, "concepts": {**config["concepts"], "behaviour": False, "bank": False, "refit": False}}


def told(folder: Path, kind: str) -> list[dict[str, Any]]:
    from interp_rlhf import load_run

    return [event for event in load_run(folder).events if event["event"] == kind]


@pytest.mark.parametrize(("wanted", "steps"), [(True, [3, 6]), (False, [])])
def test_with_every_measurement_or_never(wanted: bool, steps: list[int], tmp_path: Path) -> None:
    from trainers.tiny_runs import train

    folder = tmp_path / "run"
    train("dpo", folder, quick(folder, components=wanted), max_steps=6, save_strategy="no", use_lora=True)
    assert [event["step"] for event in told(folder, "components")] == steps


def test_an_architecture_that_is_not_supported_is_refused_once(tmp_path: Path) -> None:
    from trainers.tiny_runs import train

    folder = tmp_path / "run"
    model = make_model("opt", vocab_size=94, max_position_embeddings=128)
    _, handle = train("dpo", folder, quick(folder), model=model, max_steps=2, use_lora=True)
    (refused,) = [event for event in told(folder, "refused") if event["readout"] == "components"]
    assert "layers.0" in refused["reason"] and not told(folder, "components") and not told(folder, "failure")
    assert not handle.timeline().metric.str.startswith("component").any()
