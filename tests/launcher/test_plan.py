import sys
from pathlib import Path

import pytest

from tessera.launcher.devices import Devices
from tessera.launcher.errors import LaunchError
from tessera.launcher.plan import Place, ProcessSpec, plan_download, plan_processes
from tessera.launcher.settings import Settings
from tessera.proto.env import read_settings
from tessera.router.settings import RouterSettings
from tessera.shard.settings import ShardSettings

CPU = Devices("cpu", 1, 4)
CUDA = Devices("cuda", 2, 16, ("0", "GPU-7"))
PLACE = Place(Path("/models/m"), Path("/tmp/tessera-x"), 11, 12, 4242)


def plan(
    *flags: str, devices: Devices = CPU, place: Place = PLACE, **environ: str
) -> list[ProcessSpec]:
    return plan_processes(Settings.read(flags, environ), devices, place)


def shards(specs: list[ProcessSpec]) -> list[ShardSettings]:
    return [read_settings(ShardSettings, spec.environ) for spec in specs[:-1]]


def router(specs: list[ProcessSpec]) -> RouterSettings:
    return read_settings(RouterSettings, specs[-1].environ)


def test_shards_by_rank_then_the_router() -> None:
    specs = plan("--num-shard", "2")
    assert [spec.name for spec in specs] == ["shard 0", "shard 1", "router"]
    assert [spec.argv for spec in specs] == [
        (sys.executable, "-P", "-m", "tessera.shard.main"),
        (sys.executable, "-P", "-m", "tessera.shard.main"),
        (sys.executable, "-P", "-m", "tessera.router.main"),
    ]


def test_a_shard_is_told_its_place_in_the_group() -> None:
    first, second = shards(plan("--num-shard", "2"))
    assert (first.rank, second.rank, first.world_size, second.world_size) == (0, 1, 2, 2)
    assert first.model_id == "/models/m"
    assert first.shard_uds_path == "/tmp/tessera-x/shard"
    assert first.rendezvous == second.rendezvous == "file:///tmp/tessera-x/rendezvous-0"
    assert first.json_output


def test_every_shard_is_told_how_to_round_weights() -> None:
    told = shards(plan("--num-shard", "2", "--quantize", "int4", ISQ="8"))
    assert [shard.quantize for shard in told] == ["int4", "int4"]


def test_one_shard_needs_no_rendezvous() -> None:
    (only,) = shards(plan())
    assert (only.world_size, only.rendezvous) == (1, "")


def test_the_router_is_told_where_everything_is() -> None:
    specs = plan("--num-shard", "2", "--port", "80")
    told = router(specs)
    assert (told.num_shard, told.shard_uds_path) == (2, "/tmp/tessera-x/shard")
    assert (told.http_socket_fd, told.ready_fd) == specs[-1].pass_fds == (11, 12)
    assert (told.model_id, told.port) == ("/models/m", 80)
    assert all(spec.pass_fds == () for spec in specs[:-1])


def test_replies_carry_the_name_that_was_asked_for_not_the_folder() -> None:
    assert router(plan("--model-id", "owner/model")).served_model_name == "owner/model"
    assert router(plan("--served-model-name", "x")).served_model_name == "x"
    assert router(plan()).served_model_name == "tessera-demo"


def test_the_cores_are_shared_and_nobody_spins() -> None:
    for spec in plan("--num-shard", "2", devices=CPU)[:-1]:
        assert spec.environ["OMP_NUM_THREADS"] == "2"
        assert spec.environ["OMP_WAIT_POLICY"] == "PASSIVE"
        assert spec.environ["GOMP_SPINCOUNT"] == "0"
        assert spec.environ["KMP_BLOCKTIME"] == "0"
    assert {shard.num_threads for shard in shards(plan("--num-shard", "8"))} == {1}


def test_a_wish_for_threads_is_kept() -> None:
    for spec, _ in (plan(NUM_THREADS="3"), plan(OMP_NUM_THREADS="3")):
        assert read_settings(ShardSettings, spec.environ).num_threads == 3
        assert spec.environ["OMP_NUM_THREADS"] == "3"


def test_ranks_on_one_host_talk_over_loopback() -> None:
    assert plan("--num-shard", "2")[0].environ["GLOO_SOCKET_IFNAME"] == "lo"
    far = plan("--num-shard", "2", MASTER_ADDR="10.0.0.7")
    assert "GLOO_SOCKET_IFNAME" not in far[0].environ
    assert shards(far)[0].rendezvous == ""
    assert shards(far)[0].master_addr == "10.0.0.7"


