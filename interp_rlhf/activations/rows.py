"""What one dataset row means as tokens: TRL's column layouts, prepared and raw, plain and conversational."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from interp_rlhf.activations.prompts import ContrastPair, Prompt
from interp_rlhf.errors import PromptError


@dataclass(frozen=True, slots=True)
class RowTexts:
    """The texts of one dataset row: one sampling unit, and the preference pair where the row holds one."""

    prompts: tuple[Prompt, ...]
    pair: ContrastPair | None = None


def row_texts(row: Mapping[str, Any], tokenizer: Any, *, max_length: int) -> tuple[RowTexts, ...]:
    """Read one row. Completions are cut at ``max_length`` tokens; texts whose prompt does not fit come back empty.

    Recognized, in this order: ``prompt_ids`` with ``chosen_ids``/``rejected_ids`` or ``completion_ids`` (prepared DPO,
    KTO), ``chosen_ids``/``rejected_ids`` (prepared reward data), ``input_ids`` with ``labels``, ``completion_mask`` or
    ``completion_start`` and ``seq_lengths`` (SFT, packed or not), then raw ``chosen``/``rejected``, ``completion``,
    ``messages``, ``prompt`` and ``text``, as strings or as lists of chat messages.

    Args:
        tokenizer: needed for raw columns only; ``None`` is fine for prepared ones.

    Raises:
        PromptError: no known layout; the message lists the columns found.
    """
    if "input_ids" in row:
        return tuple(_single(ids, start, max_length) for ids, start in _language_model_rows(row))
    tokens = _token_columns(row) or _raw_columns(row, tokenizer)
    if tokens is None:
        raise PromptError(f"no known text column, found {sorted(row)}")
    prompt, first, second = tokens
    if second is None:
        return (_single([*prompt, *first], len(prompt), max_length),)
    return (_preference(prompt, first, second, max_length),)


_TokenColumns = tuple[list[int], list[int], list[int] | None]


def _token_columns(row: Mapping[str, Any]) -> _TokenColumns | None:
    if "chosen_ids" in row and "rejected_ids" in row:
        chosen, rejected = list(row["chosen_ids"]), list(row["rejected_ids"])
        if "prompt_ids" in row:
            return list(row["prompt_ids"]), chosen, rejected
        shared = _common_prefix(chosen, rejected)
        return chosen[:shared], chosen[shared:], rejected[shared:]
    if "prompt_ids" in row:
        return list(row["prompt_ids"]), list(row.get("completion_ids") or ()), None
    return None


def _raw_columns(row: Mapping[str, Any], tokenizer: Any) -> _TokenColumns | None:
    if not {"chosen", "rejected", "prompt", "messages", "text"} & row.keys():
        return None
    if tokenizer is None:
        raise PromptError(f"a tokenizer is needed to read the text columns {sorted(row)}, found none")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor carries its tokenizer
    if "chosen" in row and "rejected" in row:
        if "prompt" in row:
            prompt, chosen = encode_exchange(tokenizer, row["prompt"], row["chosen"])
            return prompt, chosen, encode_exchange(tokenizer, row["prompt"], row["rejected"])[1]
        chosen, rejected = encode_text(tokenizer, row["chosen"]), encode_text(tokenizer, row["rejected"])
        shared = _common_prefix(chosen, rejected)
        return chosen[:shared], chosen[shared:], rejected[shared:]
    if "prompt" in row:
        return *encode_exchange(tokenizer, row["prompt"], row.get("completion")), None
    return encode_text(tokenizer, row["messages"] if "messages" in row else row["text"]), [], None


def _language_model_rows(row: Mapping[str, Any]) -> list[tuple[list[int], int]]:
    ids, length = list(row["input_ids"]), len(row["input_ids"])
    if "completion_start" in row:
        return [(ids, int(row["completion_start"]))]
    if row.get("completion_mask") is not None:
        trained = [bool(x) for x in row["completion_mask"]]
    elif row.get("labels") is not None and len(row["labels"]) == length:
        trained = [label != -100 for label in row["labels"]]
    else:
        trained = [False] * length
    pieces, begin = [], 0
    for size in row.get("seq_lengths") or [length]:
        window = trained[begin : begin + size]
        partly = any(window) and not all(window)  # trained on throughout: a text, not a prompt with a completion
        pieces.append((ids[begin : begin + size], window.index(True) if partly else size))
        begin += size
    return pieces


def encode_exchange(tokenizer: Any, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its completion, tokenized so that the prompt's ids are a prefix of the whole.

    Both may be strings or lists of chat messages; for messages the chat template is applied with the generation
    prompt, and the completion is what the template adds for the assistant's turn.
    """
    if isinstance(prompt, str):
        head = list(tokenizer(prompt)["input_ids"])
        if completion is None:
            return head, []
        text = completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
        whole = list(tokenizer(prompt + text)["input_ids"])
        if whole[: len(head)] == head:
            return head, whole[len(head) :]
        return head, list(tokenizer(text, add_special_tokens=False)["input_ids"])
    head = _chat_ids(tokenizer, prompt, add_generation_prompt=True)
    if completion is None:
        return head, []
    turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    whole = _chat_ids(tokenizer, [*prompt, *turns], add_generation_prompt=False)
    shared = len(head) if whole[: len(head)] == head else _common_prefix(head, whole)
    return whole[:shared], whole[shared:]


def encode_text(tokenizer: Any, text: Any) -> list[int]:
    """Token ids of one whole text: a string, or a list of chat messages."""
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    return _chat_ids(tokenizer, text, add_generation_prompt=False)


def _chat_ids(tokenizer: Any, messages: Any, *, add_generation_prompt: bool) -> list[int]:
    if tokenizer.chat_template is None:
        raise PromptError("chat messages: the tokenizer has no chat template, found messages with roles")
    encoded = tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=True
    )
    return list(encoded["input_ids"])


def _single(ids: Sequence[int], start: int, max_length: int) -> RowTexts:
    limit = start if start < len(ids) else 0  # a text without completion may be cut anywhere
    if limit >= max_length or len(ids) < 2:
        return RowTexts(())
    kept = tuple(ids[:max_length])
    return RowTexts((Prompt(kept, min(start, len(kept)), _unit(ids[:start], kept)),))


def _preference(prompt: list[int], chosen: list[int], rejected: list[int], max_length: int) -> RowTexts:
    if len(prompt) >= max_length or not chosen or not rejected:
        return RowTexts(())
    unit = _unit(prompt, [*prompt, -1, *chosen, -1, *rejected])
    texts = tuple(Prompt(tuple([*prompt, *side][:max_length]), len(prompt), unit) for side in (chosen, rejected))
    if texts[0].input_ids == texts[1].input_ids:
        return RowTexts(())
    return RowTexts(texts, ContrastPair(texts[0], texts[1], group=unit))


def _unit(prompt: Sequence[int], text: Sequence[int]) -> str:
    """Hash of the prompt; of the whole text where the prompt is a start token at most."""
    ids = prompt if len(prompt) > 1 else text
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
