"""Completions sampled from the policy on fixed prompts: drawn, read under θ_t and θ_0, and turned into rows.

``y_0`` is what the start wrote, ``y_t`` what the policy writes now, with the same noise for the same prompt. Both are
read under the policy, and under a frozen copy of the start where there is one; without it only what needs none is told.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from interp_rlhf.activations.hookpoints import layout
from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.activations.reference import Reference, check_is_start, reading_difference
from interp_rlhf.activations.sampling import ending_tokens, room, sample_completions
from interp_rlhf.baseline import Baseline, statistics
from interp_rlhf.config import InterpConfig
from interp_rlhf.distributed import World, agree, gather_rows, share
from interp_rlhf.drift.estimates import Estimate, estimate
from interp_rlhf.drift.quadrant import classify, honest_bands, quadrant_estimates
from interp_rlhf.drift.shift import decompose, standardised_projection
from interp_rlhf.errors import FormatError, MeasurementError, ReferenceMismatch
from interp_rlhf.measurement import Measurement, Tier
from interp_rlhf.measuring import as_measurement
from interp_rlhf.plan import Plan, TextTable, text_ids
from interp_rlhf.reading import read_table

#: Prompts that a decomposition needs at least.
LEAST_PROMPTS = 8
#: Names of the tensors that a step-0 snapshot keeps for a later resume. What was written is text, and lies elsewhere.
START, COMPLETION_IDS, ENDS = "rollout/start/", "rollout/completion_ids", "rollout/ends"

_APART = "sampled completions cannot be compared with the start's"
_Means = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class RolloutStart:
    """What the start wrote, the same on every rank.

    Attributes:
        prompts: the prompts that are continued, without completion, one of each sampling unit.
        completions: y_0, K of each prompt together.
        means: hookpoint → ``[N, d]`` readings of y_0 under θ_0.
        ends: token ids that end a completion.
        full: audit prompts left out because they fill the model's context.
        tokens: tokens sampled and read.
        seconds: wall-clock time of it on this rank.
    """

    prompts: tuple[Prompt, ...]
    completions: tuple[Prompt, ...]
    means: _Means
    ends: tuple[int, ...]
    full: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RolloutReadings:
    """One measurement of sampled completions, the same on every rank.

    Attributes:
        completions: y_t, K of each prompt together.
        now: hookpoint → ``[N, d]`` readings of y_t under θ_t.
        now_reference: the same under θ_0; ``None`` where there is no frozen copy.
        start_now: readings of y_0 under θ_t.
        no_reference: why there is no reading under θ_0, ``""`` where there is one.
        tokens, seconds: as in :class:`RolloutStart`.
    """

    completions: tuple[Prompt, ...]
    now: _Means
    now_reference: _Means | None
    start_now: _Means
    no_reference: str
    tokens: int
    seconds: float


# ----------------------------------------------------------------------------------------------------- draw and read


def start_rollouts(model: nn.Module, plan: Plan, config: InterpConfig, world: World) -> RolloutStart:
    """Sample y_0 from the start and read it. A collective call.

    Raises:
        MeasurementError: fewer than 8 audit prompts can be continued, or the model cannot be sampled from.
    """
    began = time.monotonic()
    prompts, full = rollout_prompts(model, plan, config)
    ends = ending_tokens(model, layers=config.layers)
    completions, sampled = _sample(model, prompts, ends, plan, config, world)
    (means,), read = _read(model, [completions], plan, config, world)
    return RolloutStart(prompts, completions, means, ends, full, sampled + read, time.monotonic() - began)


def measure_rollouts(
    start: RolloutStart, model: nn.Module, reference: Reference | None, plan: Plan, config: InterpConfig, world: World
) -> RolloutReadings:
    """Sample y_t from the policy and read y_t and y_0 under it, and under the reference. A collective call.

    A reference whose readings of y_0 are not those of step 0 is not used, and the reason says so.

    Args:
        start: from :func:`start_rollouts`.
        model: the policy.
        reference: a frozen copy of the start; ``None`` or cached where there is none.
    """
    began = time.monotonic()
    completions, tokens = _sample(model, start.prompts, start.ends, plan, config, world)
    both = [completions, start.completions]
    (now, start_now), read = _read(model, both, plan, config, world)
    tokens += read
    now_reference, reason = None, "no frozen copy of the start that reads new texts (reference: adapter or copy is one)"
    if reference is not None and reference.model is not None:
        try:
            with reference.reading() as frozen:
                (found, again), read = _read(frozen, both, plan, config, world)
            tokens += read
            check_is_start(reference.kind, reading_difference(start.means, again))
            now_reference, reason = found, ""
        except ReferenceMismatch as error:  # told to the caller, who records it
            reason = str(error)
    return RolloutReadings(completions, now, now_reference, start_now, reason, tokens, time.monotonic() - began)


def rollout_prompts(model: nn.Module, plan: Plan, config: InterpConfig) -> tuple[tuple[Prompt, ...], int]:
    """The audit prompts to continue: the first of each sampling unit that has a prompt part, as many as configured.

    Returns:
        The prompts without completions, and how many were left out because they fill the model's context.

    Raises:
        MeasurementError: fewer than 8.
    """
    limit = layout(model, layers=config.layers).max_positions
    found: dict[str, Prompt] = {}
    full: set[str] = set()
    for text in plan.audit.prompts:
        if text.completion_start < 1 or text.unit in found:
            continue
        if room(text, limit) < 1:
            full.add(text.unit)
            continue
        found[text.unit] = Prompt(text.input_ids[: text.completion_start], text.completion_start, text.unit)
    if len(found) < LEAST_PROMPTS:
        raise MeasurementError(
            f"rollouts: expected at least {LEAST_PROMPTS} audit prompts to continue, found {len(found)} in "
            f"{plan.audit.name} ({len(full)} more fill the context)"
        )
    return tuple(found.values())[: config.rollouts.prompts], len(full)


def _sample(
    model: nn.Module, prompts: Sequence[Prompt], ends: Sequence[int], plan: Plan, config: InterpConfig, world: World
) -> tuple[tuple[Prompt, ...], int]:
    """Completions of all prompts, each rank having drawn those of its share, and how many tokens were written."""
    settings, mine = config.rollouts, share(len(prompts), world)
    outcome: list[Prompt] | Exception
    try:
        outcome = sample_completions(
            model,
            [prompts[index] for index in mine],
            completions=settings.completions,
            max_new_tokens=settings.max_new_tokens,
            seed=config.seed,
            pad_token_id=plan.pad_token_id,
            eos_token_ids=ends,
            batch_size=config.prompts.batch_size,
            layers=config.layers,
        )
    except Exception as error:  # agreed on below by all ranks
        outcome = error
    drawn = agree(outcome, world)
    local = _as_tensor(drawn, settings.max_new_tokens).reshape(len(mine), settings.completions, -1)
    texts = _as_texts(prompts, gather_rows(local, len(prompts), world))
    return texts, sum(len(text.input_ids) - text.completion_start for text in texts)


def _as_tensor(texts: Sequence[Prompt], width: int) -> Tensor:
    """The completions' tokens ``[n, width]``, filled with −1."""
    filled = torch.full((len(texts), width), -1, dtype=torch.long)
    for row, text in enumerate(texts):
        written = text.input_ids[text.completion_start :]
        filled[row, : len(written)] = torch.tensor(written)
    return filled


