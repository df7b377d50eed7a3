"""How a process reads its settings: one dataclass field per setting, flags over environment.

A field `max_input_tokens` is the environment variable `MAX_INPUT_TOKENS` and the flag
`--max-input-tokens`. Each default is written once, in the field, with its unit, range and help.
"""

import argparse
import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class SettingsError(ValueError):
    """A setting is unknown or has an unusable value. The message says what to change."""


@dataclass(frozen=True, slots=True)
class SettingSpec:
    """What is known about one setting besides its default."""

    doc: str
    parse: Callable[[str], Any]
    aliases: tuple[str, ...] = ()  # other environment names, upper case
    secret: bool = False  # never printed
    internal: bool = False  # the launcher tells its children; people need not know it


def setting(
    default: Any,
    doc: str,
    parse: Callable[[str], Any] = str,
    *,
    aliases: tuple[str, ...] = (),
    secret: bool = False,
    internal: bool = False,
) -> Any:
    """One documented dataclass field; README's table and `--help` are generated from these."""
    spec = SettingSpec(doc, parse, aliases, secret, internal)
    return dataclasses.field(default=default, metadata={"setting": spec})


def integer(minimum: int = 0, maximum: int | None = None) -> Callable[[str], int]:
    """A parser for whole numbers in [minimum, maximum]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError("must be a whole number") from None
        if value < minimum or (maximum is not None and value > maximum):
            limit = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise ValueError(f"must be {limit}")
        return value

    return parse


def number(minimum: float, maximum: float | None = None) -> Callable[[str], float]:
    """A parser for finite numbers in [minimum, maximum]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError("must be a number") from None
        if not minimum <= value <= (float("inf") if maximum is None else maximum) or value in (
            float("inf"),
        ):
            limit = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise ValueError(f"must be a finite number, {limit}")
        return value

    return parse


def choice(*values: str) -> Callable[[str], str]:
    """A parser that takes one of `values`."""

    def parse(text: str) -> str:
        if text not in values:
            raise ValueError(f"must be one of {', '.join(values)}")
        return text

    return parse


def boolean(text: str) -> bool:
    """Parse true/false, 1/0, yes/no, on/off in any case."""
    lowered = text.strip().lower()
    if lowered in ("true", "1", "yes", "on"):
        return True
    if lowered in ("false", "0", "no", "off", ""):
        return False
    raise ValueError("must be true or false")


SIZE_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def byte_size(text: str) -> int:
    """Parse docker's sizes: `8g`, `64m`, `1073741824`; units are powers of 1024, `8gb` is `8g`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ValueError("must be a size such as 64m or 8g")
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def size_text(size: int) -> str:
    """A size as `64 MiB`, in the largest unit that leaves a whole number."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size} B"


LOG_LEVELS = {
    "trace": "debug",
    "debug": "debug",
    "info": "info",
    "warn": "warning",
    "warning": "warning",
    "error": "error",
}


def level_name(text: str) -> str:
    """Parse a log level. Of a filter such as `info,router=debug` the part for everything counts."""
    words = [part.strip().lower() for part in text.split(",") if "=" not in part]
    if not words or words[0] not in LOG_LEVELS:
        raise ValueError("must be one of debug, info, warning, error")
    return LOG_LEVELS[words[0]]


def comma_list(text: str) -> tuple[str, ...]:
    """Parse `a,b,c`; spaces around items are dropped, empty items too."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def collector_address(text: str) -> str:
    """Parse the address of an OTLP collector: scheme, host and port, nothing else."""
    if not re.fullmatch(r"https?://[^\s/@?#]+:\d{1,5}/?", text):
        raise ValueError("must be an address such as http://localhost:4317, without a path")
    return text.rstrip("/")


def fields_of(cls: type[Any]) -> Iterable[tuple[str, Any, SettingSpec]]:
    """(field name, default, spec) of every setting of a settings dataclass."""
    for field in dataclasses.fields(cls):
        yield field.name, field.default, field.metadata["setting"]


def environment_names(*classes: type[Any]) -> frozenset[str]:
    """Every environment variable the given settings classes understand."""
    return frozenset(
        name
        for cls in classes
        for field, _, spec in fields_of(cls)
        for name in (field.upper(), *spec.aliases)
    )


def read_settings(cls: type[T], environ: Mapping[str, str]) -> T:
    """Build `cls` from environment variables; an empty value counts as absent.

    Args:
        cls: a frozen dataclass whose fields are made with `setting`.
        environ: usually `os.environ`; passed in so that tests need no monkeypatching.

    Raises:
        SettingsError: a value cannot be parsed, or a name and its alias disagree.
    """
    values: dict[str, Any] = {}
    for field, _, spec in fields_of(cls):
        given = {n: environ[n] for n in (field.upper(), *spec.aliases) if environ.get(n)}
        if len(set(given.values())) > 1:
            both = " and ".join(f"{name}={text!r}" for name, text in given.items())
            raise SettingsError(f"{both} mean the same setting; keep one of them.")
        for name, text in given.items():
            shown = "..." if spec.secret else repr(text)
            try:
                values[field] = spec.parse(text)
            except ValueError as error:
                raise SettingsError(f"{name}={shown} {error}.") from None
    return cls(**values)


def parse_flags(
    program: str,
    description: str,
    classes: Sequence[type[Any]],
    arguments: Sequence[str],
    *,
    internal: bool = True,
    ignored: Iterable[str] = (),
    absent: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Command-line flags as environment variables, so that one reader checks both.

    Prints help and exits 0 on `--help`; exits 2 on a flag that does not exist, naming the nearest.

    Args:
        internal: also offer the settings that only the launcher gives to its children.
        ignored: settings of other servers that are taken, with or without a value, and returned,
            but mean nothing here.
        absent: those that are refused instead, with the reason to tell.
    """
    usage = "%(prog)s [--flag VALUE]... (each flag is also an environment variable)"
    parser = _Parser(prog=program, description=description, usage=usage, allow_abbrev=False)
    parser.absent = {_flag(name): reason for name, reason in (absent or {}).items()}
    seen: set[str] = set()
    for cls in classes:
        group = parser.add_argument_group(_heading(cls))
        for field, default, spec in fields_of(cls):
            if field not in seen and (internal or not spec.internal):
                seen.add(field)
                _add_flag(group, field, default, spec)
    for name in ignored:
        parser.add_argument(
            _flag(name), dest=name.lower(), nargs="?", const="true", help=argparse.SUPPRESS
        )
    given = vars(parser.parse_args(list(arguments)))
    return {
        field.upper(): text if isinstance(text, str) else ",".join(text)
        for field, text in given.items()
        if text is not None
    }


