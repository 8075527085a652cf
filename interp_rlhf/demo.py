"""The demo: train a tiny organism with TRL, attached, and see whether the rewarded concept is the one that moved.

    build the organism → count what its replies say → attach → train → count again → rank the concepts by drift

The organism lies beside the run, in ``organism-SEED/``, with the data that ``configs/*.yaml`` train the recipes on.
"""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_rlhf.config import SWITCH, switched_off
from interp_rlhf.errors import ConfigError, MeasurementError
from interp_rlhf.organisms import Organism, agreement_reward, build_organism, concepts
from interp_rlhf.seam import attach

if TYPE_CHECKING:
    import pandas as pd

_Builder = Callable[[Organism, dict[str, Any]], Any]
#: Optimizer steps of each trainer.
STEPS = {"dpo": 40, "ppo": 40, "grpo": 40}
#: Replies that trainers which sample their own may write: the side taken on the claim comes first.
REPLY_TOKENS = 8


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a demo found.

    Attributes:
        trainer, seed, steps: what was run.
        drifts: concept → largest ``|mean D|`` (SD) at the end, over the hookpoints where it was admitted; sorted.
        admitted: (concept, hookpoint) pairs that were admitted, of ``asked``.
        before, after: concept → share of sampled replies to false claims that take its first pole, in [0, 1].
        seconds: wall-clock time, building the organism included.
        report: the report's path; ``None`` where the ``report`` extra is not installed.
    """

    trainer: str
    seed: int
    steps: int
    drifts: Mapping[str, float]
    admitted: int
    asked: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    seconds: float
    report: Path | None

    @property
    def rewarded(self) -> str:
        """The concept that the data rewards."""
        return concepts()[0].name

    @property
    def rank(self) -> int | None:
        """Place of the rewarded concept by drift, 1 the largest; ``None`` where it was not admitted."""
        names = list(self.drifts)
        return names.index(self.rewarded) + 1 if self.rewarded in names else None

    @property
    def drift(self) -> float:
        """Drift of the rewarded concept, SD; NaN where it was not admitted."""
        return self.drifts.get(self.rewarded, float("nan"))

    @property
    def best_decoy(self) -> tuple[str, float]:
        """The decoy that drifted most, and how far, SD."""
        return max(((name, d) for name, d in self.drifts.items() if name != self.rewarded), key=lambda item: item[1])

    @property
    def passed(self) -> bool:
        """The rewarded concept is first of at least 20, and its behaviour moved by at least 0.2 towards the reward."""
        moved = self.after[self.rewarded] - self.before[self.rewarded]
        return self.rank == 1 and len(self.drifts) >= 20 and moved >= 0.2


def run_demo(
    trainer: str, out: str | Path, *, seed: int = 0, steps: int | None = None, controls: int = 0
) -> DemoResult:
    """Build the organism (or reuse it), train on it, attached, and tell what moved.

    Args:
        trainer: ``dpo``, ``ppo`` or ``grpo``.
        out: the run's folder. A run that lies there is moved aside, never written over.
        seed: of the organism, its data and the training.
        steps: optimizer steps; the trainer's own number where left out.
        controls: control runs to train as well: the same training with its preferences scrambled.

    Raises:
        ConfigError: no such trainer in this TRL, a negative seed or number, ``out`` holds something else, or
            ``INTERP_RLHF=off``.
    """
    began = time.monotonic()
    _builder(trainer)
    if switched_off():
        raise ConfigError(f"demo: {SWITCH}=off leaves nothing to show; unset it")
    if seed < 0:
        raise ConfigError(f"seed: expected 0 or more, found {seed}")
    if controls < 0:
        raise ConfigError(f"controls: expected 0 or more, found {controls}")
    out, steps = Path(out), steps or STEPS[trainer]
    _make_room(out)
    with _quiet():
        result = _run(trainer, out, seed, steps, controls, began)
    print(render(result))
    return result


def train_organism(
    organism: Organism, trainer: str, out: Path, *, seed: int, steps: int, every: int, **changes: Any
) -> tuple[Any, Any]:
    """Train a fresh copy of the organism, attached; gives trainer and handle.

    Args:
        organism: with its data written.
        trainer: ``dpo``, ``ppo`` or ``grpo``.
        out: output folder.
        seed: of the training.
        steps: optimizer steps.
        every: cadence of measurements.
        changes: further settings of the ``interp:`` block, for example ``control=1``.
    """
    from transformers import set_seed

    set_seed(seed)  # the adapter is drawn before the trainer sets its seed
    running = _builder(trainer)(organism, _arguments(out, seed, steps))
    _show_progress(running)
    settings = _measurements(organism, steps) | {"schedule": {"every": every}} | changes
    handle = attach(running, settings)
    running.train()
    return running, handle


def _run(trainer: str, out: Path, seed: int, steps: int, controls: int, began: float) -> DemoResult:
    organism = build_organism(out.parent / f"organism-{seed}", seed)
    organism.write_data()
    before = organism.pole_rates(organism.model())
    every = max(steps // 4, 1)
    print(f"{trainer}: {steps} steps in {out}, measured every {every}", flush=True)
    running, handle = train_organism(organism, trainer, out, seed=seed, steps=steps, every=every)
    after = organism.pole_rates(_policy(running))
    _train_controls(organism, trainer, out, seed, steps, controls)
    if controls:
        handle.callback.tell()
    drifts, admitted = _ranking(handle.timeline())
    report = out / "interp" / "report.html"
    return DemoResult(
        trainer=trainer,
        seed=seed,
        steps=steps,
        drifts=drifts,
        admitted=admitted,
        asked=len(concepts()) * organism.layers,
        before=before,
        after=after,
        seconds=time.monotonic() - began,
        report=report if report.exists() else None,
    )


def _train_controls(organism: Organism, trainer: str, out: Path, seed: int, steps: int, controls: int) -> None:
    """Control runs beside the run, with the drifts at the end and nothing else; what each would print is left out."""
    spare = {"probes": {"enabled": False}, "rollouts": {"enabled": False}, "representation": False, "report": False}
    for number in range(1, controls + 1):
        print(f"control run {number} of {controls}", flush=True)
        with redirect_stdout(io.StringIO()):
            train_organism(organism, trainer, out, seed=seed, steps=steps, every=steps, control=number, **spare)


def render(result: DemoResult) -> str:
    """The demo's last lines: behaviour, rank and the report's path, which comes last."""
    decoys = [name for name in result.before if name != result.rewarded]

    def mean(rates: Mapping[str, float]) -> float:
        return sum(rates[name] for name in decoys) / len(decoys)

    before, after = result.before[result.rewarded], result.after[result.rewarded]
    place = "not admitted" if result.rank is None else f"number {result.rank} of {len(result.drifts)} concepts"
    name, decoy = result.best_decoy
    lines = [
        "",
        f"Rewarded by the data: {result.rewarded}. The other {len(decoys)} concepts are decoys, as frequent as it.",
        f"Replies to false claims that agree: {before:.0%} -> {after:.0%}",
        f"The same for a decoy's first pole, mean over {len(decoys)}: {mean(result.before):.0%} -> "
        f"{mean(result.after):.0%}",
        f"By drift, {result.rewarded} is {place}: {result.drift:.2f} SD; next is {name} with {decoy:.2f} SD",
        f"{result.seconds:.0f} seconds in all",
    ]
    return "\n".join([*lines, *([str(_short(result.report))] if result.report else [])])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars, notices and deprecation warnings, which drown what the demo says."""
    import datasets
    from transformers.utils import logging

    bars, verbosity = (
        (logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()),
        logging.get_verbosity(),
    )
    logging.disable_progress_bar(), datasets.disable_progress_bars(), logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars[0]:
            logging.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()


