"""Several processes as one reader: who runs which texts, gathering, and agreement on errors.

Every rank runs the same number of forwards (a sharded engine needs that); rows that only pad a rank's share are
dropped after gathering. Messages travel over a gloo group of our own, so that a measurement never interleaves with the
trainer's collectives on the accelerator's backend.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from interp_rlhf.errors import MeasurementError

T = TypeVar("T")

#: A rank that does not answer for this long has failed; the job then stops instead of hanging for ever.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class World:
    """This process among its peers: ``rank`` of ``size``, and the gloo ``group`` they talk over."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that computes statistics and writes files."""
        return self.rank == 0


def join_world() -> World:
    """The world of the running job. A collective call where ``torch.distributed`` is initialized."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return World()
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return World(dist.get_rank(), dist.get_world_size(), group)


def share(n: int, world: World) -> list[int]:
    """Indices of the rows this rank runs: ⌈n/size⌉ of them, the last rank's share padded with row 0."""
    each = -(-n // world.size)
    mine = list(range(world.rank, n, world.size))
    return mine + [0] * (each - len(mine))


def gather_rows(local: Tensor, n: int, world: World) -> Tensor:
    """Put the ranks' shares ``[⌈n/size⌉, ...]`` back in order as ``[n, ...]``, on every rank."""
    if world.size == 1:
        return local[:n]
    parts = [torch.empty_like(local) for _ in range(world.size)]
    dist.all_gather(parts, local.contiguous(), group=world.group)
    return torch.stack(parts, dim=1).flatten(0, 1)[:n]


def agree(outcome: T | Exception, world: World) -> T:
    """This rank's outcome, once every rank knows that none failed; where one did, all raise together.

    Raises:
        MeasurementError: on all ranks, naming the failing ranks and their errors; the own error is its cause. A
            process on its own raises its error as it is.
    """
    error = outcome if isinstance(outcome, Exception) else None
    if world.size > 1:
        found: list[str | None] = [None] * world.size
        dist.all_gather_object(found, None if error is None else f"{type(error).__name__}: {error}", group=world.group)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None]
        if failed:
            raise MeasurementError("; ".join(failed)) from error
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def together(work: Callable[[], T], world: World) -> T:
    """This rank's ``work()``, once it has succeeded on every rank. Nothing inside may be a collective call.

    Raises:
        MeasurementError: on all ranks, where it failed on one; as :func:`agree`.
    """
    try:
        outcome: T | Exception = work()
    except Exception as error:  # every rank is told
        outcome = error
    return agree(outcome, world)


def spread(n: int, work: Callable[[int], T], world: World) -> list[T]:
    """``[work(0), …, work(n − 1)]`` on every rank, each done by one of them. Nothing inside may be a collective call.

    Raises:
        MeasurementError: on all ranks, where one failed; as :func:`agree`.
    """
    mine = together(lambda: [work(i) for i in range(world.rank, n, world.size)], world)
    if world.size == 1:
        return mine
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, mine, group=world.group)
    return [parts[i % world.size][i // world.size] for i in range(n)]


def run_on_main(work: Callable[[], T], world: World) -> T:
    """Run ``work`` on the main process only; every rank gets its result, or raises with it."""
    if world.size == 1:
        return work()
    message: list[Any] = [None, None]
    if world.is_main:
        try:
            message[0] = work()
        except Exception as error:  # passed on to every rank below, never swallowed
            message[1] = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"
    dist.broadcast_object_list(message, src=0, group=world.group)
    if message[1] is not None:
        raise MeasurementError(f"rank 0: {message[1]}")
    return message[0]


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        dist.barrier(group=world.group)
