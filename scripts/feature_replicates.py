"""Texts of known codes written by a known dictionary, at two times: what the features' table finds of it.

A false discovery is a flagged feature whose true code did not change: every one but the scaled and the switched on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from interp_rlhf.activations.feature_sums import FeatureReading, FeatureStream
from interp_rlhf.drift.feature_health import dictionary_health, fraction_unexplained
from interp_rlhf.drift.features import feature_table, reading_of

WIDTH, SPAN, D = 128, 64, 80
TEXTS, TOKENS = 64, 16
COHERENCE, NOISE, JITTER = 0.3, 0.1, 0.05
SCALED, SWITCHED_ON = 7, 91
CHANGES = ("none", "two features", "outside")
ENCODERS = ("codes known", "JumpReLU, fitted", "JumpReLU, tied", "TopK, tied")
#: The one that leaves most of the start unexplained; set apart after the gate was seen to stay open for it.
POOR = "JumpReLU, tied"
Q, TOLERANCE = 0.1, 0.1


@lru_cache(maxsize=1)
def decoder() -> np.ndarray:
    """Unit rows ``[F, d]`` in a subspace, no two with a larger ``|cosine|`` than 0.3, many with that one.

    Alternates between cutting off larger cosines and the nearest Gram matrix of the right rank (Tropp et al. 2005).
    """
    rows = np.random.default_rng(0).normal(size=(WIDTH, SPAN))
    for _ in range(400):
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        gram = np.clip(rows @ rows.T, -0.98 * COHERENCE, 0.98 * COHERENCE)
        np.fill_diagonal(gram, 1.0)
        values, vectors = np.linalg.eigh(gram)
        rows = vectors[:, -SPAN:] * np.sqrt(np.maximum(values[-SPAN:], 0))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.hstack([rows, np.zeros((WIDTH, D - SPAN))])


@dataclass(frozen=True)
class Dictionary:
    """JumpReLU at ``threshold``, or the ``k`` largest positive codes where ``k`` is given."""

    encoder: Tensor
    bias: Tensor
    threshold: float
    k: int | None = None
    width: int = WIDTH

    def encode(self, x: Tensor) -> Tensor:
        z = x @ self.encoder + self.bias
        if self.k is None:
            return z * (z > self.threshold)
        kept = z.topk(self.k, dim=-1)
        return torch.zeros_like(z).scatter(-1, kept.indices, kept.values.relu())

    def decode(self, z: Tensor) -> Tensor:
        return z @ torch.from_numpy(decoder()).float()


@lru_cache(maxsize=4)
def dictionary(encoder: str) -> Dictionary:
    """The true decoder with one of the encoders; the fitted one regresses codes on activations of other texts."""
    rows = torch.from_numpy(decoder()).float()
    if encoder == "JumpReLU, fitted":
        generator = np.random.default_rng(1)
        z = np.concatenate([codes(generator).reshape(-1, WIDTH) for _ in range(40)])
        x = np.hstack([z @ decoder() + NOISE * generator.normal(size=(len(z), D)), np.ones((len(z), 1))])
        weights = torch.from_numpy(np.linalg.lstsq(x, z, rcond=None)[0]).float()
        return Dictionary(weights[:-1], weights[-1], 0.5)
    k = round(float(rates().sum())) if encoder.startswith("TopK") else None
    return Dictionary(rows.T.contiguous(), torch.zeros(WIDTH), 1.2, k)


@lru_cache(maxsize=1)
def rates() -> np.ndarray:
    """Share of tokens on which each feature is on, ``[F]``: from untestably rare to common."""
    rates = np.random.default_rng(2).permutation(np.geomspace(0.005, 0.2, WIDTH))
    rates[[SCALED, SWITCHED_ON]] = 0.06
    return rates


def codes(generator: Generator) -> np.ndarray:
    """True codes ``[N, T, F]``: features more or less frequent and strong from text to text."""
    chance = np.clip(rates() * generator.gamma(2.0, 0.5, size=(TEXTS, 1, WIDTH)), 0, 0.9)
    on = generator.random((TEXTS, TOKENS, WIDTH)) < chance
    return on * (0.5 + generator.exponential(1.0, size=on.shape))


def both_times(change: str, generator: Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Codes and activations at the start and now.

    Both times have their own noise, of tokens, of texts and of codes, alike at both: what did not change by plan
    changes symmetrically about 0.
    """
    base = codes(generator)
    found = []
    for now in (False, True):
        z = base * (1 + 0.1 * generator.normal(size=(TEXTS, 1, WIDTH)))
        if change == "two features" and now:
            z[..., SCALED] *= 2
        if not (change == "two features" and now):
            z[..., SWITCHED_ON] = 0
        x = z @ decoder() + NOISE * generator.normal(size=(TEXTS, TOKENS, D))
        x += JITTER * generator.normal(size=(TEXTS, 1, D))
        if change == "outside" and now:
            x += generator.exponential(2.0, size=(TEXTS, TOKENS, 1)) * outside(generator)
        found.append((z, x))
    return found


