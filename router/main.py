"""Entry point of the router process: serve HTTP at once, answer once the shards are warm."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp
from uvicorn.loops.auto import auto_loop_factory

from tessera.proto.env import SettingsError
from tessera.proto.image_layout import ImageLayoutError
from tessera.proto.process import begin, keep_what_is_there
from tessera.router.app import create_app
from tessera.router.blocks import BlockPool
from tessera.router.chat_template import ChatTemplate
from tessera.router.core import Core
from tessera.router.http_protocol import GuardedHttp
from tessera.router.limits import (
    cache_shortfall,
    check_window,
    scheduler_limits,
    serving_limits,
    warmup_request,
)
from tessera.router.metrics import Metrics
from tessera.router.model_files import ModelFiles, ModelFilesError
from tessera.router.report import Report
from tessera.router.settings import RouterSettings
from tessera.router.shards import ShardGroup, ShardsLost, WarmupFailed
from tessera.router.tokenizer import Tokenizer
from tessera.router.validation import Validator

if TYPE_CHECKING:
    from tessera.router.tracing import Tracing

logger = logging.getLogger(__name__)

LOST_A_SHARD = 2
"""Exit status when the shards are gone: distinct from a wrong setting (1)."""

FAREWELL_S = 2.0
"""How long clients get to read that their requests are lost."""


def main() -> None:
    """Run the router; exit 0 after SIGTERM or SIGINT, 1 when it cannot start."""
    try:
        settings = begin(RouterSettings, "tessera-router", __doc__ or "")
        logging.getLogger("uvicorn").setLevel(logging.WARNING)  # what it says at start, we say
        logging.getLogger("httpcore2").setLevel(logging.WARNING)  # would log what is fetched
        with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
            status = runner.run(_serve(settings))
    except (SettingsError, ModelFilesError, ImageLayoutError, WarmupFailed) as error:
        print(f"Error: {error}", file=sys.stderr)
        status = 1
    except ShardsLost as error:
        print(f"Error: {error}", file=sys.stderr)
        status = LOST_A_SHARD
    sys.exit(status)


async def _serve(settings: RouterSettings) -> int:
    """Serve until a signal drains the server or the shards are lost."""
    files = ModelFiles.read(Path(settings.model_id))
    check_window(settings, files)
    config_path = _optional_path(settings.tokenizer_config_path)
    tokenizer = Tokenizer.from_folder(files.folder, config_path)
    template = ChatTemplate.from_folder(
        files.folder, config_path, override=settings.chat_template or None
    )
    metrics = Metrics()
    shards = ShardGroup(shard_targets(settings))
    metrics.ranks.follow(shards.ranks)
    core = Core(
        shards,
        tokenizer,
        tokenizer.eos_ids,
        metrics,
        lookahead=settings.lookahead,
        max_queue_time_s=settings.max_queue_time,
    )
    validator = Validator(settings, core, tokenizer, files, template, metrics)
    tracing = _tracing(settings)
    app = create_app(settings, core, validator, files, metrics, tracing)
    server = _Server(server_config(app, settings))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _drain, core, server, settings.graceful_termination_timeout)
    serving = asyncio.create_task(server.serve(sockets=[_http_socket(settings)]))
    running = asyncio.create_task(_run_model(settings, core, shards, files))
    try:
        await asyncio.wait([serving, running], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        await serving
    finally:
        server.should_exit = True
        if not serving.done():  # the shards are gone; those who wait must still be told
            await asyncio.wait([serving], timeout=FAREWELL_S)
        running.cancel()
        try:
            with contextlib.suppress(asyncio.CancelledError, ShardsLost, WarmupFailed):
                await running
        finally:
            await shards.close()
            validator.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)
    return 0


def _tracing(settings: RouterSettings) -> "Tracing | None":
    """What sends traces; without a collector the library is not even imported."""
    if not settings.otlp_endpoint:
        return None
    from tessera.router.tracing import OtlpExporter, Tracing

    if settings.log_level != "debug":  # it says again and again what our exporter says once
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    exporter = OtlpExporter(settings.otlp_endpoint)
    return Tracing(exporter, settings.otlp_service_name, version("tessera"))


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which re-raise the signal after the shutdown."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


async def _run_model(
    settings: RouterSettings, core: Core, shards: ShardGroup, files: ModelFiles
) -> None:
    """Run steps until cancelled, with new shards whenever some are lost."""
    report = Report(settings.ready_fd)
    while True:
        try:
            await _open(settings, core, shards, files)
            keep_what_is_there()
            report.ready()
            await run_watched(core, shards)
        except ShardsLost as error:
            if not report.is_read:  # nobody starts new ones
                core.lose(error)
                raise
            core.suspend(error)
            report.lost(shards.incarnation, str(error))
            await shards.close()


async def _open(
    settings: RouterSettings, core: Core, shards: ShardGroup, files: ModelFiles
) -> None:
    """Wait for the shards, warm them up, then take requests."""
    logger.info("waiting for %s shard(s)", settings.num_shard)
    info = await shards.connect()
    logger.info("loaded %s in %s on %s, warming up", info.model_type, info.dtype, info.device)
    num_blocks = await shards.warm_up(warmup_request(settings, info, files))
    limits = serving_limits(settings, info, files, num_blocks)
    core.open(limits, scheduler_limits(settings, info), BlockPool(num_blocks, info.block_size))
    logger.info(
        "Connected: %d tokens of cache, prompts up to %d, totals up to %d, batches up to %d",
        limits.max_batch_total_tokens,
        limits.max_input_tokens,
        limits.max_total_tokens,
        limits.max_batch_size,
    )
    if shortfall := cache_shortfall(settings, limits, info.block_size):
        logger.warning("%s", shortfall)


async def run_watched(core: Core, shards: ShardGroup) -> None:
    """Run steps until cancelled.

    Raises:
        ShardsLost: a shard is gone, or hangs.
    """
    stepping = asyncio.create_task(core.run())
    watching = asyncio.create_task(shards.watch())
    try:
        await asyncio.wait([stepping, watching], return_when=asyncio.FIRST_COMPLETED)
        await (stepping if stepping.done() else watching)
    finally:
        for task in (stepping, watching):
            task.cancel()
        await asyncio.gather(stepping, watching, return_exceptions=True)


def shard_targets(settings: RouterSettings) -> list[str]:
    """gRPC addresses of the ranks' unix sockets, in order of rank."""
    return [f"unix:{settings.shard_uds_path}-{rank}" for rank in range(settings.num_shard or 1)]


