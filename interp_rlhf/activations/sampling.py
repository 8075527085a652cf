"""Completions drawn from a live model's own distribution, without touching any random state.

The Gumbel trick: ``argmax(log p + G)`` with independent standard Gumbel noise ``G`` is a draw from ``p`` (Gumbel 1954;
Maddison et al. 2014, "A* Sampling"). So decoding is greedy and all randomness is in the noise, which belongs to a text:
it is a function of the seed, the prompt and the number of the completion. Two models asked with the same seed share it
(common random numbers), and a completion does not depend on what else is in its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from interp_rlhf.activations.engines import find_engine, measuring
from interp_rlhf.activations.hookpoints import ModelLayout, layout
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.errors import MeasurementError


@dataclass(frozen=True, slots=True)
class _Job:
    """One completion to draw: the index of its prompt, its tokens, the noise's seed, and how long it may get."""

    index: int
    prompt: tuple[int, ...]
    noise: int
    limit: int


def sample_completions(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    completions: int,
    max_new_tokens: int,
    seed: int,
    pad_token_id: int,
    eos_token_ids: Sequence[int],
    batch_size: int,
    layers: str | None = None,
) -> list[Prompt]:
    """Draw completions at temperature 1, exactly from the model's next-token distribution.

    No setting of the model's own generation config (temperature, top-k, repetition penalty, forced tokens) takes part.
    Batches of other composition round differently, so that a draw that is a tie up to rounding may still differ.

    Args:
        model: the model, wrapped or not; every rank may call this on its own.
        prompts: texts whose part before ``completion_start`` is continued.
        completions: draws K for each prompt.
        max_new_tokens: a completion is cut there, and where the model's context ends.
        seed: with the prompt's tokens and the number of the completion it determines the noise.
        pad_token_id: fills shorter prompts on the left.
        eos_token_ids: tokens that end a completion (see :func:`ending_tokens`).
        batch_size: completions per forward pass.
        layers: path of the decoder layers, for architectures that are not recognised.

    Returns:
        ``len(prompts)·K`` texts, the K of a prompt together, with the unit of their prompt. The token that ended a
        completion is its last token.

    Raises:
        MeasurementError: the model is sharded, has a prompt-learning adapter or no language-model head; or a prompt is
            empty or fills the context.
    """
    parts = layout(model, layers=layers)
    _check_samples(model, parts)
    jobs = []
    for index, prompt in enumerate(prompts):
        limit = min(max_new_tokens, room(prompt, parts.max_positions))
        if prompt.completion_start < 1 or limit < 1:
            raise MeasurementError(
                f"prompt {prompt.id}: expected 1 to {(parts.max_positions or 0) - 1} tokens to continue, found "
                f"{prompt.completion_start} (context of {parts.architecture})"
            )
        tokens = prompt.input_ids[: prompt.completion_start]
        jobs += [_Job(index, tokens, _noise_seed(seed, prompt, k), limit) for k in range(completions)]
    drawn: list[Prompt | None] = [None] * len(jobs)
    with measuring(model), _plain_generation(parts.causal_lm):
        for rows in _batches(jobs, batch_size):
            written = _generate(parts, [jobs[row] for row in rows], pad_token_id, eos_token_ids)
            for row, tokens in zip(rows, written, strict=True):
                job = jobs[row]
                drawn[row] = Prompt((*job.prompt, *tokens), len(job.prompt), prompts[job.index].unit)
    return [text for text in drawn if text is not None]


def room(prompt: Prompt, max_positions: int | None) -> int:
    """Tokens that fit behind the prompt in a context of ``max_positions`` tokens (``None``: unbounded).

    >>> room(Prompt((5, 6, 7, 8), 3, "u"), 10)
    7
    """
    return (max_positions if max_positions is not None else 2**31) - prompt.completion_start


def ending_tokens(model: nn.Module, *, layers: str | None = None) -> tuple[int, ...]:
    """Tokens that end a text of this model, sorted: by its generation config, else its config; empty where none do."""
    lm: Any = layout(model, layers=layers).causal_lm
    for source in (getattr(lm, "generation_config", None), lm.config.get_text_config(decoder=True)):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(sorted({int(token) for token in (found if isinstance(found, list | tuple) else [found])}))
    return ()


