"""What the tests of a run's life share: small configs, one way to train, rows as a table, an independent reading."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from trainers.comparing import own_log
from trainers.table import causal_lm, trainers
from transformers import TrainerCallback

from interp_rlhf import attach
from interp_rlhf.activations.prompts import Prompt, content_tokens
from interp_rlhf.cli import main

KEY = ["metric", "readout", "hookpoint", "step"]
HOOKPOINTS = ("layers.1.resid_post", "layers.2.resid_post")


def small(folder: Path, **changes: Any) -> dict[str, Any]:
    """A config with one concept that every tiny random model has: the order of two words, which no word count shows."""
    path = folder.parent / "order.jsonl"
    if not path.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        first, second = "w3 " * 4 + "w60", "w60 " + "w3 " * 4
        pairs = [
            {"group": f"g{i}", "prompt": f"w{i} w{i + 30}", "positive": first, "negative": second.strip()}
            for i in range(20)
        ]
        lines = [{"pack": "order", "description": "w60 comes last (positive) or first (negative)"}, *pairs]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "hookpoints": list(HOOKPOINTS),
        "prompts": {"n": 16},
        "concepts": {"n_pairs": 32, "packs": [str(path)]},
        "schedule": {"every": 3},
        "statistics": {"bootstrap": 100, "directions": 200},
        "on_error": "raise",
        "report": False,
        **changes,
    }


class StopAt(TrainerCallback):
    """Ends training after a step, as a signal or a time limit would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


class Keeps(TrainerCallback):
    """The weights after every step, as they were when the step was done."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = copy.deepcopy(kwargs["model"].state_dict())

    on_step_end = on_train_begin


def build(name: str, folder: Path, *, callbacks: Sequence[TrainerCallback] = (), **changes: Any) -> Any:
    """A trainer from fixed seeds that saves every second step."""
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    saves = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    trainer = trainers()[name].build(folder, **{**saves, **changes})
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def train(name: str, folder: Path, config: Any, *, resume: Any = None, **changes: Any) -> tuple[Any, Any]:
    """Build, attach where there is a config, train; ``resume`` is a checkpoint's folder."""
    trainer = build(name, folder, **changes)
    handle = attach(trainer, config) if config is not None else None
    random.seed(4), np.random.seed(5), torch.manual_seed(6)
    if resume is None:
        trainer.train()
    else:
        trainer.train(resume_from_checkpoint=str(resume))
    return trainer, handle


def interp_log(trainer: Any) -> dict[int, dict[str, float]]:
    """Our keys of the trainer's log by step."""
    rows = [(r["step"], {k: v for k, v in r.items() if k.startswith("interp/")}) for r in trainer.state.log_history]
    return {step: row for step, row in rows if row}


def assert_same_training(first: Any, second: Any) -> None:
    """Weights and logged numbers of two runs, bit by bit; random states are compared where they are taken."""
    a, b = first.model.state_dict(), second.model.state_dict()
    assert a.keys() == b.keys()
    assert not [name for name, value in a.items() if not torch.equal(value, b[name])]
    assert own_log(first) == own_log(second)


def live(timeline: pd.DataFrame) -> pd.DataFrame:
    """What the weights are said to have done: rows that no later start left behind, without cost, by their key."""
    rows = timeline[~timeline.superseded & ~timeline.metric.str.startswith("cost") & (timeline.reader == "policy")]
    assert not rows.duplicated(KEY).any(), rows[rows.duplicated(KEY)]
    return rows.set_index(KEY).sort_index()


def assert_rows_equal(found: pd.DataFrame, expected: pd.DataFrame, tolerance: float = 1e-6) -> None:
    """The same keys with the same values, intervals and bands."""
    assert list(found.index) == list(expected.index)
    for column in ("value", "ci_low", "ci_high", "null_low", "null_high", "p", "n"):
        np.testing.assert_allclose(
            found[column].to_numpy(float), expected[column].to_numpy(float), rtol=tolerance, atol=tolerance
        )


def verify(folder: Path) -> int:
    """Exit code of ``interp-rlhf verify``."""
    return main(["verify", str(folder)])


def direct_means(model: Any, prompts: Sequence[Prompt], hookpoint: str, skip: frozenset[int]) -> Tensor:
    """Readings ``[N, d]`` one text at a time from the hidden states that the model returns (not the last layer's)."""
    layer = int(hookpoint.split(".")[1])
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            states = model(input_ids=torch.tensor([prompt.input_ids]), output_hidden_states=True).hidden_states
            rows.append(states[layer + 1][0][torch.tensor(content_tokens(prompt, "completion", skip))].mean(0))
    for module, mode in modes:
        module.training = mode
    return torch.stack(rows)


def assert_rows_are_of(weights: Mapping[int, Mapping[str, Tensor]], handle: Any) -> None:
    """Every row at ``layers.1`` describes the weights that its step had, read and computed here without the package."""
    plan, hookpoint = handle.callback._plan, HOOKPOINTS[0]
    prompts = plan.audit.prompts
    assert len({prompt.unit for prompt in prompts}) == len(prompts)  # one text per unit: nothing is averaged
    model = causal_lm()
    read = {}
    for step, state in weights.items():
        model.load_state_dict(state)
        read[step] = direct_means(model, prompts, hookpoint, plan.skip_ids).numpy().astype(np.float64)
    (concept,) = handle.callback._run.baseline.concepts
    v = concept.directions[hookpoint].vector.numpy().astype(np.float64)
    rows = live(handle.timeline())
    steps = sorted(set(rows.index.get_level_values("step")))
    for step in steps[1:]:
        x0, xt = read[steps[0]], read[step]
        lengths = np.linalg.norm(x0, axis=1), np.linalg.norm(xt, axis=1)
        expected = {
            ("representation/cosine", ""): ((x0 * xt).sum(1) / (lengths[0] * lengths[1])).mean(),
            ("representation/norm_ratio", ""): (lengths[1] / lengths[0]).mean(),
            ("concept/drift", "order"): ((xt - x0) @ v).mean() / (x0 @ v).std(ddof=1),
        }
        for (metric, readout), value in expected.items():
            assert rows.loc[(metric, readout, hookpoint, step)].value == pytest.approx(value, rel=1e-4, abs=1e-5)


def steps_of(handle: Any) -> list[int]:
    return sorted(set(live(handle.timeline()).index.get_level_values("step")))


def outside(trainer: Any) -> tuple[Any, ...]:
    """Everything about a trainer that attaching could change."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules())
    return type(trainer), dict(vars(trainer)), list(trainer.callback_handler.callbacks), hooks, trainer.log.__func__
