"""One process of ``test_fsdp2_capture.py``: readings of an FSDP2 model before, between and after training steps."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from tiny_models import make_batch, make_model, make_prompts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from interp_rlhf.activations.capturing import capture, read_prompts

NAMES = ["embed", "layers.0.heads", "layers.1.attn_out", "layers.1.mlp_out", "layers.1.resid_post"]
TYPES = ["llama", "gemma2", "gpt2", "mixtral"]


def readings(model: torch.nn.Module, rank: int, world: int) -> dict[str, torch.Tensor]:
    """This rank's share of the texts, so that ranks see batches of different widths."""
    found = read_prompts(model, make_prompts(8)[rank::world], NAMES, batch_size=2, pad_token_id=0, log_probs=True)
    plain = read_prompts(model, make_prompts(8)[rank::world], NAMES[:2], batch_size=2, pad_token_id=0)
    assert torch.equal(plain.means["embed"], found.means["embed"])
    assert found.log_probs is not None
    captured = capture(model, make_batch(), ["layers.1.resid_post"], reduce="mean")
    return {**found.means, "log_probs": found.log_probs, "capture": captured["layers.1.resid_post"]}


def train(model: torch.nn.Module, *, measure_between: bool, rank: int, world: int) -> list[float]:
    """Three steps; the losses. A measurement sits between backward and step, where stale weights would show."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs, losses = make_batch(), []
    model.train()
    for _ in range(3):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        losses.append(loss.item())
        if measure_between:
            readings(model, rank, world)
        optimizer.step()
        optimizer.zero_grad()
        if measure_between:
            readings(model, rank, world)
    return losses


def sharded(model_type: str) -> torch.nn.Module:
    model = make_model(model_type)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = model.transformer.h if model_type == "gpt2" else model.model.layers
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def main(folder: str) -> None:
    """Run on every rank; each saves what it read."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    saved = {}
    for model_type in TYPES:
        model = sharded(model_type)
        saved[model_type] = readings(model, rank, world)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "left unsharded"
        assert isinstance(model, FSDPModule) and all(parameter.grad is None for parameter in model.parameters())
        losses = train(model, measure_between=True, rank=rank, world=world)
        assert losses == train(sharded(model_type), measure_between=False, rank=rank, world=world), "a trace was left"
        saved[f"{model_type} trained"] = readings(model, rank, world)
    torch.save(saved, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
