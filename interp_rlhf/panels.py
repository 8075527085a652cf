"""The probe panel of every admitted concept: probes are fitted and frozen at step 0, and read at every measurement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from interp_rlhf.activations.prompts import ContrastPair, Prompt
from interp_rlhf.config import InterpConfig
from interp_rlhf.drift.estimates import IntervalOptions
from interp_rlhf.drift.panel import PanelStart, Row, panel_estimates, start_panel, text_baselines
from interp_rlhf.errors import InterpError
from interp_rlhf.plan import ConceptTexts, Plan, Refusal, TextTable
from interp_rlhf.reading import Reading
from interp_rlhf.readouts.folds import pair_folds

#: Concept and hookpoint to what step 0 left.
Panels = Mapping[tuple[str, str], PanelStart]


def start_panels(
    plan: Plan,
    table: TextTable,
    reading: Reading,
    config: InterpConfig,
    admitted: Mapping[str, Sequence[str]],
    options: IntervalOptions,
) -> tuple[dict[tuple[str, str], PanelStart], list[Refusal]]:
    """Fit and freeze the probes of each concept at each hookpoint where it was admitted.

    Args:
        plan, table, reading: of step 0.
        admitted: concept name → hookpoints.
        options: resamples, confidence and seed.

    Returns:
        The panels, and what could not be had with its reason.
    """
    found: dict[tuple[str, str], PanelStart] = {}
    refused: list[Refusal] = []
    read = [concept for concept in plan.concepts if config.probes.enabled and admitted.get(concept.name)]
    for concept in read:
        try:
            found |= _of_concept(plan, table, reading, config, concept, admitted[concept.name], options)
        except InterpError as error:
            refused.append(Refusal(f"{concept.name} (probes)", "", str(error)))
    reasons = {name: panel.no_recall for (name, _), panel in found.items() if panel.no_recall}
    refused += [Refusal(f"{name} (recall)", "", reason) for name, reason in reasons.items()]
    sealed = plan.sealed
    if sealed is not None and (sealed.name, sealed.hookpoint) not in found:
        reason = f"its concept was not admitted at {sealed.hookpoint}, so there are no pairs to read it on"
        refused.append(Refusal(f"{sealed.name} (sealed probe)", sealed.hookpoint, reason))
    return found, refused


def panel_rows(
    panels: Panels, plan: Plan, table: TextTable, reading: Reading, options: IntervalOptions
) -> Iterator[tuple[str, str, Row]]:
    """Concept, hookpoint and row of one measurement."""
    concepts = {concept.name: concept for concept in plan.concepts}
    for (name, hookpoint), start in panels.items():
        positive, negative = _sides(reading, table, concepts[name], hookpoint)
        on_domain = None
        if start.on_domain is not None:
            texts = next(labelled for labelled in plan.on_domain if labelled.name == name)
            on_domain = reading.means[hookpoint][table.rows(texts.prompts)]
        for row in panel_estimates(start, positive, negative, on_domain=on_domain, **options):
            yield name, hookpoint, row


def _of_concept(
    plan: Plan,
    table: TextTable,
    reading: Reading,
    config: InterpConfig,
    concept: ConceptTexts,
    hookpoints: Sequence[str],
    options: IntervalOptions,
) -> dict[tuple[str, str], PanelStart]:
    pairs, settings, seed = _pairs(concept), config.probes, config.seed
    groups = [pair.group for pair in pairs]
    positive, negative = ([_completion(side) for side in sides] for sides in zip(*map(_both, pairs), strict=True))
    baselines = text_baselines(positive, negative, pair_folds(groups, settings.folds, seed), **options)
    labelled = next((texts for texts in plan.on_domain if texts.name == concept.name), None)
    found = {}
    for hookpoint in hookpoints:
        on_domain = None
        if labelled is not None:
            on_domain = (reading.means[hookpoint][table.rows(labelled.prompts)], labelled.labels)
        sealed = plan.sealed
        found[concept.name, hookpoint] = start_panel(
            *_sides(reading, table, concept, hookpoint),
            groups,
            k=settings.folds,
            fpr=settings.fpr,
            refits=settings.refits,
            baselines=baselines,
            on_domain=on_domain,
            sealed=sealed if sealed and (sealed.name, sealed.hookpoint) == (concept.name, hookpoint) else None,
            **options,
        )
    return found


def _pairs(concept: ConceptTexts) -> tuple[ContrastPair, ...]:
    return (*concept.fit, *concept.held)


def _both(pair: ContrastPair) -> tuple[Prompt, Prompt]:
    return pair.positive, pair.negative


def _completion(prompt: Prompt) -> tuple[int, ...]:
    return prompt.input_ids[prompt.completion_start :]


def _sides(reading: Reading, table: TextTable, concept: ConceptTexts, hookpoint: str) -> tuple[Tensor, Tensor]:
    """Readings of both sides of all pairs, those fitted on first, ``[n, d]`` each."""
    means, pairs = reading.means[hookpoint], _pairs(concept)
    positive = means[table.rows([pair.positive for pair in pairs])]
    return positive, means[table.rows([pair.negative for pair in pairs])]
