import re
import socket
from pathlib import Path

import pytest

from tessera.launcher.settings import Settings
from tessera.proto.env import SettingsError

# A deployment's file as it stands: two names are its composer's, one setting has its older name.
ENV_FILE = """
MODEL_NAME=llava-v1.6-mistral-7b-hf-tgi
MODEL_ID=llava-hf/llava-v1.6-mistral-7b-hf
TGI_VERSION=latest-intel-xpu
SHM_SIZE=8g
MAX_CONCURRENT_REQUESTS=128
MAX_BATCH_SIZE=4
MAX_TOTAL_TOKENS=4096
MAX_INPUT_LENGTH=2048
MAX_WAITING_TOKENS=10
"""


@pytest.fixture
def env_file(tmp_path: Path) -> str:
    path = tmp_path / "llava.env"
    path.write_text(ENV_FILE)
    return str(path)


def test_a_deployments_environment_file_is_taken_as_it_stands(env_file: str) -> None:
    settings = Settings.read(["--env-file", env_file], {})
    assert settings.warnings == ()
    router = settings.router
    assert router.model_id == "llava-hf/llava-v1.6-mistral-7b-hf"
    assert (router.max_concurrent_requests, router.max_batch_size) == (128, 4)
    assert (router.max_total_tokens, router.max_input_tokens) == (4096, 2048)
    assert router.max_waiting_tokens == 10
    assert settings.launcher.shm_size == 8 << 30


def test_flags_over_environment_over_file_over_defaults(env_file: str) -> None:
    environ = {"MAX_WAITING_TOKENS": "11", "MAX_BATCH_SIZE": "5", "PORT": ""}
    settings = Settings.read(["--env-file", env_file, "--max-batch-size", "6"], environ)
    router = settings.router
    assert (router.max_batch_size, router.max_waiting_tokens) == (6, 11)
    assert (router.max_total_tokens, router.port) == (4096, 3000)


@pytest.mark.parametrize("above", ["flag", "environment"])
def test_either_name_of_a_setting_displaces_both_below(env_file: str, above: str) -> None:
    flags = ["--max-input-tokens", "99"] if above == "flag" else []
    environ = {"MAX_INPUT_TOKENS": "99"} if above == "environment" else {}
    settings = Settings.read(["--env-file", env_file, *flags], environ)
    assert settings.router.max_input_tokens == 99


def test_the_environment_may_name_the_file(env_file: str) -> None:
    assert Settings.read([], {"ENV_FILE": env_file}).router.max_batch_size == 4


def test_quotes_comments_and_exports_of_an_environment_file(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("# a comment\nexport API_KEY='a b#c$HOME'\nPORT=81 # http\n")
    router = Settings.read(["--env-file", str(path)], {}).router
    assert (router.api_key, router.port) == ("a b#c$HOME", 81)


def test_an_environment_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        Settings.read(["--env-file", str(tmp_path / "none")], {})


def test_an_environment_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "env").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="not UTF-8 text"):
        Settings.read(["--env-file", str(tmp_path / "env")], {})


def test_a_near_miss_in_the_environment_is_warned_about() -> None:
    (warning,) = Settings.read([], {"MAX_BATCH_SIZES": "4", "HOME": "/root"}).warnings
    assert warning.endswith("Did you mean MAX_BATCH_SIZE?")


def test_settings_of_the_model_server_that_this_one_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        Settings.read(["--lora-adapters", "some/adapter"], {})
    assert exit_.value.code == 2
    assert "no --lora-adapters here: adapters are not supported" in capsys.readouterr().err


def test_settings_of_the_model_server_that_this_one_can_do_without() -> None:
    unused = "USAGE_STATS is not used: no usage statistics are collected."
    assert Settings.read([], {"USAGE_STATS": "off"}).warnings == (unused,)
    settings = Settings.read(["--trust-remote-code", "--usage-stats", "off", "--port", "80"], {})
    code = "TRUST_REMOTE_CODE is not used: no code from a model's folder is ever run."
    assert settings.warnings == (code, unused)
    assert settings.router.port == 80


def test_a_containers_id_is_no_address_to_listen_on() -> None:
    settings = Settings.read([], {"HOSTNAME": "3f2a9c0d1b2e"})
    assert settings.router.hostname == "0.0.0.0"
    assert settings.warnings == (
        "HOSTNAME='3f2a9c0d1b2e' is no IP address: listening on 0.0.0.0 instead.",
    )


def test_a_container_s_own_name_as_hostname_is_nothing_to_warn_about() -> None:
    settings = Settings.read([], {"HOSTNAME": socket.gethostname()})
    assert (settings.router.hostname, settings.warnings) == ("0.0.0.0", ())


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::", "localhost"])
def test_addresses_to_listen_on(address: str) -> None:
    settings = Settings.read(["--hostname", address], {"HOSTNAME": "3f2a9c0d1b2e"})
    assert (settings.router.hostname, settings.warnings) == (address, ())


def test_a_wrong_hostname_flag_is_an_error() -> None:
    with pytest.raises(SettingsError, match="must be an IP address"):
        Settings.read(["--hostname", "my-host"], {})


def test_what_an_outer_launcher_said_is_not_meant_for_us() -> None:
    settings = Settings.read([], {"RANK": "3", "WORLD_SIZE": "4", "READY_FD": "5"})
    assert (settings.shard.rank, settings.shard.world_size) == (0, 1)
    assert settings.router.ready_fd is None


@pytest.mark.parametrize("flag", ["--quantize", "--isq"])
def test_quantization_goes_to_the_shards_by_any_name(flag: str) -> None:
    assert Settings.read([flag, "Q4K"], {}).shard.quantize == "q4k"
    assert Settings.read([], {"ISQ": "8"}).shard.quantize == "8"
    assert Settings.read(["--dtype", "bfloat16", flag, "bitsandbytes-nf4"], {}).shard.quantize


def test_quantization_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match=r"QUANTIZE='eetq' must be int8 or int4 .* awq or gptq"):
        Settings.read(["--quantize", "eetq"], {})


def test_rules_across_settings_hold_for_any_source(env_file: str) -> None:
    with pytest.raises(SettingsError, match=r"MAX_INPUT_TOKENS=2048 must be below"):
        Settings.read(["--env-file", env_file], {"MAX_TOTAL_TOKENS": "1024"})


def test_help_has_every_setting_of_all_processes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        Settings.read(["--help"], {})
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    flags = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
    assert len(flags) == len(set(flags))
    for flag in ("--model-id", "--num-shard", "--sharded", "--max-input-tokens", "--shm-size",
                 "--dtype", "--max-batch-prefill-tokens", "--waiting-served-ratio"):  # fmt: skip
        assert flag in flags
    assert not {"--rank", "--world-size", "--http-socket-fd", "--ready-fd"} & set(flags)
