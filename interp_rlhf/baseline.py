"""Step 0: what later readings are compared with. A pure function of two readings of the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interp_rlhf.activations.prompts import Prompt
from interp_rlhf.config import InterpConfig
from interp_rlhf.drift.concepts import admit, auc_estimate, by_unit, standardised_drift
from interp_rlhf.drift.estimates import IntervalOptions
from interp_rlhf.drift.nulls import covariance_directions
from interp_rlhf.drift.representation import representation_floor
from interp_rlhf.errors import FormatError, MeasurementError
from interp_rlhf.panels import Panels, start_panels
from interp_rlhf.plan import ConceptTexts, Plan, Refusal, TextTable
from interp_rlhf.reading import Reading
from interp_rlhf.readouts.baselines import bag_of_tokens_auc
from interp_rlhf.readouts.directions import Direction

#: A concept of the bank whose absolute cosine with a direction is at least this is no unrelated one.
RELATED = 0.5
#: Names of the tensors that a step-0 snapshot keeps for a later resume.
FIRST, AGAIN = "start/", "start_again/"
LOG_PROBS, LOG_PROBS_AGAIN = "start_log_probs", "start_again_log_probs"
#: Name of the tensor, in every snapshot, that says which texts the rows of its readings belong to.
TEXT_IDS = "text_ids"


@dataclass(frozen=True, slots=True)
class ConceptBaseline:
    """One admitted concept at step 0.

    Attributes:
        name: the readout's name.
        texts: its contrast pairs; ``None`` for a direction loaded from a file.
        directions: the hookpoints where it was admitted, each with its direction.
    """

    name: str
    texts: ConceptTexts | None
    directions: Mapping[str, Direction]


@dataclass(frozen=True, slots=True)
class Baseline:
    """The frozen start, on the main process.

    Attributes:
        plan: the plan without refused concepts.
        table: texts that later measurements read.
        start: the step-0 reading of ``table``.
        again: the same weights read once more, with other batch order and padding.
        x0: hookpoint → ``[U, d]``, audit readings averaged within sampling units.
        floor: hookpoint → representation metric → numeric band.
        comparison: hookpoint → ``[k, d]`` directions drawn from the covariance of ``x0``.
        without_top: the same without the first principal component of ``x0``; absent where nothing varies beyond it.
        bank: hookpoint → ``[m, d]`` directions of real concepts: the bank's, and every admitted one.
        panels: (concept, hookpoint) → the frozen probes.
        concepts: what was admitted.
        refused: what was not, with reasons.
    """

    plan: Plan
    table: TextTable
    start: Reading
    again: Reading
    x0: Mapping[str, Tensor]
    floor: Mapping[str, Mapping[str, tuple[float, float]]]
    comparison: Mapping[str, Tensor]
    without_top: Mapping[str, Tensor]
    bank: Mapping[str, Tensor]
    panels: Panels
    concepts: tuple[ConceptBaseline, ...]
    refused: tuple[Refusal, ...]


def audit_readings(reading: Reading, table: TextTable, plan: Plan, hookpoint: str) -> Tensor:
    """Readings of the audit texts averaged within sampling units, ``[U, d]``, units in the order of the prompt set."""
    rows = table.rows(plan.audit.prompts)
    return by_unit(reading.means[hookpoint][rows], [prompt.unit for prompt in plan.audit.prompts])


def sides(
    reading: Reading, table: TextTable, concept: ConceptTexts, hookpoint: str, half: str
) -> tuple[Tensor, Tensor]:
    """Readings of the positive and of the negative texts of one half (``fit`` or ``held``), ``[n, d]`` each."""
    pairs = concept.fit if half == "fit" else concept.held
    means = reading.means[hookpoint]
    positive = means[table.rows([pair.positive for pair in pairs])]
    return positive, means[table.rows([pair.negative for pair in pairs])]


def fit_baseline(plan: Plan, table: TextTable, first: Reading, again: Reading, config: InterpConfig) -> Baseline:
    """Fit directions on one half of each concept's pairs, admit them on the other, draw comparison directions.

    Args:
        plan: everything that was planned.
        table: the texts of ``first`` and ``again`` (fit and held halves of every planned concept).
        first, again: readings of θ_0, the second with other batch order and padding.
    """
    x0 = {name: audit_readings(first, table, plan, name) for name in plan.hookpoints}
    x_again = {name: audit_readings(again, table, plan, name) for name in plan.hookpoints}
    admitted, refused = [], list(plan.refused)
    for concept in plan.concepts:
        found, reasons = _admit_concept(concept, table, first, x0, config)
        refused += reasons
        admitted += [ConceptBaseline(concept.name, concept, found)] if found else []
    for direction in plan.directions:
        admitted.append(ConceptBaseline(direction.name, None, {direction.hookpoint: direction}))
    kept = plan.keep([concept.name for concept in admitted])
    later = later_table(kept, config)
    rows = table.rows(later.prompts)
    without_top, reasons = _without_top(x0, config)
    places = {concept.name: tuple(concept.directions) for concept in admitted if concept.texts is not None}
    panels, unread = start_panels(plan, table, first, config, places, statistics(config))
    return Baseline(
        plan=kept,
        table=later,
        start=_subset(first, rows),
        again=_subset(again, rows),
        x0=x0,
        floor={name: representation_floor(x0[name], x_again[name]) for name in plan.hookpoints},
        comparison={
            name: covariance_directions(x0[name], config.statistics.directions, config.seed) for name in plan.hookpoints
        },
        without_top=without_top,
        bank={name: _bank_directions(plan, table, first, name, admitted) for name in plan.hookpoints},
        panels=panels,
        concepts=tuple(admitted),
        refused=(*refused, *reasons, *unread),
    )


def later_table(plan: Plan, config: InterpConfig) -> TextTable:
    """The texts of every measurement after step 0."""
    return plan.table(fit=config.concepts.refit or config.probes.enabled)


def unrelated(bank: Tensor, v: Tensor) -> Tensor:
    """The rows of ``bank`` ``[m, d]`` whose absolute cosine with ``v`` ``[d]`` is below :data:`RELATED`."""
    return bank[(bank @ v).abs() < RELATED]


def _without_top(x0: Mapping[str, Tensor], config: InterpConfig) -> tuple[dict[str, Tensor], list[Refusal]]:
    found, refused = {}, []
    for name, start in x0.items():
        try:
            found[name] = covariance_directions(start, config.statistics.directions, config.seed, drop_top=True)
        except MeasurementError as error:
            refused.append(Refusal("directions without the top component", name, str(error)))
    return found, refused


def _bank_directions(
    plan: Plan, table: TextTable, first: Reading, hookpoint: str, admitted: Sequence[ConceptBaseline]
) -> Tensor:
    """Unit directions of the bank's concepts and of all admitted ones, ``[m, d]``."""
    found = [concept.directions[hookpoint].vector for concept in admitted if hookpoint in concept.directions]
    for concept in plan.bank:
        positive, negative = sides(first, table, concept, hookpoint, "fit")
        if not torch.equal(positive.mean(0), negative.mean(0)):
            found.append(Direction.from_means(concept.name, hookpoint, positive, negative).vector)
    width = first.means[hookpoint].shape[1]
    return torch.stack(found) if found else torch.empty(0, width)


