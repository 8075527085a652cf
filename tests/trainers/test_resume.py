"""A resumed run goes on as if it had never stopped: drift from the true start, nothing measured twice, verifiable."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from trainers.comparing import random_states
from trainers.tiny_runs import (
    StopAt,
    assert_rows_equal,
    assert_same_training,
    live,
    small,
    train,
    verify,
)

from interp_rlhf import FormatError, MeasurementError, Snapshot, load_run
from interp_rlhf.activations.reference import Reference

#: Trainer, how it is built, what its config adds.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dpo": ("dpo", {}, {"reference": "ref_model"}),
    "dpo lora": ("dpo", {"use_lora": True, "learning_rate": 1e-2}, {"reference": "adapter"}),
    "sft": ("sft", {}, {}),
    "grpo": ("grpo", {}, {}),
}


pytestmark = pytest.mark.xdist_group("resume")  # one worker, so that it is built once


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Per case: an uninterrupted run, and one that was stopped at step 4 (tests copy its folder)."""
    found = {}
    for case, (name, changes, settings) in CASES.items():
        folder = tmp_path_factory.mktemp(case.replace(" ", "-"))
        config = small(folder / "whole", **settings)
        _, handle = train(name, folder / "whole", config, **changes)
        train(name, folder / "stopped", config, callbacks=[StopAt(4)], **changes)
        found[case] = {"folder": folder / "stopped", "config": config, "whole": live(handle.timeline())}
    return found


