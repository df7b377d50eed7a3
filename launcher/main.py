"""Entry point of the launcher: settings, log, launch, and one line for what went wrong."""

import contextlib
import logging
import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence

from tessera.launcher.devices import Machine, installed_version
from tessera.launcher.errors import LaunchError
from tessera.launcher.init_process import serve_as_init
from tessera.launcher.launch import Planner, launch
from tessera.launcher.plan import plan_processes
from tessera.launcher.settings import Settings
from tessera.proto.env import SettingsError, process_environment, shown
from tessera.proto.lifeline import die_with_parent
from tessera.proto.logs import FLUSH_S, configure_logging, escaped

logger = logging.getLogger("tessera.launcher")

PLAN, VERSION = "--plan", "--version"
STDERR = 2


def main(arguments: Sequence[str] | None = None, planner: Planner = plan_processes) -> int:
    """Serve until told to stop.

    Args:
        arguments: flags; those of this process if left out. `--plan` and `--version` only print.
        planner: as in `launch`.

    Returns:
        The exit code: 0 after SIGTERM or SIGINT, 1 after an error. A wrong flag exits with 2.
    """
    serve_as_init()
    die_with_parent(death=signal.SIGTERM)
    environ = process_environment()
    arguments = sys.argv[1:] if arguments is None else arguments
    if VERSION in arguments:
        print(f"tessera {installed_version('tessera')}")
        return 0
    try:
        if PLAN in arguments:
            return _plan([word for word in arguments if word != PLAN], environ)
        settings = Settings.read(arguments, environ)
        router = settings.router
        configure_logging(router.log_level, router.json_output, background=True)
        _log_start(settings)
        launch(settings, Machine.here(settings.environ), planner)
    except (SettingsError, LaunchError) as error:
        _report(str(error))
        return 1
    return 0


def _plan(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    from tessera.launcher.memory_plan import print_plan  # the hub's client, not needed to serve

    return print_plan(arguments, environ)


def _log_start(settings: Settings) -> None:
    given = shown(settings.launcher) | shown(settings.router) | shown(settings.shard)
    said = " ".join(f"{name}={text}" for name, text in given.items()) or "defaults only"
    logger.info("tessera %s: %s", installed_version("tessera"), said)
    for warning in settings.warnings:
        logger.warning("%s", warning)


def _report(message: str) -> None:
    """Say on stderr why this ends, after everything that was logged before it."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    with contextlib.suppress(OSError):
        if select.select([], [STDERR], [], FLUSH_S)[1]:  # a stuck reader must not hold up the exit
            os.write(STDERR, f"Error: {escaped(message)}\n".encode(errors="backslashreplace"))


if __name__ == "__main__":
    sys.exit(main())
