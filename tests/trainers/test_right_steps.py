"""Rows reach every tracker on the right steps, and the trainer's own rows stay what they were."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers.comparing import own_log
from trainers.table import trainers

from interp_rlhf import attach

CONFIG = {
    "prompts": {"n": 16},
    "concepts": {"n_pairs": 32, "packs": []},
    "schedule": {"every": 3},
    "statistics": {"bootstrap": 100, "directions": 200},
    "on_error": "raise",
    "report": False,
}
STEPS = {"max_steps": 21, "logging_steps": 5, "save_strategy": "steps", "save_steps": 7}


def train(folder: Path, config: Any, **changes: Any) -> Any:
    torch.manual_seed(3)
    trainer = trainers()["dpo"].build(folder, **{**STEPS, **changes})
    handle = attach(trainer, config) if config else None
    trainer.train()
    return trainer, handle


def ours(history: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    rows = {row["step"]: {k: v for k, v in row.items() if k.startswith("interp/")} for row in history}
    return {step: row for step, row in rows.items() if row}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run that reports to all three trackers at once."""
    folder = tmp_path_factory.mktemp("tracked")
    patch = pytest.MonkeyPatch()
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("WANDB_DIR", str(folder))
    patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    changes = {"report_to": ["wandb", "tensorboard", "trackio"], "run_name": "steps", "project": "interp-test"}
    trainer, handle = train(folder / "out", CONFIG, **changes)
    import wandb

    if wandb.run is not None:
        wandb.finish()
    patch.undo()
    return {"trainer": trainer, "handle": handle, "folder": folder}


def test_measurements_fall_on_steps_that_log_and_saves_force_their_own(tracked: dict[str, Any]) -> None:
    assert sorted(ours(tracked["trainer"].state.log_history)) == [5, 10, 15, 20, 21]
    assert sorted(tracked["handle"].timeline().step.unique()) == [0, 5, 7, 10, 14, 15, 20, 21]
    snapshots = sorted(path.name for path in (tracked["folder"] / "out" / "interp" / "snapshots").iterdir())
    assert snapshots == [f"01-step-{step:06d}" for step in (0, 7, 14, 21)]


def test_logged_scalars_equal_timeline_rows(tracked: dict[str, Any]) -> None:
    from interp_rlhf.report.tables import headline, measurements

    timeline = tracked["handle"].timeline()
    for step, row in ours(tracked["trainer"].state.log_history).items():
        assert row == headline(measurements(timeline[timeline.step == step]), 50)
        assert 0 < len(row) <= 50 and all(type(value) is float and math.isfinite(value) for value in row.values())


def test_the_trainers_own_rows_are_unchanged(tracked: dict[str, Any], tmp_path: Path) -> None:
    bare, _ = train(tmp_path, None)

    assert own_log(bare) == own_log(tracked["trainer"])


def test_trainer_state_on_disk(tracked: dict[str, Any]) -> None:
    state = json.loads((tracked["folder"] / "out" / "checkpoint-21" / "trainer_state.json").read_text())
    assert sorted(ours(state["log_history"])) == [5, 10, 15, 20]  # 21 is logged after its checkpoint is saved
    for row in state["log_history"]:
        assert row == next(r for r in tracked["trainer"].state.log_history if r["step"] == row["step"])


def test_tensorboard_holds_the_same_rows(tracked: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = tracked["folder"].rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent), size_guidance={"scalars": 0})
    events.Reload()
    for step, row in ours(tracked["trainer"].state.log_history).items():
        for key, value in row.items():
            (found,) = [e.value for e in events.Scalars(f"train/{key}") if e.step == step]
            assert found == pytest.approx(value, rel=1e-5, abs=1e-7)
    logged = {
        e.step for tag in events.Tags()["scalars"] if tag.startswith("train/interp/") for e in events.Scalars(tag)
    }
    assert logged == {5, 10, 15, 20, 21}


def test_wandb_offline_run_holds_the_same_rows(tracked: dict[str, Any]) -> None:
    rows = wandb_history(tracked["folder"])
    found = {row["train/global_step"]: row for row in rows if any(k.startswith("train/interp/") for k in row)}
    expected = ours(tracked["trainer"].state.log_history)
    assert sorted(found) == sorted(expected)
    for step, row in expected.items():
        assert {k: found[step][f"train/{k}"] for k in row} == pytest.approx(row)


def test_trackio_holds_the_same_rows(tracked: dict[str, Any]) -> None:
    import sqlite3

    from trackio.utils import TRACKIO_DIR

    (database,) = TRACKIO_DIR.rglob("interp-test*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(metrics) for (metrics,) in connection.execute("SELECT metrics FROM metrics")]
    found = {row["train/global_step"]: row for row in rows if any(k.startswith("train/interp/") for k in row)}
    expected = ours(tracked["trainer"].state.log_history)
    assert sorted(found) == sorted(expected)
    for step, row in expected.items():
        assert {k: found[step][f"train/{k}"] for k in row} == pytest.approx(row)


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """History rows of the one offline run under ``folder``, read from W&B's own transaction log."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.rglob("run-*.wandb")
    rows = []
    for payload in leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            )
    return rows


def leveldb_records(body: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log (github.com/google/leveldb, doc/log_format.md) after W&B's 7-byte file header.

    Blocks of 32 KiB (the first one shortened by that header) hold chunks: CRC (4 bytes), length (2), type (1), payload;
    types 1 whole, 2 first, 3 middle, 4 last.
    """
    place, record = 0, b""
    while place + 7 <= len(body):
        left = 32768 - (place + 7) % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", body, place)
        record += body[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
