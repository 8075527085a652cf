"""Tasks: pairs of a clean and a corrupt prompt of equal length, and what is measured on the model's output.

    file ─┐
          ├─► TaskPair … ─► Task ─► halves (select, evaluate) ─► TaskBatch: clean, corrupt, metric ─► values [B]
    generator ─┘

Everything is in token ids, so that a task is the same whatever tokenizer is at hand later. Files: ``docs/formats.md``.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import torch
import yaml
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from interp_rlhf.activations.tokenizers import tokenizer_hash
from interp_rlhf.circuits.generators import GENERATORS, draw_pairs
from interp_rlhf.circuits.metrics import (
    check_metric_values,
    logit_difference,
    margin_terms,
    negative_kl,
    probe_score,
)
from interp_rlhf.circuits.task_pairs import NEEDS, MetricName, TaskPair, read_pairs, task_pairs
from interp_rlhf.errors import ConfigError, MeasurementError, PromptError
from interp_rlhf.readouts.files import check_names
from interp_rlhf.readouts.probes import LinearProbe

#: ``metric(logits [B, T, V], clean_logits [B, T, V]) -> [B]``; of a hookpoint instead of the logits, ``[B, T, d]``.
Metric = Callable[[Tensor, Tensor], Tensor]

#: Pairs of a task at least; half of them in each half.
MINIMUM = 8


@dataclass(frozen=True, slots=True, eq=False)
class TaskBatch:
    """Some pairs as the model reads them, padded on the right. ``B`` rows: a pair has one, with ``margin`` two.

    Attributes:
        clean, corrupt: ``input_ids`` and ``attention_mask``, ``[B, T]`` int64 on the CPU; the same tokens are padding.
        ids: the pair of each row.
        metric: ``metric(now, clean) -> [B]`` of the logits ``[B, T, V]``, or of what ``reads`` names ``[B, T, d]``.
            Raises :class:`~interp_rlhf.errors.MeasurementError` for values that are not finite; it names the pair.
        reads: hookpoint that the metric reads instead of the logits.
    """

    clean: dict[str, Tensor]
    corrupt: dict[str, Tensor]
    ids: tuple[str, ...]
    metric: Metric
    reads: str | None


@dataclass(frozen=True)
class Task:
    """Pairs of prompts and a metric.

    Attributes:
        name: printable, without path separators.
        pairs: at least :data:`MINIMUM`.
        metric: ``logit_diff``, ``kl``, ``margin`` or ``probe``; formulas in :mod:`interp_rlhf.circuits.metrics`.
        probe: read at the last token, with ``probe`` only.

    Raises:
        ConfigError: the name is none.
        PromptError: too few pairs, one that occurs twice or lacks what the metric needs, so many pairs with one clean
            prompt that they cannot be split in halves, or a probe where there should be none.
    """

    name: str
    pairs: tuple[TaskPair, ...]
    metric: MetricName = "logit_diff"
    probe: LinearProbe | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_names("task", name=self.name)
        if self.metric not in get_args(MetricName):
            names = ", ".join(get_args(MetricName))
            raise PromptError(f"task {self.name!r}: metric: expected one of {names}, found {self.metric!r}")
        problem = self._problem()
        if problem:
            raise PromptError(f"task {self.name!r}: {problem}")

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the metric, the probe's weight and bias, and all pairs in order: equal for equal tasks."""
        digest = hashlib.sha256(self.metric.encode())
        if self.probe is not None:
            digest.update(f"|{self.probe.hookpoint}|{self.probe.bias!r}|".encode())
            digest.update(self.probe.weight.numpy().astype("<f4").tobytes())
        for pair in self.pairs:
            digest.update(f"\n{pair.id}|{pair.content}".encode())
        return digest.hexdigest()

    def halves(self, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Indices of the pairs to select on and of those to evaluate on: disjoint, together all of them.

        Pairs with the same clean prompt stay in one half, and so do pairs of which one's corrupt prompt is another's
        clean one; the sizes are as equal as that allows.
        """
        place = {clean: number for number, clean in enumerate(dict.fromkeys(pair.clean for pair in self.pairs))}
        ends = [(place[pair.clean], place.get(pair.corrupt, place[pair.clean])) for pair in self.pairs]
        links = coo_array((np.ones(len(ends)), tuple(np.array(ends).T)), shape=(len(place), len(place)))
        _, label = connected_components(links, directed=False)
        groups: dict[int, list[int]] = {}
        for index, (clean, _) in enumerate(ends):
            groups.setdefault(int(label[clean]), []).append(index)
        shuffled = list(groups.values())
        order = np.random.default_rng(seed).permutation(len(shuffled))
        halves: tuple[list[int], list[int]] = ([], [])
        for place in sorted(order.tolist(), key=lambda place: -len(shuffled[place])):
            min(halves, key=len).extend(shuffled[place])
        select, evaluate = (tuple(sorted(half)) for half in halves)
        return select, evaluate

    def batch(self, indices: Sequence[int], pad_token_id: int) -> TaskBatch:
        """The pairs ``indices`` as one batch, in that order."""
        pairs = [self.pairs[index] for index in indices]
        tails: list[tuple[int, ...]] = [() for _ in pairs]
        if self.metric == "margin":
            tails = [tail for pair in pairs for tail in (pair.chosen, pair.rejected)]
            pairs = [pair for pair in pairs for _ in range(2)]
        clean, corrupt = (
            _padded([prompt + tail for prompt, tail in zip(prompts, tails, strict=True)], pad_token_id)
            for prompts in ([pair.clean for pair in pairs], [pair.corrupt for pair in pairs])
        )
        measure, ids = self._measure(pairs, tails, clean), tuple(pair.id for pair in pairs)

        def metric(now: Tensor, then: Tensor) -> Tensor:
            return check_metric_values(measure(now, then), ids)

        return TaskBatch(clean, corrupt, ids, metric, None if self.probe is None else self.probe.hookpoint)

    def _measure(self, pairs: Sequence[TaskPair], tails: Sequence[tuple[int, ...]], clean: dict[str, Tensor]) -> Metric:
        """The metric of these rows. All tensors follow the device of what is measured."""
        lengths, probe = clean["attention_mask"].sum(1), self.probe
        if self.metric == "logit_diff":
            answers, wrong = [pair.answers for pair in pairs], [pair.wrong for pair in pairs]
            return lambda now, _: logit_difference(now, lengths - 1, _marked(answers, now), _marked(wrong, now))
        if self.metric == "margin":
            places, ends = torch.arange(int(lengths.max())), lengths[:, None]
            starts = ends - torch.tensor([[len(tail)] for tail in tails])
            completion = (places >= starts) & (places < ends)
            chosen = torch.arange(len(pairs)) % 2 == 0
            fixed = (clean["input_ids"], completion, chosen)
            return lambda now, _: margin_terms(now, *(part.to(now.device) for part in fixed))
        if probe is not None:
            return lambda now, _: probe_score(now, lengths - 1, probe)
        return lambda now, then: negative_kl(now, then, lengths - 1)

    def _problem(self) -> str:
        if len(self.pairs) < MINIMUM:
            return f"expected at least {MINIMUM} pairs, found {len(self.pairs)}"
        if (self.metric == "probe") != (self.probe is not None):
            return f"expected a probe with metric 'probe' and with no other, found {self.metric!r}"
        for pair in self.pairs:
            for name in NEEDS[self.metric]:
                if not getattr(pair, name):
                    return f"pair {pair.id}: {name}: metric {self.metric!r} needs it, found none"
        for what in ("content", "id"):
            most, times = Counter(getattr(pair, what) for pair in self.pairs).most_common(1)[0]
            if times > 1:
                twice = next(pair.id for pair in self.pairs if getattr(pair, what) == most)
                return f"pair {twice}: expected every pair once, found the same {what} {times} times"
        smaller = min(map(len, self.halves(0)))
        if smaller < MINIMUM // 2:
            return (
                f"expected halves of at least {MINIMUM // 2} pairs, found {smaller}: pairs with one clean prompt "
                f"are not split ({len({pair.clean for pair in self.pairs})} different ones)"
            )
        return ""


def make_task(
    name: str, generator: str, tokenizer: Any, n: int, seed: int, options: Mapping[str, Any] = MappingProxyType({})
) -> Task:
    """A task of a built-in generator (:func:`~interp_rlhf.circuits.generators.draw_pairs`) with metric ``logit_diff``.

    Args:
        tokenizer: ``induction`` also takes the token ids to draw from.
        options: of the generator.

    Raises:
        ConfigError: no such generator or option.
        PromptError: the tokenizer cannot express the task, or there are fewer than ``n`` pairs.

    >>> task = make_task("induction", "induction", range(3, 64), n=8, seed=0, options={"length": 6})
    >>> pair = task.pairs[0]
    >>> len(pair.clean), pair.clean[pair.clean.index(pair.clean[-1]) + 1] == pair.answers[0]
    (6, True)
    """
    drawn = draw_pairs(generator, tokenizer, n, seed, options)
    return Task(name, tuple(TaskPair.of(**pair._asdict()) for pair in drawn))


def load_task(path: str | Path, tokenizer: Any, *, n: int = 64, seed: int = 0) -> Task:
    """Read a task file, YAML or JSON lines (``docs/formats.md``).

    Args:
        tokenizer: for texts; ``None`` is fine where prompts are token ids.
        n, seed: pairs and seed of a generator that the file names, where it does not say them itself.

    Raises:
        PromptError: a missing or damaged file, a field too many or too few, pairs that make no task; names file and
            pair.
        ConfigError: no such generator or option, a probe of another tokenizer.
        FormatError: the probe's file is none.
    """
    path = Path(path)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor carries its tokenizer
    if path.suffix == ".jsonl":
        metric, pairs = read_pairs(path, tokenizer)
        return _named(path, path.stem, pairs, metric)
    header = _header(path)
    name = header.get("name", path.stem)
    if "generator" in header:
        _check_fields(path, header, ("generator",), ("name", "n", "seed", "options"))
        return _generated(path, name, header, tokenizer, n, seed)
    _check_fields(path, header, ("metric", "pairs"), ("name", "probe"))
    metric: MetricName = header["metric"]
    given = header["pairs"]
    if not isinstance(metric, str) or metric not in NEEDS:
        raise PromptError(f"{path}: metric: expected one of {', '.join(NEEDS)}, found {metric!r}")
    if isinstance(given, str):
        _, pairs = read_pairs(path.parent / given, tokenizer, metric)
    else:
        pairs = task_pairs(path, given, tokenizer, metric)
    return _named(path, name, pairs, metric, _probe(path, header.get("probe"), tokenizer))


def resolve_task(entry: str, tokenizer: Any, *, n: int, seed: int) -> Task:
    """What the settings name: a built-in generator (``n`` pairs), or a task file (all of its pairs).

    Raises:
        ConfigError: neither; the message lists the generators.
        InterpError: as :func:`make_task` and :func:`load_task`.
    """
    if entry in GENERATORS:
        return make_task(entry, entry, getattr(tokenizer, "tokenizer", tokenizer), n, seed)
    if Path(entry).suffix in (".yaml", ".yml", ".jsonl"):
        return load_task(entry, tokenizer, n=n, seed=seed)
    raise ConfigError(
        f"task {entry!r}: expected one of {', '.join(GENERATORS)}, or the path of a .yaml, .yml or .jsonl file"
    )


def _named(path: Path, name: Any, pairs: Sequence[TaskPair], metric: Any, probe: LinearProbe | None = None) -> Task:
    try:
        return Task(name, tuple(pairs), metric, probe)
    except (PromptError, ConfigError) as error:
        raise type(error)(f"{path}: {error}") from None


def _header(path: Path) -> dict[str, Any]:
    if path.suffix not in (".yaml", ".yml"):
        raise PromptError(f"{path}: expected a task file that ends in .yaml, .yml or .jsonl")
    try:
        header = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(header, dict):
        raise PromptError(f"{path}: expected a mapping with metric and pairs, or generator, found {header!r:.40}")
    return header


def _check_fields(path: Path, header: Mapping[str, Any], needed: tuple[str, ...], more: tuple[str, ...]) -> None:
    missing, unknown = [name for name in needed if name not in header], [*map(str, set(header) - {*needed, *more})]
    if missing or unknown:
        wrong = f"without {', '.join(missing)}" if missing else f"unknown {', '.join(sorted(unknown))}"
        raise PromptError(f"{path}: expected {', '.join(needed)} (and {', '.join(more)} where wanted), found {wrong}")


def _generated(path: Path, name: Any, header: Mapping[str, Any], tokenizer: Any, n: int, seed: int) -> Task:
    numbers, options = {"n": header.get("n", n), "seed": header.get("seed", seed)}, header.get("options", {})
    for key, number in numbers.items():
        if type(number) is not int or number < 0:
            raise PromptError(f"{path}: {key}: expected an integer of 0 at least, found {number!r}")
    if not isinstance(options, dict):
        raise PromptError(f"{path}: options: expected a mapping, found {options!r}")
    try:
        return make_task(name, header["generator"], tokenizer, **numbers, options=options)
    except (PromptError, ConfigError) as error:
        raise type(error)(f"{path}: {error}") from None


def _probe(path: Path, given: Any, tokenizer: Any) -> LinearProbe | None:
    """The probe a header names, relative to its folder; it has to read a residual stream and be of this tokenizer."""
    if given is None:
        return None
    if not isinstance(given, str):
        raise PromptError(f"{path}: probe: expected the path of a probe file, found {given!r}")
    probe = LinearProbe.load(path.parent / given)
    if not re.fullmatch(r"layers\..+\.resid_post", probe.hookpoint):
        raise PromptError(f"{path}: probe: expected one fitted at a resid_post, found {probe.hookpoint}")
    probe.check(len(probe.weight), tokenizer_hash(tokenizer))
    return probe


def _padded(rows: Sequence[tuple[int, ...]], pad_token_id: int) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_token_id] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _marked(rows: Sequence[tuple[int, ...]], logits: Tensor) -> Tensor:
    """Which of the V tokens each row names, ``[B, V]``."""
    largest, size = max(map(max, rows)), logits.shape[-1]
    if largest >= size:
        raise MeasurementError(f"metric: token {largest}: expected token ids below {size}, the model's vocabulary")
    marked = torch.zeros(len(rows), size, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        marked[row, list(tokens)] = True
    return marked.to(logits.device)
