"""Real input, end to end: a pretrained model and human preference pairs, attached to DPO, GRPO and PPO."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers.table import has_ppo, lora

from interp_rlhf import InterpConfig, Snapshot, attach, load_run
from interp_rlhf.cli import main

pytestmark = pytest.mark.slow
STEPS = 30
TIMES = ("runtime", "per_second", "flos")
CLOCKS = ("step_time", "episode", "eps", "profiling")


def unsupported(build: str) -> str | None:
    """Why a trainer cannot run on this leg, or ``None``."""
    return "PPO ends with TRL 1.12" if build == "ppo" and not has_ppo() else None


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": STEPS, "logging_steps": 5,
        "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 15, "report_to": [], "use_cpu": True,
        "seed": 3, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False, **changes,
    }  # fmt: skip


def tokenizer(stories: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories, padding_side="left")


def policy(stories: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(stories)


def short(pairs: list[dict[str, str]], characters: int, n: int) -> list[dict[str, str]]:
    """The first ``n`` pairs whose dialogues are short and differ in the last answer only, split into columns."""
    found = []
    for pair in pairs:
        heads = [pair[side].rpartition("\n\nAssistant:")[0] for side in ("chosen", "rejected")]
        answers = [pair[side].rpartition("\n\nAssistant:")[2] for side in ("chosen", "rejected")]
        fits = max(map(len, pair.values())) <= characters and all(map(str.strip, answers))
        if heads[0] == heads[1] and answers[0] != answers[1] and fits:
            found.append({"prompt": heads[0] + "\n\nAssistant:", "chosen": answers[0], "rejected": answers[1]})
    return found[:n]


def dpo(folder: Path, stories: Path, pairs: list[dict[str, str]], steps: int) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list([pair for pair in pairs if max(map(len, pair.values())) <= 400][:480])
    args = DPOConfig(**arguments(folder, max_steps=steps, max_length=160, beta=0.1))
    return DPOTrainer(
        policy(stories), args=args, processing_class=tokenizer(stories), peft_config=lora(),
        train_dataset=data.select(range(160, len(data))), eval_dataset=data.select(range(160)),
    )  # fmt: skip


def few_new_words(completions: list[str], **_: Any) -> list[float]:
    """Share of distinct characters: computable, and it varies between completions."""
    return [len(set(text)) / max(len(text), 1) for text in completions]


def grpo(folder: Path, stories: Path, pairs: list[dict[str, str]], steps: int) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    data = Dataset.from_list([{"prompt": pair["prompt"]} for pair in short(pairs, 400, 160)])
    args = GRPOConfig(**arguments(folder, max_steps=steps, num_generations=2, max_completion_length=12, beta=0.04))
    return GRPOTrainer(
        policy(stories), reward_funcs=few_new_words, args=args, train_dataset=data, processing_class=tokenizer(stories),
        peft_config=lora(),
    )  # fmt: skip


def ppo(folder: Path, stories: Path, pairs: list[dict[str, str]], steps: int) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    encode = tokenizer(stories)
    rows = [{"input_ids": encode(pair["prompt"])["input_ids"]} for pair in short(pairs, 240, 160)]
    base = arguments(folder, save_strategy="no", lr_scheduler_type="constant")
    base.pop("max_steps")
    args = PPOConfig(
        **base, total_episodes=4 * steps, num_ppo_epochs=1, num_mini_batches=1, response_length=8,
        num_sample_generations=0, local_rollout_forward_batch_size=4,
    )  # fmt: skip
    torch.manual_seed(5)
    scorer, value = (AutoModelForSequenceClassification.from_pretrained(stories, num_labels=1) for _ in range(2))
    return PPOTrainer(
        args=args, processing_class=encode, model=policy(stories), ref_model=policy(stories), reward_model=scorer,
        value_model=value, train_dataset=Dataset.from_list(rows[32:]), eval_dataset=Dataset.from_list(rows[:32]),
    )  # fmt: skip


TRAINERS: dict[str, Callable[[Path, Path, list[dict[str, str]], int], Any]] = {"dpo": dpo, "grpo": grpo, "ppo": ppo}


def theirs(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trainer's own rows without clocks."""
    return [
        {k: v for k, v in row.items() if not k.startswith("interp/") and not any(t in k for t in (*TIMES, *CLOCKS))}
        for row in history
    ]


