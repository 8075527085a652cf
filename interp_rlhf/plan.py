"""What a run will read, decided before training starts: hookpoints, audit texts, concepts with their contrast pairs.

Everything that can be wrong with the input is found here, so that ``attach`` raises and a training run never does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from interp_rlhf.activations.hookpoints import ModelLayout, layout, resolve_hookpoints
from interp_rlhf.activations.labelled import LabelledTexts
from interp_rlhf.activations.prompt_sets import PromptSet, check_drawable, draw_rows, is_streaming
from interp_rlhf.activations.prompts import ContrastPair, Prompt, content_tokens
from interp_rlhf.activations.tokenizers import no_content, tokenizer_hash
from interp_rlhf.circuits.tasks import Task, resolve_task
from interp_rlhf.circuits.wiring import find_wiring, partition_problem
from interp_rlhf.config import InterpConfig
from interp_rlhf.errors import ConfigError, PromptError
from interp_rlhf.measurement import Source
from interp_rlhf.readouts.bank import bank_packs
from interp_rlhf.readouts.directions import Direction
from interp_rlhf.readouts.packs import load_pack, render, split
from interp_rlhf.readouts.probes import LinearProbe

#: The concept fitted on preference pairs.
PREFERENCE = "chosen_minus_rejected"


@dataclass(frozen=True, slots=True)
class ConceptTexts:
    """Contrast pairs of one concept: a half to fit the direction on, a half to read it on."""

    name: str
    source: Source
    fit: tuple[ContrastPair, ...]
    held: tuple[ContrastPair, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that was asked for and will not be reported, with the reason."""

    readout: str
    hookpoint: str
    reason: str


def text_ids(prompts: Sequence[Prompt]) -> Tensor:
    """Ids of texts as numbers, int64 ``[N]``: their 64 bits, signed, big-endian."""
    values = [int.from_bytes(bytes.fromhex(prompt.id), signed=True) for prompt in prompts]
    return torch.tensor(values, dtype=torch.long)


@dataclass(frozen=True, slots=True)
class TextTable:
    """The distinct texts of a measurement, ordered by id; ``scored`` ones also need their log-probability."""

    prompts: tuple[Prompt, ...]
    scored: frozenset[str]
    _index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {prompt.id: row for row, prompt in enumerate(self.prompts)})

    @property
    def ids(self) -> Tensor:
        """The texts' ids as numbers, int64 ``[N]``: what says in a file which texts its rows belong to."""
        return text_ids(self.prompts)

    def rows(self, prompts: Sequence[Prompt]) -> Tensor:
        """Row indices ``[len(prompts)]`` of these texts."""
        return torch.tensor([self._index[prompt.id] for prompt in prompts], dtype=torch.long)


@dataclass(frozen=True, slots=True)
class Plan:
    """The fixed part of a run: the same at every measurement.

    ``bank`` holds unrelated concepts, read at step 0 only; ``on_domain`` labelled texts of the training's domain,
    ``sealed`` a probe that training never touches, ``tasks`` the pairs of prompts on which circuits are found.
    """

    hookpoints: tuple[str, ...]
    audit: PromptSet
    concepts: tuple[ConceptTexts, ...]
    directions: tuple[Direction, ...]
    refused: tuple[Refusal, ...]
    pad_token_id: int
    skip_ids: frozenset[int]
    max_length: int
    behaviour: bool
    bank: tuple[ConceptTexts, ...] = ()
    on_domain: tuple[LabelledTexts, ...] = ()
    sealed: LinearProbe | None = None
    tasks: tuple[Task, ...] = ()
    control_task: Task | None = None

    def table(self, *, fit: bool, bank: bool = False) -> TextTable:
        """The texts of one measurement.

        Args:
            fit: include the halves on which directions are fitted.
            bank: include the bank of unrelated concepts.
        """
        texts = {prompt.id: prompt for prompt in self.audit.prompts}
        texts |= {prompt.id: prompt for labelled in self.on_domain for prompt in labelled.prompts}
        scored: set[str] = set()
        for concept in (*self.concepts, *(self.bank if bank else ())):
            held = [side for pair in concept.held for side in (pair.positive, pair.negative)]
            fitted = [side for pair in concept.fit for side in (pair.positive, pair.negative)] if fit else []
            texts.update((prompt.id, prompt) for prompt in (*held, *fitted))
            if self.behaviour:
                scored.update(prompt.id for prompt in held)
        return TextTable(tuple(texts[key] for key in sorted(texts)), frozenset(scored))

    def keep(self, names: Sequence[str]) -> Plan:
        """The same plan with only these concepts: what is left after admission at step 0."""
        return replace(
            self,
            concepts=tuple(concept for concept in self.concepts if concept.name in names),
            on_domain=tuple(labelled for labelled in self.on_domain if labelled.name in names),
        )


