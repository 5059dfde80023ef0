"""Mutated messages and random bytes at what assisted sums and transcripts read: an error of ours, or a valid parse."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg import transcript
from fedml_core.secagg.assisted import Panel
from fedml_core.secagg.codec import Kind
from tests.adversary.test_decoders import mutations
from tests.fedml_core.secagg.assisted_cases import FIRST_ASSISTANT, Assisted

FIRST = FIRST_ASSISTANT
KINDS = {
    "advert": Kind.ASSISTANT,
    "panel": Kind.ASSISTANTS,
    "contribution": Kind.CONTRIBUTION,
    "roundup": Kind.ROUNDUP,
    "gathered": Kind.REFUSALS,
    "contributors": Kind.CONTRIBUTORS,
    "witness": Kind.WITNESS,
    "request": Kind.WITNESSES,
    "answer": Kind.ANSWER,
}


def ready(name: str) -> tuple[bytes, Callable[[bytes], object]]:
    """Return the message of a kind that is due in a sum, and what reads it."""
    world = Assisted()
    assistant, server = world.assistants[FIRST], world.server
    if name == "advert":
        return assistant.advertise(), lambda data: server.receive_advert(FIRST, data)
    world.advertise()
    if name == "panel":
        return server.panel.to_bytes, lambda data: Panel.read(world.parameters, data, world.roster)
    if name == "contribution":
        message, vector = world.masked(0)
        return message, lambda data: server.receive_contribution(0, data, vector)
    world.contribute()
    roundup = server.roundup(FIRST)
    if name == "roundup":
        return roundup, assistant.gather
    if name == "gathered":
        return assistant.gather(roundup), lambda data: server.receive_gathered(FIRST, data)
    server.receive_gathered(FIRST, assistant.gather(roundup))
    for other in (FIRST + 1, FIRST + 2):
        server.receive_gathered(other, world.assistants[other].gather(server.roundup(other)))
    contributors = server.close_contributions()
    if name == "contributors":
        return contributors, assistant.witness
    if name == "witness":
        return assistant.witness(contributors), lambda data: server.receive_witness(FIRST, data)
    for one in server.live:
        server.receive_witness(one, world.assistants[one].witness(contributors))
    who, requests = next(iter(server.requests().items()))
    asked = world.assistants[who]
    if name == "request":
        return requests[0], asked.answer
    message, vector = asked.answer(requests[0])
    return message, lambda data: server.receive_answer(who, data, vector)


@pytest.mark.parametrize("name", KINDS)
def test_the_message_that_is_due_is_read(name: str) -> None:
    message, read = ready(name)
    assert message[5] == KINDS[name]
    read(message)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40)
@given(mutate=mutations(), data=st.binary(max_size=300))
def test_a_mutated_message_and_random_bytes_are_read_or_refused(
    name: str, mutate: Callable[[bytes], bytes], data: bytes
) -> None:
    message, read = ready(name)
    for attempt in (mutate(message), data, b"fvsa\x01" + bytes([KINDS[name]]) + data):
        try:
            read(attempt)
        except SecureAggregationError as error:
            assert str(error)


@settings(max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just("secagg+"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        max_leaves=9,
    )
)
def test_whatever_json_is_given_as_a_transcript_has_findings(value: Any) -> None:
    findings = transcript.check(json.loads(json.dumps(value)))
    assert findings and any(finding.verdict == "failed" for finding in findings)
