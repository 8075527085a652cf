"""A checkpoint measured after the fact says what the live run said, or what is known to be true of it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainers.table import causal_lm, preferences, saved_model, tokenizer
from trainers.tiny_runs import assert_rows_equal, live, small, train, verify
from transformers import GPT2Config, GPT2LMHeadModel

from interp_rlhf import Direction, load_run
from interp_rlhf.audit.store import RunStore
from interp_rlhf.audit.timeline import to_frame
from interp_rlhf.checkpoints import load_checkpoint
from interp_rlhf.errors import ConfigError, FormatError, PromptError
from interp_rlhf.offline import Measured, measure, measure_command
from interp_rlhf.report.html import write_report

QUICK: dict[str, Any] = {
    "hookpoints": ["layers.1.resid_post", "layers.2.resid_post"],
    "prompts": {"n": 16},
    "concepts": {"n_pairs": 32, "packs": [], "bank": False},
    "probes": {"enabled": False},
    "statistics": {"bootstrap": 100, "directions": 200},
}
PLANTED = "planted"


def attached_run(name: str, folder: Path, *, control: int | None = None, **changes: Any) -> Any:
    """A finished run of four steps with checkpoints at 2 and 4."""
    settings = small(folder, probes={"enabled": False}, control=control)
    settings["concepts"]["bank"] = False
    _, handle = train(name, folder, settings, max_steps=4, **changes)
    return handle


pytestmark = pytest.mark.xdist_group("offline")  # one worker, so that it is built once


@pytest.fixture(scope="module")
def dpo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo") / "out"
    attached_run("dpo", folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in preferences(48)) + "\n\n")
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A base model, the same with 0.25·v added by a bias after layer 1, and the settings that read v there."""
    folder = tmp_path_factory.mktemp("planted")
    torch.manual_seed(0)
    words = len(tokenizer())
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=words, n_embd=32, n_layer=3, n_head=4, n_positions=64, pad_token_id=0)
    )
    direction = Direction(PLANTED, "layers.1.resid_post", torch.randn(32))
    direction.save(folder / "planted.safetensors")
    for name, shift in (("base", 0.0), ("tuned", 0.25)):
        with torch.no_grad():
            model.transformer.h[1].mlp.c_proj.bias += shift * direction.vector
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    concepts = {"pairs": False, "packs": [], "bank": False, "directions": [str(folder / "planted.safetensors")]}
    return folder / "base", folder / "tuned", {**QUICK, "concepts": concepts}


def frame(found: Measured) -> Any:
    return live(to_frame([row.as_row() | {"superseded": False} for row in found.rows]))


def live_rows(folder: Path, step: int) -> Any:
    rows = live(load_run(folder).timeline())
    return rows[rows.index.get_level_values("step") == step]


@pytest.mark.parametrize("step", [2, 4])
def test_rows_equal_those_of_the_live_run(dpo_run: Path, step: int) -> None:
    found = measure(dpo_run / f"checkpoint-{step}")
    assert found.step == step and found.run is None and {row.segment for row in found.rows} == {1}
    expected = live_rows(dpo_run, step)
    assert len(expected) > 10 and (expected.loc["concept/drift"].value.abs() > 1e-4).all()
    assert_rows_equal(frame(found), expected)
    text = [column for column in expected if column not in ("value", "ci_low", "ci_high", "null_low", "null_high", "p")]
    assert frame(found)[text].equals(expected[text])
    assert str(found.summary()) and found.summary().step == step


@pytest.mark.parametrize(("name", "lora"), [("dpo", True), ("sft", False)])
def test_rows_equal_those_of_adapters_and_of_fine_tuning(tmp_path: Path, name: str, lora: bool) -> None:
    attached_run(name, tmp_path / "out", use_lora=lora)
    assert_rows_equal(frame(measure(tmp_path / "out" / "checkpoint-4")), live_rows(tmp_path / "out", 4))


