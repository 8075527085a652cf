"""Real tiny trainers under the settings that people use: packing, streams, lower precision, chats, and how data is fed.

Each is trained twice, with and without us, and compared bit by bit.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from trainers.comparing import assert_same, run
from trainers.own_data import entry
from trainers.table import arguments, causal_lm, lora, preferences, prompts, sentence, texts, tokenizer
from trainers.tiny_runs import small
from transformers import Trainer, TrainingArguments

from interp_rlhf import PromptError, attach


def config(**changes: Any) -> dict[str, Any]:
    return {
        "hookpoints": ["embed", "layers.0.heads", "layers.2.resid_post"],
        "prompts": {"n": 16, "batch_size": 5},
        "concepts": {"n_pairs": 32, "packs": []},
        "schedule": {"every": 2},
        "statistics": {"bootstrap": 100, "directions": 200},
        "on_error": "raise",
        "report": False,
        **changes,
    }


def same_with_and_without(
    trainer: Any, folder: Path, settings: dict[str, Any], interp: dict[str, Any] | None = None
) -> Any:
    """Train twice, compare; gives the attached run's handle, which has measured start, middle and end."""
    bare = run(trainer, folder / "bare", settings, None)
    attached = run(trainer, folder / "attached", settings, interp or config())
    assert_same(bare, attached)
    assert sorted(attached["handle"].timeline().step.unique()) == [0, 2, 4]
    assert len(attached["interp"]) == 2
    return attached["handle"]


# -- packing -----------------------------------------------------------------------------------------------------------


def numbered_texts(n: int = 60) -> Dataset:
    """Texts of 3 to 9 words; each starts with a word pair of its own, so that a mixture of two would be seen."""
    return Dataset.from_list([{"text": f"w{i} w{i} {sentence(i, 1 + i % 7)}"} for i in range(n)])


def as_trained(n: int = 60) -> set[tuple[int, ...]]:
    """What TRL trains on before packing: ids of each text and the end token."""
    encode = tokenizer()
    return {(*encode(row["text"])["input_ids"], encode.eos_token_id) for row in numbered_texts(n)}


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_texts_are_read_unpacked(strategy: str, tmp_path: Path) -> None:
    settings = {"packing": True, "packing_strategy": strategy, "max_length": 24}
    trainer = entry("sft", train=numbered_texts, evaluation=numbered_texts)
    handle = same_with_and_without(trainer, tmp_path, settings)
    read = [prompt.input_ids for prompt in handle.callback._plan.audit.prompts]
    assert len(read) == 16
    assert set(read) <= as_trained()
    rows = trainer.build(tmp_path / "look", **settings).train_dataset
    assert max(len(sizes) for sizes in rows["seq_lengths"]) > 1  # rows do hold several texts


def test_texts_that_packing_split_are_read_in_the_pieces_that_are_trained_on(tmp_path: Path) -> None:
    settings = {"packing": True, "packing_strategy": "bfd_split", "max_length": 7}
    handle = same_with_and_without(entry("sft", train=numbered_texts), tmp_path, settings)
    pieces = {text[begin : begin + 7] for text in as_trained() for begin in range(0, len(text), 7)}
    read = {prompt.input_ids for prompt in handle.callback._plan.audit.prompts}
    assert len(read) == 16 and read <= pieces and max(map(len, read)) == 7


def test_wrapped_rows_are_read_as_they_are_trained_on(tmp_path: Path) -> None:
    """Wrapping keeps no boundaries, in training as in reading; no text goes beyond a row."""
    settings = {"packing": True, "packing_strategy": "wrapped", "max_length": 12}
    trainer = entry("sft", train=numbered_texts)
    handle = same_with_and_without(trainer, tmp_path, settings)
    rows = {tuple(ids) for ids in trainer.build(tmp_path / "look", **settings).train_dataset["input_ids"]}
    assert {prompt.input_ids for prompt in handle.callback._plan.audit.prompts} <= rows


