"""Log-probabilities of completions from hidden states that a pass has already computed.

Heads differ between architectures: Gemma caps the logits, Cohere and Granite scale them, GPT-J has a bias. Nothing of
that is repeated here: the model's own class computes the logits, with its backbone replaced by the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interp_rlhf.activations.hookpoints import ModelLayout
from interp_rlhf.errors import MeasurementError

#: Positions whose log-softmax is computed at once in float32.
_POSITIONS = 256


def completion_log_probs(
    layout: ModelLayout, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> Tensor:
    """Summed log-probability of each text's completion tokens given what precedes them.

    ``log p(y | x) = Σ_t log softmax(logits_{t-1})[y_t]`` over completion tokens t; a text's very first token has no
    prediction and is left out, and a text without completion has log-probability 0.

    The head is called once per text, on the predicting positions only: memory is bounded by one text's logits, and
    ranks of a sharded engine, which read equally many texts, make equally many calls.

    Args:
        layout: the model's parts.
        hidden: ``[B, T, d]`` output of the backbone.
        input_ids, attention_mask, completion_mask: ``[B, T]``.

    Returns:
        ``[B]`` float64, nats, on ``hidden``'s device.

    Raises:
        MeasurementError: the model has no language-model head, or its own forward cannot be run on hidden states.
    """
    predicted = completion_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    totals = []
    for row in range(input_ids.shape[0]):
        positions = predicted[row].nonzero().squeeze(1)
        targets = input_ids[row, positions + 1]
        logits = head_logits(layout, hidden[row, positions].unsqueeze(0)).squeeze(0)
        totals.append(_summed_log_probs(logits, targets))
    return torch.stack(totals)


def head_logits(layout: ModelLayout, hidden: Tensor) -> Tensor:
    """The model's own logits ``[1, n, V]`` from the backbone's output ``[1, n, d]``, whatever its head does to them.

    The class's ``forward`` is run, not the instance's: trainers replace the latter by one without logits.

    Raises:
        MeasurementError: as in :func:`completion_log_probs`.
    """
    lm: Any = layout.causal_lm
    if lm.get_output_embeddings() is None:
        raise MeasurementError(
            f"{layout.architecture}: expected a language-model head for log-probabilities, found none"
        )
    placeholder = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    try:
        output = type(lm).forward(_HeadOnly(layout, hidden), placeholder, use_cache=False, return_dict=True)
        logits = output.logits
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise MeasurementError(
            f"{layout.architecture}: its head cannot be run on hidden states ({type(error).__name__}: {error}), "
            "expected a forward of backbone, then head; behaviour cannot be measured on it"
        ) from error
    if logits.shape[:2] != hidden.shape[:2]:
        raise MeasurementError(
            f"{layout.architecture}: expected logits of shape {[*hidden.shape[:2], 'V']}, found {list(logits.shape)}"
        )
    return logits


def _summed_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, len(targets), _POSITIONS):
        part = slice(start, start + _POSITIONS)
        log_probs = logits[part].float().log_softmax(-1)
        total += log_probs.gather(1, targets[part].to(log_probs.device).unsqueeze(1)).double().sum()
    return total


class _HeadOnly:
    """Stands in for the model in its own ``forward``: every attribute is the model's, except the backbone."""

    def __init__(self, layout: ModelLayout, hidden: Tensor) -> None:
        self._lm = layout.causal_lm
        self._decoder = layout.decoder
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._lm, name)
        if isinstance(value, nn.Module) and any(module is self._decoder for module in value.modules()):
            return _Computed(self._hidden)
        return value


class _Computed:
    """A backbone, and its output, whose last hidden state is known; every other field of the output is ``None``."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __call__(self, *args: object, **kwargs: object) -> _Computed:
        return self

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self if name in ("decoder", "model") else None
