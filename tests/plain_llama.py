"""A plain, slow Llama in float64 with one residual stream per reader: the reference of edge attribution.

Written from the architecture's definition alone. Every query, key and value head, every MLP and the logits read a copy
of the residual stream of their own, so that the gradient and the effect of each edge can be had one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PlainLlama:
    """Weights and sizes of a Hugging Face Llama, in float64."""

    weights: dict[str, Tensor]
    layers: int
    heads: int
    groups: int
    eps: float
    theta: float

    @classmethod
    def of(cls, model) -> PlainLlama:
        config = model.config
        weights = {name: value.detach().double() for name, value in model.state_dict().items()}
        return cls(
            weights,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.rms_norm_eps,
            config.rope_parameters["rope_theta"],
        )

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weights[name]

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions of ``[B, T, dh]``."""
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[1]).double()[:, None] * self.theta ** (-torch.arange(half).double() / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def forward(
        self,
        ids: Tensor,
        *,
        embed: Tensor | None = None,
        change: Callable[[str, Tensor, Mapping[str, Tensor]], Tensor] = lambda name, x, written: x,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Logits, what every source writes, and every target's own input (a leaf-like copy with a gradient).

        ``change`` may replace a target's input, given its name, the residual stream and what was written so far.
        """
        w = self.weights
        written = {"embed": w["model.embed_tokens.weight"][ids] if embed is None else embed}
        read: dict[str, Tensor] = {}

        def own(name: str) -> Tensor:
            x = change(name, sum(written.values()), written)
            read[name] = x + torch.zeros_like(x, requires_grad=True)
            return read[name]

        for layer in range(self.layers):
            self._attention(layer, own, written)
            name = f"model.layers.{layer}."
            x = self.norm(own(f"m{layer}"), name + "post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(x @ w[name + "mlp.gate_proj.weight"].T)
            written[f"m{layer}"] = (gate * (x @ w[name + "mlp.up_proj.weight"].T)) @ w[name + "mlp.down_proj.weight"].T
        logits = self.norm(own("logits"), "model.norm.weight") @ w["lm_head.weight"].T
        return logits, written, read

    def _attention(self, layer: int, own: Callable[[str], Tensor], written: dict[str, Tensor]) -> None:
        w, name = self.weights, f"model.layers.{layer}."
        width = w[name + "self_attn.q_proj.weight"].shape[0] // self.heads

        def role(kind: str, head: int) -> Tensor:
            x = self.norm(own(f"a{layer}.h{head}.{kind}"), name + "input_layernorm.weight")
            return x @ w[f"{name}self_attn.{kind}_proj.weight"][head * width : (head + 1) * width].T

        q = [role("q", head) for head in range(self.heads)]
        k = [role("k", group) for group in range(self.groups)]
        v = [role("v", group) for group in range(self.groups)]
        out = {}
        for head in range(self.heads):
            group = head // (self.heads // self.groups)
            score = self.rotate(q[head]) @ self.rotate(k[group]).transpose(1, 2) / width**0.5
            causal = torch.ones(score.shape[-2:], dtype=torch.bool).tril()
            z = score.masked_fill(~causal, -torch.inf).softmax(-1) @ v[group]
            out[f"a{layer}.h{head}"] = z @ w[name + "self_attn.o_proj.weight"][:, head * width : (head + 1) * width].T
        written.update(out)

    def edge_scores(self, clean: Tensor, corrupt: Tensor, metric, steps: int, sources, targets, possible) -> Tensor:
        """EAP (``steps`` 0) or EAP-IG from the formula, edge by edge."""
        clean_logits, a, _ = self.forward(clean)
        _, b, _ = self.forward(corrupt)
        points = (
            [a["embed"]] if not steps else [b["embed"] + k / steps * (a["embed"] - b["embed"]) for k in range(steps)]
        )
        scores = torch.zeros(len(sources), len(targets), dtype=torch.float64)
        for point in points:
            logits, _, read = self.forward(clean, embed=point.detach())
            gradients = torch.autograd.grad(
                metric(logits, clean_logits.detach()).sum(), [read[name] for name in targets]
            )
            for j, gradient in enumerate(gradients):
                for i, source in enumerate(sources):
                    if possible[i, j]:
                        scores[i, j] += ((b[source] - a[source]) * gradient).sum() / len(clean) / len(points)
        return scores.detach()

    def run_circuit(self, clean: Tensor, corrupt: Tensor, kept: Callable[[str, str], bool]) -> Tensor:
        """Logits when a reader gets from the sources outside the circuit what they write on ``corrupt``."""
        _, b, _ = self.forward(corrupt)

        def change(name: str, x: Tensor, written: Mapping[str, Tensor]) -> Tensor:
            return sum(value if kept(source, name) else b[source] for source, value in written.items())

        return self.forward(clean, change=change)[0].detach()