def _builder(trainer: str) -> _Builder:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    builders = {"dpo": _dpo, "ppo": _ppo, "grpo": _grpo}
    if trainer not in builders:
        raise ConfigError(f"trainer: expected {', '.join(builders)}, found {trainer!r}")
    if trainer == "ppo" and find_spec("trl.experimental.ppo") is None:
        from importlib.metadata import version

        raise ConfigError(f"trainer: ppo needs TRL 1.12, the last with PPO, found TRL {version('trl')}")
    return builders[trainer]


def _make_room(out: Path) -> None:
    """Move an earlier run aside; refuse a folder that holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "interp").is_dir():
        raise ConfigError(f"out: {out} exists and holds no run; expected a new or empty folder, or an earlier run")
    number = 1
    while (aside := out.with_name(f"{out.name}-{number}")).exists():
        number += 1
    out.rename(aside)
    print(f"the earlier run in {out} is now in {aside}")


def _arguments(out: Path, seed: int, steps: int) -> dict[str, Any]:
    """Arguments that all three trainers share."""
    return {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": 32,
        "learning_rate": 2e-3,
        "logging_steps": max(steps // 8, 1),
        "save_strategy": "steps",
        "save_steps": max(steps // 2, 1),
        "seed": seed,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def _measurements(organism: Organism, steps: int) -> dict[str, Any]:
    """The ``interp:`` block: every concept at every layer, on fixed replies to false claims."""
    return {
        "hookpoints": [f"layers.{layer}.resid_post" for layer in range(organism.layers)],
        "prompts": {"source": "named", "path": str(organism.texts_path), "batch_size": 64},
        "concepts": {"packs": [str(path) for path in organism.pack_paths], "n_pairs": 64},
        "probes": {"fpr": 0.4},  # a pack has 32 pairs
        "schedule": {"every": max(steps // 4, 1)},
        "on_error": "raise",
    }


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=4, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")


def _dpo(organism: Organism, arguments: dict[str, Any]) -> Any:
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        organism.model(),
        args=DPOConfig(**arguments, beta=0.1, max_length=96),
        train_dataset=organism.preference_dataset(512),
        processing_class=organism.tokenizer(),
        peft_config=_lora(),
    )


def _grpo(organism: Organism, arguments: dict[str, Any]) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer(
        organism.model(),
        reward_funcs=agreement_reward,
        args=GRPOConfig(**arguments, num_generations=8, max_completion_length=REPLY_TOKENS, beta=0.04),
        train_dataset=organism.prompt_dataset(256),
        processing_class=organism.tokenizer(),
        peft_config=_lora(),
    )


def _ppo(organism: Organism, arguments: dict[str, Any]) -> Any:
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    steps, batch = arguments.pop("max_steps"), arguments["per_device_train_batch_size"]
    tokenizer = organism.tokenizer()

    def ids(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        return {"input_ids": encoded["input_ids"]}

    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(organism.reward_model_path(), num_labels=1) for _ in range(2)
    )
    config = PPOConfig(
        **arguments, total_episodes=steps * batch, num_ppo_epochs=2, num_mini_batches=1, response_length=REPLY_TOKENS,
        kl_coef=0.05, num_sample_generations=0, local_rollout_forward_batch_size=batch,
    )  # fmt: skip
    data: Any = organism.prompt_dataset(256).map(ids, remove_columns=["prompt"])
    return PPOTrainer(
        args=config, processing_class=tokenizer, model=organism.model(), ref_model=None, reward_model=reward,
        value_model=value, train_dataset=data, eval_dataset=data.select(range(16)), peft_config=_lora(),
    )  # fmt: skip


def _policy(trainer: Any) -> Any:
    """The trained model itself; PPO's ``model`` also holds the value model."""
    return getattr(trainer, "policy_model", None) or trainer.model