def make_plan(config: InterpConfig, model: nn.Module, tokenizer: Any, *, train_dataset: Any, eval_dataset: Any) -> Plan:
    """Resolve hookpoints, draw audit texts and pairs, render packs, load directions.

    Raises:
        InterpError: the first thing that is wrong, naming the hookpoint, file or dataset.
    """
    tree = layout(model, layers=config.layers)
    hookpoints = tuple(point.name for point in resolve_hookpoints(config.hookpoints, tree))
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    limit = min(config.prompts.max_length, _context(tree) or config.prompts.max_length)
    data = _audit_data(config, train_dataset, eval_dataset)
    concepts, refused = [], []
    if config.concepts.pairs:
        concept, reason = _preference_concept(config, data, tokenizer, limit)
        concepts += [concept] if concept else []
        refused += [Refusal(PREFERENCE, "", reason)] if reason else []
    for name in config.concepts.packs:
        concept, refusal = _pack_concept(name, config, tokenizer, limit)
        concepts += [concept] if concept else []
        refused += [refusal] if refusal else []
    directions = _saved_directions(config, hookpoints, tree)
    _check_names([load_pack(name).name for name in config.concepts.packs], concepts, directions)
    tasks, control_task = _tasks(config, model, tokenizer, limit)
    has_head = tree.causal_lm.get_output_embeddings() is not None
    if config.concepts.behaviour and not has_head:
        refused.append(Refusal("behaviour", "", f"{tree.architecture} has no language-model head to score texts with"))
    return Plan(
        hookpoints=hookpoints,
        audit=_audit_prompts(config, data, tokenizer, limit, fitted=_fitted(concepts)),
        concepts=tuple(concepts),
        directions=directions,
        refused=tuple(refused),
        pad_token_id=_pad_token(tokenizer),
        skip_ids=no_content(tokenizer),
        max_length=limit,
        behaviour=config.concepts.behaviour and has_head,
        bank=_bank(config, tokenizer, limit) if concepts or directions else (),
        on_domain=_on_domain(config, tokenizer, limit, concepts),
        sealed=_sealed_probe(config, hookpoints, tree, tokenizer, concepts),
        tasks=tasks,
        control_task=control_task,
    )


def _tasks(config: InterpConfig, model: nn.Module, tokenizer: Any, limit: int) -> tuple[tuple[Task, ...], Task | None]:
    """The tasks whose circuits are followed and the control task, on a model whose wiring is understood."""
    wanted = config.circuits
    if not wanted.tasks:
        return (), None
    if partition_problem(model, layers=config.layers) is None:  # else refused when training begins; the rest goes on
        find_wiring(model, layers=config.layers)
    entries = (*wanted.tasks, *([] if wanted.control is None else [wanted.control]))
    tasks = [resolve_task(entry, tokenizer, n=wanted.pairs, seed=config.seed) for entry in entries]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"circuits: tasks and control: expected different names, found {', '.join(names)}")
    for task in tasks:
        if task.metric == "kl" and wanted.method == "eap":
            raise ConfigError(f"circuits: task {task.name!r}: metric kl has no gradient at the clean run, use eap-ig")
        if task.probe is not None:
            resolve_hookpoints([task.probe.hookpoint], layout(model, layers=config.layers))
        longest = max(task.pairs, key=lambda pair: pair.length)
        if longest.length > limit:
            found = f"pair {longest.id}: {longest.length} tokens"
            raise ConfigError(f"circuits: task {task.name!r}: {found}, expected at most {limit}")
    control = tasks.pop() if wanted.control is not None else None
    return tuple(tasks), control


