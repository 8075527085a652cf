"""Normalisation layers as formulas: what an edge needs to know of the norm between a residual stream and its reader.

Every norm of the supported models is ``y = w ⊙ r·Cx + b`` with ``r = (mean((Cx)²) + ε)^(-1/2)``, where ``C`` subtracts
the mean over channels (LayerNorm, Ba et al. 2016, arXiv 1607.06450) or does nothing (RMSNorm, Zhang & Sennrich 2019,
arXiv 1910.07467). Two things follow: the gradient through it in closed form, and, with ``r`` held fixed, a linear map
by which every component's share of a normalised sum can be had.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: Names under which the supported libraries keep ε.
_EPSILON = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm's formula.

    Attributes:
        scale: ``w``, ``[d]`` float32.
        shift: ``b``, ``[d]`` float32.
        eps: ε.
        centred: whether the mean over channels is subtracted.
    """

    scale: Tensor
    shift: Tensor
    eps: float
    centred: bool

    def centre(self, x: Tensor) -> Tensor:
        """``Cx``, same shape ``[..., d]``."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def inverse_rms(self, x: Tensor) -> Tensor:
        """``r`` of ``x [..., d]``: ``[..., 1]`` float32."""
        return (self.centre(x.float()).square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def __call__(self, x: Tensor) -> Tensor:
        """``y`` of ``x [..., d]``, float32."""
        return self.linear(x.float()) * self.inverse_rms(x) + self.shift

    def linear(self, x: Tensor) -> Tensor:
        """``w ⊙ Cx``: times ``r`` of a sum it gives the share that ``x [..., d]`` has in the sum's normalised value."""
        return self.scale * self.centre(x)

    def transposed(self, g: Tensor) -> Tensor:
        """``C (w ⊙ g)``, the transpose of :meth:`linear`."""
        return self.centre(self.scale * g)

    def backward(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradient at ``x`` given the gradient ``g`` at ``y``: ``Jᵀg = r·(C(w⊙g) − x̂·⟨x̂, C(w⊙g)⟩/d)``, ``x̂ = r·Cx``.

        Args:
            x, g: ``[..., d]``, float32; leading dimensions broadcast.
        """
        r = self.inverse_rms(x)
        hat, g = self.centre(x) * r, self.transposed(g)
        return r * (g - hat * (hat * g).mean(-1, keepdim=True))


def find_norm(module: nn.Module, width: int, device: torch.device, dtype: torch.dtype) -> Norm | None:
    """The formula of ``module`` if it is a norm over ``width`` channels, else ``None``.

    A formula is taken only if it reproduces the module's own output on probes of two sizes, one so small that ε rules.
    The module's hooks do not run. A norm may be wrapped (PEFT does that to norms it trains): the formula is then that
    of the module inside which answers as the whole does.
    """
    inside = [child for child in module.modules() if _epsilon(child) is not None]
    if module not in inside and not hasattr(module, "modules_to_save"):
        return None
    found = (_formula(child, module, width, device, dtype) for child in inside)
    return next((norm for norm in found if norm is not None), None)


def _epsilon(module: nn.Module) -> float | None:
    values = vars(module)
    return next((float(values[name]) for name in _EPSILON if isinstance(values.get(name), float)), None)


def _formula(module: nn.Module, whole: nn.Module, width: int, device: torch.device, dtype: torch.dtype) -> Norm | None:
    """The formula with the weights of ``module`` if ``whole`` follows it."""
    eps = _epsilon(module)
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if eps is None or any(p is not None and p.shape != (width,) for p in (weight, bias)):
        return None
    ones, zeros = torch.ones(width, device=device), torch.zeros(width, device=device)
    shift = zeros if bias is None else bias.detach().float()
    scales = [ones] if weight is None else [weight.detach().float(), 1.0 + weight.detach().float()]
    probe = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(device)
    probe = torch.cat((probe + 0.5, (probe + 0.5) * eps**0.5)).to(dtype)
    with torch.no_grad():
        try:
            expected = whole.forward(probe)
        except (TypeError, RuntimeError, ValueError):
            return None
    for scale in scales:
        for centred in (False, True):
            norm = Norm(scale, shift, eps, centred)
            if isinstance(expected, Tensor) and close(norm(probe), expected):
                return norm
    return None


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether a float32 formula gives what a module gave in its own type, up to rounding."""
    if found.shape != expected.shape:
        return False
    full = expected.dtype in (torch.float32, torch.float64)
    tolerance = 1e-4 if full else 16 * torch.finfo(expected.dtype).eps
    error = (found - expected.float()).abs().amax()
    return bool(error <= tolerance * expected.float().abs().amax().clamp(min=1e-3))
