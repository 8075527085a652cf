"""One of several processes that try every function of ``distributed``; launched from test_collectives.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from interp_rlhf.activations.feature_sums import FeatureStream
from interp_rlhf.distributed import agree, barrier, gather_rows, join_world, run_on_main, share
from interp_rlhf.errors import MeasurementError
from interp_rlhf.feature_reading import gather_streams


def attempt(work: Any) -> str:
    try:
        return f"fine: {work()}"
    except MeasurementError as error:
        return str(error).splitlines()[0]


class Doubling:
    """Two features of activations of width 2."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z


def features(world: Any, n: int, values: torch.Tensor) -> Any:
    """Sums of the n first values, a text of one token each; ranks without a text have none to show."""
    stream = FeatureStream(Doubling(), "doubling")
    mine = list(range(world.rank, n, world.size))
    stream(mine, values[mine, None], torch.ones(len(mine), 1))
    found = gather_streams([stream], n, world)["doubling"]
    return [found.dense([0, 1]).tolist(), found.error, found.l0]


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    world = join_world()
    rows = torch.arange(14.0).reshape(7, 2)
    result = {
        "world": [world.rank, world.size, world.is_main],
        "shares": {n: share(n, world) for n in (1, 2, 6, 7)},
        "gathered": {n: gather_rows(rows[share(n, world)], n, world).tolist() for n in (1, 2, 6, 7)},
        "features": {n: features(world, n, rows) for n in (1, 2, 7)},
        "features failed": attempt(lambda: features(world, 7, rows / rows[:, :1].ne(6))),
        "agreed": attempt(lambda: agree(world.rank, world)),
        "one failed": attempt(lambda: agree(ValueError("broken") if world.rank == 1 else world.rank, world)),
        "both failed": attempt(lambda: agree(KeyError(world.rank), world)),
        "from main": attempt(lambda: run_on_main(lambda: 10 + world.rank, world)),
        "main failed": attempt(lambda: run_on_main(lambda: 1 // world.rank, world)),
    }
    barrier(world)
    Path(folder, f"rank{world.rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
