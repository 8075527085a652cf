"""Stored step-0 readings come back by text, whatever else the snapshot holds, and foreign ones are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.baseline import baseline_tensors, stored_readings
from interp_rlhf.errors import FormatError
from interp_rlhf.plan import TextTable
from interp_rlhf.reading import Reading

PLAN: Any = SimpleNamespace(hookpoints=("layers.0.resid_post",))


def table(*first_tokens: int) -> TextTable:
    prompts = [Prompt((token, 2, 3), 1, str(token)) for token in first_tokens]
    return TextTable(tuple(sorted(prompts, key=lambda prompt: prompt.id)), frozenset())


def reading(texts: TextTable, scale: float) -> Reading:
    values = torch.tensor([float(prompt.input_ids[0]) for prompt in texts.prompts])
    means = {name: scale * values[:, None].expand(-1, 3).contiguous() for name in PLAN.hookpoints}
    return Reading(means, 10 * scale * values.double(), 0, 0.0)


def test_ids_as_numbers_are_the_ids() -> None:
    texts = table(*range(20))
    assert [f"{number % 2**64:016x}" for number in texts.ids.tolist()] == [prompt.id for prompt in texts.prompts]


def test_rows_are_taken_by_text() -> None:
    stored = baseline_tensors(table(*range(9)), reading(table(*range(9)), 1.0), reading(table(*range(9)), 2.0))
    wanted = table(7, 1, 4)
    for found, scale in zip(stored_readings(stored, PLAN, wanted), (1.0, 2.0), strict=True):
        expected = reading(wanted, scale)
        assert torch.equal(found.means[PLAN.hookpoints[0]], expected.means[PLAN.hookpoints[0]])
        assert torch.equal(found.log_probs, expected.log_probs)


def test_as_many_other_texts_are_refused() -> None:
    stored = baseline_tensors(table(1, 2, 3), reading(table(1, 2, 3), 1.0), reading(table(1, 2, 3), 1.0))
    with pytest.raises(FormatError, match="readings of 2 of the 3 texts of this run found"):
        stored_readings(stored, PLAN, table(2, 3, 4))


def test_another_hookpoint_is_refused() -> None:
    stored = baseline_tensors(table(1), reading(table(1), 1.0), reading(table(1), 1.0))
    with pytest.raises(FormatError, match=r"no readings at layers\.1\.resid_post"):
        stored_readings(stored, SimpleNamespace(hookpoints=("layers.1.resid_post",)), table(1))  # type: ignore[arg-type]


def test_readings_that_do_not_say_whose_they_are_are_refused() -> None:
    stored = baseline_tensors(table(1), reading(table(1), 1.0), reading(table(1), 1.0))
    del stored["text_ids"]
    with pytest.raises(FormatError, match="readings of 0 of the 1 texts of this run found"):
        stored_readings(stored, PLAN, table(1))
