"""Entry point of a shard process: load one rank of the model, then serve steps."""

import asyncio
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from tessera.proto import shard_pb2, shard_pb2_grpc
from tessera.proto.env import SettingsError
from tessera.proto.image_layout import ImageLayout, layout_from_config
from tessera.proto.process import begin, keep_what_is_there
from tessera.shard.backends import load_backend
from tessera.shard.engine import Engine
from tessera.shard.errors import ShardError
from tessera.shard.models import (
    load_model,
    quantized_as,
    resolve_cache_dtype,
    resolve_dtype,
)
from tessera.shard.models.base import Placement
from tessera.shard.models.config_file import read_config
from tessera.shard.parallel import Group
from tessera.shard.quantization_names import quantization
from tessera.shard.service import ShardService
from tessera.shard.settings import ShardSettings
from tessera.shard.warmup import warm_up

logger = logging.getLogger(__name__)

SERVICE_NAME = shard_pb2.DESCRIPTOR.services_by_name["Shard"].full_name
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
"""Image tiles of a large batch pass any fixed limit; the router bounds what it sends."""


def main() -> None:
    """Run a shard; exit 0 after SIGTERM or SIGINT, 1 when it cannot start."""
    try:
        asyncio.run(_serve(begin(ShardSettings, "tessera-shard", __doc__ or "")))
    except (ShardError, SettingsError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


async def _serve(settings: ShardSettings) -> None:
    stop, loaded_or_stopped = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _set_both, stop, loaded_or_stopped)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="device") as device_thread:
        loading = loop.run_in_executor(device_thread, _load, settings)
        loading.add_done_callback(lambda _: loaded_or_stopped.set())
        await loaded_or_stopped.wait()
        if stop.is_set():
            # A thread inside a load or a rendezvous cannot be interrupted; nothing needs it now.
            logger.info("stopped while loading")
            sys.stdout.flush()
            os._exit(0)
        engine, info, layout = loading.result()
        keep_what_is_there()
        size_cache = partial(
            warm_up, engine, memory_fraction=settings.cuda_memory_fraction, layout=layout
        )
        service = ShardService(engine, info, size_cache, device_thread)
        server = await _start_server(settings, service)
        logger.info("shard %d serves %s on %s", info.rank, info.model_type, info.device)
        await stop.wait()
        await server.stop(grace=1.0)
        service.close()
        engine.placement.group.close()


def _set_both(first: asyncio.Event, second: asyncio.Event) -> None:
    first.set()
    second.set()


def _load(settings: ShardSettings) -> tuple[Engine, shard_pb2.InfoReply, ImageLayout | None]:
    folder = Path(settings.model_id)
    config = read_config(folder)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    backend = load_backend(settings.device, settings.backend)
    dtype = resolve_dtype(settings.dtype, config, backend.device.type)
    cache_dtype = resolve_cache_dtype(settings.kv_cache_dtype, backend)
    group = Group.connect(settings.rank, settings.world_size, backend.device, _rendezvous(settings))
    placement = Placement(backend, group, dtype, quantization(settings.quantize), cache_dtype)
    model = load_model(folder, placement)
    engine = Engine(model, placement, settings.block_size)
    info = shard_pb2.InfoReply(
        rank=group.rank,
        world_size=group.world_size,
        model_type=config["model_type"],
        dtype=str(dtype).removeprefix("torch."),
        device=str(backend.device),
        backend=backend.name,
        block_size=settings.block_size,
        vocab_size=model.vocab_size,
        incarnation=settings.incarnation,
        quantization=quantized_as(config, placement.quantization),
        kv_cache_dtype=str(engine.cache_shape.dtype).removeprefix("torch."),
    )
    return engine, info, layout_from_config(config)


def _rendezvous(settings: ShardSettings) -> str:
    if settings.master_addr:
        return f"tcp://{settings.master_addr}:{settings.master_port}"
    return settings.rendezvous


async def _start_server(settings: ShardSettings, service: ShardService) -> grpc.aio.Server:
    server = grpc.aio.server(options=UNLIMITED)
    shard_pb2_grpc.add_ShardServicer_to_server(service, server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        [SERVICE_NAME, "grpc.health.v1.Health", reflection.SERVICE_NAME], server
    )
    server.add_insecure_port(f"unix:{settings.shard_uds_path}-{settings.rank}")
    await server.start()
    for name in ("", SERVICE_NAME):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    return server


if __name__ == "__main__":
    main()
