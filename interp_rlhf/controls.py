"""Control runs: the same training without what its preferences say.

A drift is put down to the preferences only if it is larger than in runs whose preferences were scrambled and in which
all else is the same: the data, their order, the start, the settings (``docs/metrics.md``, null ``control_run``).

Everything here is pure. :mod:`interp_rlhf.seam` puts it into a trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from interp_rlhf.activations.prompt_sets import is_streaming
from interp_rlhf.audit.layout import CONTROLS
from interp_rlhf.errors import ConfigError

Kind = Literal["pairs swapped", "labels permuted", "rewards permuted"]

#: Keeps the draws of a control run apart from every other use of the run's seed.
_STREAM = 0xC0


@dataclass(frozen=True, slots=True)
class Control:
    """What makes a run a control run.

    Attributes:
        number: which one, 1 or more.
        kind: what was scrambled.
        changed: rows of the training data that were changed; 0 where rewards are permuted as they come.
    """

    number: int
    kind: Kind
    changed: int = 0

    def as_info(self) -> dict[str, Any]:
        """What the run file says about it."""
        return asdict(self)


def control_folder(output_dir: str | Path, number: int) -> Path:
    """Where control run ``number`` of the run in ``output_dir`` is written, also if that is a control run's already.

    >>> control_folder("runs/dpo", 3).as_posix(), control_folder("runs/dpo/_controls/02", 3).as_posix()
    ('runs/dpo/_controls/03', 'runs/dpo/_controls/03')
    """
    folder = Path(output_dir)
    real = folder.parents[1] if is_control_folder(folder) else folder
    return real / CONTROLS / f"{number:02d}"


def is_control_folder(output_dir: str | Path) -> bool:
    """Whether an output folder is one of a control run."""
    return Path(output_dir).parent.name == CONTROLS


def scramble_data(dataset: Any, number: int, *, seed: int, within: str | None) -> tuple[Any, Control] | None:
    """The training data of a control run; ``None`` where the data hold no preferences to scramble.

    Pairs (tokenized ``chosen…ids`` and ``rejected…ids``, which a trainer makes that learns from them): the two sides,
    all their columns, are swapped in half of the rows, drawn at random, in as many of each value of ``within``. A
    ``margin`` stays with its row. Labels (``label`` beside ``completion_ids``): permuted among the rows of each value.

    Args:
        dataset: a trainer's map-style ``datasets.Dataset``, as it prepared it.
        number: the control run.
        seed: the run's seed.
        within: a column; ``None`` takes all rows as one.

    Raises:
        ConfigError: a stream, a column that is not there, or data that cannot be rewritten by row.
    """
    if dataset is None:
        return None
    if is_streaming(dataset):
        raise ConfigError("control: as many rows of each kind cannot be drawn from a streaming dataset; load it whole")
    columns = list(getattr(dataset, "column_names", None) or ())
    pairs = any("chosen" in name and name.endswith("ids") and _other(name) in columns for name in columns)
    labelled = {"label", "prompt_ids", "completion_ids"} <= set(columns)
    if not (pairs or labelled):
        return None
    if within is not None and within not in columns:
        raise ConfigError(
            f"control_within: expected a column of the data ({', '.join(sorted(columns))}), found {within}"
        )
    strata = [repr(value) for value in dataset[within]] if within is not None else [None] * len(dataset)
    random = np.random.default_rng([seed, number, _STREAM])
    if pairs:
        rows = balanced_half(strata, random)
        return _swap(dataset, columns, rows), Control(number, "pairs swapped", len(rows))
    labels = [bool(label) for label in dataset["label"]]
    permuted = permute_within(labels, strata, random)
    changed = sum(a != b for a, b in zip(labels, permuted, strict=True))
    return _relabel(dataset, permuted), Control(number, "labels permuted", changed)


def balanced_half(strata: Sequence[Any], random: np.random.Generator) -> frozenset[int]:
    """Rows to change: half of those of each stratum, at random; a coin decides for an odd one.

    >>> rows = balanced_half(["a", "a", "b", "b"], np.random.default_rng(0))
    >>> len(rows & {0, 1}), len(rows & {2, 3})
    (1, 1)
    """
    found: list[int] = []
    for members in _members(strata).values():
        half, odd = divmod(len(members), 2)
        found += random.permutation(members)[: half + (odd and int(random.integers(2)))].tolist()
    return frozenset(found)


def permute_within(values: Sequence[bool], strata: Sequence[Any], random: np.random.Generator) -> list[bool]:
    """The same values in another order, each stratum keeping its own.

    >>> permute_within([True, False, False], ["a", "b", "b"], np.random.default_rng(0))[0]
    True
    """
    permuted = list(values)
    for members in _members(strata).values():
        for place, source in zip(members, random.permutation(members), strict=True):
            permuted[place] = values[source]
    return permuted


def permute_groups(rewards: Tensor, size: int, random: np.random.Generator) -> Tensor:
    """Rewards ``[B]`` or ``[B, F]`` with the rows of each group of ``size`` consecutive ones in another order.

    Raises:
        ConfigError: groups of one, which have no other order, or a batch that is no whole number of groups.

    >>> permute_groups(torch.arange(4.0), 2, np.random.default_rng(1)).view(2, 2).sort().values
    tensor([[0., 1.],
            [2., 3.]])
    """
    if size < 2 or len(rewards) % size:
        raise ConfigError(f"control: expected whole groups of at least 2 rewards, found {len(rewards)} by {size}")
    order = [group + random.permutation(size) for group in range(0, len(rewards), size)]
    return rewards[torch.from_numpy(np.concatenate(order)).to(rewards.device)]


def reward_generator(seed: int, number: int, step: int, call: int) -> np.random.Generator:
    """The generator that permutes the rewards of one call, the same on all ranks and after a resume."""
    return np.random.default_rng([seed, number, _STREAM, step, call])


def _other(name: str) -> str:
    """The column of the other side: ``ref_chosen_logps`` and ``ref_rejected_logps``."""
    return name.replace("chosen", "rejected") if "chosen" in name else name.replace("rejected", "chosen")


def _members(strata: Sequence[Any]) -> Mapping[Any, list[int]]:
    members: dict[Any, list[int]] = {}
    for row, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(row)
    return members


def _swap(dataset: Any, columns: Sequence[str], rows: frozenset[int]) -> Any:
    names = [name for name in columns if name != _other(name) and _other(name) in columns]

    def swapped(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {name: row[_other(name) if index in rows else name] for name in names}

    return dataset.map(swapped, with_indices=True, load_from_cache_file=False, desc="Swapping pairs for a control run")


def _relabel(dataset: Any, labels: Sequence[bool]) -> Any:
    def relabelled(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"label": labels[index]}

    return dataset.map(relabelled, with_indices=True, load_from_cache_file=False, desc="Permuting labels")
