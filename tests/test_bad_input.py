"""Bad input to ``attach``: one line that names the place, the trainer and every file as before, nothing executed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import SMALL, Executed, check_message, contents
from datasets import Dataset, IterableDataset
from safetensors.torch import save_file
from trainers.table import causal_lm, preferences, prompts, sentence, trainers

from interp_rlhf import Direction, InterpConfig, InterpError, attach
from interp_rlhf.cli import main
from interp_rlhf.errors import ConfigError, FormatError, HookpointError, MeasurementError, PromptError

WIDTH, LAYER = 32, "layers.2.resid_post"
#: The folder of a test's own files, in the words expected of a message.
HERE = "{folder}"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer that every refused ``attach`` leaves as it was, so that one is enough."""
    folder = tmp_path_factory.mktemp("attach")
    (folder / "keep.txt").write_text("someone else's", encoding="utf-8")
    return trainers()["dpo"].build(folder)


@pytest.fixture(autouse=True)
def detached(request: pytest.FixtureRequest) -> Iterator[None]:
    """An ``attach`` that should have been refused fails its own test only."""
    yield
    if "trainer" in request.fixturenames and "interp" in vars(request.getfixturevalue("trainer")):
        request.getfixturevalue("trainer").interp.detach()


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def written(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def direction_file(path: Path, change: Callable[[bytes], bytes] = bytes) -> str:
    Direction("honesty", LAYER, torch.ones(WIDTH)).save(path)
    return written(path, change(path.read_bytes()))


def foreign_direction(path: Path, vector: torch.Tensor, **about: Any) -> str:
    named = {"format": 1, "hookpoint": LAYER, "name": "honesty", **about}
    save_file({"vector": vector}, str(path), metadata={"interp_rlhf.direction": json.dumps(named)})
    return str(path)


def reading(hookpoint: str) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"hookpoints": [hookpoint]}


def directed(make: Callable[[Path], str]) -> Callable[[Path], dict[str, Any]]:
    def config(folder: Path) -> dict[str, Any]:
        return {"hookpoints": [LAYER], "concepts": {"packs": [], "directions": [make(folder / "d.safetensors")]}}

    return config


def named(make: Callable[[Path], str]) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"prompts": {"source": "named", "path": make(folder / "prompts.jsonl")}}


def packed(make: Callable[[Path], str]) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"concepts": {"packs": [make(folder / "pack.jsonl")]}}


def as_yaml(text: str) -> Callable[[Path], str]:
    return lambda folder: written(folder / "interp.yaml", text.encode())


HEADER = {"pack": "p", "description": "d"}
PAIR = {"group": "g", "prompt": "w1 w2", "positive": "w3", "negative": "w4"}