@pytest.mark.parametrize("name", TRAINERS)
def test_real_model_and_data(
    name: str, stories: Path, real_pairs: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := unsupported(name):
        pytest.skip(reason)

    def train(folder: Path, steps: int, *, attached: bool) -> tuple[list[dict[str, Any]], Any]:
        torch.manual_seed(3)
        trainer = TRAINERS[name](folder, stories, real_pairs, steps)
        handle = attach(trainer) if attached else None
        trainer.train()
        return trainer.state.log_history, handle

    bare, _ = train(tmp_path / "bare", 4 if name == "ppo" else STEPS, attached=False)
    capsys.readouterr()
    history, handle = train(tmp_path / "attached", STEPS, attached=True)
    check_own_rows(name, theirs(bare), theirs(history))
    check_run(name, tmp_path / "attached", handle, history, capsys.readouterr().out)
    assert main(["verify", str(tmp_path / "attached")]) == 0
    assert main(["report", str(tmp_path / "attached"), "--out", str(tmp_path / "again.html")]) == 0


def check_own_rows(name: str, bare: list[dict[str, Any]], attached: list[dict[str, Any]]) -> None:
    """The same rows. PPO on this model differs in the last bits from one bare run to the next, so there up to those."""
    if name != "ppo":
        assert bare == attached
        return
    assert [row["step"] for row in attached] == list(range(1, STEPS + 1))
    for expected, found in zip(bare, attached, strict=False):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4, nan_ok=True)


def check_run(name: str, folder: Path, handle: Any, history: list[dict[str, Any]], console: str) -> None:
    run, table = load_run(folder), handle.timeline()
    last = max(row["step"] for row in history)
    assert run.info["config"] == json.loads(json.dumps(InterpConfig.preset().as_mapping()))
    assert {0, last} <= set(table.step) and last == STEPS
    assert {snapshot.step for snapshot in run.snapshots} == ({0, 30} if name == "ppo" else {0, 15, 30})
    assert all(Snapshot.load(snapshot.path).tensors() for snapshot in run.snapshots)
    assert not [event for event in run.events if event["event"] == "failure"]
    assert set(table[table.metric.str.startswith("representation/")].hookpoint) == {
        f"layers.{layer}.resid_post" for layer in (1, 2, 3, 4)
    }
    end = table[(table.step == last) & (table.metric == "representation/cosine")]
    assert (end.value < 1 - 1e-6).all(), "training moved the representation"
    refused = [event for event in run.events if event["event"] == "refused"]
    summary = str(handle.summary())
    assert refused and all(event["readout"] in summary for event in refused)
    assert summary in console
    page = (folder / "interp" / "report.html").read_text(encoding="utf-8")
    assert all(html.escape(event["reason"]) in page for event in refused)
    read_or_refused = set(table.readout) | {event["readout"] for event in refused}
    assert set(run.info["config"]["concepts"]["packs"]) <= read_or_refused
    if name == "dpo":
        assert "chosen_minus_rejected" in read_or_refused


@pytest.mark.skipif(has_ppo(), reason="tested on the newest TRL line")
def test_two_control_runs_of_real_preferences(
    stories: Path, real_pairs: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What may be put down to 30 steps of DPO on real preferences: with two control runs nothing, and why."""
    folder = tmp_path / "run"
    handles = []
    for control in (None, 1, 2):
        torch.manual_seed(3)
        trainer = dpo(folder, stories, real_pairs, STEPS)
        handles.append(attach(trainer, {"control": control}))
        trainer.train()
    assert [path.name for path in sorted((folder / "_controls").iterdir())] == ["01", "02"]
    summary = handles[0].summary()
    assert (summary.controls.k, summary.controls.left_out) == (2, ()) and not summary.attributable
    assert summary.findings and all(len(finding.control.controls) == 2 for finding in summary.findings)
    assert all(finding.control.rank.p >= 1 / 3 for finding in summary.findings)
    words = "With 2 control runs (pairs swapped) the smallest possible p is 0.33; 19 are needed for 0.05"
    assert words in str(summary)
    assert "control run 1: pairs swapped" in str(handles[1].summary())
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")
    assert words in page and all(html.escape(finding.readout) in page for finding in summary.findings)
