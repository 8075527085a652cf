"""One of several processes that try every function of ``distributed``; launched from test_collectives.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from interp_rlhf.distributed import agree, barrier, gather_rows, join_world, run_on_main, share
from interp_rlhf.errors import MeasurementError


def attempt(work: Any) -> str:
    try:
        return f"fine: {work()}"
    except MeasurementError as error:
        return str(error).splitlines()[0]


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    world = join_world()
    rows = torch.arange(14.0).reshape(7, 2)
    result = {
        "world": [world.rank, world.size, world.is_main],
        "shares": {n: share(n, world) for n in (1, 2, 6, 7)},
        "gathered": {n: gather_rows(rows[share(n, world)], n, world).tolist() for n in (1, 2, 6, 7)},
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
