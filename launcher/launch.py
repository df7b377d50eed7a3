"""One launch: take the port, fetch the model, start shards and router, keep watch, stop."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tessera.launcher.devices import Devices, Machine, check_backend, find_devices
from tessera.launcher.errors import LaunchError
from tessera.launcher.http_socket import open_http_socket, url_of
from tessera.launcher.model_folder import check_heads, local_folder
from tessera.launcher.plan import (
    ROUTER,
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
from tessera.launcher.supervisor import (
    CAUSE_WAIT_S,
    Child,
    ChildEnded,
    Events,
    StopRequested,
    Supervisor,
    signals_to,
)
from tessera.proto.supervision import READY, parse_lost

logger = logging.getLogger("tessera.launcher")

STOP_GRACE_S = 5.0  # for a process that has nothing to finish
RESTART_WINDOW_S = 600.0  # in which MAX_SHARD_RESTARTS counts
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
    shards: list[Child] = field(default_factory=list)
    url: str = ""
    ready: bool = False  # or was once
    restarted_at: list[float] = field(default_factory=list)

    def run(self, listener: socket.socket, machine: Machine) -> None:
        """Start everything and keep watch. Returns only by an exception."""
        begun = time.monotonic()
        settings = self.settings
        # What can be refused without the model is refused before it is downloaded.
        devices = find_devices(settings.shard.device, machine)
        check_backend(settings.shard.backend)
        world_size = count_shards(settings, devices)
        prefix = socket_prefix(settings.router.shard_uds_path, self.folder, world_size)
        clear_stale_sockets(prefix, world_size)
        self._warn_about_machine(devices, world_size)
        model = self._model_folder()
        check_heads(model, world_size)
        self.url = url_of(listener)
        place = self._start(model, devices, listener)
        ranks = [Path(f"{prefix}-{rank}") for rank in range(world_size)]
        while True:
            reason = self._watch(place.incarnation, ranks, begun)
            begun = time.monotonic()
            self._check_restarts(reason, begun)
            place = replace(place, incarnation=place.incarnation + 1)
            self._restart_shards(place, devices, prefix, world_size)

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

    def _start(self, model: Path, devices: Devices, listener: socket.socket) -> Place:
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
        return place

    def _start_one(self, spec: ProcessSpec) -> None:
        child = self.supervisor.start(spec)
        logger.debug("%s has process id %d", spec.name, child.pid)
        if spec.name == ROUTER:
            self.router = child
        else:
            self.shards.append(child)

    def _watch(self, incarnation: int, ranks: Sequence[Path], started: float) -> str:
        """Wait until the shards of an incarnation are of no use any more; returns why.

        Raises:
            LaunchError: the router ended, or is not ready in time.
        """
        timeout_s = self.settings.launcher.startup_timeout
        deadline: float | None = time.monotonic() + timeout_s  # a download came before it
        lost = ""  # what the router says of a shard
        while True:
            try:
                word = self.supervisor.wait_for_word(deadline)
            except ChildEnded as ended:
                if ended.name == ROUTER:
                    raise
                return str(ended)
            if lost:
                if word is None:
                    return lost
                continue  # what else the router says does not matter any more
            if word is None:
                raise LaunchError(
                    f"not ready after {timeout_s} s: waiting for {_missing(ranks)}; "
                    "see the log above, or raise STARTUP_TIMEOUT."
                )
            if word == READY:
                deadline, self.ready = None, True
                logger.info("ready: %s (%.1f s)", self.url, time.monotonic() - started)
            elif (loss := parse_lost(word)) and loss[0] == incarnation:
                # If the shard has ended, that says more, and is heard of in a moment.
                lost, deadline = f"{loss[1]}.", time.monotonic() + CAUSE_WAIT_S

    def _check_restarts(self, reason: str, now: float) -> None:
        """Count one more.

        Raises:
            LaunchError: the server was never ready, or these are too many.
        """
        self.restarted_at = [then for then in self.restarted_at if now - then < RESTART_WINDOW_S]
        count, allowed = len(self.restarted_at), self.settings.launcher.max_shard_restarts
        if not self.ready or not allowed:
            raise LaunchError(reason)
        if count >= allowed:
            raise LaunchError(
                f"{reason} The shards were started anew {count} times within "
                f"{RESTART_WINDOW_S / 60:g} minutes, which is MAX_SHARD_RESTARTS."
            )
        self.restarted_at.append(now)
        logger.error("%s All shards are started anew (%d of %d).", reason, count + 1, allowed)

    def _restart_shards(self, place: Place, devices: Devices, prefix: str, world_size: int) -> None:
        """One rank alone cannot come back: the others wait for it within a step."""
        self.supervisor.end(self.shards)
        self.shards.clear()
        clear_stale_sockets(prefix, world_size)
        for spec in self.planner(self.settings, devices, place):
            if spec.name != ROUTER:
                self._start_one(spec)


def _missing(ranks: Sequence[Path]) -> str:
    """Who has not come yet: a shard opens its socket when its weights are loaded."""
    absent = [rank for rank, socket_path in enumerate(ranks) if not socket_path.exists()]
    return ", ".join(map(shard_name, absent)) or "the router's warm-up"
