"""The ``interp:`` block among a recipe's arguments: a dataclass for ``trl.TrlParser`` that does not import trl."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from interp_rlhf.config import InterpConfig
from interp_rlhf.errors import ConfigError


@dataclass
class InterpArguments:
    """What a recipe hands to :func:`~interp_rlhf.attach`.

    ``TrlParser`` takes a YAML file's values as defaults without converting them, so that under ``--config`` the block
    stays the mapping it is in the file; on the command line ``--interp PATH`` names a file or a preset.

    Attributes:
        interp: a mapping of settings, a path of a YAML file, or a preset's name. ``None`` is the preset ``observe``.
        control: number of a control run (``InterpConfig.control``).
    """

    interp: str | None = field(  # a mapping under --config
        default=None,
        metadata={"help": "Measurements: a YAML file or a preset's name; in a YAML config also the block itself."},
    )

    control: int | None = field(
        default=None,
        metadata={"help": "Number of a control run: the same training without its preferences, in _controls/NN."},
    )

    def settings(self) -> InterpConfig:
        """Both arguments as one config, for ``attach``.

        Raises:
            ConfigError: a wrong setting.
        """
        config = InterpConfig.resolve(self.interp)
        if self.control is None:
            return config
        return InterpConfig.from_mapping({**config.as_mapping(), "control": self.control}, where="--control")

    def __post_init__(self) -> None:
        """A wrong block ends the program with one line and exit code 2, like a wrong argument."""
        try:
            self.settings()
        except ConfigError as error:
            print(f"interp: {error}", file=sys.stderr)
            raise SystemExit(2) from None


def local_path(name: str | None, what: str) -> str:
    """A model or dataset name as it is, unless there is none or it looks like a local path and nothing is there.

    Args:
        name: a hub name (``owner/name``) or a local path (starting with ``.``, ``/``, ``~`` or ``demo/``).
        what: the argument it came from, for the message.

    Raises:
        ConfigError: no name was given, or the path does not exist.
    """
    if name is None:
        raise ConfigError(f"{what}: required, found none")
    if name.startswith((".", "/", "~", "demo/")) and not Path(name).expanduser().exists():
        hint = "; `interp-rlhf demo` writes it" if name.startswith("demo/") else ""
        raise ConfigError(f"{what}: {name} does not exist{hint}")
    return name
