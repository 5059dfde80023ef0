"""TOML files and `key=value` overrides, read so that a mistake is one line with its place."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from fedml_core.errors import ConfigError

_PLACE = re.compile(r"(?s)(?P<fact>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)")
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table that a TOML file holds.

    Raises: ConfigError: if it is missing, unreadable or not TOML, with line and column.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name another file, or write a project with fedveil init") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}{_place_and_fact(str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{path} nests its values too deep to be read; flatten it") from None


def override(table: dict[str, Any], text: str) -> tuple[str, ...]:
    """Put `key.path=value` into `table`, in place, and return the key's parts.

    Raises: ConfigError: if the text is no assignment, or a part of its path is no table.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError(f"an override must read key=value, such as training.learning_rate=0.05, got {text!r}")
    *parents, last = key.split(".")
    for place, part in enumerate(parents):
        inner = table.setdefault(part, {})
        if isinstance(inner, str):  # strategy = "FedAvg" is short for {name = "FedAvg"}
            inner = table[part] = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(parents[: place + 1])} is no table, so {key} cannot be set")
        table = inner
    table[last] = _value(value.strip())
    return (*parents, last)


def _value(text: str) -> Any:
    """Return what `text` means as a TOML value; text that is none means itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _place_and_fact(message: str) -> str:
    found = _PLACE.fullmatch(message)
    if found is None:
        return f" is not TOML: {message[:1].lower()}{message[1:]}"
    fact = found["fact"][:1].lower() + found["fact"][1:]
    place = f"line {found['line']}, column {found['column']}" if found["line"] else "at its end"
    return f", {place}: not TOML, {fact}"
