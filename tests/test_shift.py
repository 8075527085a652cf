"""The shift splits into text and representation: planted in real models, and against NumPy and SciPy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from shape_checked import checked
from tiny_models import make_model, make_prompts

from interp_rlhf.activations.capturing import read_prompts
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.activations.sampling import sample_completions
from interp_rlhf.errors import MeasurementError

shift = checked("interp_rlhf.drift.shift")

PROMPTS = make_prompts(12)
PARTS = {"total", "text", "representation", "representation_on_start", "interaction"}


def write(model: Any) -> list[Prompt]:
    return sample_completions(
        model, PROMPTS, completions=2, max_new_tokens=6, seed=0, pad_token_id=0, eos_token_ids=(2,), batch_size=8
    )


def decomposed(policy: Any, start: Any, hookpoint: str, v: torch.Tensor) -> dict[str, Any]:
    """The shift of ``x·v`` between two models, from what each writes and how each reads it."""
    texts = {"t": write(policy), "0": write(start)}

    def g(which: str, model: Any) -> torch.Tensor:
        means = read_prompts(model, texts[which], [hookpoint], batch_size=8, pad_token_id=0).means[hookpoint]
        return means.double() @ v.double()

    units = [[text.unit for text in texts[which]] for which in ("t", "0")]
    found = shift.decompose(g("t", policy), g("t", start), g("0", policy), g("0", start), *units)
    return {name.removeprefix("shift/"): value for name, value in found.items()}


def meaning(model: Any) -> torch.Tensor:
    """The direction in which the embeddings of tokens 10 to 19 differ from the others."""
    weight = model.get_input_embeddings().weight.detach()
    v = weight[10:20].mean(0) - weight.mean(0)
    return v / v.norm()


# -------------------------------------------------------------------------------------------------------- ground truth


def test_another_output_bias_is_text_alone() -> None:
    start = make_model("phi")
    policy = copy.deepcopy(start)
    with torch.no_grad():
        policy.lm_head.bias[10:20] += 6
    v = meaning(start)
    for hookpoint in ("layers.0.resid_post", "layers.2.resid_post"):
        found = decomposed(policy, start, hookpoint, v)
        for name in ("representation", "representation_on_start", "interaction"):
            assert (found[name].value, found[name].ci_low, found[name].ci_high) == (0.0, 0.0, 0.0)
        assert found["text"].ci_low > 0 and found["text"].value == found["total"].value


@pytest.mark.parametrize("c", [0.7, -2.5])
def test_a_direction_that_nothing_reads_is_representation_alone(c: float) -> None:
    """The final LayerNorm takes out the mean over channels: what is added along it is in the stream, and is ignored."""
    start = make_model("gpt2")
    policy, v = copy.deepcopy(start), torch.full((32,), 32**-0.5)
    with torch.no_grad():
        policy.transformer.h[-1].mlp.c_proj.bias += c * v
    assert write(policy) == write(start)
    found = decomposed(policy, start, "layers.2.resid_post", v)
    assert (found["text"].value, found["text"].ci_low, found["text"].ci_high) == (0.0, 0.0, 0.0)
    for name in ("total", "representation", "representation_on_start"):
        assert found[name].value == pytest.approx(c, abs=1e-5)
        assert found[name].ci_high - found[name].ci_low < 1e-5
    assert found["interaction"].value == pytest.approx(0, abs=1e-5)


def test_both_at_once_add_up() -> None:
    start = make_model("gpt2", tie_word_embeddings=False)
    policy, v = copy.deepcopy(start), torch.full((32,), 32**-0.5)
    with torch.no_grad():
        policy.transformer.h[-1].mlp.c_proj.bias += 0.7 * v
        policy.lm_head.weight[10:20] *= 2
    found = decomposed(policy, start, "layers.2.resid_post", v)
    assert found["representation"].value == pytest.approx(0.7, abs=1e-5)
    assert abs(found["text"].value) > 1e-3
    assert found["total"].value == pytest.approx(found["text"].value + 0.7, abs=1e-5)


def test_the_same_model_does_not_shift() -> None:
    model = make_model("llama")
    found = decomposed(copy.deepcopy(model), model, "layers.1.resid_post", torch.ones(32))
    assert set(found) == PARTS
    for value in found.values():
        assert (value.value, value.ci_low, value.ci_high, value.n) == (0.0, 0.0, 0.0, 12)


def test_all_weights_changed_keeps_the_identities() -> None:
    found = decomposed(make_model("llama", seed=1), make_model("llama"), "layers.2.resid_post", torch.ones(32))
    value = {name: one.value for name, one in found.items()}
    assert min(map(abs, value.values())) > 1e-3
    assert value["total"] == pytest.approx(value["text"] + value["representation"], abs=1e-6)
    assert value["interaction"] == pytest.approx(value["representation"] - value["representation_on_start"], abs=1e-6)


# ------------------------------------------------------------------------------------------------------------ numbers


def planted(seed: int, units: list[str]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=len(units)))


def averages(values: torch.Tensor, units: list[str]) -> np.ndarray:
    return np.array(
        [np.mean([v for v, u in zip(values.tolist(), units, strict=True) if u == one]) for one in "abcdefgh"]
    )


def test_every_part_against_numpy_and_scipy() -> None:
    units_t, units_0 = list("aabbbcddeeeffghh"), list("hgfedcbaabcd")  # other order, other numbers of completions
    tt, t0, zt, z0 = (planted(seed, u) for seed, u in enumerate((units_t, units_t, units_0, units_0)))
    found = shift.decompose(tt, t0, zt, z0, units_t, units_0, resamples=10_000, confidence=0.9)
    a, b, c, d = (averages(*pair) for pair in ((tt, units_t), (t0, units_t), (zt, units_0), (z0, units_0)))
    expected = {
        "total": a - d, "text": b - d, "representation": a - b, "representation_on_start": c - d,
        "interaction": (a - b) - (c - d),
    }  # fmt: skip
    assert set(found) == {f"shift/{name}" for name in expected}
    for name, values in expected.items():
        one = found[f"shift/{name}"]
        theirs = stats.bootstrap(
            (values,), np.mean, n_resamples=10_000, confidence_level=0.9, method="percentile", rng=0
        )
        assert one.value == pytest.approx(values.mean(), abs=1e-12) and one.n == 8
        assert (one.unit, one.tier, one.null_kind) == ("sd", "B", "none")
        assert one.ci_low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * values.std())
        assert one.ci_high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * values.std())
    text_now = (a - c).mean()  # the text's part under the policy's own reading
    assert found["shift/total"].value == pytest.approx(
        found["shift/representation_on_start"].value + text_now, abs=1e-6
    )


def test_without_a_frozen_copy_what_needs_one_is_absent() -> None:
    units = list("abcd")
    values = [planted(seed, units) for seed in range(3)]
    found = shift.decompose(values[0], None, values[1], values[2], units, units)
    assert set(found) == {"shift/total", "shift/representation_on_start"}


def test_projection_is_in_step_0_standard_deviations() -> None:
    generator = torch.Generator().manual_seed(1)
    x, x0, v = (torch.randn(*shape, generator=generator) for shape in ((5, 7), (40, 7), (7,)))
    a, b, w = (t.double().numpy() for t in (x, x0 + 100, v))
    found = shift.standardised_projection(x, v, x0 + 100)
    np.testing.assert_allclose(found.numpy(), a @ w / (b @ w).std(ddof=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shift.decompose(*[torch.ones(2)] * 4, ["a", "b"], ["a", "c"]), r"1 on the first only .*'b'"),
        (lambda: shift.decompose(*[torch.ones(2)] * 4, ["a", "a"], ["a", "a"]), "at least 2 sampling units"),
        (lambda: shift.decompose(*[torch.ones(2)] * 4, ["a", "b", "c"], ["a", "b", "c"]), "expected one per row"),
        (lambda: shift.decompose(*[torch.tensor([1.0, float("nan")])] * 4, ["a", "b"], ["a", "b"]), "NaN"),
        (lambda: shift.standardised_projection(torch.ones(2, 3), torch.ones(3), torch.ones(4, 3)), "do not vary"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        call()