#: What is wrong -> config, the error's class, words of the message .
CONFIGS: dict[str, tuple[Callable[[Path], Any], type[InterpError], tuple[str, ...]]] = {
    "layer that is not there": (reading("layers.99.resid_post"), HookpointError, ("layers.99", "0..2")),
    "layer before the first": (reading("layers.-4.resid_post"), HookpointError, ("layers.-4", "0..2")),
    "depth beyond the end": (reading("layers.150%.resid_post"), HookpointError, ("150%",)),
    "site that is not there": (reading("layers.1.resid_pre"), HookpointError, ("layers.1.resid_pre", "resid_post")),
    "no hookpoint name": (reading(""), HookpointError, ("''",)),
    "no hookpoints": (lambda folder: {"hookpoints": []}, ConfigError, ("hookpoints",)),
    "direction of another width": (
        directed(lambda path: foreign_direction(path, torch.ones(WIDTH + 1) / (WIDTH + 1) ** 0.5)),
        ConfigError, ("honesty", LAYER, "32", "33"),
    ),
    "direction of two dimensions": (
        directed(lambda path: foreign_direction(path, torch.ones(2, WIDTH))), FormatError, (HERE, "[2, 32]"),
    ),
    "direction of NaN": (
        directed(lambda path: foreign_direction(path, torch.full((WIDTH,), float("nan")))),
        FormatError, (HERE, "nan"),
    ),
    "direction read elsewhere": (
        directed(lambda path: foreign_direction(path, torch.ones(WIDTH), hookpoint="layers.0.resid_post")),
        ConfigError, (HERE, "layers.0.resid_post", LAYER),
    ),
    "direction named after a path": (
        directed(lambda path: foreign_direction(path, torch.ones(WIDTH), name="../../evil")),
        FormatError, (HERE, "../../evil"),
    ),
    "direction of another format": (
        directed(lambda path: foreign_direction(path, torch.ones(WIDTH), format=99)), FormatError, (HERE, "99"),
    ),
    "direction cut off": (directed(lambda path: direction_file(path, lambda b: b[:-5])), FormatError, (HERE,)),
    "direction's header cut": (directed(lambda path: direction_file(path, lambda b: b[:9])), FormatError, (HERE,)),
    "direction's header too long": (
        directed(lambda path: direction_file(path, lambda b: b"\xff" * 8 + b[8:])), FormatError, (HERE,),
    ),
    "direction that is a pickle": (
        directed(lambda path: written(path, pickle.dumps(Executed(path.parent / "executed")))),
        FormatError, (HERE,),
    ),
    "direction that is torch.save's": (
        directed(lambda path: (torch.save({"vector": torch.ones(WIDTH)}, path), str(path))[1]),
        FormatError, (HERE,),
    ),
    "empty direction file": (directed(lambda path: written(path, b"")), FormatError, (HERE,)),
    "no direction file": (directed(lambda path: str(path)), FormatError, (HERE, "No such file")),
    "folder for a direction": (directed(lambda path: str(path.parent)), FormatError, (HERE,)),
    "other safetensors": (
        directed(lambda path: (save_file({"w": torch.ones(2)}, str(path)), str(path))[1]), FormatError, (HERE,),
    ),
    "named prompts without a path": (lambda folder: {"prompts": {"source": "named"}}, ConfigError, ("prompts.path",)),
    "no prompt file": (named(str), PromptError, (HERE, "No such file")),
    "empty prompt file": (named(lambda path: written(path, b"")), PromptError, (HERE, "empty")),
    "blank prompt file": (named(lambda path: written(path, b"\n \n")), PromptError, (HERE, "empty")),
    "too few prompts": (named(lambda path: lines(path, {"prompt": "w1 w2 w3"})), PromptError, ("at least 8", "1")),
    "prompts that are a pickle": (
        named(lambda path: written(path, pickle.dumps(Executed(path.parent / "executed")))), PromptError, (HERE,),
    ),
    "prompts cut off": (
        named(lambda path: written(path, b'{"prompt": "w1 w2"}\n{"prompt": "w')), PromptError, (HERE, "line 2"),
    ),
    "prompts that are no objects": (named(lambda path: lines(path, "w1 w2")), PromptError, (HERE, "line 1", "str")),
    "prompt that is no text": (named(lambda path: lines(path, {"prompt": 5})), PromptError, (HERE, "line 1")),
    "prompt without known columns": (
        named(lambda path: lines(path, {"question": "w1 w2"})), PromptError, (HERE, "line 1", "question"),
    ),
    "prompt of one token": (named(lambda path: lines(path, {"prompt": "w1"})), PromptError, (HERE, "line 1")),
    "prompt longer than the context": (
        named(lambda path: lines(path, {"prompt": sentence(0, 200)})), PromptError, (HERE, "line 1", "128", "200"),
    ),
    "chat messages without a template": (
        named(lambda path: lines(path, {"prompt": [{"role": "user", "content": "w1"}]})),
        PromptError, (HERE, "line 1", "chat template"),
    ),
    "pack that is not packaged": (
        lambda folder: {"concepts": {"packs": ["no-such-pack"]}}, ConfigError, ("concepts.packs", "no-such-pack"),
    ),
    "no pack file": (packed(str), PromptError, (HERE, "No such file")),
    "pack outside of its folder": (
        lambda folder: {"concepts": {"packs": ["../../../etc/passwd"]}}, PromptError, ("../../../etc/passwd",),
    ),
    "empty pack": (packed(lambda path: written(path, b"")), PromptError, (HERE, "empty")),
    "pack that is a pickle": (
        packed(lambda path: written(path, pickle.dumps(Executed(path.parent / "executed")))), PromptError, (HERE,),
    ),
    "pack named after a path": (
        packed(lambda path: lines(path, {**HEADER, "pack": "../evil"}, PAIR)), PromptError, (HERE, "line 1", "pack"),
    ),
    "pack with an unknown field": (
        packed(lambda path: lines(path, HEADER, {**PAIR, "more": 1})), PromptError, (HERE, "line 2", "more"),
    ),
    "pack whose sides are the same": (
        packed(lambda path: lines(path, HEADER, {**PAIR, "negative": "w3"})), PromptError, (HERE, "line 2"),
    ),
    "unknown key": (lambda folder: {"hookpoint": [LAYER]}, ConfigError, ("unknown key 'hookpoint'",)),
    "unknown key inside": (lambda folder: {"prompts": {"m": 3}}, ConfigError, ("unknown key 'prompts.m'",)),
    "block of another type": (lambda folder: {"prompts": 3}, ConfigError, ("prompts", "3")),
    "number of another type": (lambda folder: {"prompts": {"n": "many"}}, ConfigError, ("prompts.n", "'many'")),
    "number out of range": (lambda folder: {"statistics": {"confidence": 1.5}}, ConfigError, ("confidence", "1.5")),
    "word that is not allowed": (lambda folder: {"on_error": "ignore"}, ConfigError, ("on_error", "'ignore'")),
    "config of another type": (lambda folder: 5, ConfigError, ("int",)),
    "no such preset": (lambda folder: "obsreve", ConfigError, ("obsreve", "observe")),
    "no config file": (lambda folder: str(folder / "no.yaml"), ConfigError, (HERE, "No such file")),
    "YAML that is broken": (as_yaml("prompts: [1\nx: : 2"), ConfigError, (HERE, "not valid YAML")),
    "YAML that is a list": (as_yaml("- 1"), ConfigError, (HERE, "list")),
    "YAML that would run code": (as_yaml("seed: !!python/object/apply:os.getpid []"), ConfigError, (HERE,)),
    "YAML with an unknown key": (as_yaml("interp:\n  seeds: 3"), ConfigError, (HERE, "'seeds'")),
    "YAML that is a pickle": (
        lambda folder: written(folder / "p.yaml", pickle.dumps(Executed(folder / "executed"))), ConfigError, (HERE,),
    ),
    "reference that is not there": (lambda folder: {"reference": "adapter"}, InterpError, ("adapter",)),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_attach_refuses_in_one_line_and_leaves_everything_as_it_was(what: str, trainer: Any, tmp_path: Path) -> None:
    make, expected, words = CONFIGS[what]
    config = make(tmp_path)
    before = contents(tmp_path), contents(Path(trainer.args.output_dir)), dict(vars(trainer)), type(trainer)
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(expected) as caught:
        attach(trainer, config)
    check_message(str(caught.value), tuple(word.format(folder=tmp_path) for word in words))
    after = contents(tmp_path), contents(Path(trainer.args.output_dir)), dict(vars(trainer)), type(trainer)
    assert after == before
    assert trainer.callback_handler.callbacks == callbacks


def streaming(n: int = 48) -> IterableDataset:
    return preferences(n).to_iterable_dataset()


DATASETS: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any], tuple[str, ...]]] = {
    "streaming": (streaming, lambda: None, {}, ("train_dataset", "streaming", "prompts.path")),
    "streaming evaluation": (preferences, streaming, {}, ("eval_dataset", "streaming", "prompts.path")),
    "streaming evaluation by name": (preferences, lambda: {"a": streaming()}, {}, ("eval_dataset['a']", "streaming")),
    "empty": (lambda: preferences(0), lambda: None, {}, ("train_dataset", "empty")),
    "empty evaluation": (preferences, lambda: Dataset.from_list([]), {}, ("eval_dataset", "empty")),
    "too few rows": (lambda: preferences(3), lambda: None, {}, ("train_dataset", "at least 8", "3")),
    "no evaluation data": (preferences, lambda: None, {"source": "evaluation"}, ("prompts.source", "evaluation")),
    "no known column": (lambda: prompts().rename_column("prompt", "question"), lambda: None, {}, ("question",)),
    "prompts longer than the context": (
        lambda: Dataset.from_list([{**row, "prompt": sentence(0, 200)} for row in preferences(20)]), lambda: None, {},
        ("train_dataset", "20"),
    ),
    "prompts longer than the cap": (preferences, lambda: None, {"max_length": 4}, ("train_dataset", "48")),
}  # fmt: skip


