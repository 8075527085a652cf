"""Which components a concept's drift comes from: the start, the change since, rows and events of the timeline.

The texts, the tokens and the unit (step-0 standard deviations) are those of ``concept/drift``; the parts sum to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp_rlhf.activations.hookpoints import parse_hookpoint
from interp_rlhf.audit.store import RunStore
from interp_rlhf.baseline import Baseline, statistics
from interp_rlhf.circuits.components import ComponentChanges, ComponentReading, component_changes, read_components
from interp_rlhf.circuits.wiring import find_wiring
from interp_rlhf.config import InterpConfig
from interp_rlhf.drift.estimates import estimate
from interp_rlhf.drift.nulls import paired_bootstrap
from interp_rlhf.errors import FormatError
from interp_rlhf.measurement import Measurement
from interp_rlhf.measuring import as_measurement
from interp_rlhf.readouts.directions import Direction

#: Components that an event lists, strongest first.
LISTED = 60
_PREFIX = "components/"


@dataclass(frozen=True, slots=True, eq=False)
class ComponentStart:
    """What the start was made of.

    Attributes:
        directions: the P admitted directions that are read from the residual stream.
        spread: ``[P]`` step-0 standard deviation over sampling units of each projection.
        reading: of the start's weights.
    """

    directions: tuple[Direction, ...]
    spread: Tensor
    reading: ComponentReading


def start_components(
    model: nn.Module, baseline: Baseline, config: InterpConfig, tensors: Mapping[str, Tensor] | None = None
) -> ComponentStart | None:
    """Read the start, or take it from the tensors of step 0's snapshot where a run is resumed.

    Returns:
        ``None`` where no concept is read from the residual stream.

    Raises:
        HookpointError: the architecture is not supported.
        MeasurementError: the weights are partitioned, or not floating point.
        FormatError: ``tensors`` lack something.
    """
    directions = tuple(
        direction
        for concept in baseline.concepts
        for hookpoint, direction in concept.directions.items()
        if parse_hookpoint(hookpoint).site == "resid_post"
    )
    if not directions:
        return None
    find_wiring(model, layers=config.layers)
    x0 = [(baseline.x0[one.hookpoint].double(), one.vector.double()) for one in directions]
    spread = torch.stack([(x @ v).std() for x, v in x0])
    reading = _read(model, directions, baseline, config) if tensors is None else _stored(tensors, directions)
    return ComponentStart(directions, spread, reading)


def read_changes(model: nn.Module, start: ComponentStart, baseline: Baseline, config: InterpConfig) -> ComponentChanges:
    """What moved each component's contribution since the start, ``[P, …]`` in step-0 standard deviations.

    Raises:
        HookpointError, MeasurementError: as :func:`~interp_rlhf.circuits.components.read_components`.
    """
    found = component_changes(start.reading, _read(model, start.directions, baseline, config))
    unit = start.spread[:, None]
    return ComponentChanges(
        found.change / unit[..., None], found.activation / unit, found.weight / unit, found.total / unit
    )


def _read(
    model: nn.Module, directions: tuple[Direction, ...], baseline: Baseline, config: InterpConfig
) -> ComponentReading:
    plan = baseline.plan
    return read_components(
        model,
        plan.audit.prompts,
        [(direction.hookpoint, direction.vector) for direction in directions],
        batch_size=config.prompts.batch_size,
        pad_token_id=plan.pad_token_id,
        tokens=config.prompts.tokens,
        skip_ids=plan.skip_ids,
        layers=config.layers,
    )


# ------------------------------------------------------------------------------------------------------ what is told


def record_components(
    model: nn.Module,
    start: ComponentStart,
    store: RunStore,
    baseline: Baseline,
    config: InterpConfig,
    segment: int,
    step: int,
) -> tuple[Measurement, ...]:
    """Read the weights of now, append rows and ``components`` events to the timeline; gives the rows."""
    found = read_changes(model, start, baseline, config)
    rows = component_rows(start, found, baseline, config, segment, step)
    store.append(rows)
    for event in component_events(start, found, config):
        store.event("components", step=step, **event)
    return rows


def component_rows(
    start: ComponentStart, found: ComponentChanges, baseline: Baseline, config: InterpConfig, segment: int, step: int
) -> tuple[Measurement, ...]:
    """``component/weight_share`` of every direction; none where nothing changed."""
    audit, rows = baseline.plan.audit, []
    answered = any(prompt.completion_start < len(prompt.input_ids) for prompt in audit.prompts)
    scope = config.prompts.tokens if answered or config.prompts.tokens != "completion" else "all"
    for direction, weight, activation in zip(start.directions, found.weight, found.activation, strict=True):
        by_weight, by_activation = (float(part.nan_to_num().abs().sum()) for part in (weight, activation))
        if by_weight + by_activation:
            share = by_weight / (by_weight + by_activation)
            value = estimate("component/weight_share", share, found.total.shape[1])
            place = (direction.name, direction.hookpoint)
            rows.append(as_measurement("component/weight_share", *place, value, scope, audit.source, segment, step))
    return tuple(rows)


def component_events(start: ComponentStart, found: ComponentChanges, config: InterpConfig) -> Iterator[dict[str, Any]]:
    """Every concept once, at the hookpoint where it drifted most: ``readout``, ``hookpoint`` and the drift's parts.

    ``total`` is the drift, ``parts`` the strongest components ``[name, change, ci_low, ci_high, activation, weight]``
    (``None`` where the last two are not told apart), ``rest`` what is left of the total; all in SD.
    """
    names, total = start.reading.names, found.total.mean(1)
    for concept in dict.fromkeys(direction.name for direction in start.directions):
        mine = [i for i, direction in enumerate(start.directions) if direction.name == concept]
        place = max(mine, key=lambda i: abs(float(total[i])))
        change = found.change[place]
        reached, _ = _reached(start.directions[place], start.reading.owner, start.reading.n_heads)
        listed = change.mean(0)[:reached].abs().argsort(descending=True, stable=True)[:LISTED].tolist()
        split = torch.stack((found.activation[place], found.weight[place]), 1).tolist()
        parts = [
            [
                names[i],
                float(change[:, i].mean()),
                *paired_bootstrap(change[:, i], **statistics(config)),
                *(None if math.isnan(part) else part for part in split[i]),
            ]
            for i in listed
        ]
        yield {
            "readout": concept,
            "hookpoint": start.directions[place].hookpoint,
            "total": float(total[place]),
            "parts": parts,
            "rest": float(total[place] - change.mean(0)[listed].sum()),
        }


# ------------------------------------------------------------------------------------------------------ what is kept


def component_tensors(start: ComponentStart) -> dict[str, Tensor]:
    """What step 0's snapshot keeps of the start; of each direction the layers that it reaches."""
    reading = start.reading
    kept = {
        "n_heads": torch.tensor([reading.n_heads]),
        "owner": reading.owner.to(torch.int32),
        "opaque": reading.opaque.to(torch.uint8),
        "activation": reading.activation,
    }
    for index, direction in enumerate(start.directions):
        name, (components, coordinates) = _name(direction), _reached(direction, reading.owner, reading.n_heads)
        kept |= {
            f"{name}/weight": reading.weight[index, :coordinates],
            f"{name}/parts": reading.parts[index, :, :components],
            f"{name}/total": reading.total[index],
        }
    return {_PREFIX + key: value.contiguous() for key, value in kept.items()}