@dataclass(frozen=True, slots=True)
class _Data:
    dataset: Any
    name: str
    source: Source


def _audit_data(config: InterpConfig, train_dataset: Any, eval_dataset: Any) -> _Data | None:
    """The dataset that texts are drawn from, the first of the wanted ones that the trainer has."""
    if isinstance(eval_dataset, Mapping):
        name, eval_dataset = next(iter(eval_dataset.items()), ("", None))
        evaluation = _Data(eval_dataset, f"eval_dataset[{name!r}]", "evaluation")
    else:
        evaluation = _Data(eval_dataset, "eval_dataset", "evaluation")
    training = _Data(train_dataset, "train_dataset", "training")
    wanted = {"evaluation": (evaluation,), "training": (training,)}.get(config.prompts.source, (evaluation, training))
    for data in wanted:
        if data.dataset is not None:
            if config.prompts.source != "named":
                check_drawable(data.dataset, data.name)
            return data
    return None


def _audit_prompts(
    config: InterpConfig, data: _Data | None, tokenizer: Any, limit: int, *, fitted: frozenset[str]
) -> PromptSet:
    settings = config.prompts
    if settings.source == "named":
        if settings.path is None:
            raise ConfigError("prompts.path: required with prompts.source: named, found none")
        audit = PromptSet.from_jsonl(settings.path, tokenizer, max_length=limit, n=settings.n)
    elif data is None:
        raise PromptError(f"prompts.source: {settings.source}: the trainer has no such dataset")
    else:
        audit = PromptSet.from_rows(
            draw_rows(
                data.dataset, tokenizer, n=settings.n, seed=config.seed, max_length=limit, name=data.name,
                leave_out=fitted,
            ),
            name=data.name,
            source=data.source,
        )  # fmt: skip
    units = len({prompt.unit for prompt in audit.prompts})
    if units < 8:
        beside = f" beside the {len(fitted)} that {PREFERENCE} is fitted on" if fitted else ""
        raise PromptError(f"{audit.name}: expected at least 8 different prompts to measure on, found {units}{beside}")
    for prompt in audit.prompts:
        content_tokens(prompt, settings.tokens, no_content(tokenizer))
    return audit


def _preference_concept(
    config: InterpConfig, data: _Data | None, tokenizer: Any, limit: int
) -> tuple[ConceptTexts | None, str]:
    """Pairs for the chosen − rejected direction, or the reason there is none."""
    if data is None:
        return None, "the trainer has no dataset to draw pairs from"
    if is_streaming(data.dataset):
        return None, f"no pairs can be drawn from {data.name}, a streaming dataset"
    columns = set(data.dataset[0])
    if not ({"chosen", "rejected"} <= columns or {"chosen_ids", "rejected_ids"} <= columns):
        return None, ""  # nothing was promised: this training has no pairs
    rows = draw_rows(
        data.dataset, tokenizer, n=config.concepts.n_pairs, seed=config.seed, max_length=limit, name=data.name
    )
    pairs = [row.pair for row in rows if row.pair is not None]
    fit, held = split(pairs, config.seed)
    if min(len({pair.group for pair in half}) for half in (fit, held)) < 8:
        prompts = len({pair.group for pair in pairs})
        return None, f"expected pairs of at least 16 prompts in {data.name}, found {len(pairs)} pairs of {prompts}"
    return ConceptTexts(PREFERENCE, data.source, fit, held), ""


def _fitted(concepts: Sequence[ConceptTexts]) -> frozenset[str]:
    """Sampling units of the training's own data that a direction is fitted on."""
    return frozenset(pair.group for concept in concepts if concept.name == PREFERENCE for pair in concept.fit)


def _pack_concept(
    name: str, config: InterpConfig, tokenizer: Any, limit: int
) -> tuple[ConceptTexts | None, Refusal | None]:
    pack = load_pack(name)
    if tokenizer is None:
        return None, Refusal(pack.name, "", "the trainer has no tokenizer to read the pack's texts with")
    pairs = render(pack, tokenizer, limit)
    if reason := _twice(pairs):
        return None, Refusal(pack.name, "", reason)
    fit, held = split(pairs, config.seed)
    if min(len(fit), len(held)) < 8:
        return None, Refusal(pack.name, "", f"only {len(pairs)} pairs fit into {limit} tokens, 16 are needed")
    return ConceptTexts(pack.name, "named", tuple(fit), tuple(held)), None


