"""One rank of a training that is attached; launched by ``torchrun`` from test_two_processes.py.

Usage: trainer_worker.py TRAINER ENGINE OUTPUT_DIR MODEL_DIR, TRAINER one of the table, ENGINE ddp, zero2 or zero3.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import conftest  # noqa: E402, F401  offline, single-threaded
import torch  # noqa: E402
from trainers.table import trainers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

from interp_rlhf import attach  # noqa: E402

CONFIG = {
    "prompts": {"n": 11, "batch_size": 4},  # odd: one rank's share is padded
    "concepts": {"n_pairs": 32, "packs": []},
    "schedule": {"every": 2},
    "statistics": {"bootstrap": 100, "directions": 200},
    "on_error": "raise",
    "report": False,
}


#: For trainers that have a pack beside their output folder.
MORE = {
    "hookpoints": ["layers.1.resid_post", "layers.2.resid_post"],
    "rollouts": {"prompts": 9, "completions": 2, "max_new_tokens": 4},  # odd too
}


#: For trainers that have a task there.
CIRCUITS = {"steps": 2, "random": 19}


def config(output_dir: Path) -> dict[str, object]:
    pack, task = output_dir.parent / "order.jsonl", output_dir.parent / "words.jsonl"
    more: dict[str, object] = {"circuits": {**CIRCUITS, "tasks": [str(task)]}} if task.exists() else {}
    if pack.exists():
        more |= {**MORE, "concepts": {"n_pairs": 32, "packs": [str(pack)]}}
    return {**CONFIG, **more}


def deepspeed(stage: int) -> dict[str, object]:
    zero = {"stage": stage, "overlap_comm": False}
    if stage == 3:  # tiny parameters would otherwise stay whole, and nothing would be tested
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


def break_at(trainer: Any, step: int, module: Any, name: str) -> None:
    """Let a function of a module fail on this rank at one step."""
    working = getattr(module, name)

    def broken(*args: object, **kwargs: object) -> object:
        if trainer.state.global_step == step:
            raise RuntimeError(f"planted in {name}")
        return working(*args, **kwargs)

    setattr(module, name, broken)


def main(name: str, engine: str, output_dir: str, model_dir: str) -> None:
    torch.set_num_threads(1)
    kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    trainer = trainers()[name].build(
        Path(output_dir),
        model=kind.from_pretrained(model_dir),  # from a file: inside zero.Init none can be built
        max_steps=4,
        save_strategy="steps",
        save_steps=4,
        optim="adamw_torch",
        deepspeed=deepspeed(int(engine[-1])) if engine.startswith("zero") else None,
    )
    if os.environ.get("BARE") != "1":
        settings = config(Path(output_dir))
        handle = attach(trainer, {**settings, "on_error": "warn"} if "FAIL_ON_RANK" in os.environ else settings)
    if os.environ.get("FAIL_ON_RANK") == os.environ.get("RANK", "0"):
        from interp_rlhf import mechanisms, reading

        break_at(trainer, 2, reading, "read_prompts")
        break_at(trainer, 4, mechanisms, "find_wiring")
    trainer.train()
    if "CAUSE" in os.environ:  # as the end of a run does for what stands out
        handle.callback._current.find_causes(4, [tuple(os.environ["CAUSE"].split("@"))])
    if trainer.accelerator.is_main_process:
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        Path(output_dir, "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
