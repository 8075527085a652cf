"""GRPO with TRL, attached. The lines marked `interp:` are all that differs from a plain TRL script.

python recipes/grpo.py --config configs/grpo.yaml
scripts/launch ddp recipes/grpo.py --config configs/grpo.yaml
"""

import os
import sys
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from datasets import load_dataset
from trl import (
    DatasetMixtureConfig,
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from interp_rlhf import attach  # interp:
from interp_rlhf.recipe_arguments import InterpArguments, local_path  # interp:


@dataclass
class GRPOScriptArguments(ScriptArguments):
    """Where the rewards come from: a reward model, functions by their dotted import path, or both."""

    reward_model_name_or_path: str | None = field(default=None, metadata={"help": "Reward model: hub name or path."})
    reward_funcs: list[str] | None = field(default=None, metadata={"help": "Dotted import paths, my_module.reward."})


def rewards(script_args: GRPOScriptArguments) -> list[Any]:
    """The reward model and functions the arguments name."""
    sys.path.insert(0, os.getcwd())
    found: list[Any] = []
    if script_args.reward_model_name_or_path:
        found.append(local_path(script_args.reward_model_name_or_path, "reward_model_name_or_path"))
    for path in script_args.reward_funcs or []:
        module, _, name = path.rpartition(".")
        found.append(getattr(import_module(module), name))
    return found


def main(
    script_args: GRPOScriptArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    interp_args: InterpArguments,  # interp:
) -> None:
    """Train on prompts (column ``prompt``, other columns reach the reward functions) and save the model."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),  # pyrefly: ignore[invalid-argument]  parsed by now
    }
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    else:
        dataset = load_dataset(local_path(script_args.dataset_name, "dataset_name"), name=script_args.dataset_config)

    trainer = GRPOTrainer(
        model=local_path(model_args.model_name_or_path, "model_name_or_path"),
        reward_funcs=rewards(script_args),
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    attach(trainer, interp_args.settings())  # interp:
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    parser = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig, InterpArguments))  # interp:
    main(*parser.parse_args_and_config())
