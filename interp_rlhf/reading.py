"""One complete reading of a run's texts: sharded over the ranks, run through the model, gathered in order."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from interp_rlhf.activations.capturing import Observer, Readings, read_prompts
from interp_rlhf.activations.engines import find_engine
from interp_rlhf.activations.feature_sums import FeatureReading, FeatureStream
from interp_rlhf.activations.hookpoints import layout
from interp_rlhf.activations.prompts import PaddingSide, Prompt
from interp_rlhf.config import InterpConfig
from interp_rlhf.distributed import World, agree, gather_rows, share
from interp_rlhf.errors import InterpError
from interp_rlhf.feature_reading import check_streams, counting, gather_streams
from interp_rlhf.plan import Plan, TextTable


class ShardedForwardError(InterpError):
    """A forward of a sharded model failed on this rank; the job has to stop, since the other ranks wait inside it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one pass over a :class:`TextTable` gave, complete on every rank.

    Attributes:
        means: resolved hookpoint → per-text mean over content tokens ``[N, d]``, float32 on the CPU.
        log_probs: summed completion log-probability ``[N]`` in nats; NaN for texts that are not scored.
        tokens: tokens run through the model, over all ranks' shares.
        seconds: wall-clock seconds of the pass on this rank.
        features: dictionary's name → what it read on the texts that count for features, in their order.
    """

    means: Mapping[str, Tensor]
    log_probs: Tensor
    tokens: int
    seconds: float
    features: Mapping[str, FeatureReading] = field(default_factory=dict)


def read_table(
    model: nn.Module,
    table: TextTable,
    plan: Plan,
    config: InterpConfig,
    world: World,
    *,
    side: PaddingSide = "right",
    longest_first: bool = True,
    streams: Sequence[FeatureStream] = (),
    texts: Sequence[Prompt] | None = None,
) -> Reading:
    """Read every text of ``table``. A collective call: each rank runs ⌈n/size⌉ texts, all ranks get all readings.

    Scored texts run to the end of the model, the others stop after the last hookpoint.

    Args:
        streams: new ones, dictionaries of features to read in the same pass, each at its own hookpoint, which need not
            be one of the plan's.
        texts: the texts of ``table`` that count for these, each once; ``plan.audit.prompts`` where not given.

    Raises:
        MeasurementError: on all ranks, if any rank's readings failed.
        ShardedForwardError: on the failing rank of a sharded model, which must not go on.
    """
    began = time.monotonic()
    check_streams(streams)
    counted = plan.audit.prompts if texts is None else texts
    scored = [row for row, prompt in enumerate(table.prompts) if prompt.id in table.scored]
    plain = [row for row, prompt in enumerate(table.prompts) if prompt.id not in table.scored]
    means = {name: torch.empty(0) for name in plan.hookpoints}
    log_probs = torch.full((len(table.prompts),), float("nan"), dtype=torch.float64)
    tokens = 0
    for rows in (scored, plain):
        if not rows:
            continue
        prompts = [table.prompts[i] for i in rows]
        mine = [prompts[i] for i in share(len(rows), world)]
        watching = counting(streams, mine, counted, len(range(world.rank, len(rows), world.size)))
        part = _read_shared(model, prompts, plan, config, world, side, longest_first, rows is scored, watching)
        for name, values in part.means.items():
            if not means[name].numel():
                means[name] = values.new_empty((len(table.prompts), values.shape[1]))
            means[name][rows] = values
        if rows is scored:
            log_probs[rows] = part.log_probs
        tokens += part.tokens
    features = gather_streams(streams, len(counted), world)
    return Reading(means, log_probs, tokens, time.monotonic() - began, features)


def _read_shared(
    model: nn.Module,
    prompts: Sequence[Prompt],
    plan: Plan,
    config: InterpConfig,
    world: World,
    side: PaddingSide,
    longest_first: bool,
    scored: bool,
    observers: Mapping[str, Observer],
) -> Reading:
    outcome: Readings | Exception
    try:
        outcome = read_prompts(
            model,
            [prompts[i] for i in share(len(prompts), world)],
            plan.hookpoints,
            batch_size=config.prompts.batch_size,
            pad_token_id=plan.pad_token_id,
            tokens=config.prompts.tokens,
            skip_ids=plan.skip_ids,
            side=side,
            longest_first=longest_first,
            log_probs=scored,
            layers=config.layers,
            observers=observers,
        )
    except Exception as problem:  # agreed on below by all ranks, where they can still talk
        parts = layout(model, layers=config.layers)
        if world.size > 1 and not find_engine(model, parts).may_stop:  # collectives inside the forward
            raise ShardedForwardError(f"rank {world.rank}: {type(problem).__name__}: {problem}") from problem
        outcome = problem
    local = agree(outcome, world)
    n = len(prompts)
    means = {name: gather_rows(local.means[name], n, world) for name in plan.hookpoints}
    log_probs = torch.empty(0) if local.log_probs is None else gather_rows(local.log_probs.double(), n, world)
    return Reading(means, log_probs, local.tokens * world.size, local.seconds)
