"""DPO attached on two processes: readings equal one process on the same weights, training is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainers.table import saved_model
from transformers import AutoModelForCausalLM

from interp_rlhf import load_run
from interp_rlhf.activations.capturing import read_prompts
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.audit.verification import verify_run

WORKER = Path(__file__).with_name("dpo_worker.py")


def launch(engine: str, out: Path, *, processes: int = 2, **environment: str) -> str:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, str(WORKER), engine, str(out), str(saved_model(0))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def texts(out: Path) -> dict[str, Prompt]:
    """Not the texts but their token ids: rebuilt from the data the worker drew, looked up by id."""
    from trainers.table import preferences, tokenizer

    from interp_rlhf.activations.rows import row_texts

    found = {}
    for row in preferences(40):
        row = {**row, "chosen": row["chosen"] + " </s>", "rejected": row["rejected"] + " </s>"}
        for text in row_texts(row, tokenizer(), max_length=128):
            found.update({prompt.id: prompt for prompt in text.prompts})
    return found


def read_saved(folder: Path, out: Path, name: str, prefix: str) -> None:
    """The snapshot's readings equal those of one process on the saved weights."""
    run = load_run(out)
    snapshot = next(s for s in run.snapshots if s.name == name)
    ids = [json.loads(line)["id"] for line in (out / "_interp" / "01-texts.jsonl").read_text().splitlines()]
    known = texts(out)
    tensors = snapshot.tensors()
    hookpoints = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    assert hookpoints
    kept = [known[i] for i in sorted(ids)]
    model = AutoModelForCausalLM.from_pretrained(folder)
    alone = read_prompts(model, kept, hookpoints, batch_size=8, pad_token_id=0, skip_ids=frozenset({1}))
    for hookpoint in hookpoints:
        recorded = tensors[prefix + hookpoint]
        if len(recorded) == len(kept):
            torch.testing.assert_close(recorded, alone.means[hookpoint], atol=1e-4, rtol=0)
        else:  # after admission only part of the texts is read on
            distance = torch.cdist(recorded, alone.means[hookpoint]).min(dim=1).values
            assert distance.max() < 1e-4


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_two_processes_read_what_one_reads(engine: str, tmp_path: Path) -> None:
    out = tmp_path / engine
    launch(engine, out)
    run = load_run(out)
    assert sorted(run.timeline().step.unique()) == [0, 2, 4]
    assert not [event for event in run.events if event["event"] == "failure"]
    assert run.info["world_size"] == 2
    assert verify_run(out).ok
    read_saved(saved_model(0), out, "01-step-000000", "start/")
    read_saved(out / "checkpoint-4", out, "01-step-000004", "means/")


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_training_on_two_processes_is_unchanged(engine: str, tmp_path: Path) -> None:
    losses = []
    for name, bare in (("bare", "1"), ("attached", "0")):
        launch(engine, tmp_path / name, BARE=bare)
        losses.append(json.loads((tmp_path / name / "losses.json").read_text()))
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_a_failure_on_one_rank_is_agreed_on_and_costs_no_training(tmp_path: Path) -> None:
    launch("ddp", tmp_path / "out", FAIL_ON_RANK="1")
    run = load_run(tmp_path / "out")
    (failure,) = [event for event in run.events if event["event"] == "failure"]
    assert failure["step"] == 2 and "rank 1: RuntimeError: planted" in failure["reason"]
    assert sorted(run.timeline().step.unique()) == [0, 4]
    assert len(json.loads((tmp_path / "out" / "losses.json").read_text())) == 4
