"""The one place that touches a trainer: attach, detach, and the class with ``InterpMixin`` in front.

Checked on TRL 1.12.0 and 1.16.0 with transformers 5.23.0. Only public names are used: ``add_callback``,
``remove_callback``, ``log``, ``state``, ``args``, ``model``, ``train_dataset``, ``eval_dataset``, ``processing_class``.
The exception is :func:`_permute_rewards`, for control runs of trainers that compute rewards as they go.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from interp_rlhf.activations.engines import unchanged_random_states
from interp_rlhf.callback import InterpCallback
from interp_rlhf.config import SWITCH, InterpConfig, switched_off
from interp_rlhf.controls import (
    Control,
    control_folder,
    is_control_folder,
    permute_groups,
    reward_generator,
    scramble_data,
)
from interp_rlhf.errors import ConfigError, InterpError
from interp_rlhf.provenance import describe_reward, training_info

if TYPE_CHECKING:
    import pandas as pd
    from transformers import Trainer

    from interp_rlhf.report.tables import Summary

Config = InterpConfig | Mapping[str, Any] | str | Path | None


class InterpMixin:
    """Merges the rows of a due measurement into the trainer's own log row, for every trainer alike.

    Put in front of a trainer class by :func:`attach` (on the instance) or :func:`with_interp` (on the class).
    """

    interp: Handle

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Measure if this row is due, add the headline scalars to it, and log as the trainer would.

        The caller's mapping gets them only while it is being logged: what ``train()`` returns stays the trainer's own.
        """
        handle = self.__dict__.get("interp")  # absent once detached, without a callback under INTERP_RLHF=off
        pending = handle.callback.before_log(logs, self.state) if isinstance(handle, Handle) else {}  # type: ignore[attr-defined]
        logs.update(pending)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
        for key in pending:
            del logs[key]


class Handle:
    """What ``attach`` returns: a view on the measurements so far, and the way back.

    Attributes:
        callback: the attached :class:`~interp_rlhf.InterpCallback`.
    """

    def __init__(self, trainer: Trainer, callback: InterpCallback, undo: ExitStack) -> None:
        self.callback = callback
        self._trainer: Trainer | None = trainer
        self._undo = undo

    def timeline(self) -> pd.DataFrame:
        """Measurement rows so far, one per line of ``docs/metrics.md``'s metrics (empty before training)."""
        return self.callback.timeline()

    def summary(self) -> Summary:
        """What moved, what did not, and what could not be measured; ``print`` it to read it."""
        return self.callback.summary()

    def detach(self) -> None:
        """Give the trainer back exactly as it was: class, callbacks and attributes. A second call does nothing."""
        trainer, self._trainer = self._trainer, None
        if trainer is None:
            return
        trainer.remove_callback(self.callback)
        self._undo.close()
        original = type(trainer).__dict__.get("_interp_original")
        if original is not None:
            trainer.__class__ = original
        del cast(InterpMixin, trainer).interp


class DetachedHandle:
    """The handle of an ``attach`` that was switched off: every question has an empty answer."""

    def timeline(self) -> pd.DataFrame:
        """An empty timeline."""
        from interp_rlhf.audit.timeline import to_frame

        return to_frame([])

    def summary(self) -> str:
        """One line that says why there is nothing."""
        return f"interp_rlhf is off ({SWITCH}=off)"

    def detach(self) -> None:
        """Nothing was attached."""


