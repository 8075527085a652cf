"""The demo finds the concept that its data rewards, and keeps what earlier runs left."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainers.table import has_ppo

from interp_rlhf import demo, load_run
from interp_rlhf.audit.verification import verify_run
from interp_rlhf.cli import main
from interp_rlhf.demo import DemoResult, run_demo
from interp_rlhf.errors import ConfigError
from interp_rlhf.organisms import Organism, build_organism, concepts
from interp_rlhf.report.controls import find_controls
from interp_rlhf.report.tables import summarise

pytestmark = pytest.mark.xdist_group("demo")  # one worker, so that it is built once
newest = pytest.mark.skipif(has_ppo(), reason="tested on the newest TRL line")
needs_ppo = pytest.mark.skipif(not has_ppo(), reason="this TRL has no PPO (1.12 is the last line that has it)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all runs, so that they share the organism."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def dpo(folder: Path) -> tuple[DemoResult, str]:
    console = io.StringIO()
    with contextlib.redirect_stdout(console):
        result = run_demo("dpo", folder / "dpo")
    return result, console.getvalue()


def test_the_rewarded_concept_drifts_most_and_its_behaviour_moved(dpo: tuple[DemoResult, str]):
    result, _ = dpo
    assert result.passed and result.rank == 1 and len(result.drifts) >= 24
    assert result.drift > 1.5 * result.best_decoy[1]
    assert result.after["agreement"] > 0.75 > 0.65 > result.before["agreement"] > 0.35
    decoys = [name for name in result.before if name != "agreement"]
    moved = [result.after[name] - result.before[name] for name in decoys]
    assert abs(sum(moved)) / len(moved) < 0.05
    assert result.admitted == result.asked  # every direction beats its bag of tokens


def test_rank_and_drift_are_the_timelines_own(folder: Path, dpo: tuple[DemoResult, str]):
    """Recomputed from the run on disk, row by row."""
    result, _ = dpo
    largest: dict[str, float] = {}
    for row in load_run(folder / "dpo").rows:
        if row["metric"] == "concept/drift" and row["step"] == 40 and row["readout"] != demo_pairs():
            largest[row["readout"]] = max(largest.get(row["readout"], 0.0), abs(row["value"]))
    assert dict(result.drifts) == largest
    assert max(largest, key=lambda name: largest[name]) == "agreement"


def demo_pairs() -> str:
    from interp_rlhf.plan import PREFERENCE

    return PREFERENCE


def test_the_console_ends_with_behaviour_rank_and_the_reports_path(dpo: tuple[DemoResult, str]):
    result, console = dpo
    lines = console.strip().splitlines()
    assert lines[-1] == str(result.report) and Path(lines[-1]).exists()
    assert f"number 1 of {len(concepts())} concepts" in console
    assert f"{result.before['agreement']:.0%} -> {result.after['agreement']:.0%}" in console
    assert "interp_rlhf: 5 measurements" in console  # the attached summary
    assert len(lines) < 60


def test_the_run_is_whole_and_its_snapshots_belong_to_its_checkpoints(folder: Path, dpo: tuple[DemoResult, str]):
    assert verify_run(folder / "dpo").ok
    assert {path.name for path in (folder / "dpo").glob("checkpoint-*")} == {"checkpoint-20", "checkpoint-40"}


@newest
def test_two_control_runs_say_what_may_be_claimed(folder: Path, dpo: tuple[DemoResult, str], capsys: Any):
    """The same training with half of the pairs swapped: the rewarded concept stays where it is."""
    demo._train_controls(build_organism(folder / "organism-0", 0), "dpo", folder / "dpo", 0, 40, 2)
    run = load_run(folder / "dpo")
    options = {"tolerance": 0.1, "confidence": 0.95}
    summary = summarise(run.timeline(), run.events, controls=find_controls(run), **options)
    assert (summary.controls.k, summary.controls.left_out) == (2, ()) and not summary.attributable
    (rewarded,) = (finding for finding in summary.findings if finding.readout == "agreement")
    assert rewarded.verdict == "specific" and rewarded.control is not None
    assert rewarded.control.statistic > 10 * max(rewarded.control.controls)
    assert rewarded.control.rank.p == pytest.approx(1 / 3) == rewarded.control.family.p
    specific = [finding.readout for finding in summary.specific]
    assert set(specific) <= {"agreement", demo_pairs()}
    for number in (1, 2):
        control = load_run(folder / "dpo" / "_controls" / f"{number:02d}")
        scrambled = summarise(control.timeline(), control.events, controls=find_controls(control), **options)
        (found,) = (finding for finding in scrambled.findings if finding.readout == "agreement")
        assert abs(found.value) < 1 and not scrambled.attributable
    words = "With 2 control runs (pairs swapped) the smallest possible p is 0.33; 19 are needed for 0.05"
    assert words in str(summary)
    capsys.readouterr()
    assert main(["report", str(folder / "dpo")]) == 0
    assert words in Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")


@newest
def test_grpo_runs_and_a_second_run_moves_the_first_aside(folder: Path, capsys: pytest.CaptureFixture[str]):
    first = run_demo("grpo", folder / "grpo", steps=2)
    kept = (folder / "grpo" / "interp" / "timeline.jsonl").read_bytes()
    organism = (folder / "organism-0" / "model" / "model.safetensors").stat().st_mtime_ns
    second = run_demo("grpo", folder / "grpo", steps=2)
    assert (folder / "grpo-1" / "interp" / "timeline.jsonl").read_bytes() == kept
    assert f"the earlier run in {folder / 'grpo'} is now in {folder / 'grpo-1'}" in capsys.readouterr().out
    assert (folder / "organism-0" / "model" / "model.safetensors").stat().st_mtime_ns == organism
    assert dict(first.drifts) == dict(second.drifts)  # the same seed, the same run
    assert first.report is not None and second.report is not None and second.report.exists()


@needs_ppo
def test_ppo_runs(folder: Path):
    result = run_demo("ppo", folder / "ppo", steps=2)
    assert len(result.drifts) >= 24 and result.steps == 2
    assert {row["step"] for row in load_run(folder / "ppo").rows} == {0, 1, 2}


def test_without_ppo_one_line_names_the_trl_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo", "--trainer", "ppo", "--out", str(tmp_path / "ppo")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "ppo needs TRL 1.12" in line
    assert not any(tmp_path.iterdir())


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"^out: .* exists and holds no run"):
        run_demo("dpo", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_wrong_trainer_and_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"^trainer: expected dpo, ppo, grpo, found 'sft'$"):
        run_demo("sft", tmp_path / "x")
    with pytest.raises(ConfigError, match=r"^seed: expected 0 or more, found -1$"):
        run_demo("dpo", tmp_path / "x", seed=-1)
    monkeypatch.setenv("INTERP_RLHF", "off")
    with pytest.raises(ConfigError, match=r"^demo: INTERP_RLHF=off"):
        run_demo("dpo", tmp_path / "x")


def test_complete_runs_are_the_demos(repository: Path):
    """``configs/*.yaml`` say for the recipes what the demo says in code."""
    organism = Organism(Path("demo/organism-0"), 0)
    for trainer, steps in demo.STEPS.items():
        run = yaml.safe_load((repository / "configs" / f"{trainer}.yaml").read_text(encoding="utf-8"))
        expected = demo._arguments(Path("runs") / trainer, 0, steps)
        shared = {"per_device_train_batch_size", "learning_rate", "logging_steps", "save_steps", "seed", "output_dir"}
        assert {key: run[key] for key in shared} == {key: expected[key] for key in shared}
        assert run.get("max_steps", run.get("total_episodes", 0) // 32) == steps
        measured = demo._measurements(organism, steps)
        measured.pop("on_error")
        assert run["interp"] == measured
        adapter = demo._lora()
        assert (run["lora_r"], run["lora_alpha"]) == (adapter.r, adapter.lora_alpha)
        assert set(run["lora_target_modules"]) == set(adapter.target_modules)