def outside(generator: Generator) -> np.ndarray:
    """A unit direction ``[d]``, half of its square outside what the dictionary spans, half overlapping features."""
    inside, beyond = generator.normal(size=SPAN), generator.normal(size=D - SPAN)
    return np.hstack([inside / np.linalg.norm(inside), beyond / np.linalg.norm(beyond)]) / np.sqrt(2)


def reading(encoder: str, z: np.ndarray, x: np.ndarray) -> FeatureReading:
    """What the encoder makes of the activations; the true codes where they are taken for known."""
    if encoder == "codes known":
        return reading_of(*(torch.from_numpy(part.mean(1)).float() for part in (z, (z != 0).astype(float))))
    stream = FeatureStream(dictionary(encoder), encoder)
    stream(range(TEXTS), torch.from_numpy(x).float(), torch.ones(TEXTS, TOKENS, dtype=torch.bool))
    return stream.reading()


@dataclass(frozen=True)
class Outcome:
    """Of one change, read by one encoder.

    Attributes:
        listed, listed_by: features that the table lists as drifted, by BH and by BY.
        appeared: those listed as appeared.
        ungated: what BH would list without the gate.
        rejected: what BH rejects whatever the size of the effect.
        reliable: whether the gate is open.
        untestable: number of features on too few texts.
    """

    listed: frozenset[int]
    listed_by: frozenset[int]
    appeared: frozenset[int]
    ungated: frozenset[int]
    rejected: frozenset[int]
    reliable: bool
    untestable: int


def false_share(found: frozenset[int]) -> float:
    """False discoveries among those found, 0 where nothing is."""
    return len(found - {SCALED, SWITCHED_ON}) / max(1, len(found))


def replicate(change: str, encoder: str, seed: int) -> Outcome:
    """One replicate; equal seeds give every encoder the same texts."""
    generator = np.random.default_rng([seed, CHANGES.index(change)])
    start, now = (reading(encoder, z, x) for z, x in both_times(change, generator))
    health = None if encoder == "codes known" else dictionary_health(start, now)
    table = feature_table(start, now, tolerance=TOLERANCE, q=Q, health=health)
    rejected = table.bh <= Q
    masks = {
        "listed": table.drifted_bh,
        "listed_by": table.drifted_by,
        "appeared": np.array([word == "appeared" for word in table.word], dtype=bool),
        "ungated": rejected & (np.abs(table.effect) > TOLERANCE),
        "rejected": rejected,
    }
    chosen = {name: frozenset(table.feature[mask].tolist()) for name, mask in masks.items()}
    return Outcome(**chosen, reliable=health is None or health.reliable, untestable=table.untestable)


def about() -> str:
    """What is simulated and what the columns are."""
    cosines = np.abs(decoder() @ decoder().T - np.eye(WIDTH))
    fvu = {}
    for encoder in ENCODERS[1:]:
        z, x = both_times("none", np.random.default_rng(3))[0]
        fvu[encoder] = fraction_unexplained(reading(encoder, z, x))
    return (
        f"{TEXTS} texts of {TOKENS} tokens, {WIDTH} features in {SPAN} of {D} dimensions, largest cosine between two "
        f"{cosines.max():.2f} ({(cosines > 0.29).sum(1).mean():.1f}\na feature), {rates().sum():.0f} features a token; "
        "noise of tokens, texts and codes at both times. Codes: known, or read by an encoder: regressed on\n"
        f"activations of other texts (FVU {fvu[ENCODERS[1]]:.2f}), or the decoder's own rows with a threshold "
        f"({fvu[ENCODERS[2]]:.2f}) or the largest k ({fvu[ENCODERS[3]]:.2f}).\n"
        f"q = {Q}, |effect| > {TOLERANCE}. False: a feature other than the two, its true code did not change. "
        "Shares of replicates have Clopper–Pearson\nintervals, means normal ones, all 95 %."
    )
