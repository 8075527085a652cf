"""DPO with TRL, attached. The lines marked `interp:` are all that differs from a plain TRL script.

python recipes/dpo.py --config configs/dpo.yaml
scripts/launch zero2 recipes/dpo.py --config configs/dpo.yaml
"""

from datasets import load_dataset
from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from interp_rlhf import attach  # interp:
from interp_rlhf.recipe_arguments import InterpArguments, local_path  # interp:


def main(
    script_args: ScriptArguments,
    training_args: DPOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    interp_args: InterpArguments,  # interp:
) -> None:
    """Train on preference pairs (columns ``prompt``, ``chosen``, ``rejected``) and save the model."""
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

    trainer = DPOTrainer(
        model=local_path(model_args.model_name_or_path, "model_name_or_path"),
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
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig, InterpArguments))  # interp:
    main(*parser.parse_args_and_config())
