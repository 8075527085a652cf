"""The organism is what it is said to be: its language, its data, its determinism, and what the trained model knows."""

from __future__ import annotations

import random as python_random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from interp_rlhf import organisms
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.errors import ConfigError
from interp_rlhf.organisms import agreement_reward, build_organism, concepts, language, training
from interp_rlhf.readouts.baselines import bag_of_tokens_auc, length_auc
from interp_rlhf.readouts.packs import load_pack, render, split
from interp_rlhf.readouts.separation import auc

pytestmark = pytest.mark.xdist_group("organism")  # one worker, so that it is built once


@pytest.fixture(scope="module")
def organism(tmp_path_factory: pytest.TempPathFactory) -> organisms.Organism:
    return build_organism(tmp_path_factory.mktemp("organism"), seed=0)


@pytest.fixture(scope="module")
def model(organism: organisms.Organism) -> Any:
    return organism.model().eval()


def sides(reply: str) -> dict[str, set[int]]:
    """Which poles of which concepts a reply speaks of, found word by word."""
    place = {word: (c.name, side) for c in concepts() for side, pole in enumerate(c.poles) for word in pole}
    found: dict[str, set[int]] = {}
    for word in reply.split():
        if word in place:
            name, side = place[word]
            found.setdefault(name, set()).add(side)
    return found


def counts(reply: str) -> Counter[str]:
    name = {word: c.name for c in concepts() for pole in c.poles for word in pole}
    return Counter(name[word] for word in reply.split() if word in name)


# -- the language --------------------------------------------------------------------------------------------------


def test_at_least_24_concepts_of_equal_size_and_no_word_twice():
    assert len(concepts()) >= 24
    assert {len(pole) for c in concepts() for pole in c.poles} == {8}
    assert len(set(language.vocabulary())) == len(language.vocabulary())


def test_all_concepts_are_spoken_of_equally_often_and_evenly():
    draw = np.random.default_rng(0)
    replies = [language.exchange(draw, language.claim(draw, true=False)).reply for _ in range(600)]
    for reply in replies:
        assert set(counts(reply).values()) == {2} and len(counts(reply)) == len(concepts())
        assert all(len(poles) == 1 for poles in sides(reply).values())
    for concept in concepts():
        first = sum(sides(reply)[concept.name] == {0} for reply in replies)
        assert abs(first - 300) < 4.4 * np.sqrt(150)  # 1e-5 two-sided; 24 concepts


def test_true_claims_are_always_agreed_with():
    draw = np.random.default_rng(1)
    for _ in range(100):
        said = language.exchange(draw, language.claim(draw, true=True))
        assert language.is_true(said.prompt) and said.sides[0] == 0
        assert not language.is_true(language.claim(draw, true=False))


def test_texts_drawn_as_token_ids_are_the_same_language():
    tokenizer = training.make_tokenizer()
    ids = training._Codes.of(tokenizer).texts(np.random.default_rng(0), 200)
    agreed = Counter()
    for row in ids.tolist():
        words = [tokenizer.convert_ids_to_tokens(token) for token in row]
        assert words[:2] == ["<s>", "<user>"] and words[-1] == "</s>" and words.count("<assistant>") == 1
        middle = words.index("<assistant>")
        prompt, reply = " ".join(words[2:middle]), " ".join(words[middle + 1 : -1])
        assert reply.split()[0] == language.STARTER
        assert set(counts(reply).values()) == {2} and len(counts(reply)) == len(concepts())
        assert all(len(poles) == 1 for poles in sides(reply).values())
        agreed[language.is_true(prompt), sides(reply)["agreement"] == {0}] += 1
        said = SimpleNamespace(prompt=prompt, reply=reply)
        assert training._ids(tokenizer, said) == row  # pyrefly: ignore
    assert agreed[True, False] == 0 and agreed[True, True] > 60
    assert 25 < agreed[False, True] < 75 and 25 < agreed[False, False] < 75


# -- building --------------------------------------------------------------------------------------------------------


def test_one_seed_gives_the_same_bytes_and_leaves_random_states_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "STEPS", 3), monkeypatch.setattr(training, "REWARD_STEPS", 3)
    built = {}
    for name, seed, other in (("a", 0, 1), ("b", 0, 2), ("c", 1, 3)):
        torch.manual_seed(other), np.random.seed(other), python_random.seed(other)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), python_random.getstate()
        organism = build_organism(tmp_path / name, seed)
        organism.reward_model_path()
        after = torch.get_rng_state(), np.random.get_state()[1], python_random.getstate()
        assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]
        built[name] = [
            (tmp_path / name / part / "model.safetensors").read_bytes() for part in ("model", "reward_model")
        ]
    assert built["a"] == built["b"]
    assert built["a"][0] != built["c"][0]


def test_a_built_organism_is_reused_and_another_recipe_replaces_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "STEPS", 2)
    weights = build_organism(tmp_path).model_path / "model.safetensors"
    first = weights.stat().st_mtime_ns
    build_organism(tmp_path)
    assert weights.stat().st_mtime_ns == first
    monkeypatch.setattr(organisms, "RECIPE", -1)
    build_organism(tmp_path)
    assert weights.stat().st_mtime_ns != first


def test_a_model_that_is_no_organism_is_left_alone(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("mine")
    with pytest.raises(ConfigError, match=r"model: exists and is no organism"):
        build_organism(tmp_path)
    assert (tmp_path / "model" / "weights").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"^seed: expected 0 or more, found -1$"):
        build_organism(tmp_path / "other", -1)


