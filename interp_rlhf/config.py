"""The ``interp:`` block: frozen dataclasses, validated by pydantic, readable from YAML, mapping or preset."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from interp_rlhf.errors import ConfigError

_STRICT = ConfigDict(extra="forbid")
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]

#: Environment variable that keeps everything of ours out of a training when set to ``off``.
SWITCH = "INTERP_RLHF"

#: The packaged concept packs, in the order they are read.
PACKS: tuple[str, ...] = ("sycophancy", "refusal", "hedging", "politeness", "sentiment", "formality", "verbosity")


@dataclass(frozen=True, slots=True)
class PromptsConfig:
    """Which fixed texts are read.

    Attributes:
        source: ``auto`` draws from the evaluation data, else the training data; ``named`` reads ``path``.
        path: JSONL prompt file (see ``docs/formats.md``); required for streaming datasets.
        n: number of different prompts, drawn once with the run's seed; of a preference pair one side is read.
        max_length: tokens kept per text; longer completions are cut, a longer prompt is an error.
        batch_size: texts per forward pass of a measurement.
        tokens: which tokens enter the per-text mean; ``completion`` falls back to the prompt where there is none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    source: Literal["auto", "evaluation", "training", "named"] = "auto"
    path: str | None = None
    n: Annotated[int, Field(ge=8)] = 128
    max_length: Annotated[int, Field(ge=2)] = 512
    batch_size: Positive = 16
    tokens: Literal["completion", "prompt", "all"] = "completion"


@dataclass(frozen=True, slots=True)
class ConceptsConfig:
    """Which concept directions are fitted at step 0.

    Attributes:
        pairs: fit the chosen − rejected direction where the training data has pairs.
        n_pairs: preference pairs drawn (half for fitting, half for reading).
        packs: packaged pack names or paths of JSONL pack files.
        directions: paths of saved :class:`~interp_rlhf.Direction` files to read as they are.
        behaviour: also log the log-probability gap on held-out contrast pairs.
        refit: also refit each direction at every measurement (direction cosine).
        bank: also read, at step 0, a bank of unrelated concepts that drifts are compared with.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    pairs: bool = True
    n_pairs: Annotated[int, Field(ge=16)] = 128
    packs: tuple[str, ...] = PACKS
    directions: tuple[str, ...] = ()
    behaviour: bool = True
    refit: bool = True
    bank: bool = True


@dataclass(frozen=True, slots=True)
class ProbesConfig:
    """Linear probes of each concept, cross-fitted at step 0 and frozen.

    Attributes:
        enabled: fit and read them.
        folds: K; texts of one group of pairs are never split.
        fpr: false-positive rate at which recall is read; needs 10/fpr held-out negatives.
        refits: refits of step 0 with other folds, the band of ``probe/staleness``.
        sealed: path of a probe (``interp-rlhf fit probe``) that training never touches.
        on_domain: concept name → JSONL file of labelled texts of the training's own domain.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    enabled: bool = True
    folds: Annotated[int, Field(ge=2)] = 5
    fpr: Fraction = 0.2
    refits: Annotated[int, Field(ge=19)] = 20
    sealed: str | None = None
    on_domain: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RolloutsConfig:
    """Completions sampled from the policy on fixed prompts, for the shift decomposition.

    Attributes:
        enabled: ``auto`` samples where the trainer itself trains on sampled completions.
        prompts: how many of the audit prompts are continued.
        completions: K completions of each, sampled at temperature 1 with common random numbers.
        max_new_tokens: length at which a completion is cut.
        labels: dotted path of a function ``(prompts, completions) -> list[bool | None]`` (texts in, labels out).
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    enabled: Literal["auto"] | bool = "auto"
    prompts: Annotated[int, Field(ge=8)] = 32
    completions: Positive = 2
    max_new_tokens: Positive = 64
    labels: str | None = None


@dataclass(frozen=True, slots=True)
class CircuitsConfig:
    """Circuits: which connections between heads and MLPs carry a behaviour, and whether that changes.

    Attributes:
        tasks: built-in generators (``induction``, ``greater_than``, ``agreement``) or task files
            (``docs/formats.md``); none: circuits are not measured.
        control: a task, likewise, whose circuit the others are held against.
        pairs: clean/corrupt pairs that a generator makes, half to select circuits, half to run them.
        method: how edges are scored; ``eap-ig`` averages over ``steps`` points.
        steps: points of ``eap-ig``.
        ablation: what a corrupted component writes.
        size: share of all edges in a circuit; ``auto`` takes the fewest that are faithful at step 0.
        random: random circuits of that size, the null of faithfulness.
        every: cadence in optimizer steps; ``null``: with every measurement. Saves and the end always are.
        batch_size: pairs per pass.
        memory: MiB that attribution may take beyond the passes and one pass's compact activations.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    tasks: tuple[str, ...] = ()
    control: str | None = None
    pairs: Annotated[int, Field(ge=16)] = 64
    method: Literal["eap", "eap-ig"] = "eap-ig"
    steps: Positive = 5
    ablation: Literal["patching", "mean", "zero"] = "patching"
    size: Literal["auto"] | Fraction = "auto"
    random: Annotated[int, Field(ge=19)] = 20
    every: Positive | None = None
    batch_size: Positive = 16
    memory: Positive = 512


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """When to measure. Step 0 and the end always are; every save forces a measurement of the saved weights.

    Attributes:
        every: cadence in optimizer steps; in between only on steps that log anyway (rounds up).
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    every: Positive = 50


@dataclass(frozen=True, slots=True)
class StatisticsConfig:
    """Sizes and thresholds of the statistics (``docs/metrics.md`` holds the table).

    Attributes:
        bootstrap: paired bootstrap resamples over prompts.
        confidence: coverage of the intervals.
        directions: comparison directions drawn from the step-0 activation covariance.
        tolerance: δ, the standardised drift below which nothing is called moved (step-0 standard deviations).
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    bootstrap: Annotated[int, Field(ge=100)] = 1000
    confidence: Fraction = 0.95
    directions: Annotated[int, Field(ge=200)] = 256
    tolerance: Annotated[float, Field(ge=0)] = 0.1

    def __post_init__(self) -> None:
        if math.ceil(self.confidence * (self.directions + 1)) > self.directions:
            needed = math.ceil(self.confidence / (1 - self.confidence))
            raise ValueError(
                f"confidence {self.confidence} needs at least {needed} directions, found {self.directions}"
            )


