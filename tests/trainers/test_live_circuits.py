"""Circuits followed through real trainings: on schedule, of the weights of their step, and without a trace in them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from tiny_models import CONFIGS
from torch import Tensor
from trainers.comparing import assert_same, run
from trainers.table import causal_lm, trainers, trl_version
from trainers.tiny_runs import StopAt, assert_rows_equal, interp_log, live, small, train, verify
from trainers.token_tasks import write_task
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from interp_rlhf import (
    ConfigError,
    FormatError,
    HookpointError,
    MeasurementError,
    PromptError,
    attach,
    attribute_edges,
    load_run,
)
from interp_rlhf.config import InterpConfig
from interp_rlhf.distributed import World
from interp_rlhf.mechanism_rows import stored_mechanism
from interp_rlhf.mechanisms import Reader
from interp_rlhf.readouts.probes import LinearProbe

METRICS = {
    "metric", "metric_corrupt", "effect_ratio", "faithfulness_index", "faithfulness_matched", "faithfulness_own",
    "structure_change", "structure_jaccard", "structure_spearman", "structure_top", "seconds",
}  # fmt: skip
CONTROL = {"faithfulness_control"}
BRIEF = {"max_steps": 4, "learning_rate": 2e-3}
#: What could go wrong together.
HARD = {**BRIEF, "max_steps": 3, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
SAVES = {"save_strategy": "steps", "save_steps": 3}
CASES = [
    (name, lora)
    for name in ("dpo", "grpo", "ppo")
    for lora in (False, True)
    if trainers()[name].available
]  # fmt: skip


def settings(folder: Path, *, control: bool = False, tasks: Any = None, **changes: Any) -> dict[str, Any]:
    """A config that follows one task."""
    circuits = {"tasks": tasks or [write_task(folder.parent / "words.jsonl")], "steps": 2, "random": 19}
    if control:
        circuits["size"] = 0.1
        circuits["control"] = write_task(folder.parent / "margins.jsonl", metric="margin", n=8, seed=1)
    more = {"components": False, "schedule": {"every": 2}, **changes}
    return small(folder, circuits={**circuits, **more.pop("circuits", {})}, **more)


def rows_of(timeline: pd.DataFrame, task: str = "words") -> pd.DataFrame:
    """Values by step and metric."""
    rows = timeline[timeline.metric.str.startswith("circuit/") & (timeline.readout == task)]
    return rows.assign(metric=rows.metric.str.removeprefix("circuit/")).pivot(
        index="step", columns="metric", values="value"
    )


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in load_run(folder).events if event["event"] == kind]


def reader(model: Any, handle: Any) -> Reader:
    config: InterpConfig = handle.callback.config
    return Reader.of(model, config.circuits, handle.callback._plan.pad_token_id, config.seed, World(), None)


def saved_model(folder: Path, lora: bool) -> Any:
    return PeftModel.from_pretrained(causal_lm(), folder) if lora else LlamaForCausalLM.from_pretrained(folder)


def kept(folder: Path, step: int, task: str = "words") -> dict[str, Tensor]:
    (snapshot,) = [snapshot for snapshot in load_run(folder).snapshots if snapshot.step == step]
    name = f"circuits/{task}/"
    return {key.removeprefix(name): value for key, value in snapshot.tensors().items() if key.startswith(name)}


# -- on schedule, without a trace, and true ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "lora"), CASES)
def test_training_is_unchanged_and_circuits_are_those_of_the_weights(name: str, lora: bool, tmp_path: Path) -> None:
    entry, folder = trainers()[name], tmp_path / "run" / "out"
    saves = {} if name == "ppo" else SAVES  # saving, PPO draws from Python's generator on its own
    setting = {**HARD, **saves, **({"use_lora": True, "learning_rate": 2e-2} if lora else {})}
    bare = run(entry, tmp_path / "bare", setting, None)
    attached = run(entry, folder, setting, settings(folder, control=True))
    assert_same(bare, attached)

    handle, steps = attached["handle"], [0, 2, 3]
    found = rows_of(handle.timeline())
    assert list(found.index) == steps and set(found.columns) == METRICS | CONTROL
    assert not found.isna().any(axis=None) and not events(folder, "failure")
    assert found.faithfulness_index[0] == found.faithfulness_matched[0] == found.faithfulness_own[0]
    assert found.effect_ratio[0] == 1 and found.structure_change[0] == 0
    assert (found.loc[2:, "structure_change"].abs() > 1e-4).all() and found.metric.nunique() == len(steps)
    assert [(event["task"], event["step"]) for event in events(folder, "circuit")] == [("words", s) for s in steps]
    assert {snapshot.step for snapshot in load_run(folder).snapshots} == {0, 3}
    assert kept(folder, 0).keys() >= {"blocks_a", "blocks_b", "own", "control", "full", "empty"}
    assert kept(folder, 3).keys() == {"blocks_a", "blocks_b", "own"} and verify(folder) == 0
    assert any(key.startswith("interp/circuit/") for key in attached["interp"][-1])
    if name == "dpo" and not lora and trl_version().release >= (1, 13):
        assert "forward" in vars(handle.callback._run.model), "one without logits; circuits run the class's own"
    if name != "ppo":
        check_saved(folder, 3, saved_model(folder / "checkpoint-3", lora), handle)
    check_saved(folder, 0, causal_lm(), handle)


def check_saved(folder: Path, step: int, model: Any, handle: Any) -> None:
    """Scores and metric of a step are those of the model in its files, attributed batch by batch."""
    again, tensors, (task,) = reader(model, handle), kept(folder, step), handle.callback._plan.tasks
    select, evaluate = task.halves(0)
    assert len(tensors["blocks_a"]) == 8
    for half, blocks in ((select, tensors["blocks_a"]), (evaluate, tensors["blocks_b"])):
        for index in (0, 7):
            batch = task.batch([half[index + 8], half[index]], 0)
            circuit = attribute_edges(model, batch.clean, batch.corrupt, batch.metric, method="eap-ig", steps=2)
            scores = circuit.scores[circuit.graph.possible]
            torch.testing.assert_close(blocks[index], scores, atol=1e-6 * float(scores.abs().max()), rtol=1e-6)
    batch, found = task.batch(evaluate, 0), rows_of(handle.timeline()).loc[step]
    with torch.no_grad():
        clean, corrupt = (model.eval()(**each).logits for each in (batch.clean, batch.corrupt))
    assert found["metric"] == pytest.approx(float(batch.metric(clean, clean).mean()), abs=1e-6)
    assert found["metric_corrupt"] == pytest.approx(float(batch.metric(corrupt, clean).mean()), abs=1e-6)
    runs = again.runs(task, evaluate)
    whole = (runs.clean - runs.corrupt).mean()
    own = (runs(tensors["own"].bool()) - runs.corrupt).mean() / whole
    assert found["faithfulness_own"] == pytest.approx(float(own), abs=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_in_bfloat16(lora: bool, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    model = causal_lm().to(torch.bfloat16)
    changes = {**BRIEF, "max_steps": 2, "save_strategy": "no", "use_lora": lora, "model": model}
    trainer, handle = train("sft", folder, settings(folder), **changes)
    found = rows_of(handle.timeline())
    assert list(found.index) == [0, 2] and not found.isna().any(axis=None)
    assert found.metric[0] != found.metric[2] and not events(folder, "failure")
    again, (task,) = reader(trainer.model, handle), handle.callback._plan.tasks
    runs = again.runs(task, task.halves(0)[1])
    assert torch.equal(runs(again.wiring.graph.possible), runs.clean) and (runs.clean - runs.corrupt).mean() > 0.01


# -- schedule and cost -------------------------------------------------------------------------------------------------


def test_circuits_have_a_cadence_of_their_own_and_their_time_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    config = settings(folder, schedule={"every": 1}, circuits={"every": 3})
    began = time.monotonic()
    changes = {**BRIEF, "max_steps": 7, "save_strategy": "steps", "save_steps": 5}
    trainer, handle = train("dpo", folder, config, **changes)
    took = time.monotonic() - began
    timeline, own = handle.timeline(), handle.callback._run
    assert list(rows_of(timeline).index) == [0, 3, 5, 7]  # due, due, saved, the end
    assert sorted(timeline.step.unique()) == list(range(8))
    logged = {step for step, row in interp_log(trainer).items() if any("/circuit/" in key for key in row)}
    assert logged == {3, 7}
    cost = timeline.pivot_table(index="step", columns="metric", values="value", aggfunc="sum")
    circuits = cost["circuit/seconds"].loc[3:].sum()
    assert own.spent == pytest.approx(cost["cost/seconds"].sum() + own.circuits.seconds, rel=1e-6)
    assert own.circuits.seconds > circuits > 0
    assert cost["cost/seconds"][0] > cost["circuit/seconds"][0]
    assert 1 > cost["cost_fraction"][7] >= own.spent / took, "with the last step's circuits in it"


def test_where_the_best_checkpoint_is_loaded_its_circuits_are_not_taken_for_those_of_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    changes = {
        **BRIEF, "max_steps": 8, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "callbacks": [StopAt(5)],
    }  # fmt: skip
    config = settings(folder, schedule={"every": 1}, circuits={"every": 3}, on_error="warn")
    _, handle = train("dpo", folder, config, **changes)
    assert 5 in handle.timeline().step.unique()
    assert list(rows_of(handle.timeline()).index) == [0, 2, 4]


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_from_the_circuits_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, more = tmp_path / "run", {**BRIEF, "max_steps": 6, "use_lora": True, "learning_rate": 2e-2}
    config = settings(tmp_path / "whole", control=True)
    _, whole = train("dpo", tmp_path / "whole", config, **more)
    train("dpo", folder, config, callbacks=[StopAt(4)], **more)
    monkeypatch.delattr("interp_rlhf.live_circuits.start_mechanism")  # nobody looks for them again
    _, handle = train("dpo", folder, config, resume=folder / "checkpoint-4", **more)
    timeline = handle.timeline()
    assert set(timeline[timeline.segment == 2].step) == {6}
    found, expected = (live(one.timeline()).drop(index="circuit/seconds", level=0) for one in (handle, whole))
    assert found.index.get_level_values(0).str.startswith("circuit/").any()
    assert_rows_equal(found, expected)
    drawn, expected = ([event["edges"] for event in events(one, "circuit")] for one in (folder, tmp_path / "whole"))
    assert len(drawn) == 4 and drawn == expected
    assert not events(folder, "failure") and verify(folder) == 0

    (task,), graph = handle.callback._plan.tasks, whole.callback._run.circuits.starts[0].graph
    tensors = {key: value for key, value in handle.callback._run.store.baseline().items() if "circuits/" in key}
    assert stored_mechanism(tensors, task, graph).evaluate == task.halves(0)[1]
    other = write_task(tmp_path / "others" / "words.jsonl", seed=3)
    config["circuits"]["tasks"] = [other]
    with pytest.raises(FormatError, match="'words': its pairs or metric are not those of step 0"):
        train("dpo", folder, config, resume=folder / "checkpoint-4", **more)
    own = "circuits/words/own"
    for damaged, problem in (
        ({**tensors, own: tensors[own][:-1]}, "own: expected shape"),
        ({key: value for key, value in tensors.items() if key != "circuits/words/full"}, "full: not found"),
    ):
        with pytest.raises(FormatError, match=problem):
            stored_mechanism(damaged, task, graph)


# -- what is wrong, and what fails -------------------------------------------------------------------------------------


def wrong(case: str, folder: Path) -> tuple[dict[str, Any], Any]:
    """Circuits settings that are wrong, and the model they are wrong for."""
    task = write_task(folder / "words.jsonl")
    if case == "path":
        return {"tasks": [str(folder / "nowhere.jsonl")]}, None
    if case == "name":
        return {"tasks": ["induktion"]}, None
    if case == "twice":
        return {"tasks": [task], "control": task}, None
    if case == "length":
        return {"tasks": [write_task(folder / "long.jsonl", length=140)]}, None
    if case == "probe":
        LinearProbe("p", "layers.9.resid_post", torch.ones(16), 0.0).save(folder / "probe.safetensors")
        write_task(folder / "plain.jsonl", metric="kl")
        (folder / "seen.yaml").write_text("name: seen\nmetric: probe\nprobe: probe.safetensors\npairs: plain.jsonl\n")
        return {"tasks": [str(folder / "seen.yaml")]}, None
    config = AutoConfig.for_model("opt", **{**CONFIGS["opt"], "vocab_size": 94})
    return {"tasks": [task]}, AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("path", PromptError, "nowhere.jsonl: cannot be read"),
        ("name", ConfigError, "'induktion': expected one of induction"),
        ("twice", ConfigError, "expected different names, found words, words"),
        ("length", ConfigError, "task 'long': pair [0-9a-f]{16}: 142 tokens, expected at most 128"),
        ("probe", HookpointError, "layers.9.resid_post"),
        ("architecture", HookpointError, "layers.0: OPTDecoderLayer is not supported for circuits"),
    ],
)
def test_what_is_wrong_is_said_before_training(case: str, error: Any, message: str, tmp_path: Path) -> None:
    circuits, model = wrong(case, tmp_path)
    trainer = trainers()["plain"].build(tmp_path / "out", model=model)
    with pytest.raises(error, match=message):
        attach(trainer, small(tmp_path / "out", circuits=circuits, components=False))
    assert not (tmp_path / "out" / "interp").exists()


@pytest.mark.parametrize(("at", "on_error"), [("start", "warn"), ("later", "warn"), ("later", "raise")])
def test_a_task_that_fails_costs_its_own_rows(
    at: str, on_error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from interp_rlhf import live_circuits

    name = "start_mechanism" if at == "start" else "read_mechanism"
    working, folder = getattr(live_circuits, name), tmp_path / "out"

    def fails(reading: Reader, task: Any, *more: Any) -> Any:
        if getattr(task, "task", task).name == "words":
            raise torch.cuda.OutOfMemoryError("planted")
        return working(reading, task, *more)

    monkeypatch.setattr(live_circuits, name, fails)
    tasks = [write_task(tmp_path / "words.jsonl"), write_task(tmp_path / "kl.jsonl", metric="kl", n=8, seed=2)]
    config = settings(folder, tasks=tasks, on_error=on_error)
    changes = {**BRIEF, **SAVES, "max_steps": 3}
    if on_error == "raise":
        with pytest.raises(torch.cuda.OutOfMemoryError, match="planted"):
            train("dpo", folder, config, **changes)
        return
    trainer, handle = train("dpo", folder, config, **changes)
    assert trainer.state.global_step == 3
    failed = [(event["step"], event["what"]) for event in events(folder, "failure")]
    expected = [(0, "circuit of words at the start")] if at == "start" else [(s, "circuit of words") for s in (2, 3)]
    assert failed == expected and all("planted" in event["reason"] for event in events(folder, "failure"))
    timeline = handle.timeline()
    assert list(rows_of(timeline, "kl").index) == [0, 2, 3]
    assert list(rows_of(timeline).index) == ([] if at == "start" else [0])
    assert sorted(timeline[timeline.metric == "concept/drift"].step.unique()) == [0, 2, 3]
    assert kept(folder, 3, "kl") and not kept(folder, 3, "words") and verify(folder) == 0


def test_a_control_task_that_fails_costs_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Reader, control: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("planted")

    monkeypatch.setattr(Reader, "control_scores", fails)
    folder = tmp_path / "out"
    circuits = {"control": write_task(tmp_path / "margins.jsonl", metric="margin", n=8, seed=1)}
    _, handle = train("dpo", folder, settings(folder, circuits=circuits, on_error="warn"), **{**BRIEF, "max_steps": 2})
    assert [(event["step"], event["what"]) for event in events(folder, "failure")] == [(0, "circuit of margins")]
    rows = handle.timeline()
    assert set(rows[rows.metric == "circuit/faithfulness_index"].step) == {0, 2}
    assert rows[rows.metric == "circuit/faithfulness_control"].empty


def test_partitioned_weights_are_refused_once_and_cost_nothing_else(tmp_path: Path) -> None:
    """What a model under ZeRO-3 looks like, from before it is attached to."""
    folder, model = tmp_path / "out", causal_lm()
    next(model.parameters()).ds_id = 0  # pyrefly: ignore
    _, handle = train("sft", folder, settings(folder), **{**BRIEF, "save_strategy": "no", "model": model})
    (refused,) = [event for event in events(folder, "refused") if event["readout"] == "circuits"]
    assert "ZeRO-3" in refused["reason"] and "interp-rlhf compare" in refused["reason"]
    assert rows_of(handle.timeline()).empty and not events(folder, "failure")
    assert sorted(handle.timeline().step.unique()) == [0, 2, 4]
    with pytest.raises(MeasurementError, match="ZeRO-3"):
        reader(model, handle)
