"""Builders like those of the table, for tests that bring their own data, tokenizer or models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.table import Entry, arguments, causal_lm, tokenizer

#: Two words per turn mark who speaks; every turn ends with the end token.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ ('w80 ' if m['role'] == 'user' else 'w81 ') + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w81 ' }}{% endif %}"
)


def letters(completions: list[Any], **_: Any) -> list[float]:
    """A reward for plain and conversational completions."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [len(text.replace(" ", "")) / 10 for text in texts]


def chat_tokenizer() -> Any:
    encode = tokenizer()
    encode.chat_template = CHAT_TEMPLATE
    return encode


def entry(
    name: str,
    *,
    train: Callable[[], Any],
    evaluation: Callable[[], Any] | None = None,
    encode: Callable[[], Any] = tokenizer,
    model: Callable[[], Any] = causal_lm,
    **arguments_of_trainer: Any,
) -> Entry:
    """A trainer (``dpo``, ``sft`` or ``grpo``) of these makers; each build makes everything anew."""

    def build(output_dir: Path, **changes: Any) -> Any:
        trainer_class, args, more = _parts(name, output_dir, changes)
        return trainer_class(
            model(),
            args=args,
            train_dataset=train(),
            eval_dataset=evaluation() if evaluation is not None else None,
            processing_class=encode(),
            **more,
            **{key: make() for key, make in arguments_of_trainer.items()},
        )

    return Entry(name, build, evaluates=evaluation is not None)


def _parts(name: str, output_dir: Path, changes: dict[str, Any]) -> tuple[type, Any, dict[str, Any]]:
    import trl

    settings = arguments(output_dir, **{"max_steps": 4, **changes})
    if name == "dpo":
        return trl.DPOTrainer, trl.DPOConfig(**{"max_length": 48, **settings}), {}
    if name == "sft":
        return trl.SFTTrainer, trl.SFTConfig(**{"max_length": 48, **settings}), {}
    generation = {"num_generations": 2, "max_completion_length": 6, "beta": 0.04}
    return trl.GRPOTrainer, trl.GRPOConfig(**{**generation, **settings}), {"reward_funcs": letters}
