"""What is settled before any process starts: the port, the private folder, the model's files."""

import fcntl
import json
import os
import socket
import stat
from pathlib import Path

import pytest

from tessera.launcher.errors import LaunchError
from tessera.launcher.http_socket import open_http_socket, url_of
from tessera.launcher.model_folder import check_heads, local_folder
from tessera.launcher.run_folder import clear_stale_sockets, run_folder
from tessera.launcher.shared_memory import check_shared_memory, shared_memory_bytes

MIB, GIB = 1 << 20, 1 << 30


def test_a_free_port_is_taken_and_known() -> None:
    with open_http_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener) == f"http://127.0.0.1:{port}"
        with socket.create_connection(("127.0.0.1", port), 10):
            pass
        with pytest.raises(LaunchError, match=f"port {port} on 127.0.0.1 is taken"):
            open_http_socket("127.0.0.1", port)
        with pytest.raises(LaunchError, match="is taken"):
            open_http_socket("0.0.0.0", port)


def test_every_address_of_the_machine_is_reached_as_localhost() -> None:
    with open_http_socket("0.0.0.0", 0) as listener:
        assert url_of(listener) == f"http://localhost:{listener.getsockname()[1]}"


def test_an_address_of_another_machine() -> None:
    with pytest.raises(
        LaunchError, match=r"HOSTNAME=192\.0\.2\.1 is not an address of this machine"
    ):
        open_http_socket("192.0.2.1", 0)


def test_the_run_folder_is_private_and_goes_away(tmp_path: Path) -> None:
    with run_folder(tmp_path) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "shard-0").touch()
    assert list(tmp_path.iterdir()) == []


def test_only_folders_of_launchers_that_are_gone_are_swept(tmp_path: Path) -> None:
    abandoned = tmp_path / "tessera-gone"
    abandoned.mkdir()
    (abandoned / "lock").touch()
    (abandoned / "shard-0").touch()
    unknown = tmp_path / "tessera-notes"  # no lock: not ours
    unknown.mkdir()
    (tmp_path / "tessera-link").symlink_to(unknown)
    with run_folder(tmp_path) as living, run_folder(tmp_path):
        assert living.is_dir()
        assert not abandoned.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tessera-link", "tessera-notes"]


def test_a_lock_that_is_held_keeps_its_folder(tmp_path: Path) -> None:
    held = tmp_path / "tessera-held"
    held.mkdir()
    lock = os.open(held / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with run_folder(tmp_path):
        assert held.is_dir()
    os.close(lock)


def test_no_place_for_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="set TMPDIR"), run_folder(tmp_path / "none"):
        pass


def test_a_dead_socket_is_removed_and_a_living_one_is_not(tmp_path: Path) -> None:
    prefix = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{prefix}-0")
    clear_stale_sockets(prefix, 2)
    assert not Path(f"{prefix}-0").exists()
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(f"{prefix}-1")
        living.listen()
        with pytest.raises(LaunchError, match="another server uses the socket"):
            clear_stale_sockets(prefix, 2)
        assert Path(f"{prefix}-1").exists()


def test_sockets_need_a_folder(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="set SHARD_UDS_PATH"):
        clear_stale_sockets(str(tmp_path / "missing" / "shard"), 2)


def test_a_local_model(model_folder: Path) -> None:
    assert local_folder(str(model_folder)) == model_folder
    assert local_folder("owner/model", str(model_folder)) == model_folder


def test_a_hub_id_is_not_local() -> None:
    assert local_folder("llava-hf/llava-v1.6-mistral-7b-hf") is None


def test_the_demo_model_is_what_no_id_means() -> None:
    folder = local_folder("")
    assert folder is not None and (folder / "config.json").is_file()


@pytest.mark.parametrize("model_id", ["/no/such/folder", "./none", "~/no-such-model"])
def test_a_path_that_is_not_there(model_id: str) -> None:
    with pytest.raises(LaunchError, match=f"MODEL_ID: there is no folder {model_id}"):
        local_folder(model_id)


def test_a_folder_without_its_configuration(model_folder: Path) -> None:
    (model_folder / "config.json").unlink()
    with pytest.raises(LaunchError, match=r"has no config\.json"):
        local_folder(str(model_folder))


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_damaged_configuration(model_folder: Path, text: str) -> None:
    (model_folder / "config.json").write_text(text)
    with pytest.raises(LaunchError, match="cannot be read as JSON"):
        local_folder(str(model_folder))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "world_size", "possible"),
    [
        (6, 2, 3, "1, 2, 6"),
        (6, 2, 4, "1, 2, 6"),
        (32, 8, 64, "1, 2, 4, 8, 16, 32"),
        (32, 8, 16, None),
        (6, 2, 1, None),
        (None, 2, 7, None),  # a default of the model's, which the shards know
    ],
)
def test_heads_that_the_shards_cannot_share(
    model_folder: Path,
    nested: bool,
    heads: int | None,
    kv_heads: int,
    world_size: int,
    possible: str | None,
) -> None:
    text = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = {"text_config": text, "num_attention_heads": 5} if nested else text
    (model_folder / "config.json").write_text(json.dumps(config))
    if possible is None:
        check_heads(model_folder, world_size)
        return
    with pytest.raises(LaunchError, match=f"{world_size} shards; NUM_SHARD can be {possible}\\."):
        check_heads(model_folder, world_size)


def test_pickled_weights_are_not_taken(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(LaunchError, match=r"has no \*\.safetensors"):
        local_folder(str(model_folder))


@pytest.mark.parametrize(
    ("wanted", "kind", "world_size", "total", "warning"),
    [
        (8 * GIB, "xpu", 1, 64 * MIB, "SHM_SIZE asks for 8 GiB of shared memory but /dev/shm has "),
        (8 * GIB, "xpu", 1, 8 * GIB, ""),
        (None, "cuda", 2, 64 * MIB, "2 shards need 1 GiB of shared memory but /dev/shm has 64 MiB"),
        (None, "cuda", 1, 64 * MIB, ""),
        (None, "cpu", 2, 16 * MIB, ""),
        (None, "cpu", 2, 0, ""),
    ],
)
def test_too_little_shared_memory(
    wanted: int | None, kind: str, world_size: int, total: int, warning: str
) -> None:
    said = check_shared_memory(wanted, kind, world_size, total)
    assert said.startswith(warning) and bool(said) == bool(warning)
    if said:
        assert said.endswith(("--shm-size 8g.", "--shm-size 1g."))


def test_the_shared_memory_of_this_machine(tmp_path: Path) -> None:
    assert shared_memory_bytes(tmp_path) > 0
    assert shared_memory_bytes(tmp_path / "none") == 0
