"""Linear probes: L2 logistic regression on activations, kept in one file with the tokenizer they were fitted with."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp_rlhf.errors import ConfigError, FormatError, MeasurementError
from interp_rlhf.readouts.files import Layout, check_names, read, write

#: Newton steps at most, and the gradient per text at which a fit counts as done.
_ITERATIONS, _GRADIENT = 100, 1e-11
#: Features of texts that are solved for at once, to bound memory (64 MiB in float64).
_CELLS = 2**23
_FILE = Layout("probe", tensor="weight", fields=("bias", "hookpoint", "name", "threshold", "tokenizer"))


@dataclass(frozen=True, slots=True, eq=False)
class LinearProbe:
    """A logistic regression on the activations of one hookpoint.

    Attributes:
        name: the concept; printable, without path separators.
        hookpoint: where the probe was fitted and is read (``layers.3.resid_post``).
        weight: ``[d]`` float32 on the CPU.
        bias: added to the product; scores are logits.
        threshold: score above which a text counts as positive, ``None`` where none was set.
        tokenizer: SHA-256 of the tokenizer's vocabulary, 64 hex digits; ``None`` where it is not known.

    Raises:
        MeasurementError: the weight is not 1-D, or a number is NaN or infinite.
        ConfigError: the name, the hookpoint or the tokenizer's hash is none.
    """

    name: str
    hookpoint: str
    weight: Tensor
    bias: float
    threshold: float | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        check_names("probe", name=self.name, hookpoint=self.hookpoint)
        place = f"probe {self.name!r} at {self.hookpoint}"
        weight = self.weight.detach().cpu().to(torch.float32, copy=True)
        if weight.ndim != 1 or weight.numel() == 0:
            raise MeasurementError(f"{place}: expected a weight of shape [d], found {tuple(weight.shape)}")
        if not bool(torch.isfinite(weight).all()):
            raise MeasurementError(f"{place}: expected a finite weight, found NaN or infinity")
        numbers: dict[str, Any] = {"bias": self.bias}
        if self.threshold is not None:
            numbers["threshold"] = self.threshold
        for field, number in numbers.items():
            if type(number) not in (int, float) or not math.isfinite(number):
                raise MeasurementError(f"{place}: {field}: expected a finite number, found {number!r}")
        digits = self.tokenizer
        if digits is not None and not (isinstance(digits, str) and re.fullmatch("[0-9a-f]{64}", digits)):
            raise ConfigError(f"{place}: tokenizer: expected a SHA-256 of 64 hex digits, found {digits!r}")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "bias", float(self.bias))

    def score(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Logit of the positive class: ``[..., d]`` → ``[...]`` float32, on the device of ``x``.

        Raises:
            ConfigError: the width of ``x`` is not d.
        """
        self.check(x.shape[-1] if x.ndim else 0)
        return x.to(torch.float32) @ self.weight.to(x.device) + self.bias

    def check(self, width: int, tokenizer_hash: str | None = None) -> None:
        """Whether the probe may read a model's activations.

        Args:
            width: d of the activations.
            tokenizer_hash: SHA-256 of the model's vocabulary; ``None`` does not compare.

        Raises:
            ConfigError: another width or another tokenizer.
        """
        place = f"probe {self.name!r} at {self.hookpoint}"
        if len(self.weight) != width:
            raise ConfigError(f"{place}: expected {width} dimensions, found {len(self.weight)}")
        if None not in (self.tokenizer, tokenizer_hash) and self.tokenizer != tokenizer_hash:
            raise ConfigError(
                f"{place}: fitted with another tokenizer, expected SHA-256 {str(tokenizer_hash)[:12]}…, "
                f"found {str(self.tokenizer)[:12]}…"
            )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write one safetensors file; it appears complete or not at all. The same probe gives the same bytes.

        Args:
            overwrite: replace a file that holds something else (an equal file is left as it is).

        Raises:
            FormatError: the file exists with other content, or cannot be written.
        """
        about = {field: getattr(self, field) for field in _FILE.fields}
        write(Path(path), _FILE, self.weight, about, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> LinearProbe:
        """Read a file written by :meth:`save`.

        Raises:
            FormatError: missing, truncated, not safetensors, or not a probe; the message names the file.
        """
        path = Path(path)
        about, weight = read(path, _FILE)
        try:
            return cls(weight=weight, **{field: about[field] for field in _FILE.fields})
        except (MeasurementError, ConfigError) as error:
            raise FormatError(f"{path}: {error}") from None


class FitSpace:
    """Texts to fit probes on, standardised once: mean 0 and SD 1 per dimension (n in the SD, constant ones left).

    Where d > n the fit runs in the n-dimensional space that the texts span. The solution is the same, since the
    penalty sees only what lies in that space (representer theorem, Kimeldorf & Wahba 1971).

    Args:
        x: ``[n, d]`` readings.

    Raises:
        MeasurementError: fewer than 2 texts, or readings that are not finite.
    """

    def __init__(self, x: Float[Tensor, "n d"]) -> None:
        values = x.detach().cpu().double()
        if values.ndim != 2 or len(values) < 2 or not bool(torch.isfinite(values).all()):
            shape = tuple(values.shape)
            raise MeasurementError(f"probe: expected finite readings [n, d] of 2 texts at least, found {shape}")
        n, eps = len(values), torch.finfo(torch.float64).eps
        self._mean, variance = values.mean(0), values.var(0, correction=0)
        constant = variance <= n * eps * variance + (n * self._mean * eps) ** 2  # as exact as the mean is
        self._scale = torch.where(constant, 1.0, variance.sqrt())
        self._standard = (values - self._mean) / self._scale
        self.features, self._combine = self._standard, None
        if values.shape[1] > n:
            squares, vectors = torch.linalg.eigh(self._standard @ self._standard.T)
            kept = squares > squares[-1] * n * eps
            lengths = squares[kept].sqrt()
            self.features, self._combine = vectors[:, kept] * lengths, vectors[:, kept] / lengths

    def check(self, labels: Bool[Tensor, "S n"]) -> None:
        """Raise :class:`~interp_rlhf.errors.MeasurementError` unless every labelling fits and has both classes."""
        positives, n = labels.sum(1), len(self.features)
        if labels.shape[1] != n or bool(((positives == 0) | (positives == n)).any()):
            raise MeasurementError(
                f"probe: expected labels of {n} texts, of both classes, found {int(positives[0])} positive "
                f"of {labels.shape[1]}"
            )

    def readable(self, solution: Float[Tensor, "S r1"]) -> tuple[Float[Tensor, "S d"], Float[Tensor, " S"]]:
        """Weights and biases for readings as they are, from solutions in this space (the bias last)."""
        weights = solution[:, :-1]
        if self._combine is not None:
            weights = weights @ self._combine.T @ self._standard
        weights = weights / self._scale
        return weights, solution[:, -1] - weights @ self._mean


def fit_together(
    jobs: Sequence[tuple[Float[Tensor, "n d"], Bool[Tensor, "S n"]]], *, c: float = 1.0
) -> list[tuple[Float[Tensor, "S d"], Float[Tensor, " S"]]]:
    """Logistic regressions with L2 penalty ``‖w‖²/(2c)`` in standardised units; intercepts are not penalised.

    Newton's method on all of them at once, the step halved where it does not lower the loss. A panel needs hundreds of
    small fits; one call of scikit-learn each would take most of a measurement's time. Its solutions are the reference
    in the tests.

    Args:
        jobs: readings ``[n, d]`` of the texts to fit on, and labellings ``[S, n]`` of them, true for positive texts.
        c: inverse strength of the penalty, as scikit-learn's ``C``.

    Returns:
        Per job weights ``[S, d]`` and biases ``[S]`` float64, for readings as they are, not standardised.

    Raises:
        MeasurementError: labels that do not fit the texts or hold one class, or a fit that does not converge.
    """
    spaces = [FitSpace(x) for x, _ in jobs]
    for space, (_, labels) in zip(spaces, jobs, strict=True):
        space.check(labels)
    n = max(len(space.features) for space in spaces)
    r = max(space.features.shape[1] for space in spaces)
    items = [(space, row) for space, (_, labels) in zip(spaces, jobs, strict=True) for row in labels]
    size = max(_CELLS // (n * r), 1)
    parts = [_solve(items[start : start + size], n, r, c) for start in range(0, len(items), size)]
    solutions = iter(torch.cat(parts))
    found = []
    for space, (_, labels) in zip(spaces, jobs, strict=True):
        own = torch.stack([next(solutions) for _ in labels])
        found.append(space.readable(torch.cat([own[:, : space.features.shape[1]], own[:, -1:]], 1)))
    return found


def _solve(items: Sequence[tuple[FitSpace, Tensor]], n: int, r: int, c: float) -> Float[Tensor, "S r1"]:
    """Solutions of several fits, filled up with texts of weight 0 and features that are 0."""
    x = torch.zeros(len(items), n, r + 1, dtype=torch.float64)
    y, counted = (torch.zeros(len(items), n, dtype=torch.float64) for _ in range(2))
    for index, (space, labels) in enumerate(items):
        rows, columns = space.features.shape
        x[index, :rows, :columns] = space.features
        x[index, :rows, -1] = 1
        y[index, :rows] = labels.cpu().double()
        counted[index, :rows] = 1
    return _newton(x, y, counted, c)


def _newton(
    x: Float[Tensor, "S n r1"], y: Float[Tensor, "S n"], counted: Float[Tensor, "S n"], c: float
) -> Float[Tensor, "S r1"]:
    """Minimises ``Σ log(1 + e^z) − yz + ‖w‖²/(2c)`` over counted texts, ``z = xw``; w without its last entry."""
    ridge = x.new_full((x.shape[2],), 1 / c)
    ridge[-1] = 0

    def scores(w: Tensor) -> Tensor:
        return (x @ w.unsqueeze(2)).squeeze(2)

    def losses(w: Tensor) -> Tensor:
        z = scores(w)
        return (counted * (nn.functional.softplus(z) - y * z)).sum(1) + (w * w * ridge).sum(1) / 2

    w = x.new_zeros(len(x), x.shape[2])
    for _ in range(_ITERATIONS):
        p = torch.sigmoid(scores(w))
        gradient = ((counted * (p - y)).unsqueeze(1) @ x).squeeze(1) + w * ridge
        if float(gradient.abs().max()) <= _GRADIENT * x.shape[1]:
            return w
        curvature = (x * (counted * p * (1 - p)).unsqueeze(2)).transpose(1, 2) @ x + torch.diag(ridge)
        step = torch.linalg.solve(curvature, gradient)
        before, size = losses(w), x.new_ones(len(x), 1)
        while float(size.min()) > 1e-6 and bool((rising := losses(w - size * step) > before + 1e-9).any()):
            size = torch.where(rising[:, None], size / 2, size)
        w = w - size * step
    raise MeasurementError(f"probe: a fit on {x.shape[1]} texts did not converge in {_ITERATIONS} Newton steps")


def fit_probe(
    x: Float[Tensor, "n d"], labels: Bool[Tensor, " n"], *, c: float = 1.0
) -> tuple[Float[Tensor, " d"], float]:
    """Fit one probe on standardised readings (:class:`FitSpace`); deterministic, no random draw.

    Newton's method, because L-BFGS stops where scores are still 1e-5 off.

    Args:
        x: ``[n, d]`` readings.
        labels: ``[n]`` true for positive texts.
        c: inverse strength of the L2 penalty, as scikit-learn's ``C``.

    Returns:
        Weight ``[d]`` float64 and bias for readings as they are: ``x @ weight + bias`` is the logit.

    Raises:
        MeasurementError: labels of one class, or readings that are not finite.

    >>> x = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0], [4.0, 5.0]])
    >>> weight, bias = fit_probe(x, torch.tensor([False, False, True, True]))
    >>> weight[0].item() > 0, weight[1].item(), round(2.5 * weight[0].item() + bias, 9)
    (True, 0.0, 0.0)
    """
    weights, biases = fit_together([(x, labels[None])], c=c)[0]
    return weights[0], float(biases[0])
