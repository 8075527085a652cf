"""A real attached DPO run with a concept that is admitted: words of two kinds, told apart by their embeddings only.

No word occurs twice, so a bag of tokens learns nothing on one half of the pairs that helps on the other; the embeddings
of one kind share a direction, so a difference in means does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trainers.table import SPECIAL, arguments, config
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from interp_rlhf import Direction, attach

PAIRS, LENGTH = 64, 3
WORDS = [f"{kind}{i}" for kind in "ab" for i in range(PAIRS * LENGTH)]
PLANTED, SAVED = "chosen_minus_rejected", "saved <direction> & co"


def planted_run(
    folder: Path,
    *,
    gpt2: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    interp: Mapping[str, Any] | None = None,
    **changes: Any,
) -> tuple[Any, Any]:
    """Train ten steps into ``folder``; gives the trainer and its handle. One concept has pairs, one is from a file."""
    from trl import DPOConfig, DPOTrainer

    folder.mkdir(parents=True, exist_ok=True)
    Direction(SAVED, "layers.2.resid_post", torch.arange(32) - 8.0).save(folder.parent / "saved.safetensors")
    torch.manual_seed(0)
    kind, settings = (GPT2LMHeadModel, _gpt2_config()) if gpt2 else (LlamaForCausalLM, _config())
    model = kind(settings)
    generator = torch.Generator().manual_seed(3)
    shift = torch.randn(32, generator=generator)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        weight[len(SPECIAL) : len(SPECIAL) + PAIRS * LENGTH] += 0.3 * shift
    model.save_pretrained(folder.parent / "model")
    args = DPOConfig(**{**arguments(folder, max_length=32, max_steps=10, learning_rate=5e-3), **changes})
    trainer = DPOTrainer(
        kind.from_pretrained(folder.parent / "model"), args=args, train_dataset=_pairs(),
        processing_class=_tokenizer(), callbacks=list(callbacks),
    )  # fmt: skip
    handle = attach(
        trainer,
        {
            "prompts": {"n": 32},
            "concepts": {"n_pairs": 64, "packs": [], "directions": [str(folder.parent / "saved.safetensors")]},
            "schedule": {"every": 5},
            "statistics": {"bootstrap": 200, "directions": 200},
            "on_error": "raise",
            **(interp or {}),
        },
    )
    trainer.train()
    return trainer, handle


def _gpt2_config() -> GPT2Config:
    """Blocks with biases: what is added to the last of a block moves its output by just that."""
    return GPT2Config(
        vocab_size=len(SPECIAL) + len(WORDS), n_embd=32, n_layer=3, n_head=4, n_positions=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _config() -> Any:
    made = config()
    made.vocab_size = len(SPECIAL) + len(WORDS)
    return made


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _pairs() -> Dataset:
    def words(kind: str, index: int) -> str:
        return " " + " ".join(f"{kind}{LENGTH * index + i}" for i in range(LENGTH))

    # prompts of their own, so that pairs are not grouped
    return Dataset.from_list(
        [
            {"prompt": f"a{i} b{PAIRS - i}", "chosen": words("a", i), "rejected": words("b", i)}
            for i in range(PAIRS)
        ]
    )  # fmt: skip
