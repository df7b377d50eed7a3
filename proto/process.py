"""How a child process of the launcher begins: tied to its parent, settings read, log set up."""

import gc
import sys
from typing import Protocol, TypeVar

from tessera.proto.env import (
    merged_environment,
    parse_flags,
    process_environment,
    read_settings,
)
from tessera.proto.lifeline import die_with_parent
from tessera.proto.logs import configure_logging


class _Settings(Protocol):
    @property
    def log_level(self) -> str: ...
    @property
    def json_output(self) -> bool: ...


S = TypeVar("S", bound=_Settings)


def begin(settings_class: type[S], program: str, description: str) -> S:
    """Called first in a child's `main`; returns what it was told.

    Exits 0 after `--help` and 2 on a flag that does not exist.

    Raises:
        SettingsError: a value is unusable. The message says what to change.
    """
    die_with_parent()
    flags = parse_flags(program, description, [settings_class], sys.argv[1:])
    environ = merged_environment(process_environment(), flags, settings_class)
    settings = read_settings(settings_class, environ)
    configure_logging(settings.log_level, settings.json_output)
    return settings


def keep_what_is_there() -> None:
    """Called once a process is ready: what it has made so far stays until it ends.

    Collections of garbage do not look through it again, which would stop all streams for tens of
    milliseconds.
    """
    gc.collect()
    gc.freeze()
