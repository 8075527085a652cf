"""What a run will read: which texts, split how, and what is refused before training starts."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from trainers.table import causal_lm, preferences, prompts, scorer, texts, tokenizer

from interp_rlhf.config import InterpConfig
from interp_rlhf.errors import PromptError
from interp_rlhf.plan import PREFERENCE, Plan, make_plan


def plan(train: Any, evaluation: Any = None, *, model: Any = None, encode: Any = True, **changes: Any) -> Plan:
    config = InterpConfig.from_mapping({"concepts": {"packs": []}, **changes})
    chosen = tokenizer() if encode is True else encode
    return make_plan(config, model or causal_lm(), chosen, train_dataset=train, eval_dataset=evaluation)


def repeated(n: int, different: int) -> Dataset:
    """``n`` preference pairs of ``different`` prompts."""
    rows = preferences(n).to_list()
    return Dataset.from_list([{**row, "prompt": rows[i % different]["prompt"]} for i, row in enumerate(rows)])


def test_nothing_that_a_direction_is_fitted_on_is_read_for_drift() -> None:
    found = plan(preferences(48), prompts={"n": 40})
    (concept,) = found.concepts
    fitted = {pair.group for pair in concept.fit}
    assert concept.name == PREFERENCE and len(concept.fit) == len(concept.held) == 24
    assert fitted.isdisjoint(pair.group for pair in concept.held)
    assert fitted.isdisjoint(prompt.unit for prompt in found.audit.prompts) and len(found.audit.prompts) == 24


def test_pairs_of_one_prompt_stay_on_one_side() -> None:
    found = plan(repeated(96, 24))
    (concept,) = found.concepts
    halves = [{pair.group for pair in half} for half in (concept.fit, concept.held)]
    assert halves[0].isdisjoint(halves[1]) and len(halves[0]) == len(halves[1]) == 12
    assert len(found.audit.prompts) == 12


@pytest.mark.parametrize(("pairs", "different"), [(48, 1), (48, 15), (10, 10)])
def test_too_few_prompts_are_said_with_their_number(pairs: int, different: int) -> None:
    data = repeated(pairs, different)
    if different < 8:
        with pytest.raises(
            PromptError, match=f"train_dataset: expected at least 8 different prompts .*found {different}"
        ):
            plan(data)
        return
    found = plan(data)
    (refusal,) = found.refused
    assert not found.concepts and refusal.readout == PREFERENCE
    assert refusal.reason == (
        f"expected pairs of at least 16 prompts in train_dataset, found {pairs} pairs of {different}"
    )


def test_evaluation_data_comes_first_and_rows_say_which() -> None:
    assert plan(preferences(), preferences(24)).audit.source == "evaluation"
    assert plan(preferences()).audit.source == "training"
    assert plan(preferences(), {"a": preferences(24), "b": None}).audit.name == "eval_dataset['a']"
    chosen = plan(preferences(), preferences(24), prompts={"source": "training"})
    assert chosen.audit.source == chosen.concepts[0].source == "training"


def test_data_without_pairs_promises_no_preference_direction() -> None:
    for data in (prompts(), texts()):
        found = plan(data)
        assert not found.concepts and not found.refused


def test_texts_are_cut_at_the_models_context() -> None:
    long = Dataset.from_list([{"text": " ".join(["w1"] * 150) + f" w{i}"} for i in range(20)])
    rows = [{"text": f"w{i} " + " ".join(["w1"] * 150)} for i in range(20)]
    found = plan(Dataset.from_list(rows), prompts={"max_length": 512})
    assert found.max_length == 128 and {len(prompt.input_ids) for prompt in found.audit.prompts} == {128}
    with pytest.raises(PromptError, match="found 1"):  # equal once cut
        plan(long, prompts={"max_length": 100})


def test_without_a_language_model_head_there_is_no_behaviour() -> None:
    found = plan(preferences(), model=scorer())
    assert not found.behaviour and [refusal.readout for refusal in found.refused] == ["behaviour"]


def test_packs_need_a_tokenizer() -> None:
    prepared = Dataset.from_list([{"input_ids": [1, 4 + i, 5, 6]} for i in range(20)])
    found = plan(prepared, encode=None, concepts={"packs": ["refusal"]})
    assert [(refusal.readout, "no tokenizer" in refusal.reason) for refusal in found.refused] == [("refusal", True)]


def test_a_table_holds_each_text_once_and_scores_held_pairs_only() -> None:
    found = plan(preferences(48))
    (concept,) = found.concepts
    whole, later = found.table(fit=True), found.table(fit=False)
    ids = [prompt.id for prompt in whole.prompts]
    assert ids == sorted(set(ids))
    fitted = {side.id for pair in concept.fit for side in (pair.positive, pair.negative)}
    held = {side.id for pair in concept.held for side in (pair.positive, pair.negative)}
    assert whole.scored == later.scored == held
    assert {prompt.id for prompt in later.prompts} == set(ids) - fitted
    assert later.rows([later.prompts[3], later.prompts[0]]).tolist() == [3, 0]
