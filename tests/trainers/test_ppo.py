"""PPO's own loop, which is not the ``Trainer``'s: it logs before a step ends, and saves on its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainers.table import trainers
from trainers.tiny_runs import build, interp_log, outside, small, steps_of, verify

from interp_rlhf import Snapshot, attach, load_run


@pytest.mark.trl_1_12
def test_ppo(tmp_path: Path) -> None:
    """PPO's own loop: snapshots beside checkpoints, a second run on the same object, and the way back."""
    if not trainers()["ppo"].available:
        pytest.skip("TRL has no PPO from 1.13 on")
    folder = tmp_path / "run"
    trainer = build("ppo", folder, max_steps=4, save_steps=3)
    before = outside(trainer)
    attach(trainer, small(folder)).detach()
    assert outside(trainer) == before
    handle = attach(trainer, small(folder))
    trainer.train()
    assert steps_of(handle) == [0, 3, 4] and sorted(interp_log(trainer)) == [3, 4]
    for step in (3, 4):
        copy = Snapshot.load(folder / f"checkpoint-{step}" / "interp")
        assert copy.step == step and copy.manifest["checkpoint"]["weights"].keys() == {"model.safetensors"}
    assert verify(folder) == 0
    trainer.train()
    run = load_run(folder)
    assert [(s.number, s.resumed_from) for s in run.segments] == [(1, None), (2, 0)]
    assert steps_of(handle) == [0, 3, 4] and set(run.timeline().segment) == {1, 2}
    assert verify(folder) == 0
    handle.detach()
    after = outside(trainer)  # but for its attributes, and hooks that transformers installs to return hidden states
    assert (after[0], after[2], after[4]) == (before[0], before[2], before[4])
    trainer.train()
    assert len(load_run(folder).segments) == 2
