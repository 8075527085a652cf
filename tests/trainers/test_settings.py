"""Real tiny trainers under the settings that people use: packing, streams, lower precision, chats, and how data is fed.

Each is trained twice, with and without us, and compared bit by bit.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from trainers.comparing import assert_same, run
from trainers.own_data import chat_tokenizer, entry
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
    trainer: Any,
    folder: Path,
    settings: dict[str, Any],
    interp: dict[str, Any] | None = None,
    steps: Sequence[int] = (0, 2, 4),
) -> Any:
    """Train twice, compare; gives the attached run's handle, which has measured start, middle and end."""
    bare = run(trainer, folder / "bare", settings, None)
    attached = run(trainer, folder / "attached", settings, config())
    assert_same(bare, attached)
    assert sorted(attached["handle"].timeline().step.unique()) == list(steps)
    assert len(attached["interp"]) == len(steps) - 1
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
    assert later.value.between(later.null_low, later.null_high).all(), later
    summary = handle.summary()
    assert not summary.moved
    assert any(finding.readout == "order" for finding in summary.not_detected)
    drift = rows[(rows.step > 0) & (rows.metric == "concept/drift")]
    assert len(drift) and (drift.value.abs() < 0.05).all()


# -- chats -------------------------------------------------------------------------------------------------------------


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def asked(i: int) -> list[dict[str, str]]:
    return [turn("system", sentence(3 * i + 7, 2)), turn("user", f"w{i} {sentence(3 * i, 4)}")]


def answered(i: int, length: int = 4) -> list[dict[str, str]]:
    return [turn("assistant", sentence(3 * i + length, length))]


def chats(columns: str, n: int = 48) -> Dataset:
    makers: dict[str, Callable[[int], dict[str, Any]]] = {
        "prompt, chosen, rejected": lambda i: {
            "prompt": asked(i), "chosen": answered(i, 4 + i % 3), "rejected": answered(i, 7)
        },
        "chosen, rejected": lambda i: {
            "chosen": asked(i) + answered(i, 4 + i % 3), "rejected": asked(i) + answered(i, 7)
        },
        "messages": lambda i: {"messages": asked(i) + answered(i)},
        "prompt, completion": lambda i: {"prompt": asked(i), "completion": answered(i)},
        "prompt": lambda i: {"prompt": asked(i)},
    }  # fmt: skip
    return Dataset.from_list([makers[columns](i) for i in range(n)])


def rendered(messages: list[dict[str, str]], *, generation: bool = False) -> tuple[int, ...]:
    """Token ids of a chat, from the words that the template of these tests stands for."""
    turns = [f"{'w80' if m['role'] == 'user' else 'w81'} {m['content']} </s>" for m in messages]
    return tuple(tokenizer().convert_tokens_to_ids(" ".join([*turns, *["w81"] * generation]).split()))


def expected_texts(columns: str) -> set[tuple[tuple[int, ...], int]]:
    """Ids and completion start of every text that may be read of :func:`chats`."""
    found = set()
    for row in chats(columns):
        if "messages" in row:
            ids = rendered(row["messages"])
            found.add((ids, len(ids)))
            continue
        history = row.get("prompt", row.get("chosen", [])[:-1])
        start = len(rendered(history, generation=True))
        if columns == "prompt":
            found.add((rendered(history, generation=True), start))
        for key in row.keys() & {"chosen", "rejected", "completion"}:
            found.add((rendered([*history, row[key][-1]]), start))
    return found


CHATS = [
    ("dpo", "prompt, chosen, rejected"),
    ("dpo", "chosen, rejected"),
    ("sft", "messages"),
    ("sft", "prompt, completion"),
    ("grpo", "prompt"),
]


@pytest.mark.parametrize(("name", "columns"), CHATS)
def test_chats_are_read_as_the_template_renders_them(name: str, columns: str, tmp_path: Path) -> None:
    trainer = entry(name, train=lambda: chats(columns), evaluation=lambda: chats(columns, 40), encode=chat_tokenizer)
    handle = same_with_and_without(trainer, tmp_path, {"max_length": 64} if name != "grpo" else {})
    read = {(prompt.input_ids, prompt.completion_start) for prompt in handle.callback._plan.audit.prompts}
    assert len(read) == 16
    assert read <= expected_texts(columns)


