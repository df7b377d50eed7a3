from dataclasses import dataclass

import pytest

from tessera.proto.env import (
    SettingsError,
    boolean,
    byte_size,
    comma_list,
    environment_names,
    integer,
    level_name,
    merged_environment,
    near_misses,
    number,
    parse_flags,
    read_settings,
    setting,
    settings_table,
    shown,
    size_text,
    to_environment,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Settings of an example. Nothing else."""

    port: int = setting(3000, "TCP port", integer(0, 65535))
    max_input_tokens: int | None = setting(
        None, "longest prompt", integer(1), aliases=("MAX_INPUT_LENGTH",)
    )
    ratio: float = setting(0.3, "a share", number(0, 1))
    json_output: bool = setting(False, "log as JSON", boolean)
    origins: tuple[str, ...] = setting((), "who may call", comma_list)
    api_key: str = setting("", "the key", secret=True)
    rank: int = setting(0, "which one", integer(0), internal=True)


def read(**environ: str) -> Example:
    return read_settings(Example, environ)


def flags(*arguments: str, internal: bool = True) -> dict[str, str]:
    return parse_flags("example", "An example.", [Example], arguments, internal=internal)


def test_defaults_and_overrides() -> None:
    assert read() == Example()
    assert read(PORT="80", RATIO="0.5", JSON_OUTPUT="TRUE", ORIGINS="a, b,", HOME="/") == Example(
        port=80, ratio=0.5, json_output=True, origins=("a", "b")
    )


def test_an_empty_value_counts_as_absent() -> None:
    assert read(PORT="", API_KEY="") == Example()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PORT": "http"}, r"PORT='http' must be a whole number\."),
        ({"PORT": "65536"}, r"PORT='65536' must be from 0 to 65535\."),
        ({"MAX_INPUT_TOKENS": "0"}, r"MAX_INPUT_TOKENS='0' must be at least 1\."),
        ({"RATIO": "much"}, r"RATIO='much' must be a number\."),
        ({"RATIO": "nan"}, r"RATIO='nan' must be a finite number"),
        ({"RATIO": "inf"}, r"RATIO='inf' must be a finite number"),
        ({"JSON_OUTPUT": "maybe"}, r"JSON_OUTPUT='maybe' must be true or false\."),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(
    environ: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        read(**environ)


def test_an_alias_means_its_setting() -> None:
    assert read(MAX_INPUT_LENGTH="2048").max_input_tokens == 2048
    assert read(MAX_INPUT_LENGTH="9", MAX_INPUT_TOKENS="9").max_input_tokens == 9
    with pytest.raises(SettingsError, match="mean the same setting; keep one of them"):
        read(MAX_INPUT_LENGTH="8", MAX_INPUT_TOKENS="9")


def test_what_a_setting_becomes_in_an_environment_reads_back() -> None:
    told = Example(port=0, max_input_tokens=7, ratio=1.0, json_output=True, origins=("a", "b"))
    environ = to_environment(told)
    assert "API_KEY" not in environ
    assert read_settings(Example, environ) == told
    assert to_environment(Example()) == {}


def test_a_secret_is_never_shown() -> None:
    assert shown(Example(api_key="sesame", port=1)) == {"API_KEY": "...", "PORT": "1"}
    with pytest.raises(SettingsError) as error:
        read_settings(_Secret, {"PIN": "sesame"})
    assert "sesame" not in str(error.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Secret:
    pin: int = setting(0, "a number", integer(), secret=True)


def test_flags_become_environment_variables() -> None:
    assert flags("--port", "80", "--ratio=0.5", "--max-input-length", "9") == {
        "PORT": "80",
        "RATIO": "0.5",
        "MAX_INPUT_TOKENS": "9",
    }


def test_a_switch_needs_no_value_and_a_list_may_be_repeated() -> None:
    assert flags("--json-output", "--port", "1") == {"JSON_OUTPUT": "true", "PORT": "1"}
    assert flags("--json-output", "false") == {"JSON_OUTPUT": "false"}
    assert flags("--origins", "a,b", "--origins", "c") == {"ORIGINS": "a,b,c"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prot", "80"], "there is no --prot. Did you mean --port?"),
        (
            ["--max-inpt-tokens=9"],
            "there is no --max-inpt-tokens. Did you mean --max-input-tokens?",
        ),
        (["--zzz"], "there is no --zzz. See --help."),
        (["model"], "'model' stands alone"),
        (["--por", "80"], "Did you mean --port?"),
        (["--port"], "expected one argument"),
    ],
)
def test_a_wrong_flag_ends_with_two_and_a_hint(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        flags(*arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_flag_default_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        flags("--help", internal=False)
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Settings of an example:" in text
    assert "--port VALUE TCP port [default: 3000] [env: PORT]" in text
    assert "[env: MAX_INPUT_TOKENS, MAX_INPUT_LENGTH]" in text
    assert "--rank" not in text


def test_what_only_the_launcher_says_is_no_flag_of_its_own() -> None:
    assert flags("--rank", "1") == {"RANK": "1"}
    with pytest.raises(SystemExit):
        flags("--rank", "1", internal=False)


def test_a_flag_displaces_every_name_of_its_setting() -> None:
    environ = {"MAX_INPUT_LENGTH": "5", "PORT": "1", "HOME": "/"}
    merged = merged_environment(environ, {"MAX_INPUT_TOKENS": "9"}, Example)
    assert merged == {"MAX_INPUT_TOKENS": "9", "PORT": "1", "HOME": "/"}
    merged = merged_environment({"MAX_INPUT_TOKENS": "5"}, {"MAX_INPUT_LENGTH": "9"}, Example)
    assert merged == {"MAX_INPUT_LENGTH": "9"}


def test_nearly_a_name_is_warned_about() -> None:
    known = environment_names(Example)
    assert "MAX_INPUT_LENGTH" in known
    warnings = near_misses({"MAX_INPUT_TOKEN": "1", "HOME": "/", "PORTS": "1", "PORT": "1"}, known)
    assert warnings == [
        "the environment has MAX_INPUT_TOKEN, which is no setting. Did you mean MAX_INPUT_TOKENS?"
    ]


def test_the_table_lists_what_people_can_set_once() -> None:
    table = settings_table(Example, Example)
    assert table.count("| `--port` | `PORT` | `3000` | TCP port |\n") == 1
    assert "`MAX_INPUT_TOKENS`, `MAX_INPUT_LENGTH`" in table
    assert "RANK" not in table


@pytest.mark.parametrize(
    ("text", "size"),
    [("8g", 8 << 30), ("64M", 64 << 20), ("1gb", 1 << 30), ("512KiB", 512 << 10), ("1.5g", 3 << 29),
     ("1073741824", 1 << 30), (" 7 b", 7)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["", "g", "8x", "-1g", "8 g g", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="must be a size such as 64m or 8g"):
        byte_size(text)


def test_size_text_is_exact_where_it_can_be() -> None:
    sizes = (0, 7, 1 << 10, 64 << 20, 8 << 30)
    assert [size_text(size) for size in sizes] == ["0 B", "7 B", "1 KiB", "64 MiB", "8 GiB"]
    assert size_text((1 << 30) + 1) == "1024 MiB"


@pytest.mark.parametrize(
    ("text", "level"),
    [("INFO", "info"), ("warn", "warning"), ("trace", "debug"), ("info,router=debug", "info")],
)
def test_log_levels(text: str, level: str) -> None:
    assert level_name(text) == level


@pytest.mark.parametrize("text", ["loud", "router=debug"])
def test_what_is_no_log_level(text: str) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        level_name(text)