def _stored(tensors: Mapping[str, Tensor], directions: tuple[Direction, ...]) -> ComponentReading:
    def get(key: str) -> Tensor:
        if _PREFIX + key not in tensors:
            raise FormatError(f"step-0 snapshot: {_PREFIX}{key}: not found, expected the components of the start")
        return tensors[_PREFIX + key]

    owner, n_heads = get("owner").long(), int(get("n_heads"))
    components, coordinates = map(max, zip(*(_reached(one, owner, n_heads) for one in directions), strict=True))
    owner, opaque, activation = owner[:coordinates], get("opaque")[:components].bool(), get("activation")[:coordinates]
    total = torch.stack([get(f"{_name(direction)}/total") for direction in directions])
    weight = torch.zeros(len(directions), len(owner))
    parts = torch.zeros(*total.shape, len(opaque))
    for index, direction in enumerate(directions):
        name, (components, coordinates) = _name(direction), _reached(direction, owner, n_heads)
        weight[index, :coordinates] = get(f"{name}/weight")
        parts[index, :, :components] = get(f"{name}/parts")
    return ComponentReading(n_heads, owner, opaque, activation, weight, parts, total)


def _name(direction: Direction) -> str:
    return f"{direction.name}/{direction.hookpoint}"


def _reached(direction: Direction, owner: Tensor, n_heads: int) -> tuple[int, int]:
    """How many of the components, and of the coordinates, lie before a direction's hookpoint."""
    layer = parse_hookpoint(direction.hookpoint).layer or 0
    components = 2 + (layer + 1) * (n_heads + 1)
    return components, int((owner == components - 1).nonzero().max()) + 1