def _check_samples(model: nn.Module, parts: ModelLayout) -> None:
    """Refuse what cannot be sampled here, with the reason."""
    engine = find_engine(model, parts)
    if not engine.may_stop:
        raise MeasurementError(
            f"{parts.architecture}: its weights are sharded (ZeRO-3 or FSDP), sampling completions needs them whole"
        )
    if not engine.pads_left:
        raise MeasurementError(f"{parts.architecture}: has a prompt-learning adapter, completions cannot be sampled")
    if parts.causal_lm.get_output_embeddings() is None or not parts.causal_lm.can_generate():
        raise MeasurementError(f"{parts.architecture}: expected a language-model head to sample from, found none")


def _noise_seed(seed: int, prompt: Prompt, k: int) -> int:
    """Seed of one completion's noise: its prompt's tokens, whatever follows them, its number, and the run's seed."""
    start = Prompt(prompt.input_ids[: prompt.completion_start], prompt.completion_start, "")
    digest = hashlib.sha256(f"{seed}|{start.id}|{k}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _batches(jobs: Sequence[_Job], batch_size: int) -> Iterator[list[int]]:
    """Rows of equal limit together, longest prompts first: no row of a batch outgrows the context before it ends."""
    order = sorted(range(len(jobs)), key=lambda row: (-jobs[row].limit, -len(jobs[row].prompt), row))
    for limit in dict.fromkeys(jobs[row].limit for row in order):
        rows = [row for row in order if jobs[row].limit == limit]
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


class _GumbelNoise(LogitsProcessor):
    """Adds to each row the noise of its own generator; its i-th call in a generation is position i."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        where = device if device.type == "cuda" else torch.device("cpu")  # not every device has float64
        self._generators = [torch.Generator(where).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``[B, V]``: 0 at the token with the largest logit plus noise, −∞ at all others.

        The sum is in float64, so that no two tokens tie by rounding.
        """
        rows = [
            torch.rand(scores.shape[1], generator=one, dtype=torch.float64, device=one.device)
            for one in self._generators
        ]
        noise = -torch.log(-torch.log(torch.stack(rows)))
        chosen = (scores.to(noise.device).double() + noise).argmax(1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.to(scores.device), 0.0)


def _generate(
    parts: ModelLayout, jobs: Sequence[_Job], pad_token_id: int, eos_token_ids: Sequence[int]
) -> list[tuple[int, ...]]:
    """The tokens written behind each prompt, up to and including the first that ends a text."""
    lm: Any = parts.causal_lm
    device = next(lm.parameters()).device
    width = max(len(job.prompt) for job in jobs)
    ids = torch.tensor([[pad_token_id] * (width - len(job.prompt)) + list(job.prompt) for job in jobs], device=device)
    mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in jobs], device=device)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=jobs[0].limit,
        pad_token_id=pad_token_id,
        eos_token_id=list(eos_token_ids) or None,
    )
    noise = _GumbelNoise([job.noise for job in jobs], device)
    written = lm.generate(
        ids,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList([noise]),
        synced_gpus=False,
    )
    return [_until_end(row, eos_token_ids) for row in written[:, width:].tolist()]


def _until_end(tokens: Sequence[int], eos_token_ids: Sequence[int]) -> tuple[int, ...]:
    end = next((place + 1 for place, token in enumerate(tokens) if token in eos_token_ids), len(tokens))
    return tuple(tokens[:end])


@contextmanager
def _plain_generation(lm: Any) -> Iterator[None]:
    """Inside, the model generates with its class's ``forward`` and with nothing but the settings it is called with.

    Settings that a call leaves open are filled from the model's own generation config, so that one is set aside.
    Trainers and accelerate replace ``forward`` on the instance: by one without logits, or one under autocast.
    """
    own, replaced = lm.generation_config, vars(lm).pop("forward", None)
    lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own
        if replaced is not None:
            vars(lm)["forward"] = replaced
