"""Greetings survive the wire, and bytes from a stranger become a greeting or one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedml_core.errors import ChannelError, ConfigError
from fedml_core.handshake import (
    FORMAT,
    Goodbye,
    Greeting,
    Hello,
    Introduction,
    Refused,
    greeting_from_frame,
    greeting_to_frame,
)
from fedml_core.model import ModelSpec
from fedml_core.untrusted import printable
from fedml_core.wire import Frame

SPEC = ModelSpec.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
GREETINGS: list[Greeting] = [
    Hello("run-1", 2**70, SPEC),
    Introduction(0, "", SPEC),
    Introduction(2**31 - 1, "Grüße ☃", SPEC),
    Refused("no", final=False),
    Refused("no"),
    Goodbye("the run is done after 3 rounds"),
]


@pytest.mark.parametrize("greeting", GREETINGS, ids=lambda greeting: type(greeting).__name__)
def test_a_greeting_survives_the_wire(greeting: Greeting) -> None:
    frame = greeting_to_frame(greeting)
    assert frame.kind == type(greeting).__name__.lower()
    assert greeting_from_frame(frame) == greeting
    if isinstance(greeting, Hello):
        read = greeting_from_frame(frame)
        assert isinstance(read, Hello) and read.spec.fingerprint == SPEC.fingerprint


@pytest.mark.parametrize("greeting", GREETINGS, ids=lambda greeting: type(greeting).__name__)
def test_every_greeting_says_its_format_and_another_is_refused_with_the_remedy(greeting: Greeting) -> None:
    frame = greeting_to_frame(greeting)
    for other in (FORMAT + 1, 0):
        strange = Frame(frame.kind, frame.header.replace(f'"format":{FORMAT}', f'"format":{other}'))
        with pytest.raises(ConfigError, match=f"speaks format {other} and this side format {FORMAT}; install the same"):
            greeting_from_frame(strange)


Change = Callable[[dict[str, Any]], object]
BROKEN: dict[str, Change] = {
    "no format": lambda tree: tree.pop("format"),
    "format in words": lambda tree: tree.update(format="1"),
    "no run": lambda tree: tree.pop("run"),
    "run is a number": lambda tree: tree.update(run=1),
    "run is a path": lambda tree: tree.update(run="../run"),
    "run ends its line": lambda tree: tree.update(run="run\n"),
    "seed is a truth value": lambda tree: tree.update(seed=True),
    "seed is a fraction": lambda tree: tree.update(seed=0.5),
    "no spec": lambda tree: tree.pop("spec"),
    "spec is a list": lambda tree: tree.update(spec=[]),
    "no buffers": lambda tree: tree["spec"].pop("buffers"),
    "rows of two": lambda tree: tree["spec"].update(parameters=[["a", [1]]]),
    "a name is a number": lambda tree: tree["spec"].update(parameters=[[1, [1], "float32"]]),
    "a name moves the cursor": lambda tree: tree["spec"].update(parameters=[["\x1b[2J", [1], "float32"]]),
    "a name without end": lambda tree: tree["spec"].update(parameters=[["a" * 1001, [1], "float32"]]),
    "a shape is text": lambda tree: tree["spec"].update(parameters=[["a", "12", "float32"]]),
    "a size is negative": lambda tree: tree["spec"].update(parameters=[["a", [-1], "float32"]]),
    "a size is a truth value": lambda tree: tree["spec"].update(parameters=[["a", [True], "float32"]]),
    "a digest is a list": lambda tree: tree["spec"].update(frozen_digest=[]),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_hello_that_is_none_is_one_clear_error(change: Change) -> None:
    tree = json.loads(greeting_to_frame(Hello("run", 1, SPEC)).header)
    change(tree)
    with pytest.raises(ChannelError, match="not one that this version understands .*; is it fedveil"):
        greeting_from_frame(Frame("hello", json.dumps(tree)))


@pytest.mark.parametrize("client", [-1, 2**31, 1.0, True, "1", None])
def test_a_clients_number_is_a_whole_number_in_range(client: Any) -> None:
    tree = {**json.loads(greeting_to_frame(Introduction(1, "a", SPEC)).header), "client": client}
    with pytest.raises(ChannelError):
        greeting_from_frame(Frame("introduction", json.dumps(tree)))


def test_text_from_the_other_side_is_printable_and_bounded() -> None:
    long = "\x1b]0;owned\x07\n" + "a" * 5000
    for greeting in (Introduction(1, long, SPEC), Refused(long), Goodbye(long)):
        read = greeting_from_frame(greeting_to_frame(greeting))
        text = read.name if isinstance(read, Introduction) else getattr(read, "reason", "")
        assert text.startswith("?]0;owned??aaa") and text.isprintable()
        assert len(text) <= 1000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = ("run", "seed", "spec", "client", "name", "reason", "final")


@given(
    st.sampled_from(["hello", "introduction", "refused", "goodbye", "train", ""]),
    st.dictionaries(st.sampled_from(KEYS), JSON).map(lambda tree: {"format": FORMAT, **tree}) | JSON,
)
def test_whatever_a_stranger_sends_is_a_greeting_or_a_clear_error(kind: str, tree: Any) -> None:
    try:
        read = greeting_from_frame(Frame(kind, json.dumps(tree)))
    except (ChannelError, ConfigError) as error:
        assert str(error)
    else:
        assert type(read).__name__.lower() == kind


@given(st.text())
def test_what_is_printable_stays_and_everything_else_becomes_a_question_mark(text: str) -> None:
    shown = printable(text, 50)
    assert len(shown) == min(len(text), 50)
    assert all(b == (a if a.isprintable() else "?") for a, b in zip(text, shown, strict=False))
