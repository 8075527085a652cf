"""Models come back from their folders with the weights that were saved; what is no model is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainers.table import causal_lm, lora, saved_model, scorer, tokenizer

from interp_rlhf.checkpoints import checkpoint_step, load_checkpoint, load_tokenizer
from interp_rlhf.errors import ConfigError
from interp_rlhf.provenance import tokenizer_hash

IDS = torch.tensor([[1, 7, 9, 4, 30]])


def same_output(a: Any, b: Any) -> bool:
    with torch.no_grad():
        return torch.equal(a.eval()(input_ids=IDS).logits, b.eval()(input_ids=IDS).logits)


def adapted(model: Any, config: Any, folder: Path) -> Any:
    from peft import get_peft_model

    model = get_peft_model(model, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def test_a_saved_model_and_its_tokenizer() -> None:
    found = load_checkpoint(saved_model(0))
    assert same_output(found, causal_lm()) and not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert tokenizer_hash(load_tokenizer(saved_model(0))) == tokenizer_hash(tokenizer())


def test_precision_is_as_asked(tmp_path: Path) -> None:
    causal_lm().to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_checkpoint(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in load_checkpoint(tmp_path, dtype="auto").parameters()} == {torch.bfloat16}
    assert load_tokenizer(tmp_path) is None


def test_an_adapter_is_put_on_its_base(tmp_path: Path) -> None:
    model = adapted(causal_lm(), lora(), tmp_path)
    assert same_output(load_checkpoint(tmp_path), model)
    assert not same_output(load_checkpoint(tmp_path), causal_lm())
    assert not same_output(load_checkpoint(tmp_path, base=saved_model(3)), model)


def test_reward_models_whole_and_as_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig

    whole, adapter = tmp_path / "whole", tmp_path / "adapter"
    scorer().save_pretrained(whole)
    assert same_output(load_checkpoint(whole), scorer())
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    made = adapted(scorer(), config, adapter)
    assert same_output(load_checkpoint(adapter, base=whole), made)
    found = load_checkpoint(adapter, base=saved_model(0))  # a language model as its base: the head is the adapter's
    assert found.config.num_labels == 1
    head = {n: p for n, p in made.named_parameters() if "modules_to_save" in n}
    assert head and all(torch.equal(dict(found.named_parameters())[n], p) for n, p in head.items())


def test_the_step_is_the_trainers_else_the_folders_name(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-40"
    folder.mkdir()
    assert checkpoint_step(folder) == 40 and checkpoint_step(tmp_path) is None
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 41}))
    assert checkpoint_step(folder) == 41
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(ConfigError, match="global_step: expected a whole number"):
        checkpoint_step(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere/at/all", "nowhere/at/all: no such folder, expected one with a saved model or adapter"),
        ("someone/never-downloaded", "hf download someone/never-downloaded gets it"),
    ],
)
def test_what_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(name)


def test_folders_without_a_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a model folder, expected config"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json: cannot be read"):
        load_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="found a file"):
        load_checkpoint(tmp_path / "config.json")
    causal_lm().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="cannot be loaded as a model"):
        load_checkpoint(tmp_path)


def test_an_adapter_whose_base_is_gone_says_so(tmp_path: Path) -> None:
    adapted(causal_lm(), lora(), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    gone = {**settings, "base_model_name_or_path": "/gone/base-model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(gone))
    with pytest.raises(ConfigError, match=r"adapter's base: /gone/base-model: no such folder.* give .* as base"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, base=saved_model(0)) is not None
    with pytest.raises(ConfigError, match="is an adapter too"):
        load_checkpoint(tmp_path, base=tmp_path)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path, kind: str) -> None:
    if kind == "whole":
        causal_lm().save_pretrained(tmp_path)
    else:
        adapted(causal_lm(), lora(), tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    del tensors[next(name for name in sorted(tensors) if "layers.1" in name)]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 of its weights are not there|Found missing adapter keys"):
        load_checkpoint(tmp_path)
