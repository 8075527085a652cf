"""Which features of a frozen dictionary drifted: per feature a paired change with p and effect, and the subspace.

A feature is judged by its mean codes on the same texts at two times, one pair of numbers a text, because a text's
tokens are not independent of one another. Single features depend on the seed a dictionary was fitted with; the subspace
that the leading ones span does not, and stands beside them.

What a flag says: this code changed on these texts. An encoder that reads features by overlapping directions changes the
codes of other features along with the one that changed (``scripts/stress_features`` shows how many it lists).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy import linalg, stats
from torch import Tensor

from interp_rlhf.activations.feature_sums import FeatureReading
from interp_rlhf.drift.feature_health import Health
from interp_rlhf.drift.nulls import finite
from interp_rlhf.drift.sign_flip_tails import sign_flip_p
from interp_rlhf.errors import MeasurementError

#: Numbers of a dense block of changes (8 MiB in float64).
_BLOCK = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class FeatureTable:
    """One row for each tested feature, in the order of their numbers, and what became of all others.

    Attributes:
        feature: ``[m]`` number of the feature.
        mean_start, mean_now: ``[m]`` mean over texts of its mean code.
        rate_start, rate_now: ``[m]`` mean over texts of the share of tokens on which it fired.
        change: ``[m]`` ``mean_now − mean_start``.
        effect: ``[m]`` the change in pooled SDs (:func:`effect_size`).
        p: ``[m]`` two-sided sign-flip p (:func:`~interp_rlhf.drift.sign_flip_tails.sign_flip_p`).
        bh: ``[m]`` p adjusted by Benjamini & Hochberg 1995, the smallest q at which the feature is found. Approximate:
            features depend on one another.
        by: ``[m]`` p adjusted by Benjamini & Yekutieli 2001, valid whatever the dependence.
        drifted_bh, drifted_by: ``[m]`` adjusted p ≤ q and ``|effect| > tolerance``; all False where withheld.
        word: ``[m]`` of those in ``drifted_bh``: "appeared" (fired on no text at the start and on at least ``least``
            now), "vanished" (the reverse), "" otherwise.
        untestable: features that fired on some text, but on fewer than ``least``.
        silent: features that fired on no text at either time. Tested, untestable and silent make up all.
        withheld: why nothing is flagged although tests were made; "" where flags stand.
    """

    feature: Int64[np.ndarray, " m"]
    mean_start: Float64[np.ndarray, " m"]
    mean_now: Float64[np.ndarray, " m"]
    rate_start: Float64[np.ndarray, " m"]
    rate_now: Float64[np.ndarray, " m"]
    change: Float64[np.ndarray, " m"]
    effect: Float64[np.ndarray, " m"]
    p: Float64[np.ndarray, " m"]
    bh: Float64[np.ndarray, " m"]
    by: Float64[np.ndarray, " m"]
    drifted_bh: Bool[np.ndarray, " m"]
    drifted_by: Bool[np.ndarray, " m"]
    word: tuple[str, ...]
    untestable: int
    silent: int
    withheld: str = ""

    @property
    def tested(self) -> int:
        """Features with a p."""
        return len(self.feature)

    @property
    def flagged_bh(self) -> int:
        """Features in ``drifted_bh``."""
        return int(self.drifted_bh.sum())

    @property
    def flagged_by(self) -> int:
        """Features in ``drifted_by``."""
        return int(self.drifted_by.sum())


def feature_table(
    start: FeatureReading,
    now: FeatureReading,
    *,
    tolerance: float,
    least: int = 20,
    q: float = 0.1,
    health: Health | None = None,
    seed: int = 0,
) -> FeatureTable:
    """Test every feature that fired on at least ``least`` texts, at the start or now.

    Args:
        start, now: the same dictionary read on the same texts, in the same order.
        tolerance: smallest ``|effect|`` that counts, in pooled SDs.
        least: texts on which a tested feature fired at the start, now, or both times.
        q: false-discovery rate aimed at, in (0, 1).
        health: of the dictionary at both times; where it is unreliable nothing is flagged and no word is given.
        seed: of the patterns that :func:`~interp_rlhf.drift.sign_flip_tails.sign_flip_p` draws.

    Raises:
        MeasurementError: readings that do not belong together, fewer than 2 texts, codes that are not finite.

    >>> codes = torch.rand(64, 3, generator=torch.Generator().manual_seed(0))
    >>> codes[30:, 2] = 0
    >>> codes[5:, 1] = 0
    >>> table = feature_table(reading_of(codes), reading_of(codes * torch.tensor([1.0, 1.0, 2.0])), tolerance=0.1)
    >>> table.feature.tolist(), table.drifted_bh.tolist(), table.untestable
    ([0, 2], [False, True], 1)
    >>> table.p.tolist() == [1.0, 2.0**-29], round(float(table.effect[1]), 2)
    (True, 0.43)
    """
    _check_pair(start, now)
    firing = _firing_texts(start, now)
    tested = np.flatnonzero(firing >= least)
    step = max(1, _BLOCK // len(start.tokens))
    blocks = [_statistics(start, now, tested[at : at + step], seed) for at in range(0, max(1, len(tested)), step)]
    found = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    fired_start, fired_now = found.pop("fired_start"), found.pop("fired_now")
    bh, by = (stats.false_discovery_control(found["p"], method=method) for method in ("bh", "by"))
    sound = (np.abs(found["effect"]) > tolerance) & (health is None or health.reliable)
    drifted = sound & (bh <= q)
    return FeatureTable(
        feature=tested,
        **found,
        bh=bh,
        by=by,
        drifted_bh=drifted,
        drifted_by=sound & (by <= q),
        word=tuple(_word(*row) for row in zip(drifted.tolist(), fired_start.tolist(), fired_now.tolist(), strict=True)),
        untestable=int(((firing > 0) & (firing < least)).sum()),
        silent=_read(start) - int((firing > 0).sum()),
        withheld="" if health is None or health.reliable else health.why,
    )


def effect_size(
    change: Float64[np.ndarray, " m"],
    variance_start: Float64[np.ndarray, " m"],
    variance_now: Float64[np.ndarray, " m"],
) -> Float64[np.ndarray, " m"]:
    """``change / √((variance_start + variance_now)/2)``: a paired mean change in SDs of the texts' mean codes.

    The two variances (n − 1 in them) are of the texts' values at each time, not of the paired changes: that would
    call a tiny change large where it is the same on every text (Cohen 1988, section 2.2, d with the pooled SD).

    Returns:
        0 where nothing changed, infinite where something did although texts do not differ at either time.

    >>> effect_size(np.array([1.0, 0.0, -1.0]), np.array([3.0, 0.0, 0.0]), np.array([5.0, 0.0, 0.0])).tolist()
    [0.5, 0.0, -inf]
    """
    spread = np.sqrt((variance_start + variance_now) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(change == 0, 0.0, change / spread)


def subspace_angles(
    decoder: Float[Tensor, "F d"], start_means: Float[Tensor, " F"], now_means: Float[Tensor, " F"], k: int
) -> Float64[np.ndarray, " angles"]:
    """Principal angles between what the k leading features span at the start and now (Björck & Golub 1973).

    Leading: largest ``|mean code|·‖decoder row‖``, the mean contribution to the reconstruction; ties go to the lower
    number. Blind to how dictionaries divide a subspace among features.

    Args:
        decoder: ``[F, d]`` what each feature writes; the same at both times.
        start_means, now_means: ``[F]`` mean codes.
        k: features, at most d.

    Returns:
        ``[k]`` radians in [0, π/2], the largest first; fewer where the k rows are linearly dependent.

    Raises:
        MeasurementError: shapes that do not fit, k outside 1 … min(F, d), fewer than k features with a contribution.

    >>> angles = subspace_angles(torch.eye(3), torch.tensor([3.0, 2.0, 0.0]), torch.tensor([3.0, 0.0, 2.0]), 2)
    >>> np.rad2deg(angles).round(6).tolist()  # the first is kept, the second gave way to the third
    [90.0, 0.0]
    """
    if decoder.ndim != 2 or start_means.shape != decoder.shape[:1] or now_means.shape != decoder.shape[:1]:
        raise MeasurementError(
            f"subspace_angles: expected decoder [F, d] and mean codes [F], found {tuple(decoder.shape)}, "
            f"{tuple(start_means.shape)} and {tuple(now_means.shape)}"
        )
    if not 1 <= k <= min(decoder.shape):
        raise MeasurementError(f"subspace_angles: expected k of 1 to {min(decoder.shape)}, found {k}")
    rows = finite(decoder, "decoder").double()
    spans = []
    for means, when in ((start_means, "the start"), (now_means, "now")):
        weight = finite(means, f"mean codes of {when}").double().abs() * rows.norm(dim=1)
        leading = weight.sort(descending=True, stable=True).indices[:k]
        if float(weight[leading[-1]]) == 0:
            raise MeasurementError(
                f"subspace_angles: expected {k} features with a contribution at {when}, found {int((weight > 0).sum())}"
            )
        spans.append(rows[leading].T.numpy())
    return np.asarray(linalg.subspace_angles(*spans))


def mean_codes(reading: FeatureReading) -> Float64[Tensor, " F"]:
    """Mean over texts of every feature's mean code, ``[F]``.

    >>> mean_codes(reading_of(torch.tensor([[1.0, 0.0], [3.0, 0.0]])))
    tensor([2., 0.], dtype=torch.float64)
    """
    total = torch.bincount(reading.columns.long(), reading.means.double(), minlength=reading.width)
    return total / len(reading.tokens)


def reading_of(
    means: Float[Tensor, "N F"],
    fired: Float[Tensor, "N F"] | None = None,
    tokens: Int64[Tensor, " N"] | None = None,
) -> FeatureReading:
    """A reading from dense mean codes, for features alone: what health needs is not there.

    Args:
        means: ``[N, F]`` mean codes.
        fired: ``[N, F]`` shares of tokens; ``None``: every token of a text whose mean code is not 0.
        tokens: ``[N]``; ``None``: one each.

    >>> reading_of(torch.tensor([[0.0, 2.0], [1.0, 3.0]])).columns
    tensor([1, 0, 1], dtype=torch.int32)
    """
    n, width = means.shape
    fired = (means != 0).float() if fired is None else fired
    rows, columns = fired.nonzero(as_tuple=True)
    lengths = torch.bincount(rows, minlength=n).cumsum(0)
    return FeatureReading(
        indptr=torch.cat([torch.zeros(1, dtype=torch.long), lengths]), columns=columns.int(),
        means=means[rows, columns].float(), fired=fired[rows, columns].float(),
        tokens=torch.ones(n, dtype=torch.long) if tokens is None else tokens,
        x_mean=torch.zeros(n, 0), x_hat_mean=None, x_sum=torch.zeros(0, dtype=torch.float64),
        error=float("nan"), power=0.0, l0=0, width=width,
    )  # fmt: skip


def _check_pair(start: FeatureReading, now: FeatureReading) -> None:
    if start.width != now.width or not _same(start.features, now.features):
        raise MeasurementError(
            f"features: expected the same features of one dictionary at both times, found {_read(start)} of "
            f"{start.width} and {_read(now)} of {now.width}"
        )
    if not torch.equal(start.tokens, now.tokens) or len(start.tokens) < 2:
        raise MeasurementError(
            f"features: expected the same texts at both times, at least 2, found {len(start.tokens)} of "
            f"{int(start.tokens.sum())} tokens and {len(now.tokens)} of {int(now.tokens.sum())}"
        )
    for reading, when in ((start, "the start"), (now, "now")):
        if len(reading.means):
            finite(reading.means, f"features: mean codes of {when}")


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _read(reading: FeatureReading) -> int:
    """How many features were read."""
    return reading.width if reading.features is None else len(reading.features)


def _firing_texts(start: FeatureReading, now: FeatureReading) -> np.ndarray:
    """On how many texts each feature fired at the start, now, or both times, ``[F]``."""
    pairs = [
        torch.repeat_interleave(reading.indptr.diff()) * reading.width + reading.columns for reading in (start, now)
    ]
    return torch.bincount(torch.cat(pairs).unique() % start.width, minlength=start.width).numpy()


def _statistics(start: FeatureReading, now: FeatureReading, chosen: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Columns of the table for some features, and whether they fired at all at either time."""
    features = torch.from_numpy(chosen)
    before, after = (reading.dense(features).double().numpy() for reading in (start, now))
    fired = [reading.dense(features, of="fired").double().numpy() for reading in (start, now)]
    d = after - before
    change = d.mean(0)
    return {
        "mean_start": before.mean(0),
        "mean_now": after.mean(0),
        "rate_start": fired[0].mean(0),
        "rate_now": fired[1].mean(0),
        "change": change,
        "effect": effect_size(change, before.var(0, ddof=1), after.var(0, ddof=1)),
        "p": sign_flip_p(d, seed=seed),
        "fired_start": (fired[0] != 0).any(0),
        "fired_now": (fired[1] != 0).any(0),
    }


def _word(drifted: bool, start: bool, now: bool) -> str:
    if not drifted or (start and now):
        return ""
    return "vanished" if start else "appeared"
