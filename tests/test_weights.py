"""Which files of a checkpoint are its weights: every layout that trainers save, and what transformers and PEFT save."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from stored_runs import INFO, row
from transformers import LlamaConfig, LlamaForCausalLM

from interp_rlhf.audit.store import RunStore
from interp_rlhf.audit.weights import weight_files, weight_hashes
from interp_rlhf.cli import main
from interp_rlhf.errors import FormatError

#: What a trainer saves besides weights; none of it decides what the model computes.
STATES = (
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "rng_state_1.pth",
    "training_args.bin", "trainer_state.json", "config.json", "generation_config.json", "tokenizer.json", "README.md",
    "tokenizer_config.json", "chat_template.jinja", "latest", "zero_to_fp32.py", "interp/tensors.safetensors",
    "interp/snapshot.json", ".interp-1-2/tensors.safetensors", "optimizer_0/__0_0.distcp", "optimizer_0/.metadata",
)  # fmt: skip

OPTIMIZER_SHARDS = tuple(f"global_step4/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2))
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
MODEL_STATES = tuple(f"global_step4/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(2))

#: Weight files of a layout, and files of it that are no weights.
LAYOUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "one file": (("model.safetensors",), ()),
    "one file, PyTorch": (("pytorch_model.bin",), ()),
    "shards": (SHARDS, ()),
    "shards, PyTorch": (
        ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"), (),
    ),
    "adapter only": (ADAPTER, ()),
    "adapter and reference adapter": ((*ADAPTER, *(f"ref/{name}" for name in ADAPTER)), ()),
    "value head": (("model.safetensors", "v_head.bin", "value_model/model.safetensors"), ()),
    "ZeRO 2": (("model.safetensors", "global_step4/mp_rank_00_model_states.pt"), OPTIMIZER_SHARDS),
    "ZeRO 3, gathered": ((*SHARDS, *MODEL_STATES), OPTIMIZER_SHARDS),
    "ZeRO 3, adapter": ((*ADAPTER, *MODEL_STATES), OPTIMIZER_SHARDS),
    "ZeRO 3, not gathered": ((*MODEL_STATES, *OPTIMIZER_SHARDS), ()),
    "FSDP, sharded": (
        tuple(f"pytorch_model_fsdp_0/{name}" for name in (".metadata", "__0_0.distcp", "__1_0.distcp")), (),
    ),
    "FSDP, one file": (("pytorch_model_fsdp.bin",), ()),
    "none": ((), ()),
}  # fmt: skip


def fill(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"bytes of {name}".encode())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, tmp_path: Path) -> None:
    weights, others = LAYOUTS[layout]
    fill(tmp_path, (*weights, *others, *STATES))
    assert weight_files(tmp_path) == tuple(sorted(weights)) == weight_files(str(tmp_path))
    expected = {}
    for name in weights:
        data = f"bytes of {name}".encode()
        expected[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert weight_hashes(tmp_path) == expected


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "none"])
def test_verify_covers_every_weight_file(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each changed by one byte, removed, and one more of its kind added: exit code 1 and the file's name."""
    weights, others = LAYOUTS[layout]
    checkpoint = tmp_path / "checkpoint-10"
    fill(checkpoint, (*weights, *others, *(name for name in STATES if "interp" not in name)))
    store = RunStore(tmp_path)
    store.start(INFO, resumed_from=None)
    store.snapshot(10, [row(1, 10)], {"x": torch.ones(2)}, checkpoint=checkpoint)
    for name in (*others, "optimizer.pt", "trainer_state.json"):
        (checkpoint / name).write_bytes(b"changed")
    assert main(["verify", str(tmp_path)]) == 0
    for name in weights:
        data = (checkpoint / name).read_bytes()
        for bad in (data[:-1] + b"X", None):
            (checkpoint / name).unlink()
            if bad is not None:
                (checkpoint / name).write_bytes(bad)
            capsys.readouterr()
            assert main(["verify", str(tmp_path)]) == 1
            assert f"failure  checkpoint-10/{name}: found " in capsys.readouterr().out
        (checkpoint / name).write_bytes(data)
    more = checkpoint / Path(weights[-1]).parent / "more.safetensors"
    more.write_bytes(b"more")
    assert main(["verify", str(tmp_path)]) == 1
    more.unlink()
    assert main(["verify", str(tmp_path)]) == 0


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_what_transformers_saves(size: str, tmp_path: Path) -> None:
    """All its tensors are in the files that are found, whatever their number."""
    from safetensors import safe_open

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size=size)
    found = weight_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - set(found) == {"config.json", "generation_config.json"}
    shards = [name for name in found if name.endswith(".safetensors")]
    assert (len(shards) > 1) == (size == "20KB") == ("model.safetensors.index.json" in found)
    names = set()
    for name in shards:
        with safe_open(tmp_path / name, framework="np") as file:
            names |= set(file.keys())
    assert names == {name for name, _ in model.named_parameters()}


def test_what_peft_saves(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert weight_files(tmp_path) == (*ADAPTER, *(f"ref/{name}" for name in ADAPTER))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(FormatError, match=r"model\.safetensors: cannot be read"):
        weight_hashes(tmp_path)
    os.unlink(tmp_path / "model.safetensors")
    fill(tmp_path, ("elsewhere/weights",))
    (tmp_path / "model.safetensors").symlink_to("elsewhere/weights")
    assert set(weight_hashes(tmp_path)) == {"model.safetensors"}, "a link to weights is read, as the model loader does"
