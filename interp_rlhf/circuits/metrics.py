"""What a task measures on a model's output: one number per row, differentiable in what the model puts out.

Rows are padded on the right; ``last`` is the position of each row's last token. All sums are in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_rlhf.errors import MeasurementError
from interp_rlhf.readouts.probes import LinearProbe


def logit_difference(
    logits: Float[Tensor, "B T V"], last: Int[Tensor, " B"], answers: Bool[Tensor, "B V"], wrong: Bool[Tensor, "B V"]
) -> Float[Tensor, " B"]:
    """Mean logit of the answers − mean logit of the wrong tokens, at the last position; in logits.

    Linear in the logits, so that attribution to what is added to them is exact. With one answer and one wrong token
    the log of their odds (Wang et al. 2023, arXiv:2211.00593, section 2).

    Args:
        answers, wrong: which tokens are, at least one each.

    >>> logits = torch.tensor([[[1.0, 5.0, 3.0, 0.0]]])
    >>> answers = torch.tensor([[False, True, True, False]])
    >>> wrong = torch.tensor([[True, False, False, False]])
    >>> logit_difference(logits, torch.tensor([0]), answers, wrong).item()
    3.0
    """
    rows = _at(logits, last)
    answers, wrong = answers.to(rows), wrong.to(rows)
    return (rows * (answers / answers.sum(1, keepdim=True) - wrong / wrong.sum(1, keepdim=True))).sum(1)


def negative_kl(
    logits: Float[Tensor, "B T V"], clean_logits: Float[Tensor, "B T V"], last: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """``−KL(clean ‖ now)`` of the next-token distributions at the last position, in nats; 0 at the clean run.

    Its gradient at the clean run is 0, so EAP finds nothing with it: use EAP-IG (Hanna et al. 2024, arXiv:2403.17806).

    >>> now, clean = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[50.0, 0.0]]])
    >>> round(negative_kl(now, clean, torch.tensor([0])).item(), 6)  # -log 2
    -0.693147
    """
    now, then = _at(logits, last).log_softmax(-1), _at(clean_logits, last).log_softmax(-1)
    return (then.exp() * (now - then)).sum(-1)


def margin_terms(
    logits: Float[Tensor, "B T V"],
    input_ids: Int[Tensor, "B T"],
    completion: Bool[Tensor, "B T"],
    chosen: Bool[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """Twice the summed log-probability of each row's completion, negated where it is the rejected one; in nats.

    The mean over the two rows of a pair is then its preference margin, log p(chosen) − log p(rejected).

    Args:
        completion: tokens that are scored; never a row's first one.
        chosen: rows that hold the chosen completion.

    >>> logits = torch.tensor([[[0.0, 0.0], [9.0, 9.0]]])
    >>> ids, completion = torch.tensor([[0, 1]]), torch.tensor([[False, True]])
    >>> round(margin_terms(logits, ids, completion, torch.tensor([False])).item(), 6)  # -2 log(1/2)
    1.386294
    """
    row, position = completion.nonzero(as_tuple=True)
    scored = _wide(logits[row, position - 1]).log_softmax(-1)  # [N, V], tokens of completions only
    found = scored.gather(1, input_ids[row, position][:, None]).squeeze(1)
    totals = found.new_zeros(len(logits)).index_add(0, row, found)
    return torch.where(chosen, 2.0, -2.0).to(totals) * totals


def probe_score(residual: Float[Tensor, "B T d"], last: Int[Tensor, " B"], probe: LinearProbe) -> Float[Tensor, " B"]:
    """The probe's logit on the residual stream at the last position.

    Raises:
        ConfigError: the probe has another width.

    >>> probe = LinearProbe("p", "layers.0.resid_post", torch.tensor([1.0, 2.0]), 0.5)
    >>> probe_score(torch.tensor([[[9.0, 9.0], [1.0, 1.0]]]), torch.tensor([1]), probe).item()
    3.5
    """
    return probe.score(_at(residual, last))


def check_metric_values(values: object, ids: Sequence[str]) -> Tensor:
    """The values of a metric if they are a floating tensor ``[B]`` of finite numbers.

    Args:
        ids: the pair of each row.

    Raises:
        MeasurementError: anything else; NaN and infinity name the pair.

    >>> check_metric_values(torch.tensor([1.0, float("nan")]), ["a", "b"])
    Traceback (most recent call last):
    interp_rlhf.errors.MeasurementError: metric: pair b: expected finite values, found nan
    """
    if not isinstance(values, Tensor):
        raise MeasurementError(f"metric: expected a tensor of shape [{len(ids)}], found {type(values).__name__}")
    if values.shape != (len(ids),) or not values.is_floating_point():
        raise MeasurementError(
            f"metric: expected a floating tensor of shape [{len(ids)}], one value per row, found {values.dtype} of "
            f"shape {list(values.shape)}"
        )
    bad = (~values.detach().isfinite()).nonzero().flatten().tolist()
    if bad:
        raise MeasurementError(f"metric: pair {ids[bad[0]]}: expected finite values, found {values[bad[0]].item()}")
    return values


def _at(values: Tensor, last: Tensor) -> Tensor:
    """``values[b, last[b]]``, ``[B, ·]``, float32 or wider."""
    return _wide(values[torch.arange(len(last), device=values.device), last.to(values.device)])


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