def test_each_cuda_rank_sees_its_own_device() -> None:
    specs = plan(devices=CUDA)
    assert [spec.environ["CUDA_VISIBLE_DEVICES"] for spec in specs[:-1]] == ["0", "GPU-7"]
    assert {shard.device for shard in shards(specs)} == {"cuda"}


def test_xpu_ranks_count_by_index_and_a_given_index_is_kept() -> None:
    assert [shard.device for shard in shards(plan(devices=Devices("xpu", 2, 8)))] == [
        "xpu:0",
        "xpu:1",
    ]
    one = Devices("cuda", 1, 8)
    assert [shard.device for shard in shards(plan("--device", "cuda:1", devices=one))] == ["cuda:1"]


@pytest.mark.parametrize(
    ("flags", "devices", "count"),
    [
        ([], CPU, 1),
        ([], CUDA, 2),
        (["--sharded", "false"], CUDA, 1),
        (["--sharded"], CUDA, 2),
        (["--num-shard", "1"], CUDA, 1),
        (["--num-shard", "3"], CPU, 3),
        (["--sharded", "true", "--num-shard", "2"], CPU, 2),
        (["--sharded", "false", "--num-shard", "2"], CPU, 2),
    ],
)
def test_how_many_shards(flags: list[str], devices: Devices, count: int) -> None:
    assert len(plan(*flags, devices=devices)) == count + 1


@pytest.mark.parametrize(
    ("flags", "devices", "message"),
    [
        (["--sharded"], CPU, "SHARDED=true but there is one cpu device; set NUM_SHARD"),
        (["--sharded", "--num-shard", "1"], CUDA, "contradict"),
        (["--num-shard", "3"], CUDA, "NUM_SHARD=3 but there are 2 cuda"),
        (["--num-shard", "3"], Devices("xpu", 2, 8), "NUM_SHARD=3 but there are 2 xpu"),
        (
            ["--num-shard", "2", "--device", "cuda:1"],
            Devices("cuda", 1, 8),
            "NUM_SHARD=2 but DEVICE=cuda:1 is one device; lower it or set DEVICE=cuda",
        ),
    ],
)
def test_numbers_of_shards_that_cannot_be(flags: list[str], devices: Devices, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        plan(*flags, devices=devices)


def test_a_flag_equal_to_the_default_overrules_the_environment() -> None:
    specs = plan("--port", "3000", "--dtype", "auto", PORT="80", DTYPE="float32")
    assert router(specs).port == 3000
    assert shards(specs)[0].dtype == "auto"


def test_children_inherit_the_rest_of_the_environment_but_no_hub_token() -> None:
    for spec in plan(CUSTOM="kept", HF_TOKEN="hf_x", HF_HOME="/cache"):
        assert spec.environ["CUSTOM"] == "kept"
        assert spec.environ["HF_HOME"] == "/cache"
        assert "HF_TOKEN" not in spec.environ
        assert spec.environ["HF_HUB_OFFLINE"] == "1"
        assert spec.environ["LAUNCHER_PID"] == "4242"


def test_the_key_goes_to_the_router_only_and_never_by_argument() -> None:
    specs = plan("--api-key", "sesame")
    assert router(specs).api_key == "sesame"
    for spec in specs[:-1]:
        assert "sesame" not in spec.environ.values()
    assert not any("sesame" in word for spec in specs for word in spec.argv)


def test_sockets_fit_into_a_unix_address() -> None:
    deep = Place(Path("/models/m"), Path("/tmp") / ("d" * 96), 11, 12, 1)
    with pytest.raises(LaunchError, match=r"has \d+ bytes, over the limit of 107; set TMPDIR"):
        plan(place=deep)
    with pytest.raises(LaunchError, match="set SHARD_UDS_PATH to a shorter path"):
        plan("--shard-uds-path", "/tmp/" + "x" * 120)
    assert shards(plan("--shard-uds-path", "/run/s", place=deep))[0].shard_uds_path == "/run/s"


def test_the_download_gets_the_token_by_environment_under_any_of_its_names() -> None:
    settings = Settings.read(
        ["--model-id", "o/m", "--revision", "v1", "--huggingface-hub-cache", "/data"],
        {"HUGGING_FACE_HUB_TOKEN": "hf_x"},
    )
    spec = plan_download(settings, Path("/tmp/result"), 4242)
    assert spec.argv[1:] == (
        *("-P", "-m", "tessera.launcher.download", "--result", "/tmp/result"),
        *("--log-level", "info"),
        *("--revision", "v1", "--cache-dir", "/data", "--", "o/m"),
    )
    assert spec.environ["HF_TOKEN"] == "hf_x"
    assert spec.environ["LAUNCHER_PID"] == "4242"
