"""Which models may stand for the frozen start: only those that read as the policy read at step 0."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from trainers.table import causal_lm, lora

from interp_rlhf.activations.capturing import read_prompts
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.activations.reference import check_is_start, find_reference, reading_difference
from interp_rlhf.errors import ReferenceMismatch

TEXTS = [Prompt((1, *range(5 + i, 15 + i)), 4, str(i)) for i in range(6)]


def read(model):
    return read_prompts(
        model, TEXTS, ["layers.0.resid_post", "layers.2.resid_post"], batch_size=4, pad_token_id=0
    ).means


def adapted():
    torch.manual_seed(0)
    return get_peft_model(causal_lm(), lora())


def grown(model):
    """What training would do: every adapter weight moves."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3)
    return model


def test_a_fresh_adapter_switched_off_is_the_start_even_after_training():
    model = adapted()
    start = read(model)
    reference = find_reference("adapter", model, None)
    grown(model)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    assert reading_difference(start, read(model)) > 0.01
    with reference.reading() as off:
        difference = reading_difference(start, read(off))
    check_is_start("adapter", difference)
    assert difference == 0.0
    assert frozen == {name: p.requires_grad for name, p in model.named_parameters()} != trainable


def test_a_continued_adapter_switched_off_is_not_the_start():
    model = grown(adapted())
    start = read(model)
    with find_reference("adapter", model, None).reading() as off:
        difference = reading_difference(start, read(off))
    with pytest.raises(ReferenceMismatch, match=r"reference: adapter: its readings differ .* expected at most 0.001"):
        check_is_start("adapter", difference)


def test_a_foreign_reference_model_is_refused_and_the_right_one_accepted():
    start = read(causal_lm(0))
    with find_reference("ref_model", causal_lm(0), causal_lm(0)).reading() as same:
        check_is_start("ref_model", reading_difference(start, read(same)))
    with find_reference("ref_model", causal_lm(0), causal_lm(1)).reading() as foreign, pytest.raises(ReferenceMismatch):
        check_is_start("ref_model", reading_difference(start, read(foreign)))


def test_a_copy_stays_where_the_policy_was():
    model = causal_lm()
    start = read(model)
    reference = find_reference("copy", model, None)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with reference.reading() as copied:
        assert reading_difference(start, read(copied)) == 0.0
    assert reading_difference(start, read(model)) > 1e-3


@pytest.mark.parametrize(("kind", "message"), [("adapter", "no PEFT adapter"), ("ref_model", "no reference model")])
def test_what_is_not_there_is_refused(kind, message):
    with pytest.raises(ReferenceMismatch, match=message):
        find_reference(kind, causal_lm(), None)


def test_nan_readings_are_never_the_start():
    with pytest.raises(ReferenceMismatch):
        check_is_start("copy", float("nan"))