def baseline_tensors(table: TextTable, first: Reading, again: Reading) -> dict[str, Tensor]:
    """Both readings of a table as named tensors, for the step-0 snapshot."""
    return {
        TEXT_IDS: table.ids,
        **{FIRST + name: value for name, value in first.means.items()},
        **{AGAIN + name: value for name, value in again.means.items()},
        LOG_PROBS: torch.nan_to_num(first.log_probs, nan=0.0),  # texts without one are never asked for theirs
        LOG_PROBS_AGAIN: torch.nan_to_num(again.log_probs, nan=0.0),
    }


def direction_tensors(baseline: Baseline) -> dict[str, Tensor]:
    """The admitted directions as named tensors, for the step-0 snapshot."""
    return {
        f"direction/{concept.name}/{hookpoint}": direction.vector
        for concept in baseline.concepts
        for hookpoint, direction in concept.directions.items()
    }


def reading_tensors(table: TextTable, reading: Reading) -> dict[str, Tensor]:
    """One reading of a table as named tensors, for a later snapshot."""
    means = {f"means/{name}": value for name, value in reading.means.items()}
    return {TEXT_IDS: table.ids, **means, "log_probs": torch.nan_to_num(reading.log_probs, nan=0.0)}


def stored_readings(tensors: Mapping[str, Tensor], plan: Plan, table: TextTable) -> tuple[Reading, Reading]:
    """The two readings of :func:`baseline_tensors`, read back when a run is resumed.

    Raises:
        FormatError: a hookpoint or a text that this run reads is not among them.
    """
    advice = "resume with the interp config and data that the run was started with"
    absent = [name for name in plan.hookpoints if FIRST + name not in tensors]
    if absent:
        raise FormatError(f"step-0 snapshot: no readings at {', '.join(absent)}; {advice}")
    place = {text: row for row, text in enumerate(tensors.get(TEXT_IDS, torch.empty(0)).tolist())}
    found = [place[text] for text in table.ids.tolist() if text in place]
    if len(found) < len(table.prompts):
        raise FormatError(
            f"step-0 snapshot: readings of {len(found)} of the {len(table.prompts)} texts of this run found; {advice}"
        )
    rows = torch.tensor(found, dtype=torch.long)

    def reading(prefix: str, log_probs: str) -> Reading:
        means = {name: tensors[prefix + name][rows] for name in plan.hookpoints}
        return Reading(means, tensors[log_probs][rows], 0, 0.0)

    return reading(FIRST, LOG_PROBS), reading(AGAIN, LOG_PROBS_AGAIN)


