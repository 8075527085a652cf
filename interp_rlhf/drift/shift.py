"""Did the readout move because the text changed, or because the same text is represented differently?

``total = E_{π_t} g(y, θ_t) − E_{π_0} g(y, θ_0) = text + representation``, both expectations over the same prompts, K
completions each. The split has two orders, and their difference is the interaction. Obfuscation Atlas (2602.15515)
splits probe scores like this; here it holds for any readout g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp_rlhf.drift.concepts import by_unit
from interp_rlhf.drift.estimates import Estimate, estimate
from interp_rlhf.drift.nulls import finite, paired_bootstrap
from interp_rlhf.errors import MeasurementError


def standardised_projection(
    x: Float[Tensor, "n d"], v: Float[Tensor, " d"], x0: Float[Tensor, "m d"]
) -> Float[Tensor, " n"]:
    """``g = x·v / SD(x0·v)``: each reading's projection in standard deviations of the step-0 readings (n − 1 in it).

    Args:
        x: ``[n, d]`` readings to project.
        v: ``[d]`` the concept's direction.
        x0: ``[m, d]`` step-0 readings of the audit texts, one row per sampling unit: the unit that
            ``concept/drift`` is in.

    Raises:
        MeasurementError: shapes that do not fit, NaN, or step-0 projections that do not vary.

    >>> x0 = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    >>> standardised_projection(torch.tensor([[3.0, 9.0]]), torch.tensor([1.0, 0.0]), x0)
    tensor([1.5000], dtype=torch.float64)
    """
    if x.ndim != 2 or x0.ndim != 2 or x.shape[1:] != v.shape or x0.shape[1:] != v.shape:
        raise MeasurementError(
            f"shift: expected readings [n, d], a direction [d] and step-0 readings [m, d], found {tuple(x.shape)}, "
            f"{tuple(v.shape)} and {tuple(x0.shape)}"
        )
    direction, start = finite(v, "direction").double(), finite(x0, "step-0 readings").double()
    spread = ((start - start.mean(0)) @ direction).std() if len(start) > 1 else start.new_zeros(())
    if not bool(spread > 1e-12 * start.norm()):
        raise MeasurementError(f"shift: the step-0 projections of {len(start)} prompts do not vary (SD 0)")
    return finite(x, "readings").double() @ direction / spread


def decompose(
    text_t_model_t: Float[Tensor, " n"],
    text_t_model_0: Float[Tensor, " n"] | None,
    text_0_model_t: Float[Tensor, " m"],
    text_0_model_0: Float[Tensor, " m"],
    units_t: Sequence[str],
    units_0: Sequence[str],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The ``shift/*`` metrics of one readout, with paired bootstrap intervals over prompts.

    Completions of one prompt are averaged first; the prompt is the sampling unit.

    Args:
        text_t_model_t: ``[n]`` readout of what the policy writes now, read in the policy.
        text_t_model_0: the same texts read in the frozen start; ``None`` where there is no frozen copy.
        text_0_model_t: ``[m]`` readout of what the start wrote, read in the policy.
        text_0_model_0: the same texts read in the frozen start.
        units_t, units_0: the prompt of each text; both hold the same prompts, in any order and number.

    Returns:
        ``shift/total`` and ``shift/representation_on_start``; with a frozen copy also ``shift/text``,
        ``shift/representation`` and ``shift/interaction``. ``total = text + representation``.

    Raises:
        MeasurementError: lengths or prompts that do not fit, fewer than 2 prompts, or NaN.

    >>> found = decompose(
    ...     torch.tensor([4.0, 5.0]),
    ...     torch.tensor([3.0, 4.0]),
    ...     torch.tensor([1.5, 2.5]),
    ...     torch.tensor([1.0, 2.0]),
    ...     ["a", "b"],
    ...     ["a", "b"],
    ... )
    >>> {name.removeprefix("shift/"): one.value for name, one in found.items()}
    {'total': 3.0, 'representation_on_start': 0.5, 'text': 2.0, 'representation': 1.0, 'interaction': 0.5}
    """
    order = dict.fromkeys(units_t)
    if order.keys() != dict.fromkeys(units_0).keys():
        raise MeasurementError(f"shift: the same prompts expected on both sides, found {_apart(units_t, units_0)}")
    now = _per_prompt(text_t_model_t, units_t, order)
    moved, start = (_per_prompt(values, units_0, order) for values in (text_0_model_t, text_0_model_0))
    parts = {"shift/total": now - start, "shift/representation_on_start": moved - start}
    if text_t_model_0 is not None:
        before = _per_prompt(text_t_model_0, units_t, order)
        parts |= {
            "shift/text": before - start,
            "shift/representation": now - before,
            "shift/interaction": (now - before) - (moved - start),
        }
    return {
        metric: estimate(
            metric, float(values.mean()), len(values),
            interval=paired_bootstrap(values, resamples=resamples, confidence=confidence, seed=seed),
        )
        for metric, values in parts.items()
    }  # fmt: skip


def _per_prompt(values: Tensor, units: Sequence[str], order: Mapping[str, None]) -> Tensor:
    """Mean per prompt, prompts in ``order``, ``[u]`` float64."""
    means = by_unit(finite(values, "shift").double()[:, None], units)[:, 0]
    place = {unit: row for row, unit in enumerate(dict.fromkeys(units))}
    return means[torch.tensor([place[unit] for unit in order])]


def _apart(first: Sequence[str], second: Sequence[str]) -> str:
    only = [sorted(set(a) - set(b)) for a, b in ((first, second), (second, first))]
    return (
        f"{len(only[0])} on the first only and {len(only[1])} on the second only (such as {(only[0] + only[1])[0]!r})"
    )
