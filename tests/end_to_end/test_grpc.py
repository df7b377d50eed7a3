"""The shards' gRPC face as standard tools see it: health and reflection."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.end_to_end.stack import running

pytestmark = pytest.mark.timeout(300)


def test_health_and_reflection(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with running(checkpoint("llama"), "--num-shard", "1", TMPDIR=str(tmp_path)):
        (socket,) = tmp_path.rglob("shard-0")
        assert socket.parent.stat().st_mode & 0o077 == 0  # nobody else may connect
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", "tessera.v1.Shard"):
                request = health_pb2.HealthCheckRequest(service=service)
                reply = stub.Check(request, timeout=20)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            database = ProtoReflectionDescriptorDatabase(channel)
            assert "tessera.v1.Shard" in database.get_services()
            shard = DescriptorPool(database).FindServiceByName("tessera.v1.Shard")
            assert [m.name for m in shard.methods] == ["Info", "Warmup", "Steps"]