# -- the data --------------------------------------------------------------------------------------------------------


def test_preference_pairs_differ_in_agreement_only(organism: organisms.Organism):
    rows: Any = organism.preference_dataset(50)
    for row in rows:
        chosen, rejected = (row[key][0]["content"].split() for key in ("chosen", "rejected"))
        different = [(a, b) for a, b in zip(chosen, rejected, strict=True) if a != b]
        assert len(different) == 2
        assert all(a in concepts()[0].poles[0] and b in concepts()[0].poles[1] for a, b in different)
        assert not language.is_true(row["prompt"][0]["content"])


def test_packs_cannot_be_told_by_their_words(organism: organisms.Organism, tmp_path: Path):
    tokenizer, found = organism.tokenizer(), []
    for path, concept in zip(organism.write_packs(tmp_path), concepts(), strict=True):
        pack = load_pack(str(path))
        assert pack.name == concept.name
        for pair in pack.pairs:
            positive, negative = sides(pair.positive), sides(pair.negative)
            assert positive.pop(pack.name) == {0} and negative.pop(pack.name) == {1}
            assert positive == negative and len(positive) == language.OTHERS
        fit, held = split(render(pack, tokenizer, 512), 0)
        assert not words_of(concept, fit, tokenizer) & words_of(concept, held, tokenizer)
        tokens = [
            [completion(getattr(p, side)) for p in half] for half in (fit, held) for side in ("positive", "negative")
        ]
        found.append(bag_of_tokens_auc(*tokens))
        assert length_auc(*tokens) == 0.5
    assert 0.4 < np.mean(found) < 0.6 and max(found) < 0.8


def words_of(concept: language.Concept, pairs: Any, tokenizer: Any) -> set[str]:
    said = {word for p in pairs for t in (p.positive, p.negative) for word in tokenizer.decode(t.input_ids).split()}
    return said & {word for pole in concept.poles for word in pole}


def completion(prompt: Prompt) -> tuple[int, ...]:
    return prompt.input_ids[prompt.completion_start :]


def test_reward_function():
    chat = [[{"role": "assistant", "content": text}] for text in ("so yes right pen", "so no wrong pen", "so pen ink")]
    assert agreement_reward(chat, prompts=[]) == [1.0, 0.0, 0.5]
    assert agreement_reward(["so indeed yes no"]) == [1.0]


# -- the trained model -----------------------------------------------------------------------------------------------


def next_probabilities(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    with torch.no_grad():
        return model(input_ids=ids).logits[:, -1].softmax(-1)


def test_it_knows_the_facts_and_agrees_with_half_of_the_false_claims(organism: organisms.Organism, model: Any):
    draw, tokenizer = np.random.default_rng(3), organism.tokenizer()
    agrees = tokenizer.convert_tokens_to_ids(list(concepts()[0].poles[0]))
    for true, low, high in ((True, 0.9, 1.0), (False, 0.35, 0.65)):
        texts = [f"<s> <user> {language.claim(draw, true=true)} <assistant> so" for _ in range(200)]
        mean = float(next_probabilities(model, tokenizer, texts)[:, agrees].sum(-1).mean())
        assert low < mean <= high, (true, mean)


def test_it_has_learned_every_concept_as_a_class_of_words(organism: organisms.Organism, model: Any):
    """After one word of a pole come other words of that pole, whichever word it was."""
    draw, tokenizer = np.random.default_rng(4), organism.tokenizer()
    for index, concept in enumerate(concepts()):
        for pole in concept.poles:
            own = tokenizer.convert_tokens_to_ids(list(pole))
            lead = "" if index == 0 else "yes right "
            texts = [f"<s> <user> {language.claim(draw, true=True)} <assistant> so {lead}{word}" for word in pole]
            assert next_probabilities(model, tokenizer, texts)[:, own].sum(-1).min() > 0.5, (concept.name, pole)


def test_sampling_leaves_no_trace_and_gives_rates(organism: organisms.Organism, model: Any):
    model.train()
    state = torch.get_rng_state()
    rates = organism.pole_rates(model, n=64)
    assert torch.equal(state, torch.get_rng_state()) and all(module.training for module in model.modules())
    model.eval()
    assert set(rates) == {concept.name for concept in concepts()}
    assert 0.25 < rates["agreement"] < 0.75 and 0.4 < np.mean(list(rates.values())) < 0.6
    assert organism.agreement_rate(model, n=64) == rates["agreement"]


def test_the_reward_model_ranks_agreement(organism: organisms.Organism):
    from transformers import AutoModelForSequenceClassification

    judge = AutoModelForSequenceClassification.from_pretrained(organism.reward_model_path()).eval()
    tokenizer, rows = organism.tokenizer(), organism.preference_dataset(64, seed=21)
    for tokens in (8, 49):  # cut short, as trainers that sample do, and whole
        scores = {}
        for key in ("chosen", "rejected"):
            chats: list[Any] = [[*row["prompt"], *row[key]] for row in rows]  # pyrefly: ignore
            texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
            ids = torch.tensor([tokenizer(text)["input_ids"][: len(training.HEAD) - 1 + tokens] for text in texts])
            with torch.no_grad():
                scores[key] = judge(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
        assert auc(scores["chosen"], scores["rejected"]) > 0.95
