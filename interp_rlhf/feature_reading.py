"""Dictionaries of features read along with a run's texts: which texts count for them, and the ranks' parts as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor

from interp_rlhf.activations.capturing import Observer
from interp_rlhf.activations.feature_sums import FeatureReading, FeatureStream
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.distributed import World, together
from interp_rlhf.errors import MeasurementError


def gather_features(
    local: FeatureReading | None, n: int, world: World, rows: Int64[Tensor, " own"] | None = None
) -> FeatureReading:
    """One reading of all n texts from every rank's part. A collective call: all ranks get the whole.

    Args:
        local: what this rank read, without rows that only pad its share; ``None`` where that is no text.
        n: texts over all ranks.
        world: this process among its peers.
        rows: which of the n texts the part's are; rank, rank + size, … where not given, as
            :func:`~interp_rlhf.distributed.share` deals them out.

    Raises:
        MeasurementError: on all ranks, where the parts are not of one dictionary or not of the n texts, each once.
    """
    own = torch.arange(world.rank, n, world.size) if rows is None else rows
    parts: list[Any] = [(local, own)]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, (local, own), group=world.group)
    found = torch.cat([rows for _, rows in parts])
    readings = [part for part, _ in parts if part is not None]
    if not torch.equal(found.sort().values, torch.arange(n)):
        raise MeasurementError(f"feature readings: expected {n} texts over all ranks, each once, found {len(found)}")
    return FeatureReading.merge(readings, found.argsort())


def check_streams(streams: Sequence[FeatureStream]) -> None:
    """Refuse streams that share a name, have no hookpoint, or have read before.

    Raises:
        MeasurementError: naming the dictionary.
    """
    names = [stream.name for stream in streams]
    for stream in streams:
        if names.count(stream.name) > 1:
            raise MeasurementError(f"{stream.place}: expected dictionaries of different names, found this one twice")
        if not stream.hookpoint:
            raise MeasurementError(f"{stream.place}: expected a hookpoint to read it at, found none")
        if len(stream.rows):
            raise MeasurementError(
                f"{stream.place}: expected a new stream, found one that read {len(stream.rows)} texts"
            )


def counting(
    streams: Sequence[FeatureStream], prompts: Sequence[Prompt], texts: Sequence[Prompt], real: int
) -> Mapping[str, Observer]:
    """Observers that pass a list of texts on to streams, by hookpoint, as far as they count; none where no text does.

    Args:
        streams: what reads.
        prompts: the list that ``read_prompts`` gets.
        texts: those that count; streams know a text by its place among these.
        real: how many of ``prompts`` are this rank's own; those after them only pad its share.
    """
    place = {prompt.id: row for row, prompt in enumerate(texts)}
    places = [place.get(prompt.id) if row < real else None for row, prompt in enumerate(prompts)]

    if not any(row is not None for row in places):
        return {}

    def observer(at: str) -> Observer:
        def observe(rows: Sequence[int], values: Tensor, mask: Tensor) -> None:
            kept = [index for index, row in enumerate(rows) if places[row] is not None]
            mine = [place for row in rows if (place := places[row]) is not None]
            if len(kept) < len(rows):
                values, mask = values[kept], mask[kept]
            for stream in streams:
                if stream.hookpoint == at:
                    stream(mine, values, mask)

        return observe

    return {at: observer(at) for at in dict.fromkeys(stream.hookpoint for stream in streams)}


def gather_streams(streams: Sequence[FeatureStream], n: int, world: World) -> dict[str, FeatureReading]:
    """What streams read on n texts over all ranks, by name. A collective call.

    Raises:
        MeasurementError: on all ranks, where a stream failed on one.
    """
    found: dict[str, FeatureReading] = {}
    for stream in streams:
        found[stream.name] = gather_features(together(stream.part, world), n, world, stream.rows)
    return found
