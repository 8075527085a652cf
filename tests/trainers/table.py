"""One table of trainers for every contract test: how each is built on tiny models, on the TRL line that has it."""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from packaging.version import Version
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(90)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def trl_version() -> Version:
    import trl

    return Version(trl.__version__)


def has_ppo() -> bool:
    return importlib.util.find_spec("trl.experimental.ppo") is not None


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )


@cache
def saved_model(seed: int) -> Path:
    """A tiny random Llama on disk: without an adapter TRL loads its reference model from the policy's own path."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-llama-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):  # the first call leaves the caller's random state as the later ones do
        torch.manual_seed(seed)
        LlamaForCausalLM(config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def causal_lm(seed: int = 0) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(saved_model(seed))


def scorer(seed: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config(num_labels=1))


def sentence(seed: int, length: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())


def preferences(n: int = 48) -> Dataset:
    rows = []
    for i in range(n):
        chosen, rejected = " " + sentence(3 * i + 1, 4 + i % 3), " " + sentence(3 * i + 2, 5)
        rows.append({"prompt": sentence(3 * i, 5), "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def unpaired(n: int = 48) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": sentence(2 * i, 5), "completion": " " + sentence(2 * i + 1, 5), "label": i % 2 == 0}
            for i in range(n)
        ]
    )


def prompts(n: int = 48) -> Dataset:
    return Dataset.from_list([{"prompt": sentence(i, 5)} for i in range(n)])


def texts(n: int = 48) -> Dataset:
    return Dataset.from_list([{"text": sentence(i, 6 + i % 5)} for i in range(n)])


def token_ids(dataset: Dataset) -> Dataset:
    encode = tokenizer()
    return dataset.map(lambda row: {"input_ids": encode(row["prompt"])["input_ids"]}, remove_columns=["prompt"])


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(len, text.split())) / 10 for text in completions]


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Entry:
    """One trainer: ``build(output_dir, model=…, lora=…, **arguments)`` gives it ready to ``train()``.

    ``control`` is what a control run of it scrambles, ``None`` where there is nothing; ``samples`` says whether it
    trains on completions of its own policy.
    """

    name: str
    build: Callable[..., Any]
    available: bool = True
    evaluates: bool = True
    control: str | None = None
    samples: bool = False


def arguments(output_dir: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "seed": 7,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **changes,
    }


def _dpo(output_dir: Path, *, use_lora: bool = False, model: Any = None, **changes: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**arguments(output_dir, max_length=32, **changes))
    return DPOTrainer(
        model or causal_lm(), args=args, train_dataset=preferences(), eval_dataset=preferences(24),
        processing_class=tokenizer(), peft_config=lora() if use_lora else None,
    )  # fmt: skip


def _sft(output_dir: Path, *, use_lora: bool = False, model: Any = None, **changes: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**arguments(output_dir, **{"max_length": 32, **changes}))
    return SFTTrainer(
        model or causal_lm(), args=args, train_dataset=texts(), eval_dataset=texts(24), processing_class=tokenizer(),
        peft_config=lora() if use_lora else None,
    )  # fmt: skip


def _grpo(output_dir: Path, *, use_lora: bool = False, model: Any = None, **changes: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        **arguments(output_dir, **{"num_generations": 2, "max_completion_length": 6, "beta": 0.04, **changes})
    )
    return GRPOTrainer(
        model or causal_lm(), reward_funcs=length_reward, args=args, train_dataset=prompts(),
        eval_dataset=prompts(16), processing_class=tokenizer(), peft_config=lora() if use_lora else None,
    )  # fmt: skip


def _rloo(output_dir: Path, *, use_lora: bool = False, model: Any = None, **changes: Any) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    args = RLOOConfig(**arguments(output_dir, **{"num_generations": 2, "max_completion_length": 6, **changes}))
    return RLOOTrainer(
        model or causal_lm(), reward_funcs=length_reward, args=args, train_dataset=prompts(),
        eval_dataset=prompts(16), processing_class=tokenizer(), peft_config=lora() if use_lora else None,
    )  # fmt: skip


def _kto(output_dir: Path, *, use_lora: bool = False, model: Any = None, **changes: Any) -> Any:
    from trl import KTOConfig, KTOTrainer

    args = KTOConfig(**arguments(output_dir, max_length=32, **changes))
    return KTOTrainer(
        model or causal_lm(), args=args, train_dataset=unpaired(), eval_dataset=unpaired(24),
        processing_class=tokenizer(), peft_config=lora() if use_lora else None,
    )  # fmt: skip


def _reward(output_dir: Path, *, use_lora: bool = False, model: Any = None, **changes: Any) -> Any:
    from peft import LoraConfig
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(**arguments(output_dir, max_length=32, **changes))
    peft_config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"], task_type="SEQ_CLS")
    return RewardTrainer(
        model or scorer(), args=args, train_dataset=preferences(), eval_dataset=preferences(24),
        processing_class=tokenizer(), peft_config=peft_config if use_lora else None,
    )  # fmt: skip


def _plain(output_dir: Path, *, use_lora: bool = False, model: Any = None, **changes: Any) -> Any:
    from peft import get_peft_model
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    encode = tokenizer()
    data = texts().map(lambda row: encode(row["text"]), remove_columns=["text"])
    model = model or causal_lm()
    return Trainer(
        get_peft_model(model, lora()) if use_lora else model,
        args=TrainingArguments(**arguments(output_dir, **changes)),
        train_dataset=data, eval_dataset=data.select(range(24)), processing_class=encode,
        data_collator=DataCollatorForLanguageModeling(encode, mlm=False),
    )  # fmt: skip


def _online_dpo(output_dir: Path, *, use_lora: bool = False, model: Any = None, **changes: Any) -> Any:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    args = OnlineDPOConfig(**arguments(output_dir, max_new_tokens=6, max_length=32, **changes))
    return OnlineDPOTrainer(
        model=model or causal_lm(), ref_model=None if use_lora else causal_lm(), reward_funcs=length_reward, args=args,
        train_dataset=prompts(), eval_dataset=prompts(16), processing_class=tokenizer(),
        peft_config=lora() if use_lora else None,
    )  # fmt: skip


def _ppo(output_dir: Path, *, use_lora: bool = False, model: Any = None, **changes: Any) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    steps = changes.pop("max_steps", 6)
    changes.pop("eval_strategy", None)
    changes.pop("eval_steps", None)
    accumulation = changes.get("gradient_accumulation_steps", 1)
    base = arguments(output_dir, **changes)
    base.pop("max_steps")
    args = PPOConfig(
        **base, total_episodes=steps * 2 * accumulation, num_ppo_epochs=2, num_mini_batches=1, response_length=5,
        num_sample_generations=0, local_rollout_forward_batch_size=2,
    )  # fmt: skip
    return PPOTrainer(
        args=args, processing_class=tokenizer(), model=model or causal_lm(),
        ref_model=None if use_lora else causal_lm(), reward_model=scorer(1), value_model=scorer(2),
        train_dataset=token_ids(prompts()), eval_dataset=token_ids(prompts(16)),
        peft_config=lora() if use_lora else None,
    )  # fmt: skip


def trainers() -> dict[str, Entry]:
    """The table. OnlineDPO needs nothing new; PPO exists up to TRL 1.12 only."""
    entries = [
        Entry("dpo", _dpo, control="pairs swapped"),
        Entry("sft", _sft),
        Entry("grpo", _grpo, control="rewards permuted", samples=True),
        Entry("plain", _plain),
        Entry("ppo", _ppo, available=has_ppo(), evaluates=False, control="rewards permuted", samples=True),
        Entry("rloo", _rloo, control="rewards permuted", samples=True),
        Entry("kto", _kto, control="labels permuted"),
        Entry("reward", _reward, control="pairs swapped"),
        Entry("online_dpo", _online_dpo, evaluates=False, control="rewards permuted", samples=True),
    ]
    return {entry.name: entry for entry in entries}
