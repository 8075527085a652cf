"""A real model's circuits before and after DPO on real preferences: a task it can do, a control task, control runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from interp_rlhf import load_run
from interp_rlhf.circuits.tasks import resolve_task
from interp_rlhf.cli import main
from interp_rlhf.config import InterpConfig
from interp_rlhf.report.circuits import mechanisms_of
from scripts.real_circuits import dpo, write_tasks

pytestmark = pytest.mark.slow


def test_the_tasks_are_of_one_token_and_balanced(stories: Path, tmp_path: Path) -> None:
    paths = write_tasks(tmp_path, AutoTokenizer.from_pretrained(stories))
    for path in paths.values():
        pairs = [json.loads(line) for line in Path(path).read_text().splitlines()]
        assert len(pairs) == 64 and all(len(pair["clean"]) == len(pair["corrupt"]) for pair in pairs)
        assert all(len(pair["answers"]) == len(pair["wrong"]) == 1 for pair in pairs)
        assert len({pair["answers"][0] for pair in pairs}) == 2, "no constant answer is right"


def test_the_settings_to_start_from_have_tasks_for_a_real_tokenizer(stories: Path, repository: Path) -> None:
    wanted = InterpConfig.from_yaml(repository / "configs/interp/circuits.yaml").circuits
    for name in (*wanted.tasks, wanted.control):
        assert len(resolve_task(name, AutoTokenizer.from_pretrained(stories), n=wanted.pairs, seed=0).pairs) == 64


def test_dpo_on_real_preferences_and_two_control_runs(
    stories: Path, real_pairs: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a rate that strains it the mechanism is the same, edges change in control runs as much as in the real one."""
    folder, found, handles = tmp_path / "run", [], []
    for control in (None, 1, 2):
        handle = dpo(folder, stories, real_pairs, control=control, lr=1e-2, steps=15)
        where = folder if control is None else folder / "_controls" / f"{control:02d}"
        run = load_run(where)
        (mechanism,) = mechanisms_of(run.timeline())
        check_start(mechanism)
        check_end(mechanism, run.events, str(handle.summary()))
        found.append(mechanism)
        handles.append(handle)
    changes = [mechanism.now["circuit/structure_change"] for mechanism in found]
    assert all(change.ci_low > 0 for change in changes), "structure changed, also without the preferences"
    starts = [{m: row.value for m, row in mechanism.start.items() if "seconds" not in m} for mechanism in found]
    assert starts[0] == starts[1] == starts[2]
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")
    assert "pronoun" in page and found[0].word in page
    said = "With scrambled preferences: same 2."
    assert said in page and said in str(handles[0].summary()) and said not in str(handles[1].summary())


def check_start(mechanism: Any) -> None:
    """The model can do it, by a circuit that another task's is no substitute for."""
    rows = {name.removeprefix("circuit/"): row for name, row in mechanism.start.items()}
    assert mechanism.task == "pronoun" and mechanism.start_step == 0
    assert rows["metric"].ci_low > 2 and rows["metric_corrupt"].ci_high < -2
    assert rows["faithfulness_index"].ci_low > 0.7 > rows["faithfulness_index"].null_high
    assert rows["faithfulness_control"].ci_high < 0.5
    assert rows["structure_change"].value == 0


def check_end(mechanism: Any, events: list[dict[str, Any]], summary: str) -> None:
    """The word is the one that its numbers make, and is told with them; an alarm only where it is one."""
    value = {name.removeprefix("circuit/"): row.value for name, row in mechanism.now.items()}
    assert mechanism.step == 15 and value["effect_ratio"] > 0.2
    high = 0.8 * mechanism.start["circuit/faithfulness_index"].value
    assert mechanism.word == "same" and value["faithfulness_index"] >= high
    alarms = [event for event in events if event["event"] == "alarm"]
    assert not alarms and not mechanism.alarm
    assert not [event for event in events if event["event"] == "failure"]
    assert f"pronoun: same. {mechanism.why}" in summary and f"{value['faithfulness_index']:.2f}" in mechanism.why
    drawn = [event for event in events if event["event"] == "circuit"]
    assert [event["step"] for event in drawn] == [0, 15]
