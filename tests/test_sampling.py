"""Completions follow the model's distribution, depend on nothing but model, prompt and seed, and leave no trace."""

from __future__ import annotations

import copy
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from scipy import stats
from tiny_models import CONFIGS, make_model, make_prompts
from torch import nn
from trainers.table import lora, scorer, trainers
from transformers import GenerationConfig

from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.activations.reference import find_peft
from interp_rlhf.activations.sampling import ending_tokens, room, sample_completions
from interp_rlhf.errors import MeasurementError

PROMPT = Prompt((5, 6, 7, 9, 9), 3, "u")


def draw(model: Any, prompts: list[Prompt], **changes: Any) -> list[Prompt]:
    settings: dict[str, Any] = {
        "completions": 2, "max_new_tokens": 8, "seed": 0, "pad_token_id": 0, "eos_token_ids": (2,), "batch_size": 4,
        **changes,
    }  # fmt: skip
    return sample_completions(model, prompts, **settings)


def logits(model: Any, *tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1].double()


# ------------------------------------------------------------------------------------------------------- distribution


def chi_square_p(tokens: list[int], probabilities: torch.Tensor) -> float:
    """p of the drawn tokens under the probabilities; rare tokens are pooled until a cell expects 10."""
    expected = len(tokens) * probabilities.numpy()
    order = np.argsort(expected)[::-1]
    cells = np.minimum(np.cumsum(expected[order]) // 10, np.sum(expected) // 10 - 1).astype(int)
    found, expected = np.bincount(tokens, minlength=len(expected))[order], expected[order]
    pooled = [np.bincount(cells, weights=values) for values in (found, expected)]
    kept = pooled[1] > 0
    assert kept.sum() > 8
    return stats.chisquare(pooled[0][kept], pooled[1][kept]).pvalue


def test_first_and_second_tokens_follow_the_softmax() -> None:
    model, n = make_model("llama"), 4000
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # far from uniform
    first = logits(model, 5, 6, 7).softmax(0)
    assert first.max() > 0.15 and (first < 0.001).sum() > 5
    drawn = draw(model, [PROMPT], completions=n, max_new_tokens=2, batch_size=500, eos_token_ids=())
    assert chi_square_p([text.input_ids[3] for text in drawn], first) > 1e-3
    common = int(first.argmax())
    given = logits(model, 5, 6, 7, common).softmax(0)
    assert chi_square_p([text.input_ids[4] for text in drawn if text.input_ids[3] == common], given) > 1e-3


def test_a_token_is_the_argmax_of_logits_and_noise_shared_by_all_models() -> None:
    """The same noise for other weights: adding a constant to one logit changes only draws that go over to it."""
    model = make_model("gpt2")
    before = draw(model, [PROMPT], completions=200, max_new_tokens=1, batch_size=100)
    moved = copy.deepcopy(model)
    moved.lm_head = nn.Linear(32, 64)
    with torch.no_grad():
        moved.lm_head.weight.copy_(model.lm_head.weight)
        moved.lm_head.bias.zero_()[30] = 2.0
    after = draw(moved, [PROMPT], completions=200, max_new_tokens=1, batch_size=100)
    changed = [text.input_ids[-1] for old, text in zip(before, after, strict=True) if old != text]
    assert 0 < len(changed) < 100 and set(changed) == {30}


# --------------------------------------------------------------------------------------------------- what it depends on


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "gemma2", "mpt", "falcon"])
def test_batching_padding_and_company_do_not_matter(model_type: str) -> None:
    model, prompts = make_model(model_type), make_prompts(5)
    alone = draw(model, prompts, batch_size=1)
    assert alone == draw(model, prompts, batch_size=4) == draw(model, prompts, batch_size=16)
    assert alone[2:4] == draw(model, prompts[1:2])  # as other ranks would see it
    assert alone[:1] + alone[2:3] == draw(model, prompts[:2], completions=1)
    assert [text.unit for text in alone] == [prompt.unit for prompt in prompts for _ in range(2)]
    for text, prompt in zip(alone, [p for p in prompts for _ in range(2)], strict=True):
        assert text.input_ids[: text.completion_start] == prompt.input_ids[: prompt.completion_start]
        assert 1 <= len(text.input_ids) - text.completion_start <= 8
    other = [Prompt((*p.input_ids[: p.completion_start], 60), p.completion_start, p.unit) for p in prompts]
    assert draw(model, other) == alone  # what followed the prompt in the data is no part of it


def test_completions_and_seeds_differ() -> None:
    model, prompts = make_model("llama"), make_prompts(4)
    drawn = draw(model, prompts, completions=3)
    assert len({text.input_ids for text in drawn}) == 12
    assert not set(drawn) & set(draw(model, prompts, completions=3, seed=1))


def test_the_first_token_that_ends_a_text_is_its_last() -> None:
    model = make_model("llama")
    ends = tuple(range(2, 30))
    for text in draw(model, make_prompts(6), eos_token_ids=ends, max_new_tokens=12):
        written = text.input_ids[text.completion_start :]
        assert written and not set(written[:-1]) & set(ends)
        assert written[-1] in ends or len(written) == 12
    always = draw(model, [PROMPT], eos_token_ids=tuple(range(64)), pad_token_id=2)
    assert [len(text.input_ids) for text in always] == [4, 4]  # an empty answer keeps the token that ended it