@pytest.mark.parametrize(("name", "lora"), [("grpo", True), ("dpo", True), ("dpo", False)])
def test_everything_a_live_run_measures(tmp_path: Path, name: str, lora: bool) -> None:
    """Probes, every null and, with the adapter off as θ_0, sampled completions: the same rows of both readers."""
    folder = tmp_path / "out"
    settings = small(folder, rollouts={"enabled": True, "prompts": 8, "max_new_tokens": 5})
    train(name, folder, settings, max_steps=2, use_lora=lora)
    found = to_frame([row.as_row() | {"superseded": False} for row in measure(folder / "checkpoint-2").rows])
    rows = load_run(folder).timeline()
    expected = rows[(rows.step == 2) & ~rows.metric.str.startswith("cost")]
    key, numbers = ["metric", "readout", "hookpoint", "text", "reader"], ["value", "ci_low", "ci_high", "p"]
    found, expected = (table.set_index(key).sort_index() for table in (found, expected))
    if not lora:  # a fully trained checkpoint does not hold what it started from
        apart = expected.index.get_level_values("metric").isin(
            ["shift/text", "shift/representation", "shift/interaction"]
        )
        assert apart.any()
        expected = expected[~apart]
    assert {"shift/total", "probe/auc", "concept/drift_t"} <= set(found.index.get_level_values("metric"))
    assert list(found.index) == list(expected.index)
    assert np.allclose(found[numbers].astype(float), expected[numbers].astype(float), atol=1e-6, equal_nan=True)


def test_a_step_that_is_not_the_checkpoints_is_refused(dpo_run: Path) -> None:
    with pytest.raises(ConfigError, match="step: expected 2, which the checkpoint tells of itself, found 4"):
        measure(dpo_run / "checkpoint-2", step=4)


def test_a_checkpoint_elsewhere_is_measured_against_a_named_run(dpo_run: Path, tmp_path: Path) -> None:
    shutil.copytree(dpo_run / "checkpoint-2", tmp_path / "moved")
    found = measure(tmp_path / "moved", run=dpo_run, out=tmp_path / "written")
    assert_rows_equal(frame(found), live_rows(dpo_run, 2))
    again = measure(tmp_path / "moved", run=tmp_path / "written")  # what was written can be measured against
    assert_rows_equal(frame(again), live_rows(dpo_run, 2))
    assert verify(tmp_path / "written") == 0


def test_without_the_plan_it_is_said_what_to_give(dpo_run: Path, tmp_path: Path) -> None:
    shutil.copytree(dpo_run, tmp_path / "downloaded")
    shutil.rmtree(tmp_path / "downloaded" / "_interp")
    with pytest.raises(ConfigError, match=r"01-plan\.jsonl: not there .* give base and data"):
        measure(tmp_path / "downloaded" / "checkpoint-2")


def test_a_changed_plan_is_refused(dpo_run: Path, tmp_path: Path) -> None:
    shutil.copytree(dpo_run, tmp_path / "changed")
    path = tmp_path / "changed" / "_interp" / "01-plan.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    next(line for line in lines if line.get("field") == "max_length")["value"] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(FormatError, match=r"01-plan\.jsonl: found other bytes than the timeline tells of"):
        measure(tmp_path / "changed" / "checkpoint-2")


