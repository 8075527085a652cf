"""Errors a person can act on: each names the place, what was found and what was expected."""

from __future__ import annotations


class InterpError(Exception):
    """Base of every error this package raises on purpose. The command line turns it into exit code 2."""


class ConfigError(InterpError):
    """A configuration key, value or file is wrong; the message names the file and the field's path."""


class HookpointError(InterpError):
    """A hookpoint name is malformed or does not exist on this model; the message lists what exists."""


class PromptError(InterpError):
    """A prompt set is empty, unreadable, too long for the model, or cannot be drawn without side effects."""


class ReferenceMismatch(InterpError):
    """The model offered as the frozen start is not the frozen start."""


class FormatError(InterpError):
    """A file on disk is damaged, foreign, or written by an incompatible version."""


class MeasurementError(InterpError):
    """A measuring pass produced something that cannot be a measurement (NaN, wrong shape, no content tokens)."""