def _admit_concept(
    concept: ConceptTexts, table: TextTable, first: Reading, x0: Mapping[str, Tensor], config: InterpConfig
) -> tuple[dict[str, Direction], list[Refusal]]:
    words = {
        half: [[_completion(getattr(pair, side)) for pair in pairs] for side in ("positive", "negative")]
        for half, pairs in (("fit", concept.fit), ("held", concept.held))
    }
    lexical = bag_of_tokens_auc(*words["fit"], *words["held"])
    found: dict[str, Direction] = {}
    refused = []
    for hookpoint, start in x0.items():
        try:
            direction = Direction.from_means(concept.name, hookpoint, *sides(first, table, concept, hookpoint, "fit"))
            standardised_drift(start, start, direction.vector)  # refuses a direction along which nothing varies
            held = (direction.project(side) for side in sides(first, table, concept, hookpoint, "held"))
            auc = auc_estimate(*held, **statistics(config))
        except MeasurementError as error:
            refused.append(Refusal(concept.name, hookpoint, str(error)))
            continue
        reason = admit(auc.value, 0.0 if auc.ci_low is None else auc.ci_low, lexical)
        if reason is None:
            found[hookpoint] = direction
        else:
            refused.append(Refusal(concept.name, hookpoint, reason))
    return found, refused


def statistics(config: InterpConfig) -> IntervalOptions:
    """The arguments that every estimate with an interval takes."""
    return IntervalOptions(
        resamples=config.statistics.bootstrap, confidence=config.statistics.confidence, seed=config.seed
    )


def _completion(prompt: Prompt) -> Sequence[int]:
    return prompt.input_ids[prompt.completion_start :]


def _subset(reading: Reading, rows: Tensor) -> Reading:
    means = {name: value[rows] for name, value in reading.means.items()}
    return Reading(means, reading.log_probs[rows], reading.tokens, reading.seconds)
