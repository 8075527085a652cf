"""Who may stand for the frozen start in a real training: each kind gives the rows that cached readings give.

What is not the start is refused, when training begins or as soon as it has moved; training itself never notices.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from trainers.comparing import assert_same, run
from trainers.own_data import entry
from trainers.table import causal_lm, lora, preferences, prompts, texts, trainers
from trainers.tiny_runs import HOOKPOINTS, direct_means, live, small
from transformers import TrainerCallback

from interp_rlhf import InterpError, attach
from interp_rlhf.activations.reference import find_reference
from interp_rlhf.errors import ReferenceMismatch

DATA = {"dpo": preferences, "sft": texts, "grpo": prompts}
#: What the error says first and last; between the two stands the measured difference.
REFUSED = r"^reference: {kind}: its readings differ from the policy's at step 0 by (\S+) of the mean norm, expected .*$"


def rows_of(handle: Any) -> pd.DataFrame:
    return live(handle.timeline())


def numbers(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[["value", "ci_low", "ci_high", "null_low", "null_high", "p", "n"]].astype(float)


def refusal(trainer: Any, folder: Path, kind: str) -> float:
    """The difference that a refusal names; the training ends with it, in one line."""
    attach(trainer, small(folder, reference=kind))
    with pytest.raises(ReferenceMismatch) as error:
        trainer.train()
    (line,) = str(error.value).splitlines()
    found = re.match(REFUSED.format(kind=kind), line)
    assert found is not None, line
    return float(found[1])


#: On new texts cached readings say nothing.
FIXED = {"rollouts": {"enabled": False}}


def same_rows_as_cached(trainer: Any, folder: Path, settings: dict[str, Any], kind: str) -> pd.DataFrame:
    """Train twice, with cached readings and with another reference; gives the rows, which are equal bit by bit."""
    cached = run(trainer, folder / "a" / "run", settings, small(folder / "a" / "run", **FIXED, reference="cached"))
    other = run(trainer, folder / "b" / "run", settings, small(folder / "b" / "run", **FIXED, reference=kind))
    assert other["handle"].callback._run.reference.kind == kind
    assert_same(cached, other)
    expected, found = rows_of(cached["handle"]), rows_of(other["handle"])
    pd.testing.assert_frame_equal(numbers(found), numbers(expected), check_exact=True)
    assert sorted({step for *_, step in found.index})[-1] == other["handle"]._trainer.state.max_steps
    return expected


# -- the start itself --------------------------------------------------------------------------------------------------

CASES = [
    ("dpo", {}, "copy"),
    ("dpo", {}, "ref_model"),
    ("dpo", {"use_lora": True}, "copy"),
    ("dpo", {"use_lora": True}, "adapter"),
    ("dpo", {"use_lora": True, "bf16": True}, "adapter"),
    ("dpo", {"bf16": True}, "ref_model"),
    ("dpo", {"gradient_checkpointing": True, "use_lora": True}, "adapter"),
    ("sft", {}, "copy"),
    ("sft", {"use_lora": True}, "adapter"),
    ("grpo", {}, "ref_model"),
    ("grpo", {"use_lora": True}, "adapter"),
    ("plain", {"use_lora": True}, "adapter"),
    ("kto", {}, "ref_model"),
    ("rloo", {}, "ref_model"),
    ("reward", {"use_lora": True}, "adapter"),
    ("online_dpo", {}, "ref_model"),
    ("ppo", {}, "ref_model"),
]


@pytest.mark.parametrize(("name", "settings", "kind"), CASES, ids=lambda x: " ".join(x) if isinstance(x, dict) else x)
def test_every_kind_gives_the_rows_of_cached_readings(
    name: str, settings: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    trainer = trainers()[name]
    if not trainer.available:
        pytest.skip("TRL has no PPO from 1.13 on")
    settings = {"learning_rate": 1e-2, **settings}
    expected = same_rows_as_cached(trainer, tmp_path, settings, kind)
    moved = expected.loc["representation/cosine"].xs(6, level="step").value
    assert (moved < 1 - 1e-6).any(), "the weights did move, so a reference that follows them would be seen"


@pytest.mark.parametrize("kind", ["ref_model", "copy", "adapter"])
def test_a_reference_is_read_at_every_measurement_and_left_as_it_was(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import interp_rlhf.session as module

    read: list[nn.Module] = []
    real = module.read_table

    def counting(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        read.append(model)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(module, "read_table", counting)
    trainer = trainers()["dpo"].build(tmp_path / "run", use_lora=kind == "adapter")
    handle = attach(trainer, small(tmp_path / "run", reference=kind))
    frozen = trainer.model if kind == "adapter" else trainer.ref_model
    if kind != "adapter":
        next(frozen.parameters()).requires_grad_(False)  # some of them require gradients, some do not
    before = None if kind == "adapter" else state_of(frozen)
    trainer.train()
    model = handle.callback._run.reference.model
    policy = handle.callback._run.model
    assert [m is model for m in read].count(True) >= 3 + (model is policy) * 4  # at steps 0, 3 and 6
    if before is not None:
        assert_same_state(before, state_of(frozen))


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": copy.deepcopy(model.state_dict()),
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


def assert_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert not [name for name, value in first["weights"].items() if not torch.equal(value, second["weights"][name])]
    for key in ("grad", "modes", "hooks"):
        assert first[key] == second[key], key


# -- what is not the start ---------------------------------------------------------------------------------------------


def measured_difference(handle: Any, policy: nn.Module, other: nn.Module) -> float:
    """Largest distance of two readings of a text over the mean length, at the layer that can be read from outside."""
    texts = handle.callback._plan.table(fit=True).prompts
    skip = handle.callback._plan.skip_ids
    a, b = (direct_means(model, texts, HOOKPOINTS[0], skip) for model in (policy, other))
    return float((a - b).norm(dim=1).max() / a.norm(dim=1).mean())


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_foreign_reference_model_is_refused_with_the_difference(name: str, tmp_path: Path) -> None:
    trainer = trainers()[name].build(tmp_path / "run")
    trainer.ref_model = causal_lm(5)
    config = small(tmp_path / "run", reference="ref_model", hookpoints=[HOOKPOINTS[0]])
    handle = attach(trainer, config)
    with pytest.raises(ReferenceMismatch) as error:
        trainer.train()
    found = re.match(REFUSED.format(kind="ref_model"), str(error.value))
    assert found is not None, error.value
    assert float(found[1]) == pytest.approx(measured_difference(handle, causal_lm(0), causal_lm(5)), rel=0.06)
    assert "reference: cached is" in str(error.value)


def test_a_reference_that_differs_by_a_little_is_refused_or_not_by_how_much(tmp_path: Path) -> None:
    """On both sides of the accepted difference of 1e-3."""
    for scale, accepted in ((1e-4, True), (1e-2, False)):
        folder = tmp_path / str(scale) / "run"
        trainer = trainers()["dpo"].build(folder)
        with torch.no_grad():
            trainer.ref_model.get_input_embeddings().weight.mul_(1 + scale)
        if accepted:
            attach(trainer, small(folder, reference="ref_model"))
            trainer.train()
        else:
            assert refusal(trainer, folder, "ref_model") == pytest.approx(scale, rel=0.5)


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_reference_model_that_follows_the_policy_is_refused_once_it_has_moved(name: str, tmp_path: Path) -> None:
    syncs = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6, "learning_rate": 1e-2}
    trainer = trainers()[name].build(tmp_path / "run", **syncs)
    assert refusal(trainer, tmp_path / "run", "ref_model") > 1e-3
    rows = rows_of(trainer.interp)
    assert {step for *_, step in rows.index} == {0}  # the start was fine
    assert trainer.state.global_step == 3  # the first measurement after the sync


def test_a_refused_reference_costs_the_measurements_not_the_training(tmp_path: Path) -> None:
    """With ``on_error: warn`` the run goes on, bit by bit the same, and says why there are no numbers."""
    trainer = trainers()["dpo"]
    syncs = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6, "learning_rate": 1e-2}
    config = {**small(tmp_path / "b" / "run", reference="ref_model"), "on_error": "warn"}
    bare = run(trainer, tmp_path / "a" / "run", syncs, None)
    attached = run(trainer, tmp_path / "b" / "run", syncs, config)
    assert_same(bare, attached)
    told = attached["handle"].summary().not_measured
    assert any("reference: ref_model: its readings differ" in item.reason for item in told)
    assert {step for *_, step in rows_of(attached["handle"]).index} == {0}


# -- adapters ----------------------------------------------------------------------------------------------------------


def adapted(**changes: Any) -> Any:
    """A policy whose adapter has been trained before: its B is not zero."""
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(causal_lm(), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    return model


@pytest.mark.parametrize("name", DATA)
def test_an_adapter_that_is_continued_is_not_the_start_when_off(name: str, tmp_path: Path) -> None:
    trainer = entry(name, train=DATA[name], model=adapted).build(tmp_path / "run")
    found = refusal(trainer, tmp_path / "run", "adapter")
    off = causal_lm()
    expected = measured_difference(trainer.interp, merged(adapted()), off)
    assert found >= expected * 0.95  # another of the two layers may differ by more


def merged(model: Any) -> nn.Module:
    return model.merge_and_unload()


@pytest.mark.parametrize("kind", ["cached", "copy"])
def test_a_continued_adapter_starts_where_it_is(kind: str, tmp_path: Path) -> None:
    """Drift is counted from the adapter as it came, not from the base model."""
    trainer = entry("dpo", train=preferences, model=adapted).build(tmp_path / "run", learning_rate=0.0)
    handle = attach(trainer, small(tmp_path / "run", reference=kind))
    trainer.train()
    rows = rows_of(handle)
    cosine = rows.loc["representation/cosine"].value
    assert cosine.to_numpy() == pytest.approx(1.0, abs=1e-9)
    assert not handle.summary().moved


def pissa() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa")


def test_an_adapter_that_takes_over_a_part_of_the_weights_is_not_the_start_when_off(tmp_path: Path) -> None:
    """PiSSA moves the leading singular vectors into the adapter: on, the model is the start; off, it is not."""
    trainer = entry("dpo", train=preferences, peft_config=pissa).build(tmp_path / "run")
    assert refusal(trainer, tmp_path / "run", "adapter") > 1e-2


def with_biases() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = causal_lm().config
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=base.vocab_size, n_embd=32, n_layer=3, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip


def with_trained_biases() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="all", task_type="CAUSAL_LM")


def test_weights_that_are_trained_beside_the_adapter_are_noticed_once_they_moved(tmp_path: Path) -> None:
    """``bias="all"`` trains the base model's own biases: switching the adapter off does not bring them back."""
    trainer = entry("sft", train=texts, model=with_biases, peft_config=with_trained_biases)
    built = trainer.build(tmp_path / "run", learning_rate=3e-2)
    assert refusal(built, tmp_path / "run", "adapter") > 1e-3
    assert {step for *_, step in rows_of(built.interp).index} == {0}


