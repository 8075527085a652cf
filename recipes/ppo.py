"""PPO with TRL 1.12, attached. The lines marked `interp:` are all that differs from a plain TRL script.

python recipes/ppo.py --config configs/ppo.yaml
scripts/launch ddp recipes/ppo.py --config configs/ppo.yaml
"""

from typing import Any

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from interp_rlhf import attach  # interp:
from interp_rlhf.recipe_arguments import InterpArguments, local_path  # interp:


def tokenize(dataset: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Replace the ``prompt`` column (a string or chat messages) by ``input_ids``, which is all PPO takes."""

    def ids(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return {"input_ids": tokenizer(prompt)["input_ids"]}
        encoded: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        return {"input_ids": encoded["input_ids"]}

    return dataset.map(ids, remove_columns=dataset.column_names)


def main(
    script_args: ScriptArguments,
    training_args: PPOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    interp_args: InterpArguments,  # interp:
) -> None:
    """Train on prompts against ``reward_model_path``; the value model starts from it too. Saves the policy."""
    model_path = local_path(model_args.model_name_or_path, "model_name_or_path")
    reward_path = local_path(training_args.reward_model_path, "reward_model_path")
    settings = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
    }
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path, revision=model_args.model_revision, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    policy = AutoModelForCausalLM.from_pretrained(model_path, **settings)
    peft_config = get_peft_config(model_args)
    reference = AutoModelForCausalLM.from_pretrained(model_path, **settings) if peft_config is None else None
    value = AutoModelForSequenceClassification.from_pretrained(reward_path, num_labels=1, dtype=model_args.dtype)
    reward = AutoModelForSequenceClassification.from_pretrained(reward_path, num_labels=1, dtype=model_args.dtype)

    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    else:
        dataset = load_dataset(local_path(script_args.dataset_name, "dataset_name"), name=script_args.dataset_config)

    trainer = PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=tokenize(dataset[script_args.dataset_train_split], tokenizer),
        eval_dataset=tokenize(dataset[script_args.dataset_test_split], tokenizer),
        peft_config=peft_config,
    )
    attach(trainer, interp_args.settings())  # interp:
    trainer.train()
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, PPOConfig, ModelConfig, DatasetMixtureConfig, InterpArguments))  # interp:
    main(*parser.parse_args_and_config())
