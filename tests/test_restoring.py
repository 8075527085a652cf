"""One component of a live model's residual stream put to another model's: planted shifts, adapters, no trace left."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from shape_checked import checked
from tiny_models import CONFIGS, LAYERS, counting, make_model, make_prompts
from torch import Tensor, nn

from interp_rlhf.activations.capturing import capture, read_prompts
from interp_rlhf.activations.prompts import Batch, ContrastPair, Prompt
from interp_rlhf.activations.reference import Reference, find_reference
from interp_rlhf.activations.restoring import read_moved
from interp_rlhf.causal import causal_share, random_directions
from interp_rlhf.errors import HookpointError, MeasurementError, PromptError, ReferenceMismatch

restoring = checked("interp_rlhf.activations.restoring")

LAYER = 1
AT = f"layers.{LAYER}.resid_post"
PASSES: dict[str, Any] = {"batch_size": 4, "pad_token_id": 0}
STATISTICS: dict[str, Any] = {"batch_size": 12, "pad_token_id": 0, "bootstrap": 200}


def pairs(n: int = 12) -> list[ContrastPair]:
    texts = make_prompts(2 * n)
    return [ContrastPair(texts[i], texts[n + i], str(i)) for i in range(n)]


def texts_of(found: list[ContrastPair]) -> list[Prompt]:
    return [*(pair.positive for pair in found), *(pair.negative for pair in found)]


def towards(start: nn.Module, now: nn.Module, n: int = 12) -> list[ContrastPair]:
    """Pairs whose gap grows from ``start`` to ``now``."""
    found = pairs(n)
    texts = texts_of(found)
    positive, negative = (log_probs(now, texts) - log_probs(start, texts)).chunk(2)
    return [
        pair if grows else ContrastPair(pair.negative, pair.positive, pair.group)
        for pair, grows in zip(found, positive > negative, strict=True)
    ]


def direction(seed: int = 0) -> Tensor:
    return random_directions(1, 32, 100 + seed)[0]  # none of those that a share with seed 0 draws


def planted(shift: Tensor) -> tuple[Any, Any]:
    """θ_0, and θ_t whose layer adds ``shift [d]`` to the residual stream through a bias of its MLP."""
    start = make_model("llama", mlp_bias=True)
    now = copy.deepcopy(start)
    with torch.no_grad():
        now.model.layers[LAYER].mlp.down_proj.bias.add_(shift)
    return start, now


def log_probs(model: nn.Module, prompts: list[Prompt]) -> Tensor:
    found = read_prompts(model, prompts, [], log_probs=True, tokens="all", **PASSES).log_probs
    assert found is not None
    return found


# --------------------------------------------------------------------------------------------------- what passes give


def test_without_a_target_nothing_moves() -> None:
    model, prompts, v = make_model("llama"), make_prompts(9), direction()
    found = read_moved(model, prompts, AT, 3 * v, nll=True, **PASSES)
    assert torch.equal(found.values, log_probs(model, prompts))
    whole = [Prompt(prompt.input_ids, 0, prompt.unit) for prompt in prompts]
    torch.testing.assert_close(found.nll, -log_probs(model, whole))
    assert found.components.shape == (9, max(len(prompt.input_ids) for prompt in prompts))
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.input_ids])
        expected = capture(model, {"input_ids": ids}, [AT])[AT][0] @ v
        torch.testing.assert_close(found.components[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)
        assert not found.components[row, len(expected) :].any()
    assert read_moved(model, prompts, AT, v, **PASSES).nll.isnan().all()


def test_restoring_a_planted_shift_gives_the_starts_log_probabilities_and_injecting_it_the_policys() -> None:
    v, prompts = direction(), make_prompts(9)
    start, now = planted(4 * v)
    then, later = (read_moved(model, prompts, AT, v, **PASSES) for model in (start, now))
    assert (later.values - then.values).abs().mean() > 0.5
    restored = read_moved(now, prompts, AT, v, target=then.components, **PASSES)
    injected = read_moved(start, prompts, AT, v, target=later.components, **PASSES)
    torch.testing.assert_close(restored.values, then.values, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(injected.values, later.values, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(restored.components, later.components)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architectures_stream_is_moved_as_asked(model_type: str) -> None:
    """The next layer's input, token by token: moved along w by what is missing along v, and nowhere else."""
    model, prompts, v, w = make_model(model_type), make_prompts(5), direction(), direction(1)
    target = torch.randn(5, max(len(p.input_ids) for p in prompts), generator=torch.Generator().manual_seed(3))
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    for given in (None, target):
        blocks = restoring.layout(model).layers
        handle = blocks[LAYER + 1].register_forward_pre_hook(keep, with_kwargs=True)
        read_moved(model, prompts, AT, v, target=given, along=w, behaviour=nothing, batch_size=5, pad_token_id=0)
        handle.remove()
    order = sorted(range(5), key=lambda i: -len(prompts[i].input_ids))
    for row, index in enumerate(order):
        n = len(prompts[index].input_ids)
        before, after = seen[0][row], seen[1][row]
        expected = before[:n] + (target[index, :n] - before[:n] @ v)[:, None] * w
        torch.testing.assert_close(after[:n], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(after[n:], before[n:])


def nothing(parts: Any, hidden: Tensor, batch: Batch) -> Tensor:
    return torch.zeros(len(batch.rows))


def test_layers_that_output_tuples_keep_the_rest() -> None:
    point = restoring.resolve_hookpoints([AT], restoring.layout(make_model("llama")))[0]
    layer = nn.Identity()
    point = restoring.ResolvedHookpoint(AT, (), "resid_post", LAYER, layer, "output")
    with restoring.changing(point, lambda stream: stream + 1):
        found = layer((torch.zeros(2), "cache"))
    assert type(found) is tuple and torch.equal(found[0], torch.ones(2)) and found[1] == "cache"
    with pytest.raises(MeasurementError, match="found dict"), restoring.changing(point, lambda stream: stream):
        layer({"a": torch.zeros(2)})
    with pytest.raises(MeasurementError, match="reached twice"), restoring.changing(point, lambda stream: stream):
        layer(layer(torch.zeros(2)))
    with pytest.raises(MeasurementError, match="not reached"), restoring.changing(point, lambda stream: stream):
        pass
    assert not layer._forward_hooks


def test_bfloat16_streams_are_moved_in_float32() -> None:
    v, prompts = direction(), make_prompts(5)
    stream = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    target, there = torch.full((5, 7), 0.3), torch.ones(5, 7, dtype=torch.bool)
    exact = stream.double() + (0.3 - stream.double() @ v.double())[..., None] * v.double()
    found = restoring.moved(stream, v, target, v, there)
    assert found.dtype == torch.bfloat16 and (found == exact.bfloat16()).float().mean() > 0.99
    start, now = (model.bfloat16() for model in planted(4 * v))
    then = read_moved(start, prompts, AT, v, **PASSES)
    restored = read_moved(now, prompts, AT, v, target=then.components, **PASSES)
    unrestored = read_moved(now, prompts, AT, v, **PASSES)
    assert (restored.values - then.values).abs().max() < 0.2 * (unrestored.values - then.values).abs().max()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_change_no_reading(batch_size: int) -> None:
    v, prompts = direction(), make_prompts(9)
    start, now = planted(4 * v)
    targets = [
        read_moved(start, prompts, AT, v, batch_size=n, pad_token_id=0).components for n in (batch_size, 4)
    ]  # fmt: skip
    torch.testing.assert_close(*targets, atol=1e-5, rtol=1e-5)
    found, expected = (
        read_moved(now, prompts, AT, v, target=targets[0], along=direction(1), batch_size=n, pad_token_id=0).values
        for n in (batch_size, 4)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- whole shares


def test_share_of_a_planted_shift_is_one_and_random_directions_lie_around_zero() -> None:
    v = direction()
    start, now = planted(v)
    given = towards(start, now, 24)
    found = causal_share(now, start, given, AT, v, directions=40, **STATISTICS)
    assert found.share is not None and found.injected is not None and not found.reason
    texts = texts_of(given)
    change = log_probs(now, texts) - log_probs(start, texts)
    assert found.change == pytest.approx(float((change[:24] - change[24:]).mean()), abs=1e-6)
    for row, null in ((found.share, found.random_restored), (found.injected, found.random_injected)):
        assert (row.value, row.ci_low, row.ci_high) == pytest.approx((1, 1, 1), abs=1e-4)
        assert row.n == found.n == 24 and len(null) == 40
        assert abs(null.mean()) < 0.2 and 0.1 < null.std() < 0.5
        assert row.null_high < 1 and row.p <= 2 / 41  # type: ignore[operator]
    whole = [Prompt(text.input_ids, 0, text.unit) for text in texts]
    tokens = sum(len(text.input_ids) - 1 for text in texts)
    expected = float((log_probs(now, whole) - log_probs(start, whole)).sum()) / tokens
    assert found.nll_change.value == pytest.approx(expected, abs=1e-5) and found.nll_change.n == 24


def at_the_end(weights: Tensor) -> Any:
    """``Σ_j weights_j σ(h·u_j)``, mean over a text's tokens; h the backbone's output, here without a final norm."""

    def behaviour(parts: Any, hidden: Tensor, batch: Batch) -> Tensor:
        seen = torch.sigmoid(hidden @ torch.eye(32)[:, : len(weights)]) @ weights
        mask = batch.attention_mask
        return (seen * mask).sum(1) / mask.sum(1)

    return behaviour


def two_shifts() -> tuple[Any, Any]:
    """Both along the first and the second axis the last layer's stream, which nothing follows, moves by 0.5."""
    last, shift = LAYERS - 1, 0.5 * torch.eye(32)[:2].sum(0)
    start = make_model("llama", mlp_bias=True)
    start.model.norm = nn.Identity()
    now = copy.deepcopy(start)
    with torch.no_grad():
        for model in (start, now):
            block = model.model.layers[last]
            for module in (block.self_attn.o_proj, block.mlp.down_proj):
                module.weight.zero_()
            model.model.embed_tokens.weight.mul_(0.05)
        now.model.layers[last].mlp.down_proj.bias.add_(shift)
    return start, now


@pytest.mark.parametrize(
    ("weights", "expected"), [((1.0, 0.0), 1.0), ((0.0, 1.0), 0.0), ((0.6, 0.4), 0.6), ((0.4, 0.6), 0.4)]
)
def test_known_shares_of_known_behaviours(weights: tuple[float, float], expected: float) -> None:
    start, now = two_shifts()
    behaviour = at_the_end(torch.tensor(weights))
    found = causal_share(
        now, start, make_prompts(30), f"layers.{LAYERS - 1}.resid_post", torch.eye(32)[0], behaviour, **STATISTICS
    )
    assert found.share is not None and found.injected is not None
    for row in (found.share, found.injected):
        assert row.value == pytest.approx(expected, abs=0.05 if 0 < expected < 1 else 1e-4)
        assert row.ci_low - 0.05 <= expected <= row.ci_high + 0.05  # type: ignore[operator]
    if expected == 0:
        assert found.share.ci_low <= 1e-5 and found.share.ci_high >= -1e-5  # type: ignore[operator]
        assert found.share.null_low < found.share.value < found.share.null_high  # type: ignore[operator]


def adapted(v: Tensor) -> Any:
    """A LoRA policy whose adapter writes to the stream along ``v`` only, as much as each token's MLP asks for."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    options = LoraConfig(r=1, lora_alpha=1, target_modules=["down_proj"], layers_to_transform=[LAYER], lora_dropout=0.5)
    model = get_peft_model(make_model("llama"), options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(5 * v[:, None])
    return model.train()


def test_the_same_model_without_its_adapter_is_the_start() -> None:
    v = direction()
    model = adapted(v)
    given = towards(make_model("llama"), model)
    found = causal_share(model, find_reference("adapter", model, None), given, AT, v, **STATISTICS)
    assert found.share is not None and found.injected is not None
    assert (found.share.value, found.injected.value) == pytest.approx((1, 1), abs=1e-4)
    other = causal_share(model, make_model("llama"), given, AT, v, **STATISTICS)
    assert (found.change, found.share) == (other.change, other.share)
    assert torch.equal(found.random_injected, other.random_injected)


def test_no_share_where_the_behaviour_did_not_change_and_no_passes_wasted_on_it() -> None:
    model, given = make_model("llama"), pairs()
    start = copy.deepcopy(model)
    with counting(model.model) as calls:
        found = causal_share(model, start, given, AT, direction(), **STATISTICS)
    assert found.share is None and found.injected is None and "covers 0" in found.reason
    assert found.change == 0 and list(found.rows()) == ["causal/nll_change"]
    assert found.nll_change.value == pytest.approx(0, abs=1e-6)
    assert len(calls) == 2 * math.ceil(24 / 12)


def test_texts_of_one_unit_count_once() -> None:
    v = direction()
    start, now = planted(3 * v)
    units = [0] * 1 + [1] * 5 + [2] * 2 + [3] * 4 + [4] * 6
    texts = [Prompt(text.input_ids, text.completion_start, str(units[i])) for i, text in enumerate(make_prompts(18))]
    found = causal_share(now, start, texts, AT, v, **STATISTICS)
    change = log_probs(now, texts) - log_probs(start, texts)
    means = torch.stack([change[torch.tensor(units) == unit].mean() for unit in range(5)])
    assert found.n == found.nll_change.n == 5 and found.change == pytest.approx(float(means.mean()), abs=1e-5)
    whole = [Prompt(text.input_ids, 0, text.unit) for text in texts]
    total = float((log_probs(now, whole) - log_probs(start, whole)).sum())
    tokens = sum(len(text.input_ids) - 1 for text in texts)
    assert found.nll_change.value == pytest.approx(total / tokens, abs=1e-5)


def test_no_trace_is_left_and_the_same_call_gives_the_same_numbers() -> None:
    v = direction()
    model = adapted(v)
    given = towards(make_model("llama"), model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    reference = find_reference("adapter", model, None)
    first, second = (causal_share(model, reference, given, AT, v, **STATISTICS) for _ in range(2))
    assert first.share == second.share and torch.equal(first.random_restored, second.random_restored)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def broken(parts: Any, hidden: Tensor, batch: Batch) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        causal_share(model, reference, given, AT, v, broken, **STATISTICS)
    modules = list(model.modules())
    assert flags == [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    assert grads == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_left_alone(kind: str) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    options = PromptTuningConfig if kind == "prompt" else PrefixTuningConfig
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama"), options(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    prompts, v = make_prompts(7), direction()
    own = read_moved(model, prompts, AT, v, **PASSES)
    same = read_moved(model, prompts, AT, v, target=own.components, **PASSES)
    torch.testing.assert_close(same.values, own.values, atol=1e-5, rtol=1e-6)
    found = causal_share(model, find_reference("adapter", model, None), prompts, AT, v, **STATISTICS)
    assert found.n == 7


# ----------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_measured_is_refused() -> None:
    model, prompts, v = make_model("llama"), make_prompts(4), direction()
    width = max(len(prompt.input_ids) for prompt in prompts)

    def read(hookpoint: str = AT, v: Tensor = v, **changes: Any) -> None:
        read_moved(model, prompts, hookpoint, v, **{**PASSES, **changes})

    with pytest.raises(HookpointError, match=r"'layers.1.mlp_out': expected a resid_post"):
        read("layers.1.mlp_out")
    with pytest.raises(HookpointError, match=r"the model has layers 0\.\.2"):
        read("layers.7.resid_post")
    for bad in (torch.ones(5), torch.zeros(32), torch.full((32,), float("nan"))):
        with pytest.raises(MeasurementError, match=r"direction: expected a finite non-zero vector of shape \[32\]"):
            read(v=bad)
    with pytest.raises(MeasurementError, match="direction to move along: expected"):
        read(along=torch.zeros(32))
    with pytest.raises(MeasurementError, match=rf"expected finite targets of shape \[4, {width}\].*found \[4, 3\]"):
        read(target=torch.zeros(4, 3))
    with pytest.raises(MeasurementError, match="found NaN or infinity"):
        read(target=torch.full((4, width), float("nan")))
    with pytest.raises(MeasurementError, match=r"behaviour: expected one value per text \[4\], found \[4, 2\]"):
        read(behaviour=lambda parts, hidden, batch: torch.zeros(len(batch.rows), 2))
    with pytest.raises(MeasurementError, match=rf"behaviour: prompt {prompts[0].id}: expected finite values"):
        read(behaviour=lambda parts, hidden, batch: torch.full((len(batch.rows),), float("nan")))


def test_arguments_of_a_share_are_checked() -> None:
    model, given, v = make_model("llama"), pairs(), direction()
    with pytest.raises(MeasurementError, match="directions: expected at least 20, found 19"):
        causal_share(model, model, given, AT, v, directions=19, **STATISTICS)
    with pytest.raises(PromptError, match="found 12 pairs and 1 prompts"):
        causal_share(model, model, [*given, make_prompts(1)[0]], AT, v, **STATISTICS)  # type: ignore[list-item]
    with pytest.raises(PromptError, match="found 0 pairs and 0 prompts"):
        causal_share(model, model, [], AT, v, **STATISTICS)
    with pytest.raises(MeasurementError, match="expected at least 2 sampling units, found 1"):
        causal_share(model, model, given[:1], AT, v, **STATISTICS)
    with pytest.raises(ReferenceMismatch, match="cached readings exist for the fixed prompts only"):
        causal_share(model, Reference("cached"), given, AT, v, **STATISTICS)
