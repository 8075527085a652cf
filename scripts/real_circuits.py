"""A real pretrained model before and after a short DPO on real preferences, and two tasks that it can do.

*Pronoun* asks for ``she`` or ``he`` after a text about a girl or a boy, *name* for the name that the text began with.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: One place for the word that differs between clean and corrupt text, one for a word that varies.
PRONOUN = ("The {0} was {1} because", "One day, the {0} was {1} because")
NAME = ("A {1} child was named {0}. One day,", "There was a {1} child named {0}. One day,")
FEELINGS = (
    "happy", "sad", "scared", "tired", "hungry", "big", "small", "good", "kind", "nice", "brave", "sick", "lost", "mad",
    "alone", "sleepy",
)  # fmt: skip


def word_pairs(tokenizer: Any, texts: Sequence[str], words: Sequence[str], answers: Sequence[str]) -> list[dict]:
    """Pairs in token ids: two words change places between clean and corrupt text, and with them the answers."""
    right, wrong = (tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers)
    if len(right) != 1 or len(wrong) != 1:
        raise ValueError(f"answers {answers}: expected one token each, found {len(right)} and {len(wrong)}")
    pairs = []
    for text, feeling in itertools.product(texts, FEELINGS):
        first, second = (list(tokenizer(text.format(word, feeling))["input_ids"]) for word in words)
        pairs.append({"clean": first, "corrupt": second, "answers": right, "wrong": wrong})
        pairs.append({"clean": second, "corrupt": first, "answers": wrong, "wrong": right})
    return pairs


def write_tasks(folder: Path, tokenizer: Any) -> dict[str, str]:
    """The task files *pronoun* and *name*, 64 pairs each; name to path."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "pronoun": word_pairs(tokenizer, PRONOUN, ("girl", "boy"), ("she", "he")),
        "name": word_pairs(tokenizer, NAME, ("Lily", "Tim"), ("Lily", "Tim")),
    }
    for name, pairs in made.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n", encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in made}


def dpo(
    folder: Path, stories: Path, pairs: Sequence[dict[str, str]], *, control: int | None, steps: int = 30,
    lr: float = 1e-3, seed: int = 3,
) -> Any:  # fmt: skip
    """Train a LoRA of the stories model on preference pairs with both tasks followed; gives the handle."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from interp_rlhf import attach

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(stories, padding_side="left")
    data = Dataset.from_list([pair for pair in pairs if max(map(len, pair.values())) <= 400][:128])
    args = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=steps, logging_steps=10, learning_rate=lr,
        save_strategy="no", report_to=[], use_cpu=True, seed=seed, disable_tqdm=True, bf16=False, max_length=160,
        gradient_checkpointing=False, beta=0.1,
    )  # fmt: skip
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(stories), args=args, processing_class=tokenizer, train_dataset=data,
        peft_config=adapter,
    )  # fmt: skip
    tasks = write_tasks(folder.parent / "tasks", tokenizer)
    off = {name: {"enabled": False} for name in ("probes", "rollouts", "snapshots")}
    off |= {"concepts": {"packs": [], "n_pairs": 32}, "components": False, "prompts": {"n": 16}}
    circuits = {"tasks": [tasks["pronoun"]], "control": tasks["name"], "batch_size": 64, "steps": 3, "every": steps}
    handle = attach(trainer, {"circuits": circuits, "control": control, "schedule": {"every": steps}, **off})
    trainer.train()
    return handle
