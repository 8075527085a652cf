"""What the killed children do: a real DPO training with a measurement attached, saved every second step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.tiny_runs import build, small, train
from transformers import TrainerCallback

#: Steps of the whole run.
STEPS = 8


class Waits(TrainerCallback):
    """Does not get past a step: whoever wants to kill the run before it has the time to."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            time.sleep(120)


def dpo(folder: str, resume: str | None, waits_at: int = -1) -> None:
    """Train up to the end, from scratch or from a checkpoint."""
    train("dpo", Path(folder), small(Path(folder)), resume=resume, max_steps=STEPS, callbacks=[Waits(waits_at)])


def warm_up() -> None:
    """Import TRL and write the tiny model once; no backward pass, whose threads a child would not have."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        build("dpo", Path(folder) / "run")


WORK: dict[str, Callable[..., None]] = {"dpo": dpo}


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint that can be resumed: the trainer writes its state last."""
    found = []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            found.append((json.loads(path.read_bytes())["global_step"], path.parent))
        except ValueError:
            continue
    return max(found)[1] if found else None