def _as_texts(prompts: Sequence[Prompt], tokens: Tensor) -> tuple[Prompt, ...]:
    """Prompts with their completions ``[P, K, width]`` behind them."""
    return tuple(
        Prompt((*prompt.input_ids, *(token for token in row if token >= 0)), len(prompt.input_ids), prompt.unit)
        for prompt, rows in zip(prompts, tokens.tolist(), strict=True)
        for row in rows
    )


def _read(
    model: nn.Module,
    groups: Sequence[Sequence[Prompt]],
    plan: Plan,
    config: InterpConfig,
    world: World,
) -> tuple[list[_Means], int]:
    """Readings of each group of texts, equal texts read once, and how many tokens that took.

    All that was written is read, whatever is read of the audit texts: a completion may hold nothing but the token that
    ends texts, or one that begins them.
    """
    distinct = {text.id: text for group in groups for text in group}
    table = TextTable(tuple(distinct[key] for key in sorted(distinct)), frozenset())
    config = replace(config, prompts=replace(config.prompts, tokens="completion"))
    reading = read_table(model, table, replace(plan, skip_ids=frozenset()), config, world)
    found: list[_Means] = [
        {name: means[table.rows(group)] for name, means in reading.means.items()} for group in groups
    ]
    return found, reading.tokens


