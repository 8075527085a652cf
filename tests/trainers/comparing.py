"""One training with and without us, and the comparison of the two: weights, every logged number, all random states."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interp_rlhf import attach

#: Wall-clock quantities differ between any two runs.
TIMES = ("runtime", "per_second", "step_time", "eps", "flos")


def own_log(trainer: Any) -> list[dict[str, Any]]:
    """The trainer's log without our keys and without times."""
    return [
        {k: v for k, v in row.items() if not k.startswith("interp/") and not any(t in k for t in TIMES)}
        for row in trainer.state.log_history
    ]


def random_states() -> tuple[Any, ...]:
    """Python's, NumPy's (with its position) and torch's."""
    return random.getstate(), str(np.random.get_state(legacy=False)["state"]), torch.get_rng_state().tolist()


def run(entry: Any, folder: Path, setting: dict[str, Any], config: Any) -> dict[str, Any]:
    """Train once from fixed seeds; ``config=None`` trains without us."""
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    evaluation = {"eval_strategy": "steps", "eval_steps": 2} if entry.evaluates else {}
    trainer = entry.build(folder, **evaluation, **setting)
    handle = attach(trainer, config) if config is not None else None
    trainer.train()
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "grad": {name: p.requires_grad for name, p in trainer.model.named_parameters()},
        "modes": {name: module.training for name, module in trainer.model.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()),
        "log": own_log(trainer),
        "random": random_states(),
        "handle": handle,
        "interp": [row for row in trainer.state.log_history if any(k.startswith("interp/") for k in row)],
    }


def assert_same(bare: dict[str, Any], attached: dict[str, Any]) -> None:
    assert bare["weights"].keys() == attached["weights"].keys()
    changed = [name for name, value in bare["weights"].items() if not torch.equal(value, attached["weights"][name])]
    assert not changed, f"weights differ: {changed}"
    assert bare["log"] == attached["log"]
    for place, whose in enumerate(("Python", "NumPy", "torch")):
        assert bare["random"][place] == attached["random"][place], f"{whose}'s generator"
    for key in ("grad", "modes", "hooks"):
        assert bare[key] == attached[key], key