def attach(trainer: Trainer, config: Config = None) -> Handle | DetachedHandle:
    """Attach to a trainer in one line; training itself stays bit-identical.

    Args:
        trainer: any ``transformers.Trainer``, TRL's included, after construction and before ``train()``.
        config: nothing (preset ``observe``), a YAML path, a preset's name, a mapping, or an :class:`InterpConfig`.
            With ``control: N`` in it this becomes control run N: its preferences are scrambled, and its output folder
            becomes ``_controls/NN`` in that of the real run.

    Returns:
        A handle with ``timeline()``, ``summary()`` and ``detach()``. With ``INTERP_RLHF=off`` in the environment the
        trainer is left alone, one line says so, and the handle is empty.

    Raises:
        InterpError: a wrong setting, hookpoint, file or dataset; the trainer is then untouched.
    """
    settings = InterpConfig.resolve(config)
    if switched_off():
        if settings.control is not None:
            raise ConfigError(f"control: {settings.control} with {SWITCH}=off would train on the real preferences")
        print(f"interp_rlhf: off ({SWITCH}=off), the trainer is left as it is")
        return DetachedHandle()
    _check(trainer, settings)
    callback = InterpCallback(settings)
    callback.prepare(
        model=cast(nn.Module, trainer.model),
        tokenizer=trainer.processing_class,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        args=trainer.args,
        ref_model=getattr(trainer, "ref_model", None),
        samples=_names(trainer) & _SAMPLE != set(),
    )
    undo = ExitStack()
    with unchanged_random_states():
        callback.training = training_info(trainer.train_dataset, _rewards(trainer))
    if settings.control is not None:
        callback.control = _make_control(trainer, settings, undo)
    callback.rows_reach_the_log = True
    callback.trainer_class = type(trainer).__name__
    if not isinstance(trainer, InterpMixin):
        trainer.__class__ = _with_mixin(type(trainer), _interp_original=type(trainer))
    trainer.add_callback(callback)
    handle = cast(InterpMixin, trainer).interp = Handle(trainer, callback, undo)
    return handle


def _check(trainer: Trainer, settings: InterpConfig) -> None:
    """Refuse trainers that cannot be attached to."""
    if isinstance(trainer.__dict__.get("interp"), Handle):
        raise InterpError(f"attach: this {type(trainer).__name__} is attached already; call handle.detach() first")
    if any(isinstance(other, InterpCallback) for other in trainer.callback_handler.callbacks):
        raise InterpError(
            f"attach: this {type(trainer).__name__} has an InterpCallback already, which would write twice"
        )
    if trainer.model is None:
        raise InterpError(f"attach: this {type(trainer).__name__} has no model")
    if settings.control is None and is_control_folder(str(trainer.args.output_dir)):
        raise ConfigError(
            f"output_dir: {trainer.args.output_dir} is a control run's, and this run has no control number; its "
            "arguments were used for a control run before: give it new ones"
        )


