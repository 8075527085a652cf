"""The one place that touches a trainer: attach, detach, and the class with ``InterpMixin`` in front.

Checked on TRL 1.12.0 and 1.16.0 with transformers 5.23.0. Only public names are used: ``add_callback``,
``remove_callback``, ``log``, ``state``, ``model``, ``train_dataset``, ``eval_dataset``, ``processing_class``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from interp_rlhf.callback import InterpCallback
from interp_rlhf.config import SWITCH, InterpConfig, switched_off
from interp_rlhf.errors import InterpError

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

    def __init__(self, trainer: Trainer, callback: InterpCallback) -> None:
        self.callback = callback
        self._trainer: Trainer | None = trainer

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

    Returns:
        A handle with ``timeline()``, ``summary()`` and ``detach()``. With ``INTERP_RLHF=off`` in the environment the
        trainer is left alone, one line says so, and the handle is empty.

    Raises:
        InterpError: a wrong setting, hookpoint, file or dataset; the trainer is then untouched.
    """
    if switched_off():
        print(f"interp_rlhf: off ({SWITCH}=off), the trainer is left as it is")
        return DetachedHandle()
    if isinstance(trainer.__dict__.get("interp"), Handle):
        raise InterpError(f"attach: this {type(trainer).__name__} is attached already; call handle.detach() first")
    if any(isinstance(other, InterpCallback) for other in trainer.callback_handler.callbacks):
        raise InterpError(
            f"attach: this {type(trainer).__name__} has an InterpCallback already, which would write twice"
        )
    if trainer.model is None:
        raise InterpError(f"attach: this {type(trainer).__name__} has no model")
    callback = InterpCallback(config)
    callback.prepare(
        model=trainer.model,
        tokenizer=trainer.processing_class,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        args=trainer.args,
        ref_model=getattr(trainer, "ref_model", None),
    )
    callback.rows_reach_the_log = True
    callback.trainer_class = type(trainer).__name__
    if not isinstance(trainer, InterpMixin):
        trainer.__class__ = _with_mixin(type(trainer), _interp_original=type(trainer))
    trainer.add_callback(callback)
    handle = cast(InterpMixin, trainer).interp = Handle(trainer, callback)
    return handle


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