@pytest.mark.parametrize("what", DATASETS)
def test_datasets_that_cannot_be_drawn_from(what: str, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, evaluation, changes, words = DATASETS[what]
    monkeypatch.setattr(trainer, "train_dataset", train())
    monkeypatch.setattr(trainer, "eval_dataset", evaluation())
    with pytest.raises(PromptError) as caught:
        attach(trainer, {**SMALL, "prompts": {**SMALL["prompts"], **changes}})
    check_message(str(caught.value), words)
    assert not isinstance(caught.value, ConfigError) and "interp" not in vars(trainer)


def test_named_prompts_let_a_streaming_dataset_through(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    consumed: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for row in preferences():
            consumed.append(1)
            yield row

    path = lines(tmp_path / "named.jsonl", *({"prompt": sentence(i, 5)} for i in range(8)))
    monkeypatch.setattr(trainer, "train_dataset", IterableDataset.from_generator(rows))
    monkeypatch.setattr(trainer, "eval_dataset", None)
    attach(trainer, {**SMALL, "prompts": {"source": "named", "path": path}}).detach()
    assert not consumed


def test_an_unknown_architecture_is_listed_and_its_layers_can_be_named(tmp_path: Path) -> None:
    model = causal_lm()
    model.model.more = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in model.model.layers)
    trainer = trainers()["plain"].build(tmp_path, model=model, max_steps=2)
    config = {"prompts": {"n": 8}, "concepts": {"packs": []}, "report": False, "on_error": "raise"}
    with pytest.raises(HookpointError) as caught:
        attach(trainer, config)
    check_message(str(caught.value), ("model.layers (3 of LlamaDecoderLayer)", "model.more (3 of Linear)", "layers:"))
    handle = attach(trainer, {**config, "layers": "model.layers"})
    trainer.train()
    assert "layers.2.resid_post" in set(handle.timeline().hookpoint)


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_activations_that_are_not_finite(on_error: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainers()["plain"].build(tmp_path, max_steps=1)
    handle = attach(trainer, {**SMALL, "on_error": on_error, "report": False})
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    if on_error == "raise":
        with pytest.raises(MeasurementError) as caught:
            trainer.train()
        check_message(str(caught.value), ("layers.1.resid_post", "prompt", "finite"))
        return
    trainer.train()
    told = [record.getMessage() for record in caplog.records if record.name == "interp_rlhf"]
    assert any("layers.1.resid_post" in line and "finite" in line for line in told)
    assert "layers.1.resid_post" in str(handle.summary()) and main(["verify", str(tmp_path)]) == 0


def test_a_folder_with_something_else_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "interp").mkdir()
    (tmp_path / "interp" / "thesis.txt").write_text("ten years", encoding="utf-8")
    trainer = trainers()["plain"].build(tmp_path, max_steps=1)
    attach(trainer, InterpConfig.from_mapping({**SMALL, "report": False}))
    before = contents(tmp_path)
    with pytest.raises(InterpError) as caught:
        trainer.train()
    check_message(str(caught.value), (str(tmp_path / "interp"), "thesis.txt"))
    assert contents(tmp_path) == before
