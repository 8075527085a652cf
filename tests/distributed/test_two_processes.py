"""Attached on two processes: readings equal one process on the same weights, training is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pytest
import torch
from torch import nn
from trainers.table import causal_lm, preferences, prompts, saved_model, scorer, texts, tokenizer, unpaired
from trainers.tiny_runs import small
from trainers.token_tasks import write_task
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from interp_rlhf import load_run
from interp_rlhf.activations.capturing import read_prompts
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.activations.reference import find_frozen
from interp_rlhf.activations.rows import row_texts
from interp_rlhf.audit.verification import verify_run
from interp_rlhf.causal import causal_share
from interp_rlhf.config import InterpConfig
from interp_rlhf.distributed import World
from interp_rlhf.mechanism_rows import mechanism_estimates
from interp_rlhf.mechanisms import Reader, read_mechanism, start_mechanism
from interp_rlhf.offline import measure
from interp_rlhf.plan import TextTable
from interp_rlhf.readouts.packs import load_pack, render
from interp_rlhf.stored_plan import load_plan

#: What the two tested TRL lines share out among each other: both run ZeRO-3, and DPO under every engine.
ELSEWHERE = "ddp" if version("trl").startswith("1.12.") else "zero2"
#: Where causal shares are asked for.
PLACE = "layers.2.resid_post"
WORKER = Path(__file__).with_name("trainer_worker.py")


def launch(trainer: str, engine: str, out: Path, **environment: str) -> str:
    model = out.parent / "scorer" if trainer == "reward" else saved_model(0)
    if trainer == "reward":
        scorer().save_pretrained(model)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)]
    done = subprocess.run(
        [*command, trainer, engine, str(out), str(model)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@cache
def known_texts() -> dict[int, Prompt]:
    """Every text that a trainer of the table may read, by the number that snapshots know it by."""
    found: dict[int, Prompt] = {}
    for row in (*preferences(24), *unpaired(24), *texts(24), *prompts(16)):
        ended = {
            key: f"{value} </s>" if isinstance(value, str) and key != "prompt" else value for key, value in row.items()
        }
        for variant in (row, ended):  # trainers add the end of a text
            for drawn in row_texts(variant, tokenizer(), max_length=128):
                for prompt in drawn.prompts:
                    found[int(TextTable((prompt,), frozenset()).ids)] = prompt
    with TemporaryDirectory() as folder:
        (pack,) = small(Path(folder) / "run")["concepts"]["packs"]
        for pair in render(load_pack(pack), tokenizer(), 128):
            for prompt in (pair.positive, pair.negative):
                found[int(TextTable((prompt,), frozenset()).ids)] = prompt
    return found


#: Parts of a shift that need the frozen start, which no checkpoint of a full fine-tuning holds.
APART = {"shift/text", "shift/representation", "shift/interaction"}


def claims(timeline: pd.DataFrame) -> dict[tuple[str, ...], float]:
    """Values of the last step's probes and sampled completions."""
    rows = timeline[(timeline.step == 4) & timeline.metric.str.startswith(("probe/", "shift/"))]
    keys = zip(rows.metric, rows.readout, rows.hookpoint, rows.reader, strict=True)
    return dict(zip(keys, rows.value, strict=True))


def check_claims(out: Path, *, sampled: bool) -> None:
    """Probes and sampled completions are those of one process that reads the checkpoint, and the parts add up."""
    found, alone = claims(load_run(out).timeline()), claims(measure(out / "checkpoint-4").timeline())
    assert alone.keys() == {key for key in found if key[0] not in APART}
    for key, value in alone.items():
        assert found[key] == pytest.approx(value, abs=1e-4), key
    metrics = {key[0] for key in found}
    assert "probe/staleness" in metrics and (APART | {"shift/total"} <= metrics) == sampled
    for key in found:
        if key[0] == "shift/total":
            parts = (found["shift/text", *key[1:]], found["shift/representation", *key[1:]])
            assert found[key] == pytest.approx(sum(parts), abs=1e-6) and abs(parts[1]) > 1e-5
    refused = {event["readout"]: event["reason"] for event in load_run(out).events if event["event"] == "refused"}
    assert ("sharded" in refused.get("sampled completions", "")) == (not sampled)


def check_readings(model: nn.Module, out: Path, name: str, prefix: str) -> None:
    """The snapshot's readings equal those of one process on the same weights."""
    (snapshot,) = [snapshot for snapshot in load_run(out).snapshots if snapshot.name == name]
    tensors = snapshot.tensors()
    hookpoints = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    assert hookpoints
    read = [known_texts()[text] for text in tensors["text_ids"].tolist()]
    alone = read_prompts(model, read, hookpoints, batch_size=8, pad_token_id=0, skip_ids=frozenset({1}))
    for hookpoint in hookpoints:
        torch.testing.assert_close(tensors[prefix + hookpoint], alone.means[hookpoint], atol=1e-4, rtol=0)