def test_modules_that_an_adapter_saves_are_switched_off_with_it(tmp_path: Path) -> None:
    def whole_head() -> LoraConfig:
        return LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")

    trainer = entry("dpo", train=preferences, peft_config=whole_head)
    same_rows_as_cached(trainer, tmp_path, {"learning_rate": 1e-2}, "adapter")


class Moves(TrainerCallback):
    """Does something to the model after the last step, before the row that is logged then."""

    def __init__(self, move: Callable[[Any], None]) -> None:
        self.move = move

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            with torch.no_grad():
                self.move(kwargs["model"])


def soft_prompt(kind: str) -> PeftConfig:
    config = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[kind]
    return config(task_type="CAUSAL_LM", num_virtual_tokens=3)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_copy_takes_a_learned_prompt_along_and_switching_it_off_is_not_the_start(kind: str, tmp_path: Path) -> None:
    trainer = entry("sft", train=texts, peft_config=lambda: soft_prompt(kind))
    same_rows_as_cached(trainer, tmp_path, {"learning_rate": 1e-2}, "copy")
    folder = tmp_path / "adapter" / "run"
    assert refusal(trainer.build(folder), folder, "adapter") > 1e-2


def test_an_adapter_of_the_value_model_is_not_the_policys(tmp_path: Path) -> None:
    class PolicyAndValue(nn.Module):
        """What TRL's PPO trains: two models in one, the value model first."""

        def __init__(self) -> None:
            super().__init__()
            self.value_model = get_peft_model(causal_lm(1), lora())
            self.policy = causal_lm()

    with pytest.raises(ReferenceMismatch, match="no PEFT adapter"):
        find_reference("adapter", PolicyAndValue(), None)


