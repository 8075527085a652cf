"""Causal shares at the end of a run: how much of a concept's change of behaviour goes through its direction.

Only drifts that stand out are asked about, since every share takes some dozens of passes over the concept's held-out
pairs (:mod:`interp_rlhf.causal`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from interp_rlhf.activations.hookpoints import parse_hookpoint
from interp_rlhf.activations.reference import Reference
from interp_rlhf.baseline import Baseline, ConceptBaseline
from interp_rlhf.causal import LEAST_DIRECTIONS, causal_share
from interp_rlhf.circuits.wiring import partition_problem
from interp_rlhf.config import InterpConfig
from interp_rlhf.measurement import Measurement
from interp_rlhf.measuring import as_measurement
from interp_rlhf.plan import Refusal
from interp_rlhf.report.tables import Summary

#: Concepts that are asked about, those of largest drift first.
MOST = 3


def standing_out(summary: Summary, config: InterpConfig) -> tuple[tuple[str, str], ...]:
    """Concepts to ask about, each with the hookpoint of its largest drift: the specific ones, or all that moved."""
    if config.causal is False:
        return ()
    found = [f for f in summary.findings if (f.outside_at if config.causal == "auto" else f.moved_at)]
    largest = sorted(found, key=lambda finding: -abs(finding.drift.value))[:MOST]
    return tuple((finding.drift.readout, finding.drift.hookpoint) for finding in largest)


def causal_rows(
    model: nn.Module,
    reference: Reference | None,
    baseline: Baseline,
    places: Sequence[tuple[str, str]],
    config: InterpConfig,
    segment: int,
    step: int,
) -> Iterator[Measurement | Refusal]:
    """Rows ``causal/*`` of each concept, or why it has none. Runs the model: on whole weights only.

    Args:
        model: the policy.
        reference: a frozen copy of the start that can read new texts; ``None``: there is none.
        places: concepts and hookpoints, from :func:`standing_out`.
    """
    for name, hookpoint in places:
        concept = next((c for c in baseline.concepts if c.name == name), None)
        reason = _problem(model, reference, baseline, concept, hookpoint, config)
        if reason or concept is None or concept.texts is None or reference is None:
            yield Refusal(f"causal share of {name}", hookpoint, reason)
            continue
        found = causal_share(
            model,
            reference,
            concept.texts.held,
            hookpoint,
            concept.directions[hookpoint].vector,
            batch_size=config.prompts.batch_size,
            pad_token_id=baseline.plan.pad_token_id,
            directions=LEAST_DIRECTIONS,
            bootstrap=config.statistics.bootstrap,
            confidence=config.statistics.confidence,
            seed=config.seed,
            layers=config.layers,
        )
        if found.reason:
            yield Refusal(f"causal share of {name}", hookpoint, found.reason)
        for metric, value in found.rows().items():
            yield as_measurement(metric, name, hookpoint, value, "completion", concept.texts.source, segment, step)


def _problem(
    model: nn.Module,
    reference: Reference | None,
    baseline: Baseline,
    concept: ConceptBaseline | None,
    hookpoint: str,
    config: InterpConfig,
) -> str:
    """Why there is no share; empty where nothing speaks against one."""
    if concept is None or concept.texts is None or not concept.texts.held:
        return "a direction without contrast pairs has no behaviour to explain"
    if not baseline.plan.behaviour:
        return "concepts.behaviour is off, or the model has no language-model head"
    if parse_hookpoint(hookpoint).site != "resid_post":
        return "expected a resid_post, where a component of the stream can be restored"
    if reference is None:
        return "no frozen copy of the start that reads changed activations (an adapter or a reference model is one)"
    return partition_problem(model, layers=config.layers) or ""
