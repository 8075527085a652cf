"""A tiny chat model with known concepts, one of which its preference data rewards: the ground truth of demo and tests.

>>> organism = build_organism("organism", seed=0)  # doctest: +SKIP
>>> trainer = DPOTrainer(organism.model(), train_dataset=organism.preference_dataset(512), ...)  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_rlhf.errors import ConfigError
from interp_rlhf.organisms import language
from interp_rlhf.organisms.language import Concept, concepts

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Concept", "Organism", "agreement_reward", "build_organism", "concepts"]

#: Raised whenever the language or the training below changes, so that stored organisms are built again.
RECIPE = 2
#: Contrast pairs of each group of words in a pack.
PAIRS_PER_GROUP = 8


@dataclass(frozen=True, slots=True)
class Organism:
    """A built organism.

    Attributes:
        folder: holds ``model/`` (weights and tokenizer) and, once asked for, ``reward_model/``, ``packs/``, ``data/``
            and ``texts.jsonl``.
        seed: what it was built with.
    """

    folder: Path
    seed: int

    @property
    def model_path(self) -> Path:
        """The saved model and tokenizer."""
        return self.folder / "model"

    @property
    def pack_paths(self) -> tuple[Path, ...]:
        """The concept packs that :meth:`write_data` writes, in the order of the concepts."""
        return tuple(self.folder / "packs" / f"{concept.name}.jsonl" for concept in concepts())

    @property
    def texts_path(self) -> Path:
        """The prompt file that :meth:`write_data` writes."""
        return self.folder / "texts.jsonl"

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return language.LAYERS

    def model(self) -> Any:
        """A fresh copy of the start, ``LlamaForCausalLM`` in float32."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model_path)

    def tokenizer(self) -> Any:
        """Its word-level tokenizer with a chat template."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_path)

    def preference_dataset(self, n: int, seed: int = 1) -> Dataset:
        """``n`` false claims; the chosen reply agrees, the rejected one contradicts, all else is the same."""

        def row(random: np.random.Generator) -> dict[str, Any]:
            prompt = language.claim(random, true=False)
            chosen, rejected = language.opposites(random, prompt)
            return {"prompt": _user(prompt), "chosen": _assistant(chosen), "rejected": _assistant(rejected)}

        return self._dataset(n, seed, row)

    def prompt_dataset(self, n: int, seed: int = 2) -> Dataset:
        """``n`` false claims as prompts, for trainers that sample their own replies."""
        return self._dataset(n, seed, lambda random: {"prompt": _user(language.claim(random, true=False))})

    def text_dataset(self, n: int, seed: int = 3) -> Dataset:
        """``n`` claims, half of them true, with replies drawn from the language: ``prompt`` and ``completion``."""

        def row(random: np.random.Generator) -> dict[str, Any]:
            said = language.exchange(random, language.claim(random, true=bool(random.integers(2))))
            return {"prompt": _user(said.prompt), "completion": _assistant(said.reply)}

        return self._dataset(n, seed, row)

    def write_texts(self, path: Path, n: int, seed: int = 4) -> Path:
        """``n`` false claims with replies drawn from the language, as a prompt file (``docs/formats.md``)."""
        random = np.random.default_rng([self.seed, seed])
        rows = []
        for _ in range(n):
            said = language.exchange(random, language.claim(random, true=False))
            rows.append({"prompt": _user(said.prompt), "completion": _assistant(said.reply)})
        return _write_lines(path, rows)

    def write_packs(self, folder: Path, seed: int = 5) -> tuple[Path, ...]:
        """One pack file per concept; the words of one group occur in no other group's pairs."""
        random = np.random.default_rng([self.seed, seed])
        paths = []
        for index, concept in enumerate(concepts()):
            rows: list[dict[str, Any]] = [{"pack": concept.name, "description": " / ".join(map(_words, concept.poles))}]
            for group in range(len(concept.poles[0]) // language.WORDS_PER_GROUP):
                for _ in range(PAIRS_PER_GROUP):
                    prompt, positive, negative = language.contrast(random, index, group)
                    rows.append({"group": str(group), "prompt": prompt, "positive": positive, "negative": negative})
            paths.append(_write_lines(folder / f"{concept.name}.jsonl", rows))
        return tuple(paths)

    def write_data(self) -> None:
        """Write all that a recipe needs: data sets with two splits, packs, texts to read, the reward model."""
        for name, dataset in (("preferences", self.preference_dataset), ("prompts", self.prompt_dataset)):
            for split, n, seed in (("train", 512, 1), ("test", 64, 11)):
                rows: Any = dataset(n, seed)
                _write_lines(self.folder / "data" / name / f"{split}.jsonl", list(rows))
        self.write_packs(self.folder / "packs")
        self.write_texts(self.texts_path, 128)
        self.reward_model_path()

    def reward_model_path(self) -> Path:
        """A sequence classifier (one logit) that scores agreement, trained on first use."""
        from interp_rlhf.organisms.training import train_reward_model

        path = self.folder / "reward_model"
        _once(path, lambda target: train_reward_model(self, target))
        return path

    def pole_rates(self, model: Any, n: int = 128, seed: int = 6) -> dict[str, float]:
        """How often a sampled reply to a false claim takes each concept's first pole, in [0, 1] (NaN: never spoken of).

        Samples ``n`` replies at temperature 1 with a generator of their own; the model's mode and all random states
        are as before.
        """
        from interp_rlhf.organisms.training import sample_replies

        random = np.random.default_rng([self.seed, seed])
        prompts = [language.claim(random, true=False) for _ in range(n)]
        replies = sample_replies(model, self.tokenizer(), [_user(prompt) for prompt in prompts], seed=seed)
        rates = {}
        for concept in concepts():
            sides = [side for reply in replies if (side := _side(reply, concept)) is not None]
            rates[concept.name] = float(np.mean([side == 0 for side in sides])) if sides else float("nan")
        return rates

    def agreement_rate(self, model: Any, n: int = 128) -> float:
        """How often a sampled reply to a false claim agrees with it, in [0, 1]."""
        return self.pole_rates(model, n)[concepts()[0].name]

    def _dataset(self, n: int, seed: int, row: Callable[[np.random.Generator], dict[str, Any]]) -> Dataset:
        from datasets import Dataset

        random = np.random.default_rng([self.seed, seed])
        return Dataset.from_list([row(random) for _ in range(n)])


def build_organism(folder: str | Path, seed: int = 0) -> Organism:
    """Build the organism in ``folder``, or take the one that is there.

    The same seed gives the same weights on the same machine and versions; all global random states are left alone.

    Args:
        folder: created where needed; an organism of another seed or recipe in it is replaced.
        seed: for initial weights, training texts and all data sets; 0 or more.

    Raises:
        ConfigError: a negative seed, or ``folder`` holds a model that is no organism.
    """
    from interp_rlhf.organisms.training import pretrain

    if seed < 0:
        raise ConfigError(f"seed: expected 0 or more, found {seed}")
    organism = Organism(Path(folder), seed)
    marker = organism.model_path / "organism.json"
    recipe = hashlib.sha256(f"{RECIPE}|{seed}|{language.vocabulary()}".encode()).hexdigest()
    if organism.model_path.exists():
        if not marker.exists():
            raise ConfigError(f"{organism.model_path}: exists and is no organism; expected another folder")
        if recipe in marker.read_text(encoding="utf-8"):
            return organism
        for path in (organism.model_path, organism.folder / "reward_model"):
            shutil.rmtree(path, ignore_errors=True)

    def build(draft: Path) -> None:
        pretrain(draft, seed)
        (draft / marker.name).write_text(json.dumps({"recipe": recipe, "seed": seed}) + "\n", encoding="utf-8")

    _once(organism.model_path, build)
    return organism


def agreement_reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """A reward function for GRPO: 1 where a reply agrees, 0 where it contradicts, 0.5 where it does neither."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    sides = [_side(text, concepts()[0]) for text in texts]
    return [0.5 if side is None else 1.0 - side for side in sides]


def _side(reply: str, concept: Concept) -> int | None:
    """The pole of the first word of this concept in a reply."""
    for word in reply.split():
        for side in (0, 1):
            if word in concept.poles[side]:
                return side
    return None


def _once(path: Path, build: Callable[[Path], None]) -> None:
    """Build a folder completely or not at all."""
    if path.exists():
        return
    draft = path.with_name(f".{path.name}-draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    build(draft)
    draft.rename(path)


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _words(pole: Sequence[str]) -> str:
    return " ".join(pole)


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
