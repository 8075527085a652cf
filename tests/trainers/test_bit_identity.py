"""Attached with nothing that acts, training is bit-identical: weights, every logged number, all random states.

One table of trainers, five settings. Dropout is on, every hookpoint of every layer is read, three or more measurements
fall into the run and one of them comes right after an evaluation.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainers.comparing import assert_same, run
from trainers.table import trainers

EVERYTHING = (
    "embed",
    *(f"layers.{i}.{site}" for i in range(3) for site in ("resid_post", "attn_out", "mlp_out", "heads")),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"use_lora": True},
    "accumulation": {"gradient_accumulation_steps": 4},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", trainers())
def test_training_is_bit_identical(name: str, setting: str, tmp_path: Path) -> None:
    entry = trainers()[name]
    if not entry.available:
        pytest.skip("TRL has no PPO from 1.13 on")
    config = {
        "hookpoints": list(EVERYTHING),
        "prompts": {"n": 16, "batch_size": 5},
        "concepts": {"n_pairs": 32, "packs": ["sycophancy", "refusal"]},
        "schedule": {"every": 2},
        "statistics": {"bootstrap": 100, "directions": 200},
        "on_error": "raise",
        "report": False,
    }
    bare = run(entry, tmp_path / "bare", SETTINGS[setting], None)
    attached = run(entry, tmp_path / "attached", SETTINGS[setting], config)
    assert_same(bare, attached)
    measured = attached["handle"].timeline().step.unique().tolist()
    assert len([step for step in measured if step > 0]) >= 3, measured
    assert len(attached["interp"]) >= 3
    first = bare["log"][0].get("loss", bare["log"][0].get("loss/policy_avg"))
    assert first is not None and np.isfinite(first)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """A measurement that drew one random number would be found."""
    entry = trainers()["dpo"]
    bare = run(entry, tmp_path / "bare", {}, None)
    torch_before = torch.get_rng_state

    def one_draw_more(folder: Path) -> dict[str, Any]:
        from transformers import TrainerCallback

        class Draws(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                torch.rand(1)

        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        trainer = entry.build(folder, eval_strategy="steps", eval_steps=2)
        trainer.add_callback(Draws())
        trainer.train()
        return {**bare, "weights": trainer.model.state_dict(), "random": (*bare["random"][:2], torch_before())}

    with pytest.raises(AssertionError):
        assert_same(bare, one_draw_more(tmp_path / "draws"))


@pytest.mark.parametrize("name", trainers())
def test_the_shipped_preset_unchanged(name: str, tmp_path: Path, repository: Path) -> None:
    entry = trainers()[name]
    if not entry.available:
        pytest.skip("TRL has no PPO from 1.13 on")
    bare = run(entry, tmp_path / "bare", {}, None)
    assert_same(bare, run(entry, tmp_path / "attached", {}, repository / "configs" / "interp" / "observe.yaml"))
