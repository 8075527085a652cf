"""A user's own function that labels completions: found by its dotted path, and its answers checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.errors import ConfigError, MeasurementError

Labeller = Callable[[list[str], list[str]], list[bool | None]]


def load_labels(dotted: str) -> Labeller:
    """The function that ``rollouts.labels`` names, as ``package.module.function``.

    Raises:
        ConfigError: the module cannot be imported, or what it holds under that name cannot be called.
    """
    module, _, name = dotted.rpartition(".")
    if not module or not name:
        raise ConfigError(f"rollouts.labels: expected package.module.function, found {dotted!r}")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # whatever a foreign module does when imported
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"rollouts.labels: {dotted} cannot be imported ({problem})") from error
    if not callable(found):
        raise ConfigError(f"rollouts.labels: {dotted}: expected a function, found {type(found).__name__}")
    return found


def label_completions(function: Labeller, texts: Sequence[Prompt], tokenizer: Any) -> list[bool | None]:
    """One label per completion; the main process's work, since the function may be slow or cost money.

    Args:
        function: takes the prompts and the completions as texts without special tokens.
        texts: prompts with completions.
        tokenizer: or a processor that holds one.

    Raises:
        MeasurementError: the answer is not a list of as many ``True``, ``False`` or ``None``.
    """
    decode = getattr(tokenizer, "tokenizer", tokenizer).decode
    prompts, completions = (
        [decode(list(part(text)), skip_special_tokens=True) for text in texts] for part in (_prompt, _completion)
    )
    labels = function(prompts, completions)
    if not isinstance(labels, list) or len(labels) != len(texts):
        found = f"{len(labels)} of them" if isinstance(labels, list) else type(labels).__name__
        raise MeasurementError(f"rollouts.labels: expected a list of {len(texts)} labels, found {found}")
    labels = [bool(label) if isinstance(label, np.bool_) else label for label in labels]
    wrong = next((label for label in labels if not (label is None or isinstance(label, bool))), None)
    if wrong is not None:
        raise MeasurementError(f"rollouts.labels: expected True, False or None, found {wrong!r}")
    return labels


def _prompt(text: Prompt) -> tuple[int, ...]:
    return text.input_ids[: text.completion_start]


def _completion(text: Prompt) -> tuple[int, ...]:
    return text.input_ids[text.completion_start :]