def test_a_runs_checkpoint_is_read_in_the_precision_it_was_saved_in(
    dpo_run: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def spy(path: Path, **options: Any) -> Any:
        asked.append(options.get("dtype", torch.float32))
        return load_checkpoint(path, **options)

    monkeypatch.setattr("interp_rlhf.starts.load_checkpoint", spy)
    measure(dpo_run / "checkpoint-2")
    measure(saved_model(3), base=saved_model(0), config=QUICK, data=pairs)
    assert asked == ["auto", torch.float32, torch.float32]


def test_a_planted_shift_is_found_in_a_checkpoint_that_was_never_attached(
    planted: tuple[Path, Path, dict[str, Any]], pairs: Path, tmp_path: Path
) -> None:
    base, tuned, settings = planted
    found = measure(tuned, base=base, config=settings, data=pairs, out=tmp_path / "out")
    start, hookpoint = found.start, "layers.1.resid_post"
    x0 = start.baseline.x0[hookpoint].double().numpy()
    v = Direction.load(settings["concepts"]["directions"][0]).vector.double().numpy()
    row = frame(found).loc[("concept/drift", PLANTED, hookpoint, 1)]
    assert row.value == pytest.approx(0.25 / (x0 @ v).std(ddof=1), abs=1e-4)
    assert row.ci_high - row.ci_low < 1e-4 and row.n == 16 and row.null_kind == "directions"
    assert [finding.readout for finding in found.summary().moved] == [PLANTED]


def test_what_is_written_is_a_run(planted: tuple[Path, Path, dict[str, Any]], pairs: Path, tmp_path: Path) -> None:
    base, tuned, settings = planted
    text = measure_command(tuned, base=base, config=settings, data=pairs, out=tmp_path / "out", step=7)
    assert text.startswith("tuned (step 7) against base (step 0)") and PLANTED in text
    run = load_run(tmp_path / "out")
    assert [snapshot.step for snapshot in run.snapshots] == [0, 7]
    assert run.info["trainer"] is None and run.info["measured"]["base"] == "base"
    assert run.info["measured"]["checkpoint"] == "tuned" and run.info["prompts"]["name"] == "pairs.jsonl"
    assert str(tmp_path) not in (run.path / "run.json").read_text()
    assert verify(tmp_path / "out") == 0
    assert write_report(run, tmp_path / "report.html").stat().st_size > 1000
    assert {"cost/seconds", "cost/tokens"} < set(run.timeline().metric) and "cost_fraction" not in set(
        run.timeline().metric
    )
    assert_rows_equal(frame(measure(tuned, run=tmp_path / "out", step=7)), live_rows(tmp_path / "out", 7))
    with pytest.raises(ConfigError, match="holds interp/ already"):
        measure(tuned, base=base, config=settings, data=pairs, out=tmp_path / "out")


def test_preference_pairs_of_the_file_give_a_concept(pairs: Path) -> None:
    found = measure(saved_model(0), base=saved_model(0), config=QUICK, data=pairs)
    start = found.start
    assert start.plan.concepts[0].name == "chosen_minus_rejected" and start.plan.audit.name == "pairs.jsonl"
    values, hookpoint = frame(found).value, "layers.1.resid_post"
    assert not torch.equal(start.first.means[hookpoint], start.again.means[hookpoint])  # read in another order
    assert torch.allclose(start.first.means[hookpoint], start.again.means[hookpoint], atol=1e-5)
    assert np.allclose(values.loc["representation/cosine"], 1, rtol=0, atol=1e-6) and found.step == 1
    assert not found.summary().moved


def test_random_states_are_as_before(pairs: Path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    measure(saved_model(3), base=saved_model(0), config=QUICK, data=pairs)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_another_tokenizer_is_refused(pairs: Path, dpo_run: Path, tmp_path: Path) -> None:
    causal_lm().save_pretrained(tmp_path)
    other = tokenizer()
    other.add_tokens(["unheard"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer: found [0-9a-f]{12}…, expected [0-9a-f]{12}…, that of "):
        measure(tmp_path, base=saved_model(0), config=QUICK, data=pairs)
    with pytest.raises(ConfigError, match="that of out; under another tokenizer"):
        measure(tmp_path, run=dpo_run, step=4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ConfigError, "lies in no attached run, expected run .* or base and data"),
        ({"base": "BASE"}, ConfigError, "data: expected JSON lines of prompts or pairs"),
        ({"base": "BASE", "data": "/nowhere.jsonl"}, PromptError, "/nowhere.jsonl: cannot be read"),
        ({"base": "/nowhere/x", "data": "PAIRS"}, ConfigError, "/nowhere/x: no such folder"),
        ({"run": "/nowhere"}, FormatError, "/nowhere: found no run"),
        ({"run": "RUN"}, ConfigError, "neither trainer_state.json nor its name tells the step"),
        ({"run": "RUN", "step": 0}, ConfigError, "step 0: expected one after the start's, 0"),
        ({"run": "RUN", "data": "PAIRS"}, ConfigError, "brings its own settings and texts"),
    ],
)
def test_what_is_missing_is_named(
    options: dict[str, Any], error: type[Exception], message: str, pairs: Path, dpo_run: Path
) -> None:
    places = {"BASE": saved_model(0), "PAIRS": pairs, "RUN": dpo_run}
    with pytest.raises(error, match=message):
        measure(saved_model(0), **{key: places.get(value, value) for key, value in options.items()})


@pytest.mark.parametrize(
    ("content", "message"),
    [("\n", "found an empty file"), ("{}\n{", "line 2: not valid JSON"), ("[1]", "line 1: expected an object")],
)
def test_data_that_cannot_be_read_is_named_with_its_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(PromptError, match=f"data.jsonl.*{message}"):
        measure(saved_model(0), base=saved_model(0), config=QUICK, data=path)


def test_a_run_without_a_snapshot_of_its_start_cannot_be_compared_with(dpo_run: Path, tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.start(load_run(dpo_run).info, resumed_from=None)
    with pytest.raises(FormatError, match="no snapshot of the start"):
        measure(dpo_run / "checkpoint-2", run=tmp_path)
