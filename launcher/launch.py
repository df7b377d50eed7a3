"""One launch: take the port, fetch the model, start shards and router, keep watch, stop."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tessera.launcher.devices import Devices, Machine, find_devices
from tessera.launcher.errors import LaunchError
from tessera.launcher.http_socket import open_http_socket, url_of
from tessera.launcher.model_folder import check_heads, local_folder
from tessera.launcher.plan import (
    Place,
    ProcessSpec,
    count_shards,
    plan_download,
    plan_processes,
    shard_name,
    socket_prefix,
)
from tessera.launcher.run_folder import clear_stale_sockets, run_folder
from tessera.launcher.settings import Settings
from tessera.launcher.shared_memory import check_shared_memory, shared_memory_bytes
from tessera.launcher.supervisor import Child, Events, StopRequested, Supervisor, signals_to

logger = logging.getLogger("tessera.launcher")

READY = "ready"  # the line with which the router reports
STOP_GRACE_S = 5.0  # for a process that has nothing to finish
DRAIN_MARGIN_S = 5.0  # the router ends what is late itself; this long it may take to do so


Planner = Callable[[Settings, Devices, Place], list[ProcessSpec]]


def launch(settings: Settings, machine: Machine, planner: Planner = plan_processes) -> None:
    """Serve until told to stop.

    Args:
        planner: says which processes to run; tests put other programs in their place.

    Raises:
        LaunchError: it could not start, or a process ended. Nothing is left running or lying.
    """
    events: Events = Events()
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals_to(events))
        router = settings.router
        listener = stack.enter_context(open_http_socket(router.hostname, router.port))
        folder = stack.enter_context(run_folder(Path(settings.environ.get("TMPDIR") or "/tmp")))
        supervisor = Supervisor(events)
        stack.callback(supervisor.kill_all)
        server = Server(settings, supervisor, folder, planner)
        try:
            server.run(listener, machine)
        except StopRequested:
            logger.info("stopping; SIGINT (Ctrl-C) once more stops at once")
            server.stop(graceful=True)
            logger.info("stopped")
        except LaunchError:
            server.stop(graceful=False)
            raise


@dataclass(slots=True)
class Server:
    """The processes of one server and how far they have come."""

    settings: Settings
    supervisor: Supervisor
    folder: Path
    planner: Planner
    router: Child | None = None
    ready: bool = False

    def run(self, listener: socket.socket, machine: Machine) -> None:
        """Start everything and keep watch. Returns only by an exception."""
        begun = time.monotonic()
        settings = self.settings
        # What can be refused without the model is refused before it is downloaded.
        devices = find_devices(settings.shard.device, machine)
        world_size = count_shards(settings, devices)
        prefix = socket_prefix(settings.router.shard_uds_path, self.folder, world_size)
        clear_stale_sockets(prefix, world_size)
        self._warn_about_machine(devices, world_size)
        model = self._model_folder()
        check_heads(model, world_size)
        url = url_of(listener)
        self._start(model, devices, listener)
        self._wait_until_ready(prefix, world_size)
        logger.info("ready: %s (%.1f s)", url, time.monotonic() - begun)
        while True:
            self.supervisor.wait_for_word()

    def stop(self, *, graceful: bool) -> None:
        """Stop the router first, so that no request loses its shards, then the rest."""
        drain = self.settings.router.graceful_termination_timeout + DRAIN_MARGIN_S
        grace = drain if graceful and self.ready else STOP_GRACE_S
        router = [self.router] if self.router is not None else []
        self.supervisor.stop(router, grace)
        self.supervisor.stop(self.supervisor.alive, STOP_GRACE_S)

    def _warn_about_machine(self, devices: Devices, world_size: int) -> None:
        logger.info("%d shard(s) on %s, %d core(s)", world_size, devices.kind, devices.cores)
        wanted = self.settings.launcher.shm_size
        total = shared_memory_bytes()
        for warning in (
            devices.note,
            check_shared_memory(wanted, devices.kind, world_size, total),
        ):
            if warning:
                logger.warning("%s", warning)

    def _model_folder(self) -> Path:
        """The model's files on this machine, downloaded if need be."""
        settings = self.settings
        local = local_folder(settings.router.model_id, settings.launcher.weights_cache_override)
        if local is not None:
            return local
        result = self.folder / "model-folder"
        download = self.supervisor.start(plan_download(settings, result, os.getpid()))
        self.supervisor.wait_for_end(download)
        return Path(result.read_text(encoding="utf-8"))

    def _start(self, model: Path, devices: Devices, listener: socket.socket) -> None:
        report, ready_fd = os.pipe()
        place = Place(model, self.folder, listener.fileno(), ready_fd, os.getpid())
        try:
            self.supervisor.listen(report)
            for spec in self.planner(self.settings, devices, place):
                self._start_one(spec)
        finally:
            # The router has its own copies. Ours would keep clients waiting on a closing server
            # instead of having them refused, and would hide the router's end from the pipe.
            os.close(ready_fd)
            listener.close()

    def _start_one(self, spec: ProcessSpec) -> None:
        child = self.supervisor.start(spec)
        logger.debug("%s has process id %d", spec.name, child.pid)
        if spec.pass_fds:
            self.router = child

    def _wait_until_ready(self, prefix: str, world_size: int) -> None:
        timeout_s = self.settings.launcher.startup_timeout
        deadline = time.monotonic() + timeout_s
        while (word := self.supervisor.wait_for_word(deadline)) != READY:
            if word is None:
                raise LaunchError(
                    f"not ready after {timeout_s} s: waiting for {_missing(prefix, world_size)}; "
                    "see the log above, or raise STARTUP_TIMEOUT."
                )
        self.ready = True


def _missing(prefix: str, world_size: int) -> str:
    """Who has not come yet: a shard opens its socket when its weights are loaded."""
    absent = [rank for rank in range(world_size) if not Path(f"{prefix}-{rank}").exists()]
    return ", ".join(map(shard_name, absent)) or "the router's warm-up"