def _drain(core: Core, server: uvicorn.Server, timeout_s: float) -> None:
    """Stop taking requests; those under way finish, or are told shortly before they are cut off."""
    logger.info("draining")
    core.drain()
    server.should_exit = True
    asyncio.get_running_loop().call_later(
        max(0.0, timeout_s - FAREWELL_S),
        core.end_all,
        "the server is shutting down; send the request to another one",
    )


def server_config(app: ASGIApp, settings: RouterSettings) -> uvicorn.Config:
    """How HTTP is served."""
    return uvicorn.Config(
        app,
        http=GuardedHttp,
        ws="none",  # there is no websocket here, so no advice on how to install one
        log_config=None,
        access_log=False,
        lifespan="off",  # the app has none, and one that is cut off fills the log
        timeout_graceful_shutdown=settings.graceful_termination_timeout,
        timeout_keep_alive=75,  # longer than the usual load balancer's, so that it closes first
        server_header=False,
        date_header=True,
    )


def _http_socket(settings: RouterSettings) -> socket.socket:
    """The socket the launcher bound, or one of our own.

    Raises:
        SettingsError: the port cannot be had.
    """
    if settings.http_socket_fd is not None:
        return socket.socket(fileno=settings.http_socket_fd)
    try:
        return socket.create_server((settings.hostname, settings.port), backlog=2048)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {settings.hostname}:{settings.port}: {error.strerror}; "
            "set PORT to a free one."
        ) from None


def _optional_path(text: str) -> Path | None:
    return Path(text) if text else None


if __name__ == "__main__":
    main()