def test_an_adapter_that_is_merged_later_is_refused_and_stays_merged(tmp_path: Path) -> None:
    """PEFT would undo the merge on the way to switching it off, and the weights would not be what they were."""
    settings = {"learning_rate": 1e-2, "max_steps": 3}
    trainer = entry("dpo", train=preferences, peft_config=lora).build(tmp_path / "run", **settings)
    kept: dict[str, Tensor] = {}

    def merge(model: Any) -> None:
        model.merge_adapter()
        kept.update({name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name})

    trainer.add_callback(Moves(merge))
    handle = attach(trainer, small(tmp_path / "run", reference="adapter"))
    with pytest.raises(ReferenceMismatch, match=r"^reference: adapter: .*merged.*$"):
        trainer.train()
    assert kept and all(torch.equal(trainer.model.state_dict()[name], value) for name, value in kept.items())
    assert {step for *_, step in rows_of(handle).index} == {0}


# -- what is not there -------------------------------------------------------------------------------------------------

MISSING: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "no adapter": ("dpo", {}, "adapter", "reference: adapter: the model has no PEFT adapter"),
    "an adapter instead": ("dpo", {}, "ref_model", "reference: ref_model: the trainer has no"),
    "a trainer without one": ("sft", {}, "ref_model", "reference: ref_model: the trainer has no reference model"),
    "no KL": ("grpo", {"beta": 0.0}, "ref_model", "reference: ref_model: the trainer has no reference model"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_reference_that_is_not_there_is_refused_before_anything_else(case: str, tmp_path: Path) -> None:
    name, settings, kind, message = MISSING[case]
    made = entry(name, train=DATA[name], **({"peft_config": lora} if case == "an adapter instead" else {}))
    trainer = made.build(tmp_path / "run", **settings)
    before = dict(vars(trainer))
    with pytest.raises(InterpError) as error:
        attach(trainer, small(tmp_path / "run", reference=kind))
    (line,) = str(error.value).splitlines()
    assert line.startswith(message)
    assert dict(vars(trainer)) == before and not type(trainer).__name__.startswith("Interp")
    assert not (tmp_path / "run" / "interp").exists()