def test_the_models_own_generation_settings_take_no_part_and_stay() -> None:
    model = make_model("llama")
    plain = draw(model, make_prompts(5))
    own = GenerationConfig(
        temperature=0.1, top_k=1, do_sample=True, repetition_penalty=5.0, forced_eos_token_id=9, min_new_tokens=8,
        suppress_tokens=[11, 12], eos_token_id=list(range(20)), max_length=9, num_return_sequences=1,
        no_repeat_ngram_size=1,
    )  # fmt: skip
    model.generation_config, before = own, own.to_dict()
    assert draw(model, make_prompts(5)) == plain
    assert model.generation_config is own and own.to_dict() == before


def test_the_context_cuts_a_completion_and_a_prompt_that_fills_it_is_refused() -> None:
    long = Prompt((*range(3, 63), 3), 61, "long")
    assert room(long, 64) == 3 and room(long, None) > 10**9
    for model_type in ("gpt2", "llama"):
        model = make_model(model_type)
        together = draw(model, [PROMPT, long], eos_token_ids=())
        assert [len(text.input_ids) for text in together] == [11, 11, 64, 64]
        assert together[2:] == draw(model, [long], eos_token_ids=())
    with pytest.raises(MeasurementError, match=r"expected 1 to 63 tokens to continue, found 64"):
        draw(make_model("gpt2"), [Prompt((3,) * 65, 64, "full")])
    with pytest.raises(MeasurementError, match="found 0"):
        draw(make_model("gpt2"), [Prompt((3, 4), 0, "empty")])


def test_ending_tokens_come_from_the_generation_config_else_the_config() -> None:
    model = make_model("llama")
    assert ending_tokens(model) == (2,)
    model.generation_config.eos_token_id = [7, 3, 7]
    assert ending_tokens(model) == (3, 7)
    model.generation_config.eos_token_id = None
    assert ending_tokens(model) == (2,)
    assert ending_tokens(make_model("mpt")) == ()


# ----------------------------------------------------------------------------------------------------------- no trace


def trace_of(model: nn.Module) -> list[Any]:
    return [
        random.getstate(),
        [str(part) for part in np.random.get_state()],
        torch.get_rng_state().tolist(),
        [module.training for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [None if p.grad is None else p.grad.sum().item() for p in model.parameters()],
        [b.double().sum().item() for b in model.buffers()],
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_nothing_is_left_behind(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(model_type).train()
    next(model.get_decoder().children()).eval()
    model.config.use_cache = False
    own, before = model.generation_config, trace_of(model)
    with caplog.at_level(logging.WARNING):
        draw(model, make_prompts(3))
    assert trace_of(model) == before and model.config.use_cache is False and model.generation_config is own
    assert not caplog.records


def test_a_failure_inside_leaves_nothing_behind_either() -> None:
    model = make_model("llama").train()
    model.forward, own = model.forward, model.generation_config
    replaced, before = model.forward, trace_of(model)
    handle = model.model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        draw(model, make_prompts(2))
    handle.remove()
    assert trace_of(model) == before and model.generation_config is own and vars(model)["forward"] is replaced


# ----------------------------------------------------------------------------------------------- wrappers and trainers


def frozen(policy: Any) -> Any:
    """The same weights without any wrapper or replaced forward; an adapter merged into them."""
    alone = copy.deepcopy(policy)
    for module in alone.modules():
        vars(module).pop("forward", None)
    peft = find_peft(alone)
    return (peft.merge_and_unload() if peft is not None else alone).eval()


@pytest.mark.parametrize(
    ("name", "use_lora"),
    [("dpo", False), ("dpo", True), ("sft", False), ("grpo", False), ("kto", False), ("ppo", False)],
)
def test_trainers_models_are_sampled_before_and_after_training(name: str, use_lora: bool, tmp_path: Path) -> None:
    entry = trainers()[name]
    if not entry.available:
        pytest.skip(f"this TRL has no {name}")
    torch.manual_seed(0)  # an adapter is drawn when it is built
    trainer = entry.build(tmp_path, use_lora=use_lora, max_steps=2, learning_rate=0.3 if use_lora else 3e-2)
    policy = getattr(trainer.model, "policy", trainer.model)
    prompts = make_prompts(4)
    start = draw(trainer.model, prompts)
    assert start == draw(frozen(policy), prompts)
    trainer.train()
    modes = [module.training for module in trainer.model.modules()]
    end = draw(trainer.model, prompts)
    assert end == draw(frozen(getattr(trainer.model, "policy", trainer.model)), prompts) != start
    assert modes == [module.training for module in trainer.model.modules()]


def test_an_adapter_switched_off_writes_what_the_base_writes() -> None:
    base = make_model("llama")
    plain = draw(base, make_prompts(4))
    model = get_peft_model(base, lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, 0.3)
    assert draw(model, make_prompts(4)) != plain
    with model.disable_adapter():
        assert draw(model, make_prompts(4)) == plain


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: scorer(), "expected a language-model head"),
        (
            lambda: get_peft_model(
                make_model("llama"), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
            ),
            "prompt-learning adapter",
        ),
        (lambda: _partitioned(), "sharded"),
    ],
)
def test_what_cannot_be_sampled_is_refused(model: Any, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        draw(model(), make_prompts(2))


def _partitioned() -> Any:
    """A model whose parameters carry the mark of DeepSpeed ZeRO-3."""
    model = make_model("llama")
    model.model.norm.weight.ds_id = 0
    return model