def _twice(pairs: Sequence[ContrastPair]) -> str:
    """Why pairs cannot be split by group: a text in two groups would be fitted on and read. Empty where they can."""
    place: dict[str, str] = {}
    for pair in pairs:
        for prompt in (pair.positive, pair.negative):
            if place.setdefault(prompt.id, pair.group) != pair.group:
                groups = f"{place[prompt.id]!r} and {pair.group!r}"
                return f"for this tokenizer the groups {groups} hold the same text (id {prompt.id})"
    return ""


def _bank(config: InterpConfig, tokenizer: Any, limit: int) -> tuple[ConceptTexts, ...]:
    """Unrelated concepts whose texts this tokenizer tells apart."""
    if not config.concepts.bank or tokenizer is None:
        return ()
    rendered = ((pack.name, render(pack, tokenizer, limit)) for pack in bank_packs(config.seed))
    return tuple(ConceptTexts(name, "named", pairs, ()) for name, pairs in rendered if len(pairs) >= 4)


def _on_domain(
    config: InterpConfig, tokenizer: Any, limit: int, concepts: Sequence[ConceptTexts]
) -> tuple[LabelledTexts, ...]:
    known = {concept.name for concept in concepts}
    for name in config.probes.on_domain:
        if name not in known:
            raise ConfigError(f"probes.on_domain: expected a concept that is read ({sorted(known)}), found {name!r}")
    return tuple(
        LabelledTexts.from_jsonl(path, tokenizer, name=name, max_length=limit)
        for name, path in config.probes.on_domain.items()
        if config.probes.enabled
    )


def _check_names(packs: Sequence[str], concepts: Sequence[ConceptTexts], directions: Sequence[Direction]) -> None:
    """Two readouts of one name at one hookpoint could not be told apart in any table."""
    named = [*packs, *(concept.name for concept in concepts if concept.name == PREFERENCE)]
    places = [(direction.name, direction.hookpoint) for direction in directions]
    twice = [name for i, name in enumerate(named) if name in named[:i]]
    twice += [name for i, (name, _) in enumerate(places) if name in named or places[i] in places[:i]]
    if twice:
        raise ConfigError(f"concepts: expected a name of its own for each pack and direction, found {twice[0]!r} twice")


def _saved_directions(config: InterpConfig, hookpoints: Sequence[str], tree: ModelLayout) -> tuple[Direction, ...]:
    directions = tuple(Direction.load(path) for path in config.concepts.directions)
    for path, direction in zip(config.concepts.directions, directions, strict=True):
        if direction.hookpoint not in hookpoints:
            raise ConfigError(
                f"concepts.directions: {path}: its hookpoint {direction.hookpoint} is not among the hookpoints read "
                f"({', '.join(hookpoints)})"
            )
        direction.check(tree.d_model)
    return directions


def _sealed_probe(
    config: InterpConfig,
    hookpoints: Sequence[str],
    tree: ModelLayout,
    tokenizer: Any,
    concepts: Sequence[ConceptTexts],
) -> LinearProbe | None:
    path = config.probes.sealed
    if path is None or not config.probes.enabled:
        return None
    probe = LinearProbe.load(path)
    for what, found, known in (
        ("hookpoint", probe.hookpoint, hookpoints),
        ("concept", probe.name, [concept.name for concept in concepts]),
    ):
        if found not in known:
            raise ConfigError(f"probes.sealed: {path}: its {what} {found} is not among those read ({', '.join(known)})")
    try:
        probe.check(tree.d_model, tokenizer_hash(tokenizer))
    except ConfigError as error:
        raise ConfigError(f"probes.sealed: {path}: {error}") from None
    return probe


def _context(tree: ModelLayout) -> int | None:
    settings = tree.causal_lm.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(getattr(settings, name, None), int):
            return getattr(settings, name)
    return None


def _pad_token(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0