@pytest.fixture
def stopped(runs: dict[str, dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """A fresh copy of the DPO run that was stopped at step 4."""
    shutil.copytree(runs["dpo"]["folder"], tmp_path / "run")
    return {**runs["dpo"], "folder": tmp_path / "run"}


def notes(folder: Path) -> list[str]:
    return [event["text"] for event in load_run(folder).events if event["event"] == "note"]


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_goes_on_where_it_stopped(
    case: str, runs: dict[str, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (name, changes, _), run = CASES[case], runs[case]
    for copy in ("bare", "attached"):
        shutil.copytree(run["folder"], tmp_path / copy)
    before = load_run(tmp_path / "attached").timeline()
    assert sorted(before.step.unique()) == [0, 2, 3, 4]

    bare, _ = train(name, tmp_path / "bare", None, resume=tmp_path / "bare" / "checkpoint-4", **changes)
    states = random_states()
    with caplog.at_level(logging.WARNING, "interp_rlhf"):
        attached, handle = train(
            name, tmp_path / "attached", run["config"], resume=tmp_path / "attached" / "checkpoint-4", **changes
        )
    assert_same_training(bare, attached)
    assert states == random_states()
    assert not caplog.messages and not notes(tmp_path / "attached")  # nothing differs, so nothing is said

    stored = load_run(tmp_path / "attached")
    assert [(s.number, s.resumed_from, s.parent) for s in stored.segments] == [(1, None, None), (2, 4, 1)]
    timeline = handle.timeline()
    assert sorted(timeline[timeline.segment == 2].step.unique()) == [6, 8], "step 0 was not measured again"
    key = ["metric", "readout", "hookpoint", "step", "reader"]
    assert not timeline.superseded.any() and not timeline.duplicated(key).any()
    assert timeline[timeline.segment == 1].equals(before), "nothing of the first segment was touched"
    assert {"concept/drift", "concept/auc", "concept/behaviour_change"} <= set(timeline.metric)
    assert_rows_equal(live(timeline), run["whole"])
    assert [snapshot.name for snapshot in stored.snapshots][-3:] == [
        "01-step-000004", "02-step-000006", "02-step-000008",
    ]  # fmt: skip
    assert stored.snapshots[-2].parent == "01-step-000004"
    assert verify(tmp_path / "attached") == 0


def test_going_back_leaves_the_abandoned_steps_behind(stopped: dict[str, Any]) -> None:
    """Resumed at step 2 of a run that went on to 4: rows after 2 are superseded, everything else is one line."""
    folder = stopped["folder"]
    _, handle = train("dpo", folder, stopped["config"], resume=folder / "checkpoint-2")
    timeline = handle.timeline()
    assert sorted(timeline[timeline.superseded].step.unique()) == [3, 4]
    assert_rows_equal(live(timeline), stopped["whole"])
    snapshots = {snapshot.name: snapshot.parent for snapshot in load_run(folder).snapshots}
    assert snapshots["02-step-000004"] == "01-step-000002", "the chain forks at the checkpoint that was resumed"
    assert Snapshot.load(folder / "checkpoint-4" / "interp").name == "02-step-000004"
    assert verify(folder) == 0


def test_killed_between_the_save_and_its_measurement(stopped: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint of step 4 is there and nothing of ours about it: no rows, no snapshot, a torn last line."""
    folder = stopped["folder"]
    shutil.rmtree(folder)

    class Killed(Exception):
        pass

    def dies(self: Any, step: int, checkpoint: Path | None) -> None:
        if step == 4:
            raise Killed
        return original(self, step, checkpoint)

    from interp_rlhf.session import Session

    original = Session.keep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "keep", dies)
        with pytest.raises(Killed):
            train("dpo", folder, stopped["config"])
    with open(folder / "interp" / "timeline.jsonl", "ab") as file:
        file.write(b'{"segment":1,"step":4,"metr')
    assert (folder / "checkpoint-4" / "model.safetensors").exists()
    assert not (folder / "checkpoint-4" / "interp").exists()

    with caplog.at_level(logging.WARNING, "interp_rlhf"):
        _, handle = train("dpo", folder, stopped["config"], resume=folder / "checkpoint-4")
    text = "resumed from step 4: no snapshot beside that checkpoint, taken to be the newest run's"
    assert text in caplog.messages and text in notes(folder)
    rows, whole = live(handle.timeline()), stopped["whole"]
    assert set(rows.index.get_level_values("step")) == {0, 2, 3, 6, 8}
    assert_rows_equal(rows, whole[whole.index.get_level_values("step") != 4])
    assert verify(folder) == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"schedule": {"every": 2}}, ["config.schedule.every: 3 → 2"]),
        ({"representation": False}, ["config.representation: true → false"]),
        (
            {"hookpoints": ["layers.1.resid_post"]},
            [
                'config.hookpoints: ["layers.1.resid_post", "layers.2.resid_post"] → ["layers.1.resid_post"]',
                'hookpoints: ["layers.1.resid_post", "layers.2.resid_post"] → ["layers.1.resid_post"]',
            ],
        ),
    ],
)
def test_other_settings_are_named(
    changes: dict[str, Any], named: list[str], stopped: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = stopped["folder"]
    with caplog.at_level(logging.WARNING, "interp_rlhf"):
        train("dpo", folder, {**stopped["config"], **changes}, resume=folder / "checkpoint-4")
    text = f"resumed with other settings than the run was started with: {'; '.join(named)}"
    assert notes(folder) == [text] and text in caplog.messages
    assert verify(folder) == 0


def test_texts_that_step_0_never_read(
    runs: dict[str, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another seed draws other texts: there is nothing to compare with, and that is said, not papered over."""
    for folder in (tmp_path / "raised", tmp_path / "warned"):
        shutil.copytree(runs["sft"]["folder"], folder)
    config = {**runs["sft"]["config"], "seed": 5}
    with pytest.raises(FormatError, match="texts of this run found; resume with the interp config"):
        train("sft", tmp_path / "raised", config, resume=tmp_path / "raised" / "checkpoint-4")

    caplog.clear()
    with caplog.at_level(logging.WARNING, "interp_rlhf"):
        trainer, handle = train("sft", folder, {**config, "on_error": "warn"}, resume=folder / "checkpoint-4")
    assert trainer.state.global_step == 8
    (said,) = notes(folder)
    assert "config.seed: 0 → 5" in said and "prompts.sha256" in said and said in caplog.messages
    assert len(said.splitlines()) == 1 and len(said) < 400
    assert set(live(handle.timeline()).index.get_level_values("step")) == {0, 2, 3, 4}
    assert any(m.what == "the baseline" and "texts of this run" in m.reason for m in handle.summary().not_measured)
    assert verify(tmp_path / "raised") == verify(folder) == 0


def test_resuming_a_run_that_was_never_attached(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Drift is counted from the resumed step, which is said; resuming once more goes by that same start."""
    folder = tmp_path / "run"
    train("sft", folder, None, callbacks=[StopAt(2)])
    config = small(folder, snapshots={"keep": 1})
    with caplog.at_level(logging.WARNING, "interp_rlhf"):
        _, handle = train("sft", folder, config, resume=folder / "checkpoint-2", callbacks=[StopAt(6)])
    assert "resumed at step 2 without readings of step 0: drift is counted from here" in caplog.messages
    assert any("the start is unknown here" in text for text in notes(folder))
    first = live(handle.timeline())
    assert set(first.index.get_level_values("step")) == {2, 3, 4, 6}
    start = first.xs(2, level="step")
    drift = start.loc["concept/drift"]
    assert (drift.null_kind == "numeric").all() and drift.value.abs().max() < 1e-4
    assert start.loc["representation/cka"].value.min() > 1 - 1e-4
    assert first.xs(6, level="step").loc["representation/cka"].value.max() < 0.999
    assert {finding.readout for finding in (*handle.summary().moved, *handle.summary().not_detected)} == {"order"}

    caplog.clear()
    with caplog.at_level(logging.WARNING, "interp_rlhf"):
        _, handle = train("sft", folder, config, resume=folder / "checkpoint-6")
    assert not caplog.messages
    assert set(live(handle.timeline()).index.get_level_values("step")) == {2, 3, 4, 6, 8}

    once = folder.parent / "once"  # the same in one go
    train("sft", once, None, callbacks=[StopAt(2)])
    _, at_once = train("sft", once, config, resume=once / "checkpoint-2")
    rows = live(handle.timeline())
    assert_rows_equal(rows, live(at_once.timeline()).loc[rows.index])
    kept = [path.parent.name for path in sorted(folder.glob("interp/snapshots/*/tensors.safetensors"))]
    assert kept == ["01-step-000002", "02-step-000008"], "the start is kept whatever its step"
    assert verify(folder) == 0 and verify(once) == 0


def test_a_foreign_checkpoint_in_the_same_place_is_noticed(
    stopped: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = stopped["folder"]
    path = folder / "checkpoint-4" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, path, metadata={"format": "pt"})
    assert verify(folder) == 1
    with caplog.at_level(logging.WARNING, "interp_rlhf"):
        train("dpo", folder, stopped["config"], resume=folder / "checkpoint-4")
    text = "resumed from step 4: the weights of checkpoint-4 are not those of its snapshot"
    assert text in notes(folder) and text in caplog.messages


def test_a_copy_as_reference_does_not_outlive_its_process(
    stopped: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A copy of the resumed weights would not be the start: the stored readings are gone by, and that is said."""
    folder = stopped["folder"]
    shutil.rmtree(folder)
    config = {**stopped["config"], "reference": "copy"}
    train("dpo", folder, config, callbacks=[StopAt(4)])
    with caplog.at_level(logging.WARNING, "interp_rlhf"):
        _, handle = train("dpo", folder, config, resume=folder / "checkpoint-4")
    assert [m for m in caplog.messages if "reference: copy" in m]
    assert handle.callback._run.reference == Reference("cached")
    assert_rows_equal(live(handle.timeline()), stopped["whole"])


@pytest.mark.parametrize(("batch", "done"), [(2, [4, 5]), (12, [4])], ids=["within an epoch", "at its end"])
def test_no_step_left(batch: int, done: list[int], tmp_path: Path) -> None:
    """Resumed at its last step: within an epoch transformers still does one more, at an epoch's end none."""
    folder, length = tmp_path / "run", {"max_steps": 4, "per_device_train_batch_size": batch}
    train("dpo", folder, small(folder), **length)
    trainer, handle = train("dpo", folder, small(folder), resume=folder / "checkpoint-4", **length)
    assert trainer.state.global_step == done[-1]
    assert sorted(set(live(handle.timeline()).index.get_level_values("step"))) == [0, 2, 3, *done]
    assert [s.step for s in load_run(folder).snapshots] == [0, 2, *done]
    assert verify(folder) == 0


def test_the_state_that_is_saved_is_the_trainers_own(stopped: dict[str, Any], tmp_path: Path) -> None:
    """Nothing of ours is in a checkpoint besides our folder: it resumes without us, on a machine without us."""
    train("dpo", tmp_path / "bare", None, callbacks=[StopAt(4)])
    for step in (2, 4):
        ours, bare = stopped["folder"] / f"checkpoint-{step}", tmp_path / "bare" / f"checkpoint-{step}"
        assert {p.name for p in ours.iterdir()} - {"interp"} == {p.name for p in bare.iterdir()}
        states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (ours, bare)]
        assert states[0]["stateful_callbacks"] == states[1]["stateful_callbacks"]
        for name in ("scheduler.pt", "rng_state.pth", "optimizer.pt"):
            assert (ours / name).read_bytes() == (bare / name).read_bytes(), name
        assert (ours / "model.safetensors").read_bytes() == (bare / "model.safetensors").read_bytes()


def test_a_baseline_that_failed_is_taken_at_the_resumed_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 0 could not be read: nothing is compared with, until a resumed run finds a start of its own."""
    from interp_rlhf import session

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise MeasurementError("no reading today")

    folder = tmp_path / "run"
    config = small(folder, on_error="warn")
    with monkeypatch.context() as patch:
        patch.setattr(session, "read_table", fails)
        _, handle = train("sft", folder, config, callbacks=[StopAt(4)])
    assert handle.timeline().empty and verify(folder) == 0
    assert {m.what for m in handle.summary().not_measured} >= {"the baseline", "a measurement"}

    with caplog.at_level(logging.WARNING, "interp_rlhf"):
        _, handle = train("sft", folder, config, resume=folder / "checkpoint-4")
    assert "resumed at step 4 without readings of step 0: drift is counted from here" in caplog.messages
    assert set(live(handle.timeline()).index.get_level_values("step")) == {4, 6, 8}
    assert verify(folder) == 0