def test_packed_chats_keep_where_the_completion_starts(tmp_path: Path) -> None:
    columns = "prompt, completion"
    trainer = entry("sft", train=lambda: chats(columns), encode=chat_tokenizer)
    handle = same_with_and_without(trainer, tmp_path, {"packing": True, "max_length": 64})
    read = {(prompt.input_ids, prompt.completion_start) for prompt in handle.callback._plan.audit.prompts}
    assert len(read) == 16
    assert read <= expected_texts(columns)


@pytest.mark.parametrize("interp", [{}, {"prompts": "named"}], ids=["its own data", "named prompts"])
def test_chats_without_a_template_are_refused_in_one_line(interp: dict[str, Any], tmp_path: Path) -> None:
    if interp:
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chats("prompt, completion", 12)))
        trainer = entry("sft", train=texts).build(tmp_path)
        settings = config(prompts={"source": "named", "path": str(path)})
    else:
        trainer, settings = entry("grpo", train=lambda: chats("prompt")).build(tmp_path), config()
    with pytest.raises(PromptError) as refusal:
        attach(trainer, settings)
    (line,) = str(refusal.value).splitlines()
    assert "no chat template" in line and ("chats.jsonl, line 1:" if interp else "train_dataset, row ") in line


# -- tokenizers, caches, how data is fed -------------------------------------------------------------------------------


def pad_is_end() -> Any:
    encode = tokenizer()
    encode.pad_token = encode.eos_token
    return encode


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_that_pads_with_its_end_token(name: str, tmp_path: Path) -> None:
    """Padding is what the attention mask says, so the readings are those of a tokenizer with a padding token."""
    other = run(entry(name, train=DATA[name]), tmp_path / "other", {}, config())["handle"]
    handle = same_with_and_without(entry(name, train=DATA[name], encode=pad_is_end), tmp_path, {})
    start, expected = (h.callback._run.baseline.start.means for h in (handle, other))
    assert handle.callback._plan.pad_token_id == 2 != other.callback._plan.pad_token_id
    for hookpoint, means in start.items():
        torch.testing.assert_close(means, expected[hookpoint], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_cache_stays_switched_on(name: str, checkpointing: bool, tmp_path: Path) -> None:
    made: list[Any] = []

    def caching() -> Any:
        made.append(causal_lm())
        made[-1].config.use_cache = made[-1].generation_config.use_cache = True
        return made[-1]

    trainer = entry(name, train=DATA[name], model=caching)
    same_with_and_without(trainer, tmp_path, {"gradient_checkpointing": checkpointing, "use_cache": True})
    bare, attached = made
    assert bare.config.to_dict() == attached.config.to_dict()
    assert bare.generation_config.to_dict() == attached.generation_config.to_dict()
    assert attached.config.use_cache or checkpointing


FEEDS: dict[str, dict[str, Any]] = {
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "a worker": {"dataloader_num_workers": 1},
}


@pytest.mark.parametrize("feed", FEEDS)
def test_how_data_is_fed(feed: str, tmp_path: Path) -> None:
    same_with_and_without(entry("sft", train=texts, evaluation=lambda: texts(16)), tmp_path, FEEDS[feed])


@pytest.mark.parametrize("name", NAMES)
def test_several_evaluation_sets(name: str, tmp_path: Path) -> None:
    """Texts are drawn from the first, rows say so, and each set's own log row stays without ours."""
    sets = {"first": DATA[name](48).select(range(12, 48)), "second": DATA[name](16)}
    trainer = entry(name, train=DATA[name], evaluation=lambda: dict(sets))
    handle = same_with_and_without(trainer, tmp_path, {"logging_steps": 4}, steps=(0, 4))  # evaluated at 2, too
    assert set(handle.timeline().source) == {"evaluation"}
    audit = handle.callback._plan.audit
    assert audit.name == "eval_dataset['first']" and len(audit.prompts) == 16
    decode = tokenizer().decode
    firsts = [row.get("prompt", row.get("text")) for row in sets["first"]]
    assert all(any(decode(p.input_ids).startswith(text) for text in firsts) for p in audit.prompts)
    log = handle._trainer.state.log_history
    assert {key for row in log for key in row} >= {"eval_first_loss", "eval_second_loss"}
    assert not [row for row in log if any(k.startswith("eval_") for k in row) and any("interp/" in k for k in row)]