def merged_environment(
    environ: Mapping[str, str], flags: Mapping[str, str], *classes: type[Any]
) -> dict[str, str]:
    """`environ` with `flags` laid over it; a setting given above displaces its other names below.

    `flags` may be any layer of names and texts, an environment file's for instance.
    """
    merged = dict(environ)
    for cls in classes:
        for field, _, spec in fields_of(cls):
            names = (field.upper(), *spec.aliases)
            if any(flags.get(name) for name in names):
                for name in names:
                    merged.pop(name, None)
    merged.update(flags)
    return merged


def to_environment(settings: Any) -> dict[str, str]:
    """The environment variables from which `read_settings` rebuilds `settings`."""
    environ: dict[str, str] = {}
    for field, default, _ in fields_of(type(settings)):
        value = getattr(settings, field)
        if value != default and value is not None:
            environ[field.upper()] = _as_text(value)
    return environ


def shown(settings: Any) -> dict[str, str]:
    """What was set other than the default, for a log line: a secret shows only that it is set."""
    given = to_environment(settings)
    secrets = {field.upper() for field, _, spec in fields_of(type(settings)) if spec.secret}
    return {name: "..." if name in secrets else text for name, text in given.items()}


def settings_table(*classes: type[Any]) -> str:
    """A Markdown table of every setting that people can give, for the README."""
    rows = ["| flag | environment | default | meaning |", "| --- | --- | --- | --- |"]
    seen: set[str] = set()
    for cls in classes:
        for field, default, spec in fields_of(cls):
            if field in seen or spec.internal:
                continue
            seen.add(field)
            names = ", ".join(f"`{name}`" for name in (field.upper(), *spec.aliases))
            plain = "" if default in (None, "", ()) else f"`{_as_text(default)}`"
            doc = spec.doc.replace("|", "\\|")
            rows.append(f"| `--{field.replace('_', '-')}` | {names} | {plain} | {doc} |")
    return "\n".join(rows) + "\n"


def near_misses(environ: Mapping[str, str], known: frozenset[str]) -> list[str]:
    """Warnings about variables that look like a misspelt setting.

    The environment belongs to everybody, so these are warnings, and only for close names.
    """
    warnings = []
    for name in sorted(environ):
        if name in known or len(name) < 6:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.88)
        if near:
            hint = f"Did you mean {near[0]}?"
            warnings.append(f"the environment has {name}, which is no setting. {hint}")
    return warnings


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _flag(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def _heading(cls: type[Any]) -> str:
    return (cls.__doc__ or cls.__name__).splitlines()[0].split(".")[0]


def _add_flag(group: Any, field: str, default: Any, spec: SettingSpec) -> None:
    names = [_flag(name) for name in (field, *spec.aliases)]
    plain = "" if default in (None, "", ()) else f" [default: {_as_text(default)}]"
    variables = ", ".join((field.upper(), *spec.aliases))
    text = f"{spec.doc}{plain} [env: {variables}]".replace("%", "%%")
    extra: dict[str, Any] = {}
    if spec.parse is boolean:
        extra = {"nargs": "?", "const": "true"}
    elif spec.parse is comma_list:
        extra = {"action": "append"}  # may be repeated
    group.add_argument(*names, dest=field, metavar="VALUE", help=text, **extra)


class _Parser(argparse.ArgumentParser):
    """argparse, but an unknown flag is answered with the nearest known one."""

    absent: Mapping[str, str]  # flags of other servers, with the reason for not having them

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._complaint(unknown[0]))
        return known

    def _complaint(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"{argument!r} stands alone; every value follows its flag. See --help."
        flag = argument.split("=")[0]
        if flag in self.absent:
            return f"there is no {flag} here: {self.absent[flag]}."
        flags = [known for action in self._actions for known in action.option_strings]
        near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else "See --help."
        return f"there is no {flag}. {hint}"


def process_environment() -> dict[str, str]:
    """A copy of this process's environment. Called from `main` functions only."""
    return dict(os.environ)