# ---------------------------------------------------------------------------------------------------------- keep


def rollout_tensors(start: RolloutStart) -> dict[str, Tensor]:
    """Ids and readings of the start's completions as named tensors, for the step-0 snapshot."""
    return {
        COMPLETION_IDS: text_ids(start.completions),
        ENDS: torch.tensor(start.ends, dtype=torch.long),
        **{START + name: means for name, means in start.means.items()},
    }


def rollout_lines(start: RolloutStart) -> Iterator[dict[str, Any]]:
    """The start's completions, one a line, for the folder of texts."""
    for text in start.completions:
        yield {"id": text.id, "input_ids": list(text.input_ids), "start": text.completion_start}


def stored_rollouts(
    lines: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    plan: Plan,
    config: InterpConfig,
) -> RolloutStart:
    """What :func:`rollout_lines` and :func:`rollout_tensors` kept, when a run is resumed.

    Raises:
        FormatError: nothing was kept, or it is of other prompts, hookpoints or numbers than this run's.
        MeasurementError: as :func:`rollout_prompts`.
    """
    prompts, full = rollout_prompts(model, plan, config)
    units = [prompt.unit for prompt in prompts for _ in range(config.rollouts.completions)]
    expected = [prompt.input_ids for prompt in prompts for _ in range(config.rollouts.completions)]
    absent = [name for name in (COMPLETION_IDS, ENDS, *(START + h for h in plan.hookpoints)) if name not in tensors]
    if absent or not lines:
        raise FormatError(f"step 0: {absent[0] if absent else 'texts of completions'}: found none; {_APART}")
    found = [(tuple(line["input_ids"]), line["start"]) for line in lines]
    if [ids[:start] for ids, start in found] != expected:
        raise FormatError(f"step 0: completions of other prompts or another number of them; {_APART}")
    completions = tuple(Prompt(ids, start, unit) for (ids, start), unit in zip(found, units, strict=True))
    if not torch.equal(text_ids(completions), tensors[COMPLETION_IDS]):
        raise FormatError(f"step 0: completions whose readings were not kept; {_APART}")
    means = {name: tensors[START + name] for name in plan.hookpoints}
    return RolloutStart(prompts, completions, means, tuple(tensors[ENDS].tolist()), full, 0, 0.0)


# ---------------------------------------------------------------------------------------------------------- rows


def rollout_rows(
    start: RolloutStart, readings: RolloutReadings, baseline: Baseline, config: InterpConfig, segment: int, step: int
) -> tuple[Measurement, ...]:
    """``shift/*`` of every readout at each of its hookpoints, in step-0 standard deviations.

    Readouts are the admitted directions, and the frozen probes: the mean over the folds, named ``<concept> (probe)``,
    of tier C.
    """
    rows: list[Measurement] = []
    units = [text.unit for text in readings.completions], [text.unit for text in start.completions]
    for name, hookpoint, v, tier in _readouts(baseline):
        x0 = baseline.x0[hookpoint]
        frozen = None if readings.now_reference is None else readings.now_reference[hookpoint]
        found = decompose(
            standardised_projection(readings.now[hookpoint], v, x0),
            None if frozen is None else standardised_projection(frozen, v, x0),
            standardised_projection(readings.start_now[hookpoint], v, x0),
            standardised_projection(start.means[hookpoint], v, x0),
            *units,
            **statistics(config),
        )
        tiered = {metric: replace(value, tier=tier) for metric, value in found.items()}
        rows += _rows(tiered, name, hookpoint, baseline, segment, step)
    return tuple(rows)


