"""How a server and a client meet and part: a greeting, an introduction, a refusal, a farewell.

Names and numbers only. What arrives is checked before it is believed, and made printable before anybody reads it: the
other side could send what moves a terminal's cursor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedml_core.errors import ChannelError, ConfigError
from fedml_core.model import ModelSpec
from fedml_core.untrusted import as_text, as_whole, printable
from fedml_core.wire import Frame, from_frame, to_frame

__all__ = [
    "FORMAT",
    "Goodbye",
    "Greeting",
    "Hello",
    "Introduction",
    "NotGreetedError",
    "Refused",
]

FORMAT = 1
"""The version of what is said here and in `fedml_core.messages`; both sides must speak the same."""

_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")  # a client names a folder after it
_MAX_CLIENT = 2**31 - 1


class NotGreetedError(ChannelError):
    """A client was given work before it was greeted, as after a restart that its server did not notice."""


@dataclass(frozen=True)
class Hello:
    """The server's first word to every client: which run this is, its seed, and the model that it trains."""

    run: str
    seed: int
    spec: ModelSpec


@dataclass(frozen=True)
class Introduction:
    """The client's answer: the number that it claims, its name for people (or ""), and the model that it holds."""

    client: int
    name: str
    spec: ModelSpec


@dataclass(frozen=True)
class Refused:
    """Either side's no. `final`: trying again cannot help until somebody changes something."""

    reason: str
    final: bool = True


@dataclass(frozen=True)
class Goodbye:
    """The server's last word: the run is over, and in a few words how."""

    reason: str


Greeting = Hello | Introduction | Refused | Goodbye
_KINDS: Mapping[str, type[Greeting]] = {kind.__name__.lower(): kind for kind in (Hello, Introduction, Refused, Goodbye)}


def greeting_to_frame(greeting: Greeting) -> Frame:
    """Return the wire form of a greeting."""
    body = {**vars(greeting), "format": FORMAT}
    if isinstance(greeting, Hello | Introduction):
        body["spec"] = greeting.spec.to_config()
    return to_frame(type(greeting).__name__.lower(), body)


def greeting_from_frame(frame: Frame) -> Greeting:
    """Return the greeting that a frame holds; its text is printable and of bounded length.

    Raises: ConfigError: if the other side speaks another format. ChannelError: if the frame holds no greeting.
    """
    try:
        tree = from_frame(frame)
        spoken = as_whole(tree["format"])
        if spoken != FORMAT:
            raise ConfigError(
                f"the other side speaks format {spoken} and this side format {FORMAT}; "
                "install the same version of fedveil on both"
            )
        return _greeting(_KINDS[frame.kind], tree)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ChannelError(
            f"the other side's greeting is not one that this version understands ({type(error).__name__}); "
            "is it fedveil, and of the same version?"
        ) from error


def _greeting(kind: type[Greeting], tree: Mapping[str, Any]) -> Greeting:
    if kind is Hello:
        if not _RUN.fullmatch(tree["run"]):
            raise ValueError("a run must be named by letters, digits, '-' and '_'")
        return Hello(tree["run"], as_whole(tree["seed"]), _spec(tree["spec"]))
    if kind is Introduction:
        if not 0 <= as_whole(tree["client"]) <= _MAX_CLIENT:
            raise ValueError("a client's number must be from 0")
        return Introduction(tree["client"], printable(as_text(tree["name"]), 64), _spec(tree["spec"]))
    reason = printable(as_text(tree["reason"]), 1000)
    return Refused(reason, final=tree["final"] is not False) if kind is Refused else Goodbye(reason)


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    """Return a model's layout that a stranger described; `ModelSpec.from_config` itself believes what it is given."""
    for name, shape, dtype in (*config["parameters"], *config["buffers"]):
        if not (
            as_text(name).isprintable() and as_text(dtype).isprintable() and len(name) <= 1000 and len(dtype) <= 40
        ):
            raise ValueError("a tensor's name and type must be printable")
        if any(as_whole(size) < 0 for size in shape):
            raise ValueError("a tensor's sizes must be from 0")
    as_text(config["frozen_digest"])
    return ModelSpec.from_config(config)
