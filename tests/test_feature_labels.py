"""Labels say what the evidence says; their scores are NumPy's correlations over single tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shape_checked import checked
from tiny_models import make_model, make_prompts

from interp_rlhf.activations.capturing import read_prompts
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.activations.top_contexts import TokenCodes, TopContexts
from interp_rlhf.errors import MeasurementError

labels = checked("interp_rlhf.readouts.feature_labels")
WORDS = ["zero", " one", "two\n", "three", "four", "five", "six", "seven"]


def planted(n: int, seed: int, vocabulary: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Ids ``[n]``, and codes ``[n, 4]`` of features of one token, of chance, of positions and of two tokens."""
    rng = np.random.default_rng(seed)
    ids = rng.zipf(1.3, n) % vocabulary
    position = np.arange(n) % 12
    one = (ids == 3) * (5 + 0.1 * rng.standard_normal(n))
    chance = (rng.random(n) < 0.1) * rng.exponential(2, n)
    place = (position == 0) * (3 + 0.1 * rng.standard_normal(n))
    two = (ids == 3) * 4.0 + (ids == 5) * rng.exponential(1, n)
    return ids, np.stack([one, chance, place, two], axis=1)


def summed(ids: np.ndarray, codes: np.ndarray) -> TokenCodes:
    return TokenCodes.of(torch.from_numpy(ids), torch.from_numpy(codes))


@pytest.fixture(scope="module")
def both() -> tuple[TokenCodes, TokenCodes]:
    return summed(*planted(6000, 1)), summed(*planted(3000, 2))


def reference(fit: tuple[np.ndarray, np.ndarray], held: tuple[np.ndarray, np.ndarray], column: int) -> float:
    """Token by token."""
    ids, codes = fit[0], fit[1][:, column]
    guess = [codes[ids == i].mean() if (ids == i).any() else codes.mean() for i in held[0]]
    return float(np.corrcoef(guess, held[1][:, column])[0, 1])


def test_scores_are_correlations_over_single_tokens() -> None:
    fit, held = planted(500, 1, vocabulary=300), planted(400, 2, vocabulary=300)
    unseen = ~np.isin(held[0], fit[0])
    assert 0.02 < unseen.mean() < 0.5
    for column in range(4):
        found = labels.label_score(summed(*fit), summed(*held), column)
        np.testing.assert_allclose(found.score, reference(fit, held, column), rtol=1e-9)
        assert found.tokens == 400 and found.named is None
        np.testing.assert_allclose(found.unseen, unseen.mean())


def test_a_feature_of_one_token_scores_near_1(both: tuple[TokenCodes, TokenCodes]) -> None:
    found = labels.label_score(*both, 0)
    assert found.score > 0.99 and found.shuffled < 0.8 * found.score


@pytest.mark.parametrize("column", [1, 2], ids=["random", "position"])
def test_a_feature_that_tokens_do_not_explain_scores_near_0(both: tuple[TokenCodes, TokenCodes], column: int) -> None:
    found = labels.label_score(*both, column)
    assert abs(found.score) < 0.06
    assert labels.label_score(both[0], both[0], column).score > abs(found.score)  # on its own texts it flatters


def test_shuffled_labels_score_what_their_permutations_do(both: tuple[TokenCodes, TokenCodes]) -> None:
    fit, held = planted(500, 1), planted(400, 2)
    found = labels.label_score(summed(*fit), summed(*held), 3, seed=7)
    assert found == labels.label_score(summed(*fit), summed(*held), 3, seed=7)
    assert found.shuffled != labels.label_score(summed(*fit), summed(*held), 3, seed=8).shuffled
    names, place = np.unique(held[0], return_inverse=True)
    means = fit[1][:, 3].mean() * np.ones(len(names))
    for index, name in enumerate(names):
        if (fit[0] == name).any():
            means[index] = fit[1][fit[0] == name, 3].mean()
    generator = torch.Generator().manual_seed(7)
    orders = [torch.randperm(len(names), generator=generator).numpy() for _ in range(labels.SHUFFLES)]
    chance = [np.corrcoef(means[order][place], held[1][:, 3])[0, 1] for order in orders]
    np.testing.assert_allclose(found.shuffled, max(chance), rtol=1e-9)


def test_chance_is_above_its_shuffled_labels_once_in_twenty() -> None:
    """Predictions that have nothing to do with the held-out codes, 400 times over."""
    rng, above = np.random.default_rng(0), 0
    for seed in range(400):
        ids = np.repeat(np.arange(12), 6)
        fit, held = (summed(ids, rng.exponential(1, (72, 1))) for _ in range(2))
        found = labels.label_score(fit, held, 0, seed=seed)
        above += found.score > found.shuffled
    assert 400 / 20 - 18 < above < 400 / 20 + 18  # four standard deviations


def test_named_tokens_alone_predict_less_or_as_much(both: tuple[TokenCodes, TokenCodes]) -> None:
    fit, held = planted(500, 1), planted(400, 2)
    label = labels.feature_label(summed(*fit), 3, str, most=2, share=0.01)
    assert [token for token, _ in label.tokens] == [3, 5]
    mean = {token: fit[1][fit[0] == token, 1].mean() for token in (3, 5)}
    others = fit[1][~np.isin(fit[0], [3, 5]), 1].mean()
    guess = [mean.get(token, others) for token in held[0].tolist()]
    found = labels.label_score(summed(*fit), summed(*held), 1, label)  # of a feature that fires on others as well
    np.testing.assert_allclose(found.named, np.corrcoef(guess, held[1][:, 1])[0, 1], rtol=1e-9)
    own = labels.label_score(summed(*fit), summed(*held), 3, label)
    assert own.named == pytest.approx(own.score, abs=1e-12)  # of one that these two tokens are all of
    one = labels.feature_label(summed(*fit), 3, str, most=1)
    assert labels.label_score(summed(*fit), summed(*held), 3, one).named < own.score
    spread = labels.feature_label(both[0], 1, str, share=0.9)
    assert spread.tokens == () and labels.label_score(*both, 1, spread).named is None