def with_interp(cls: type, config: Config = None) -> type:
    """The trainer class with measurements attached to every instance: ``with_interp(DPOTrainer)(model, args=…)``.

    Args:
        cls: a ``transformers.Trainer`` class.
        config: as for :func:`attach`; instances carry their handle as ``trainer.interp``.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        self.interp = attach(self, config)

    return _with_mixin(cls, __init__=__init__)


def _with_mixin(cls: type, **namespace: Any) -> type:
    return type(f"Interp{cls.__name__}", (InterpMixin, cls), {"__module__": cls.__module__, **namespace})


# -- control runs ------------------------------------------------------------------------------------------------------

#: Trainers that train on completions of the policy at hand.
_SAMPLE = frozenset({"GRPOTrainer", "RLOOTrainer", "PPOTrainer", "OnlineDPOTrainer"})


def _names(trainer: Trainer) -> set[str]:
    return {cls.__name__ for cls in type(trainer).__mro__}


def _make_control(trainer: Trainer, settings: InterpConfig, undo: ExitStack) -> Control:
    """Scramble what the trainer learns from and lead its files elsewhere; ``undo`` puts both back.

    Raises:
        ConfigError: nothing that could be scrambled; the trainer is untouched then.
    """
    number, seed = cast(int, settings.control), settings.seed
    found = None
    if not _names(trainer) & _SAMPLE:
        with unchanged_random_states():
            found = scramble_data(trainer.train_dataset, number, seed=seed, within=settings.control_within)
    if found is not None:
        data, control = found
        undo.callback(setattr, trainer, "train_dataset", trainer.train_dataset)
        trainer.train_dataset = data
    elif settings.control_within is not None:
        raise ConfigError(
            f"control_within: {settings.control_within} means nothing where rewards are permuted in groups"
        )
    else:
        _permute_rewards(trainer, number, seed, undo)
        control = Control(number, "rewards permuted")
    args: Any = trainer.args
    for name, value in (
        ("run_name", _control_name(args, number)),
        ("push_to_hub", False),
        ("output_dir", str(control_folder(args.output_dir, number))),
    ):
        undo.callback(setattr, args, name, getattr(args, name))
        setattr(args, name, value)
    if args.should_save:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return control


def _control_name(args: Any, number: int) -> str:
    name = re.sub(r"-control-\d+$", "", args.run_name or "") or control_folder(args.output_dir, number).parents[1].name
    return f"{name}-control-{number:02d}"


def _rewards(trainer: Any) -> list[str]:
    """Names of what the trainer is rewarded by, functions with a hash of their code."""
    named = vars(trainer)
    found = named.get("reward_funcs") or [named[key] for key in ("reward_model", "judge") if named.get(key) is not None]
    return [describe_reward(reward) for reward in (found if isinstance(found, list | tuple) else [found])]


def _permute_rewards(trainer: Any, number: int, seed: int, undo: ExitStack) -> None:
    """Let every completion be trained on the reward of another one: of its group, with PPO of its batch.

    The places are private or internal to TRL, the same in 1.12.0 and 1.16.0: ``_calculate_rewards`` (GRPO, RLOO)
    returns the rewards of all ranks, ``_calculate_rewards_from_functions`` (OnlineDPO) those of first and second
    completions, and PPO (1.12) calls the backbone and then the ``score`` head of its reward model.

    Raises:
        ConfigError: a trainer without such rewards.
    """
    names, calls = _names(trainer), Counter()

    def permuted(rewards: Tensor, size: int) -> Tensor:
        step = trainer.state.global_step
        calls[step] += 1  # counted within the step, so that a resumed run draws the same
        return permute_groups(rewards, size, reward_generator(seed, number, step, calls[step]))

    if names & {"GRPOTrainer", "RLOOTrainer"}:
        name, arrange = "_calculate_rewards", lambda rewards: permuted(rewards, trainer.num_generations)
    elif "OnlineDPOTrainer" in names and trainer.reward_funcs:
        name, arrange = "_calculate_rewards_from_functions", lambda rewards: _of_pairs(rewards, permuted)
    elif "PPOTrainer" in names:
        each, whole = trainer.args.local_rollout_forward_batch_size, trainer.args.local_batch_size
        if min(each, whole) < 2 or whole % each == 1:
            raise ConfigError(
                f"control: PPO's rewards are permuted among the texts scored together, found {whole} scored by {each}: "
                "one of them would be alone; set local_rollout_forward_batch_size"
            )
        _permute_scores(trainer.reward_model, permuted, undo)
        return
    else:
        raise ConfigError(
            f"control: {type(trainer).__name__} has nothing to scramble; expected chosen and rejected columns, a label "
            "column, or rewards of sampled completions (a judge's verdicts are not supported)"
        )
    original = getattr(trainer, name)

    def calculate(*args: Any, **kwargs: Any) -> Tensor:
        rewards = original(*args, **kwargs)
        return arrange(rewards) if trainer.model.training else rewards

    own = vars(trainer).get(name)
    undo.callback(delattr, trainer, name) if own is None else undo.callback(setattr, trainer, name, own)
    setattr(trainer, name, calculate)


def _of_pairs(rewards: Tensor, permuted: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Rewards ``[2B]`` of all first, then all second completions, permuted within the pairs."""
    return permuted(rewards.view(2, -1).T.reshape(-1), 2).view(-1, 2).T.reshape(-1)


def _permute_scores(reward_model: Any, permuted: Callable[[Tensor, int], Tensor], undo: ExitStack) -> None:
    """PPO's rewards: the score at each text's last token. A text gets that of another one, at every position."""
    seen: list[Tensor] = []

    def remember(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        seen[:] = [kwargs["attention_mask"]]

    def exchange(module: Any, args: Any, scores: Tensor) -> Tensor:
        mask = seen[0]
        last = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)
        own = scores[range(len(scores)), last]  # [B, 1]
        return permuted(own, len(own)).unsqueeze(1).expand_as(scores).clone()

    backbone = getattr(reward_model, reward_model.base_model_prefix)
    undo.callback(backbone.register_forward_pre_hook(remember, with_kwargs=True).remove)
    undo.callback(reward_model.score.register_forward_hook(exchange).remove)