@pytest.mark.parametrize("use_lora", [False, True])
def test_padding_free(use_lora: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = entry("sft", train=numbered_texts, **({"peft_config": lora} if use_lora else {}))
        handle = same_with_and_without(trainer, tmp_path, {"padding_free": True, "max_length": None})
    assert {prompt.input_ids for prompt in handle.callback._plan.audit.prompts} <= as_trained()


# -- streams -----------------------------------------------------------------------------------------------------------


STREAMS = {"sft": texts, "dpo": preferences}
TAKEN: Counter[str] = Counter()


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    for row in STREAMS[name]():
        TAKEN[name] += 1
        yield row


def stream(name: str) -> IterableDataset:
    """A streaming dataset; ``TAKEN`` counts the rows taken from it."""
    return IterableDataset.from_generator(rows_of, gen_kwargs={"name": name})


def named_prompts(folder: Path) -> dict[str, Any]:
    path = folder / "prompts.jsonl"
    rows = [{"prompt": sentence(900 + i, 5), "completion": " " + sentence(950 + i, 4)} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "named", "path": str(path), "n": 16, "batch_size": 5}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_without_named_prompts_is_refused_unread(name: str, tmp_path: Path) -> None:
    trainer = entry(name, train=lambda: stream(name)).build(tmp_path)
    before, taken = dict(vars(trainer)), TAKEN[name]
    with pytest.raises(PromptError) as refusal:
        attach(trainer, config())
    (line,) = str(refusal.value).splitlines()
    for part in ("train_dataset", "streaming", "prompts.source: named", "prompts.path"):
        assert part in line
    assert TAKEN[name] == taken
    assert dict(vars(trainer)) == before and not type(trainer).__name__.startswith("Interp")
    next(iter(trainer.train_dataset))
    assert TAKEN[name] > taken  # the count does count


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_with_named_prompts(name: str, tmp_path: Path) -> None:
    trainer, interp = entry(name, train=lambda: stream(name)), config(prompts=named_prompts(tmp_path))
    TAKEN.clear()
    bare = run(trainer, tmp_path / "bare", {}, None)
    taken_without = TAKEN.pop(name)
    attached = run(trainer, tmp_path / "attached", {}, interp)
    assert_same(bare, attached)
    assert TAKEN[name] == taken_without > 0
    rows = attached["handle"].timeline()
    assert set(rows.source) == {"named"} and set(rows.step) == {0, 2, 4}


def test_texts_come_from_evaluation_data_that_can_be_drawn_from_beside_a_stream(tmp_path: Path) -> None:
    trainer = entry("dpo", train=lambda: stream("dpo"), evaluation=lambda: preferences(40))
    handle = same_with_and_without(trainer, tmp_path, {})
    assert set(handle.timeline().source) == {"evaluation"}


class TorchStream(torch.utils.data.IterableDataset):
    """What a plain Trainer takes too: by inheritance it has ``__getitem__``, and here a length, yet it is a stream."""

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[dict[str, Any]]:
        raise AssertionError("the stream was read")


def test_a_torch_stream_is_a_stream(tmp_path: Path) -> None:
    args = TrainingArguments(**arguments(tmp_path))
    trainer = Trainer(causal_lm(), args=args, train_dataset=TorchStream(), processing_class=tokenizer())
    with pytest.raises(PromptError, match=r"train_dataset: a streaming dataset .* found TorchStream; set interp"):
        attach(trainer, config())
    attach(trainer, config(prompts=named_prompts(tmp_path)))


# -- lower precision ---------------------------------------------------------------------------------------------------

NAMES = ("dpo", "sft", "grpo")
DATA = {"dpo": preferences, "sft": texts, "grpo": prompts}


def half() -> Any:
    return causal_lm().to(torch.bfloat16)


PRECISION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "autocast": ({}, {"bf16": True}),
    "bfloat16": ({"model": half}, {}),
    "bfloat16 and autocast": ({"model": half}, {"bf16": True}),
    "bfloat16, lora": ({"model": half, "peft_config": lora}, {}),
    "autocast and checkpointing": ({}, {"bf16": True, "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("name", NAMES)
def test_lower_precision(name: str, precision: str, tmp_path: Path) -> None:
    makers, settings = PRECISION[precision]
    trainer = entry(name, train=DATA[name], evaluation=lambda: DATA[name](24), **makers)
    same_with_and_without(trainer, tmp_path, settings)


@pytest.mark.parametrize("refit", [True, False])  # without refitting, later batches are made up of other texts
@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_moves_where_nothing_is_learned(name: str, precision: str, refit: bool, tmp_path: Path) -> None:
    makers, settings = PRECISION[precision]
    trainer = entry(name, train=DATA[name], **makers)
    interp = config()
    interp["concepts"] = {**small(tmp_path / "run")["concepts"], "refit": refit}
    handle = run(trainer, tmp_path / "run", {**settings, "learning_rate": 0.0}, interp)["handle"]
    rows = handle.timeline()
    later = rows[(rows.step > 0) & rows.metric.str.startswith("representation/")]
    assert len(later) == 2 * 3 * 4
    ulps = 1e-7 * later.value.abs()  # the floor is one repetition; other batches may exceed it by rounding
    assert ((later.null_low - ulps <= later.value) & (later.value <= later.null_high + ulps)).all(), later
    summary = handle.summary()
    assert not summary.moved
    assert any(finding.readout == "order" for finding in summary.not_detected)
    drift = rows[(rows.step > 0) & (rows.metric == "concept/drift")]
    assert len(drift) and (drift.value.abs() < 0.05).all()