def test_scores_that_are_undefined_are_none() -> None:
    ids = np.array([1, 2, 2, 3])
    live, dead, even = np.array([[1.0], [0.1], [0.2], [0.0]]), np.zeros((4, 1)), np.full((4, 1), 0.1)
    for fit, held in ((dead, live), (live, dead), (even, live), (live, even)):
        found = labels.label_score(summed(ids, fit), summed(ids, held), 0)
        assert found.score is None and found.shuffled is None and found.tokens == 4 and found.unseen == 0
    for n in range(2, 40):  # the variance of equal codes is rounding, above 0 or below
        same = summed(np.arange(n) % 4, np.full((n, 1), 0.1))
        assert labels.label_score(summed(ids, live), same, 0).score is None
    found = labels.label_score(summed(ids, live), summed(ids + 9, live), 0)
    assert found.score is None and found.unseen == 1  # no id is known: one prediction for all
    none = labels.label_score(summed(ids, live), summed(ids[:0], live[:0]), 0)
    assert (none.score, none.shuffled, none.tokens) == (None, None, 0) and np.isnan(none.unseen)
    with pytest.raises(MeasurementError, match="expected tokens to fit on, found none"):
        labels.label_score(summed(ids[:0], live[:0]), summed(ids, live), 0)
    with pytest.raises(MeasurementError, match=r"expected a column 0\.\.0, found 1"):
        labels.label_score(summed(ids, live), summed(ids, live), 1)


class _Coordinates:
    """Codes are the positive coordinates of an activation."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z


def test_what_a_model_embeds_is_explained_by_its_tokens_and_what_it_computes_is_less() -> None:
    prompts = [
        Prompt(tuple(3 + token % 6 for token in prompt.input_ids), prompt.completion_start, prompt.unit)
        for prompt in make_prompts(40)
    ]
    names = ("embed", "layers.1.attn_out")
    streams = {
        name: TopContexts(_Coordinates(), "own", name, range(8), prompts=prompts, held_out=range(0, 40, 3))
        for name in names
    }
    read_prompts(make_model("llama"), prompts, [], batch_size=8, pad_token_id=0, side="left", observers=streams)
    scores = {}
    for name in names:
        found = streams[name].contexts()
        assert found.fit.tokens + found.held.tokens == found.tokens > 0 < found.held.tokens
        scores[name] = [labels.label_score(found.fit, found.held, column).score for column in range(8)]
    np.testing.assert_allclose([r for r in scores[names[0]] if r is not None], 1, atol=1e-6)
    assert max(scores[names[1]]) < 0.95 and None not in scores[names[1]]


# ---------------------------------------------------------------------------------------------------------- the label


def test_labels_say_what_the_evidence_says() -> None:
    ids = np.array([1, 1, 2, 4, 5, 0])
    fit = summed(ids, np.array([[4.0], [2.0], [2.0], [1.5], [0.5], [0.0]]))
    near = [("honesty", 0.75), ("harm", -0.5), ("length", 0.2)]
    label = labels.feature_label(fit, 0, WORDS.__getitem__, promoted=[7, 6, 5, 4], concepts=near)
    assert label.text == (
        r"fires on ' one' (60 %), 'two\n' (20 %) and 'four' (15 %); promotes 'seven', 'six' and 'five'; "
        "close to honesty (cosine 0.75); opposite to harm (cosine -0.50)"
    )
    assert label.tokens == ((1, 0.6), (2, 0.2), (4, 0.15)) and label.promoted == (7, 6, 5)
    assert label.concepts == (("honesty", 0.75), ("harm", -0.5))
    share = np.array([0.6, 0.2, 0.15, 0.05])
    np.testing.assert_allclose(label.spread, np.exp(-(share * np.log(share)).sum()))
    assert labels.feature_label(fit, 0, WORDS.__getitem__, most=1).text == "fires on ' one' (60 %)"
    assert labels.feature_label(fit, 0, WORDS.__getitem__, share=0.7).text == "fires on many tokens (about 3)"


def test_equal_shares_are_named_by_id_and_silence_is_said() -> None:
    fit = summed(np.array([6, 4, 2]), np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    label = labels.feature_label(fit, 0, WORDS.__getitem__, most=2)
    assert [token for token, _ in label.tokens] == [2, 4]
    many = labels.feature_label(summed(np.arange(300) % 150, np.ones((300, 1))), 0, str, most=5, share=0.0)
    assert [token for token, _ in many.tokens] == [0, 1, 2, 3, 4]
    silent = labels.feature_label(fit, 1, WORDS.__getitem__, promoted=[3])
    assert silent.text == "silent on the fitting texts; promotes 'three'"
    assert silent.tokens == () and silent.spread is None
    with pytest.raises(MeasurementError, match="expected finite sums of codes of at least 0, found -2"):
        labels.feature_label(summed(np.array([1]), np.array([[-2.0]])), 0, str)
    with pytest.raises(MeasurementError, match=r"expected a column 0\.\.1, found 2"):
        labels.feature_label(fit, 2, str)
