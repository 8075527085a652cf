"""Log-probabilities of completions, against the models' own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, make_model, make_prompts

from interp_rlhf.activations.capturing import read_prompts
from interp_rlhf.activations.hookpoints import layout
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.activations.scoring import head_logits
from interp_rlhf.errors import MeasurementError


def own_log_prob(model: Any, prompt: Prompt) -> float:
    """From the model's whole forward on the text alone."""
    ids = torch.tensor([prompt.input_ids])
    with torch.no_grad():
        log_probs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    positions = range(max(prompt.completion_start, 1), len(prompt.input_ids))
    return float(sum(log_probs[t - 1, prompt.input_ids[t]] for t in positions))


def scores(model: Any, prompts: list[Prompt], **changes: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"batch_size": 3, "pad_token_id": 0, "log_probs": True, "tokens": "all", **changes}
    found = read_prompts(model, prompts, [], **settings).log_probs
    assert found is not None and found.device.type == "cpu"
    return found


@pytest.mark.parametrize("model_type", CONFIGS)
def test_log_probabilities_are_the_models_own(model_type: str) -> None:
    """Caps (Gemma), scales (Cohere, Granite), biases (GPT-J, Phi), projections (OPT) and plain heads alike."""
    model, prompts = make_model(model_type), make_prompts()
    expected = torch.tensor([own_log_prob(model, prompt) for prompt in prompts], dtype=torch.float64)
    torch.testing.assert_close(scores(model, prompts), expected, atol=1e-4, rtol=1e-5)
    assert expected.std() > 1


@pytest.mark.parametrize(
    ("model_type", "setting"), [("gemma2", "final_logit_softcapping"), ("granite", "logits_scaling")]
)
def test_the_heads_settings_matter_in_these_tests(model_type: str, setting: str) -> None:
    model, prompts = make_model(model_type), make_prompts()
    before = scores(model, prompts)
    setattr(model.config, setting, 50.0)
    assert (scores(model, prompts) - before).abs().max() > 1


def test_texts_without_completion_or_without_prompt() -> None:
    model = make_model("llama")
    whole, none = Prompt((5, 6, 7, 8), 0, "a"), Prompt((5, 6, 7, 8), 4, "b")
    found = scores(model, [whole, none, Prompt((9, 5), 1, "c")], side="left")
    assert found[1] == 0 and found[0] == pytest.approx(own_log_prob(model, whole), abs=1e-5)


def test_a_replaced_instance_forward_is_not_called() -> None:
    """Trainers put a forward without logits on the instance (fused or chunked heads)."""
    model, prompts = make_model("llama"), make_prompts()
    expected = scores(model, prompts)

    def forward(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the instance's forward was called")

    model.forward = forward
    assert torch.equal(scores(model, prompts), expected)


def test_trls_fused_head() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL has no fused head (it came with 1.15)")
    model, prompts = make_model("gemma2"), make_prompts()
    expected = scores(model, prompts)
    utils.add_fused_lm_head(model)
    assert torch.equal(scores(model, prompts), expected)


def test_models_without_a_usable_head_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    classifier = LlamaForSequenceClassification(LlamaConfig(**CONFIGS["llama"], num_labels=1))
    with pytest.raises(MeasurementError, match="LlamaForSequenceClassification: expected a language-model head"):
        scores(classifier, make_prompts())

    model = make_model("llama")

    class Odd(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            return self.model(input_ids).nothing_like_it.logits

    model.__class__ = Odd
    with pytest.raises(MeasurementError, match="Odd: its head cannot be run on hidden states"):
        scores(model, make_prompts())


def test_head_logits_shape() -> None:
    parts = layout(make_model("cohere"))
    with torch.no_grad():
        assert head_logits(parts, torch.randn(1, 5, 32)).shape == (1, 5, 64)
        assert head_logits(parts, torch.randn(1, 0, 32)).shape == (1, 0, 64)