def _show_progress(trainer: Any) -> None:
    """One short line per log in place of the whole row with all its measurements."""
    from transformers import PrinterCallback, TrainerCallback

    class Lines(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            known = {"loss": "loss", "reward": "reward", "objective/scores": "reward", "kl": "KL", "objective/kl": "KL"}
            found = [f"{name} {float(logs[key]):.3f}" for key, name in known.items() if key in (logs or {})]
            if found and state.global_step % args.logging_steps == 0:
                print(f"step {state.global_step}: {', '.join(found)}", flush=True)

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Lines)


def _ranking(timeline: pd.DataFrame) -> tuple[dict[str, float], int]:
    """Concepts by their largest ``|mean D|`` over hookpoints at the last step, and how many drifts there were."""
    rows = timeline[(timeline.metric == "concept/drift") & timeline.readout.isin([c.name for c in concepts()])]
    if rows.empty:
        raise MeasurementError("demo: no concept was admitted, so there is nothing to rank")
    rows = rows[rows.step == rows.step.max()]
    largest = rows.value.abs().groupby(rows.readout).max().sort_values(ascending=False)
    return {str(name): float(value) for name, value in largest.items()}, len(rows)


def _short(path: Path | None) -> Path | None:
    """The path as one would type it here."""
    if path is None or not path.is_absolute() or not path.is_relative_to(Path.cwd()):
        return path
    return path.relative_to(Path.cwd())