@dataclass(frozen=True, slots=True)
class SnapshotsConfig:
    """What is kept on disk.

    Attributes:
        enabled: write snapshots (the timeline is always written).
        keep: keep the tensors of this many newest snapshots besides each start; ``None`` keeps all. Manifests stay.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    enabled: bool = True
    keep: Positive | None = None


@dataclass(frozen=True, slots=True)
class InterpConfig:
    """Everything ``attach`` can be told. The defaults are the packaged preset ``observe``.

    Attributes:
        control: number of a control run: the same training without its preferences, written to ``_controls/NN``.
        control_within: a data column; a control run swaps as many pairs in each of its values.
        hookpoints: where to read; ``layers.50%.resid_post`` is a fractional depth.
        layers: path of the decoder layers inside the model, for architectures that are not recognised.
        representation: log representation metrics (CKA, cosine, norm ratio, effective rank).
        components: split each concept's drift among heads and MLPs: ``auto`` at saves and at the end of training, true
            with every measurement; on an architecture that is not supported neither, with the reason.
        causal: at the end, the share of a concept's change of behaviour that goes through its direction: ``auto`` for
            drifts that stand out from comparable directions, true for all that moved; three concepts at most.
        reference: how readings of the frozen start are had: ``auto`` caches them at step 0.
        headline: at most this many scalars go to the trainer's log per measurement.
        on_error: a failed measurement warns, or raises and ends the run.
        seed: seeds drawing, splitting, bootstrap and comparison directions.
        report: write ``report.html`` at the end of training where the ``report`` extra is installed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    control: Annotated[int, Field(gt=0, le=9999, strict=True)] | None = None
    control_within: str | None = None
    hookpoints: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "layers.25%.resid_post",
        "layers.50%.resid_post",
        "layers.75%.resid_post",
        "layers.100%.resid_post",
    )
    layers: str | None = None
    representation: bool = True
    components: Literal["auto"] | bool = "auto"
    causal: Literal["auto"] | bool = "auto"
    reference: Literal["auto", "cached", "adapter", "ref_model", "copy"] = "auto"
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    concepts: ConceptsConfig = field(default_factory=ConceptsConfig)
    probes: ProbesConfig = field(default_factory=ProbesConfig)
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)
    circuits: CircuitsConfig = field(default_factory=CircuitsConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    snapshots: SnapshotsConfig = field(default_factory=SnapshotsConfig)
    headline: Annotated[int, Field(ge=0, le=50)] = 50
    on_error: Literal["warn", "raise"] = "warn"
    seed: Annotated[int, Field(ge=0)] = 0
    report: bool = True

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], *, where: str = "interp config") -> Self:
        """Validate a plain mapping. With an ``interp:`` key at the top, its content; keys beside it are TRL's.

        Raises:
            ConfigError: names ``where``, the field's path, what was found and what was expected.
        """
        block = mapping.get("interp", mapping)
        if not isinstance(block, Mapping):
            raise ConfigError(f"{where}: expected a mapping of settings, found {type(block).__name__}")
        try:
            return _adapter(cls).validate_python(dict(block))
        except ValidationError as error:
            raise ConfigError(f"{where}: {_first_problem(error)}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file holding the block itself or a complete run with an ``interp:`` key.

        Raises:
            ConfigError: the file is missing, not YAML, or holds an invalid setting.
        """
        path = Path(path)
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
        if loaded is None:
            loaded = {}
        if not isinstance(loaded, Mapping):
            raise ConfigError(f"{path}: expected a mapping of settings, found {type(loaded).__name__}")
        return cls.from_mapping(loaded, where=str(path))

    @classmethod
    def preset(cls, name: str = "observe") -> Self:
        """A packaged preset by name.

        Raises:
            ConfigError: no such preset; the message lists those that exist.
        """
        folder = resources.files("interp_rlhf") / "presets"
        names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        if name not in names:
            raise ConfigError(f"preset {name!r} does not exist; found {', '.join(names)}")
        return cls.from_mapping(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")), where=name)

    @classmethod
    def resolve(cls, config: InterpConfig | Mapping[str, Any] | str | Path | None) -> InterpConfig:
        """What ``attach`` accepts: nothing (preset ``observe``), a path, a preset's name, a mapping, or a config."""
        if config is None:
            return cls.preset()
        if isinstance(config, InterpConfig):
            return config
        if isinstance(config, Mapping):
            return cls.from_mapping(config)
        if isinstance(config, str | Path):
            is_name = isinstance(config, str) and not config.endswith((".yaml", ".yml")) and "/" not in config
            return cls.preset(str(config)) if is_name else cls.from_yaml(config)
        raise ConfigError(f"config: expected a path, a mapping or an InterpConfig, found {type(config).__name__}")

    def as_mapping(self) -> dict[str, Any]:
        """The config as JSON-ready nested mappings; ``from_mapping`` of it gives an equal config."""
        return _adapter(type(self)).dump_python(self, mode="json")


def switched_off() -> bool:
    """Whether the environment says ``off``.

    Raises:
        ConfigError: the variable holds another word than ``on`` or ``off``.
    """
    word = os.environ.get(SWITCH, "").strip().lower()
    if word not in ("", "on", "off"):
        raise ConfigError(f"{SWITCH}: expected on or off in the environment, found {word!r}")
    return word == "off"


@cache
def _adapter(cls: type[InterpConfig]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"]) or "the whole block"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {place!r}{more}"
    return f"{place}: {problem['msg']}, found {problem.get('input')!r}{more}"
