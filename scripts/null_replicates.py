"""One replicate of every null, at tensor level, where the null holds: a generator to a p-value."""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import Generator
from scipy import stats
from torch import Tensor

from interp_rlhf.drift.concepts import drift_estimate, specificity_estimates
from interp_rlhf.drift.control_runs import control_rank, family_rank
from interp_rlhf.drift.nulls import covariance_directions, paired_bootstrap
from interp_rlhf.drift.sign_flips import max_t

ALPHA = 0.05
COLUMNS = ("null", "replicates", "found", "rate", "99.9 % band", "uniform p", "result")


def draw(generator: Generator) -> int:
    """A seed."""
    return int(generator.integers(2**31))


def largest_t(generator: Generator, correlation: float) -> float:
    """Smallest p over 24 columns of 64 prompts that are symmetric about 0, heavy-tailed, of unequal scale."""
    common, own = generator.standard_t(4, size=(64, 1)), generator.standard_t(4, size=(64, 24))
    d = (correlation * common + own) * np.logspace(-1, 1, 24)
    return float(max_t(torch.from_numpy(d), flips=999, seed=draw(generator)).p.min())


def readings(generator: Generator, shared: bool) -> tuple[Tensor, Tensor]:
    """Readings ``[64, 24]`` of unequal spread, and later ones: each prompt moved by itself, or all of them alike."""
    x0 = generator.normal(size=(64, 24)) * np.logspace(0, 1, 24) + 3
    moved = generator.normal(size=(1 if shared else 64, 24)) * 0.3
    return torch.from_numpy(x0).float(), torch.from_numpy(x0 + moved).float()


def direction(generator: Generator, shared: bool, drop_top: bool) -> float:
    """p of a concept that is one more direction from the activations' covariance."""
    x0, xt = readings(generator, shared)
    v, *others = covariance_directions(x0, 200, draw(generator), drop_top=drop_top).split([1, 199])
    if drop_top:
        return specificity_estimates(x0, xt, v[0], others[0], None)["specificity/directions_without_top"].p
    return drift_estimate(x0, xt, v[0], others[0], resamples=100).p


def concept_bank(generator: Generator) -> float:
    """p of a concept beside 39 others that share a component with it."""
    x0, xt = readings(generator, shared=True)
    concepts = torch.from_numpy(generator.normal(size=(40, 24)) + generator.normal(size=24)).float()
    v, bank = concepts[0], concepts[1:]
    return specificity_estimates(x0, xt, v, None, bank)["specificity/concept_bank"].p


def runs(generator: Generator, readouts: int) -> list[dict[str, float]]:
    """Drifts of 20 exchangeable runs: what the data does to all, what a seed does to all readouts, and the rest."""
    shape = (20, readouts)
    drifts = generator.normal(size=readouts) + generator.normal(size=(20, 1)) + generator.standard_t(3, size=shape)
    return [{str(number): drift for number, drift in enumerate(run)} for run in drifts.tolist()]


def control_run(generator: Generator) -> float:
    """p of one run among 19 control runs, one readout."""
    drifts = [run["0"] for run in runs(generator, 1)]
    return control_rank(drifts[0], drifts[1:]).p


def control_family(generator: Generator) -> float:
    """Smallest p over 12 readouts of one run among 19 control runs."""
    found, *controls = runs(generator, 12)
    return min(rank.p for rank in family_rank(found, controls).values())


def interval(generator: Generator) -> float:
    """0 where the bootstrap interval of the mean of 128 normal values misses the truth, else 1."""
    values = torch.from_numpy(generator.normal(0.7, 1.0, size=128))
    low, high = paired_bootstrap(values, seed=draw(generator))
    return float(low <= 0.7 <= high)


#: Name of a null -> one replicate: a generator to a p-value.
NULLS = {
    "sign flips, largest of 24 independent columns": lambda g: largest_t(g, 0.0),
    "sign flips, largest of 24 correlated columns": lambda g: largest_t(g, 2.0),
    "directions, every prompt moved by itself": lambda g: direction(g, False, False),
    "directions, all prompts moved alike": lambda g: direction(g, True, False),
    "directions without top, every prompt moved by itself": lambda g: direction(g, False, True),
    "directions without top, all prompts moved alike": lambda g: direction(g, True, True),
    "concept bank, 40 exchangeable concepts": concept_bank,
    "control runs, 19, one readout": control_run,
    "control runs, 19, largest of 12 readouts": control_family,
    "bootstrap interval of a mean, n = 128, misses": interval,
}


def replicate(name: str, replicates: int, seed: int = 0) -> tuple[tuple[str, ...], bool]:
    """The row of one null, and whether it does what it says."""
    generator = np.random.default_rng([seed, list(NULLS).index(name)])
    p = np.array([NULLS[name](generator) for _ in range(replicates)])
    found = int((p <= ALPHA + 1e-12).sum())
    low, high = (int(end) for end in stats.binom.ppf([0.0005, 0.9995], replicates, ALPHA))
    passed, uniform = low <= found <= high, "-"
    if len(np.unique(p)) > 2:
        counts = np.bincount(np.ceil(20 * p - 1e-9).astype(int), minlength=21)[1:]
        fit = float(stats.chisquare(counts).pvalue)
        passed, uniform = passed and fit >= 0.001, f"{fit:.3f}"
    rate, band = f"{found / replicates:.4f}", f"{low / replicates:.4f} to {high / replicates:.4f}"
    return (name, str(replicates), str(found), rate, band, uniform, "pass" if passed else "FAIL"), passed