def check_circuits(out: Path, *, whole: bool) -> None:
    """Circuits are those of one process on the same weights; partitioned weights are refused, once and in words."""
    run = load_run(out)
    refused = [event["reason"] for event in run.events if event.get("readout") == "circuits"]
    rows = run.timeline()
    rows = rows[rows.metric.str.startswith("circuit/") & (rows.metric != "circuit/seconds")]
    if not whole:
        assert rows.empty and len(refused) == 1 and "ZeRO-3" in refused[0] and "interp-rlhf compare" in refused[0]
        return
    config = InterpConfig.resolve(load_run(out).info["config"])
    (task,) = load_plan(out / "_interp" / "01-plan.jsonl").tasks
    options = (config.circuits, 0, config.seed, World(), None)
    start = start_mechanism(Reader.of(causal_lm(), *options), task, None)
    now = read_mechanism(Reader.of(LlamaForCausalLM.from_pretrained(out / "checkpoint-4"), *options), start)
    for step, reading in ((0, start.reading), (4, now)):
        alone = {
            name: one for name, one in mechanism_estimates(start, reading, config).items() if "seconds" not in name
        }
        found = rows[rows.step == step].set_index("metric")
        assert set(found.index) == set(alone) and "circuit/faithfulness_own" in alone
        for name, one in alone.items():
            for field in ("value", "ci_low", "ci_high"):
                assert found.loc[name, field] == pytest.approx(getattr(one, field), abs=1e-4), (step, name, field)
    assert not refused and set(rows.step) == {0, 2, 4}


def check_causes(out: Path, *, whole: bool) -> None:
    """What a drift is made of and brings about is what one process finds on the same weights; else the reason why."""
    run = load_run(out)
    rows = run.timeline()
    rows = rows[rows.step == 4]
    parts, shares = (rows[rows.metric.str.startswith(name)] for name in ("component/", "causal/"))
    if not whole:
        reasons = {event["readout"]: event["reason"] for event in run.events if event["event"] == "refused"}
        told = [reason for readout, reason in reasons.items() if readout.startswith(("components", "causal share"))]
        assert parts.empty and shares.empty and len(told) >= 2 and all("ZeRO-3" in reason for reason in told), reasons
        return
    alone = measure(out / "checkpoint-4").timeline()
    key = ["metric", "readout", "hookpoint"]
    alone = alone[alone.metric.str.startswith("component/") & (alone.step == 4)].set_index(key).value
    assert len(parts) and parts.set_index(key).value.to_dict() == pytest.approx(alone.to_dict(), abs=1e-4)
    (concept,) = (one for one in load_plan(out / "_interp" / "01-plan.jsonl").concepts if one.name == "order")
    final, direction = LlamaForCausalLM.from_pretrained(out / "checkpoint-4"), run.snapshots[0].tensors()
    frozen = find_frozen(final, causal_lm())
    assert frozen is not None
    expected = causal_share(
        final, frozen, concept.held, PLACE, direction[f"direction/order/{PLACE}"],
        batch_size=4, pad_token_id=0, bootstrap=100, seed=0,
    ).rows()  # fmt: skip
    assert expected and set(shares.readout) == {"order"} and set(shares.hookpoint) == {PLACE}
    values = {metric: estimate.value for metric, estimate in expected.items()}
    assert shares.set_index("metric").value.to_dict() == pytest.approx(values, abs=1e-4, rel=1e-3)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("trainer", ["dpo", "sft", "grpo", "rloo", "kto", "reward"])
def test_two_processes_read_what_one_reads(trainer: str, engine: str, tmp_path: Path) -> None:
    if trainer != "dpo" and engine == ELSEWHERE:
        pytest.skip(f"{engine} is tested on the other TRL line")
    out = tmp_path / engine
    if trainer in ("dpo", "grpo"):
        small(out)  # leaves a pack for the worker
    if trainer == "dpo":
        write_task(out.parent / "words.jsonl")
    launch(trainer, engine, out, **({"CAUSE": f"order@{PLACE}"} if trainer == "dpo" else {}))
    run = load_run(out)
    assert sorted(run.timeline().step.unique()) == [0, 2, 4]
    assert not [event for event in run.events if event["event"] == "failure"]
    assert run.info["world_size"] == 2
    assert verify_run(out).ok
    start, kind = (scorer(), LlamaForSequenceClassification) if trainer == "reward" else (causal_lm(), LlamaForCausalLM)
    check_readings(start, out, "01-step-000000", "start/")
    check_readings(kind.from_pretrained(out / "checkpoint-4"), out, "01-step-000004", "means/")
    if trainer == "grpo":
        check_claims(out, sampled=engine != "zero3")
    if trainer == "dpo":
        found = claims(load_run(out).timeline())
        assert found and found == pytest.approx(claims(measure(out / "checkpoint-4").timeline()), abs=1e-4)
        check_circuits(out, whole=engine != "zero3")
        check_causes(out, whole=engine != "zero3")


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_training_on_two_processes_is_unchanged(engine: str, tmp_path: Path) -> None:
    if engine == ELSEWHERE:
        pytest.skip(f"{engine} is tested on the other TRL line")
    write_task(tmp_path / "words.jsonl")
    losses = []
    for name, bare in (("bare", "1"), ("attached", "0")):
        launch("dpo", engine, tmp_path / name, BARE=bare)
        losses.append(json.loads((tmp_path / name / "losses.json").read_text()))
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_a_failure_on_one_rank_is_agreed_on_and_costs_no_training(tmp_path: Path) -> None:
    write_task(tmp_path / "words.jsonl")
    launch("dpo", "ddp", tmp_path / "out", FAIL_ON_RANK="1")
    run = load_run(tmp_path / "out")
    failures = [event for event in run.events if event["event"] == "failure"]
    assert [(failure["step"], failure["what"]) for failure in failures] == [(2, "a measurement"), (4, "circuits")]
    for failure, name in zip(failures, ("read_prompts", "find_wiring"), strict=True):
        assert f"rank 1: RuntimeError: planted in {name}" in failure["reason"]
    rows = run.timeline()
    assert sorted(rows.step.unique()) == [0, 4]
    assert set(rows[rows.metric.str.startswith("circuit/")].step) == {0}
    assert len(json.loads((tmp_path / "out" / "losses.json").read_text())) == 4
