"""Attaching itself: data that draws random numbers, the off switch everywhere, and what is refused before training."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainers.comparing import assert_same, run
from trainers.table import Entry, causal_lm, texts, tokenizer, trainers
from trainers.tiny_runs import small

from interp_rlhf import InterpCallback, InterpError, attach, with_interp
from interp_rlhf.errors import ConfigError, FormatError


def noisy(output_dir: Path, **changes: Any) -> Any:
    """Plain training on rows that lose words at random, by all three generators, each time they are read."""
    from trainers.table import arguments
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    encode = tokenizer()

    def drop(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        chance = random.random() + float(np.random.rand()) + float(torch.rand(()))
        kept = [[word for word in text.split() if random.random() < chance] + ["w1", "w2"] for text in batch["text"]]
        return {"input_ids": [encode(" ".join(words))["input_ids"] for words in kept]}

    data = texts().with_transform(drop)
    return Trainer(
        causal_lm(), args=TrainingArguments(**arguments(output_dir, remove_unused_columns=False, **changes)),
        train_dataset=data, eval_dataset=data, processing_class=encode,
        data_collator=DataCollatorForLanguageModeling(encode, mlm=False),
    )  # fmt: skip


def test_data_that_draws_random_numbers_is_read_without_a_trace(tmp_path: Path) -> None:
    entry = Entry("noisy", noisy)
    bare = run(entry, tmp_path / "bare", {}, None)
    again = run(entry, tmp_path / "again", {}, None)
    assert_same(bare, again)  # two trainings without us are the same to begin with
    assert_same(bare, run(entry, tmp_path / "attached", {}, small(tmp_path / "attached")))


def test_the_first_training_of_a_process_is_left_alone_too(tmp_path: Path) -> None:
    """Libraries are imported in it, at step 0 at the latest, and some draw a random number then."""
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]; import conftest; from pathlib import Path\n"
        "from trainers.comparing import assert_same, run\n"
        "from trainers.test_attaching import noisy\n"
        "from trainers.table import Entry\n"
        "from trainers.tiny_runs import small\n"
        "folder, entry = Path(sys.argv[1]), Entry('noisy', noisy)\n"
        "attached = run(entry, folder / 'attached', {}, small(folder / 'attached'))\n"
        "assert_same(run(entry, folder / 'bare', {}, None), attached)\n"
    )
    here = Path(__file__).resolve()
    command = [sys.executable, "-c", program, str(tmp_path), str(here.parents[1]), str(here.parents[2])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("word", ["off", "OFF", " off "])
def test_off_reaches_everything(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERP_RLHF", word)
    bare = trainers()["sft"].build(tmp_path / "bare", max_steps=1)
    bare.add_callback(InterpCallback(small(tmp_path / "bare")))
    bare.train()
    assert not (tmp_path / "bare" / "interp").exists()
    built = trainers()["sft"].build(tmp_path / "class", max_steps=1)
    kind = with_interp(type(built), small(tmp_path / "class"))
    made = kind(built.model, args=built.args, train_dataset=texts(), processing_class=tokenizer())
    made.train()
    assert len(made.interp.timeline()) == 0 and not (tmp_path / "class" / "interp").exists()


def test_off_for_one_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    trainer = trainers()["sft"].build(folder, max_steps=1)
    trainer.add_callback(InterpCallback(small(folder)))
    trainer.train()
    before = (folder / "interp" / "timeline.jsonl").read_bytes()
    monkeypatch.setenv("INTERP_RLHF", "off")
    trainer.args.max_steps = 3  # another end than the last one's, which would be measured
    trainer.train()
    assert (folder / "interp" / "timeline.jsonl").read_bytes() == before

    kind = with_interp(type(trainer), small(tmp_path / "later"))
    args = trainers()["sft"].build(tmp_path / "later", max_steps=1).args
    made = kind(causal_lm(), args=args, train_dataset=texts(), processing_class=tokenizer())
    monkeypatch.delenv("INTERP_RLHF")
    handle = attach(made, small(tmp_path / "later"))
    made.train()
    assert sorted(handle.timeline().step.unique()) == [0, 1]


def test_another_word_is_no_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERP_RLHF", "0")
    with pytest.raises(ConfigError, match="INTERP_RLHF: expected on or off in the environment, found '0'"):
        attach(trainers()["sft"].build(tmp_path), small(tmp_path / "run"))


@pytest.mark.parametrize("folder", ["interp", "_interp"])
def test_a_file_in_the_place_of_a_folder(folder: str, tmp_path: Path) -> None:
    trainer = trainers()["sft"].build(tmp_path / "run")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / folder).write_text("mine")
    with pytest.raises(FormatError, match=rf"{folder}: expected a folder .*, found a file"):
        attach(trainer, small(tmp_path / "run"))
    assert (tmp_path / "run" / folder).read_text() == "mine"


def test_two_writers_on_one_trainer(tmp_path: Path) -> None:
    trainer = trainers()["sft"].build(tmp_path / "run")
    trainer.add_callback(InterpCallback(small(tmp_path / "run")))
    with pytest.raises(InterpError, match="has an InterpCallback already"):
        attach(trainer, small(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"concepts": {"packs": ["formality", "formality"]}}, "'formality' twice"),
        ({"statistics": {"confidence": 0.999, "directions": 200}}, "needs at least 999 directions, found 200"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    trainer = trainers()["dpo"].build(tmp_path / "run")
    with pytest.raises(ConfigError, match=words):
        attach(trainer, changes)
    assert not hasattr(trainer, "interp")


def test_a_reference_that_is_read_is_paid_for(tmp_path: Path) -> None:
    cost = {}
    for kind in ("cached", "adapter"):
        trainer = trainers()["sft"].build(tmp_path / kind, use_lora=True, max_steps=3)
        handle = attach(trainer, small(tmp_path / kind, reference=kind))
        trainer.train()
        rows = handle.timeline()
        cost[kind] = rows[(rows.metric == "cost/tokens") & (rows.step == 3)].value.iloc[0]
    assert cost["adapter"] == 2 * cost["cached"] > 0


def test_a_folder_that_changes_during_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerCallback

    class Moves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monkeypatch.chdir(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = trainers()["sft"].build(Path("run"), max_steps=4)
    trainer.add_callback(Moves())
    handle = attach(trainer, small(tmp_path / "run"))
    trainer.train()
    assert sorted(handle.timeline().step.unique()) == [0, 3, 4]
