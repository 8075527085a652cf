"""Linear probes: L2 logistic regression on activations, kept in one file with the tokenizer they were fitted with."""

from __future__ import annotations

import math
import re
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
        import numpy as np
        from sklearn.preprocessing import StandardScaler

        values = x.detach().cpu().double().numpy()
        if values.ndim != 2 or len(values) < 2 or not np.isfinite(values).all():
            raise MeasurementError(f"probe: expected finite readings [n, d] of 2 texts at least, found {values.shape}")
        scaler = StandardScaler().fit(values)
        self._mean, self._scale = scaler.mean_, scaler.scale_
        self._standard: Any = scaler.transform(values)
        self._features, self._combine = self._standard, None
        if values.shape[1] > len(values):
            squares, vectors = np.linalg.eigh(self._standard @ self._standard.T)
            kept = squares > squares[-1] * len(values) * np.finfo(float).eps
            lengths = np.sqrt(squares[kept])
            self._features, self._combine = vectors[:, kept] * lengths, vectors[:, kept] / lengths

    def fit(self, labels: Bool[Tensor, " n"], *, c: float = 1.0) -> tuple[Float[Tensor, " d"], float]:
        """One probe: :meth:`fit_all` of a single labelling."""
        weights, biases = self.fit_all(labels[None], c=c)
        return weights[0], float(biases[0])

    def fit_all(
        self, labels: Bool[Tensor, "S n"], *, c: float = 1.0
    ) -> tuple[Float[Tensor, "S d"], Float[Tensor, " S"]]:
        """Logistic regressions with L2 penalty ``‖w‖²/(2c)`` in standardised units; intercepts are not penalised.

        Newton's method on all labellings at once, the step halved where it does not lower the loss. A panel needs
        hundreds of small fits; one call of scikit-learn each would take most of a measurement's time. Its solutions
        are the reference in the tests.

        Args:
            labels: ``[S, n]`` true for positive texts, one row per probe.
            c: inverse strength of the penalty, as scikit-learn's ``C``.

        Returns:
            Weights ``[S, d]`` and biases ``[S]`` float64, for readings as they are, not standardised.

        Raises:
            MeasurementError: labels that do not fit the texts or hold one class, or a fit that does not converge.
        """
        positives, n = labels.sum(1), len(self._standard)
        if labels.shape[1] != n or bool(((positives == 0) | (positives == n)).any()):
            raise MeasurementError(
                f"probe: expected labels of {n} texts, of both classes, found {int(positives[0])} positive "
                f"of {labels.shape[1]}"
            )
        solution = _newton(torch.from_numpy(self._features), labels.cpu().double(), c)
        weights = solution[:, :-1]
        if self._combine is not None:
            weights = weights @ torch.from_numpy(self._combine).T @ torch.from_numpy(self._standard)
        weights = weights / torch.from_numpy(self._scale)
        return weights, solution[:, -1] - weights @ torch.from_numpy(self._mean)


def _newton(features: Float[Tensor, "n r"], y: Float[Tensor, "S n"], c: float) -> Float[Tensor, "S r+1"]:
    """Minimises ``Σ log(1 + e^z) − yz + ‖w‖²/(2c)`` with ``z = Fw + b``; the last column of the solution is b."""
    x = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    ridge = x.new_full((x.shape[1],), 1 / c)
    ridge[-1] = 0

    def losses(w: Tensor) -> Tensor:
        z = w @ x.T
        return (nn.functional.softplus(z) - y * z).sum(1) + (w * w * ridge).sum(1) / 2

    w = x.new_zeros(len(y), x.shape[1])
    for _ in range(_ITERATIONS):
        p = torch.sigmoid(w @ x.T)
        gradient = (p - y) @ x + w * ridge
        if float(gradient.abs().max()) <= _GRADIENT * len(x):
            return w
        curvature = (p * (1 - p))[:, None, :] * x.T @ x + torch.diag(ridge)
        step = torch.linalg.solve(curvature, gradient)
        before, size = losses(w), x.new_ones(len(y), 1)
        while float(size.min()) > 1e-6 and bool((rising := losses(w - size * step) > before + 1e-9).any()):
            size = torch.where(rising[:, None], size / 2, size)
        w = w - size * step
    raise MeasurementError(f"probe: the fit on {len(x)} texts did not converge in {_ITERATIONS} Newton steps")


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
    return FitSpace(x).fit(labels, c=c)