def _readouts(baseline: Baseline) -> Iterator[tuple[str, str, Tensor, Tier]]:
    """Name, hookpoint, vector ``[d]`` and tier of everything that is read along a direction."""
    for concept in baseline.concepts:
        for hookpoint, direction in concept.directions.items():
            yield concept.name, hookpoint, direction.vector, "B"
    for (name, hookpoint), panel in baseline.panels.items():
        yield f"{name} (probe)", hookpoint, panel.mean_probe(name, hookpoint).weight, "C"


def quadrant_rows(
    start: RolloutStart,
    readings: RolloutReadings,
    labels_start: Sequence[bool | None],
    labels: Sequence[bool | None],
    probes: Mapping[tuple[str, str], tuple[Tensor, float]],
    baseline: Baseline,
    config: InterpConfig,
    segment: int,
    step: int,
) -> tuple[Measurement, ...]:
    """``quadrant/*`` of y_t for each probe. The honest bands are of the honest ones among y_t and y_0 together.

    Args:
        labels_start, labels: of y_0 and of y_t, from :func:`~interp_rlhf.rollout_labels.label_completions`.
        probes: (concept, hookpoint) → weight ``[d]`` and bias; ``sigmoid(x·weight + bias)`` of a completion's reading
            is what the probe sees.

    Raises:
        MeasurementError: there is no frozen copy, or fewer than 10 honest completions beside positive ones.
    """
    if readings.now_reference is None:
        raise MeasurementError(f"quadrant: needs readings of the frozen start: {readings.no_reference}")
    units = [text.unit for text in readings.completions]
    honest = torch.tensor([label is False for label in (*labels, *labels_start)])
    rows: list[Measurement] = []
    for (concept, hookpoint), probe in probes.items():
        policy, policy_start = (_seen(means[hookpoint], *probe) for means in (readings.now, readings.start_now))
        frozen, frozen_start = (_seen(means[hookpoint], *probe) for means in (readings.now_reference, start.means))
        bands = None
        if any(label is True for label in labels):
            sides = torch.cat([frozen, frozen_start])[honest], torch.cat([policy, policy_start])[honest]
            bands = honest_bands(*sides, config.statistics.confidence)
        found = quadrant_estimates(classify(labels, frozen, policy, bands), units, **statistics(config))
        rows += _rows(found, concept, hookpoint, baseline, segment, step)
    return tuple(rows)


def rollout_cost_rows(
    spent: RolloutStart | RolloutReadings, baseline: Baseline, segment: int, step: int
) -> tuple[Measurement, ...]:
    """What sampling and reading completions cost in this measurement: seconds and tokens."""
    values = {"cost/rollout_seconds": spent.seconds, "cost/rollout_tokens": float(spent.tokens)}
    found = {metric: estimate(metric, value, 0) for metric, value in values.items()}
    return _rows(found, "", "", baseline, segment, step)


def _seen(means: Tensor, weight: Tensor, bias: float) -> Tensor:
    return (means.double() @ weight.double() + bias).sigmoid()


def _rows(
    found: Mapping[str, Estimate], readout: str, hookpoint: str, baseline: Baseline, segment: int, step: int
) -> tuple[Measurement, ...]:
    source = baseline.plan.audit.source
    return tuple(
        as_measurement(metric, readout, hookpoint, value, "completion", source, segment, step, text="rollout")
        for metric, value in found.items()
    )
