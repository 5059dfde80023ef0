"""Mutated messages and random bytes at everything that reads: an error of ours or a valid parse, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.bulletin import Advert, Bulletin
from fedml_core.secagg.client import ComplaintError
from fedml_core.secagg.parameters import Parameters
from tests.adversary.players import BINDING, World

Decoder = Callable[[World, bytes], object]

CLIENT: dict[str, Decoder] = {
    "bulletin": lambda w, data: Bulletin.read(w.parameters, data, w.roster, w.verify),
    "delivery": lambda w, data: w.clients[0].receive(data, BINDING),
    "survivors": lambda w, data: w.clients[0].confirm(data),
    "quorum": lambda w, data: w.clients[0].unmask(data),
}
SERVER: dict[str, Decoder] = {
    "advert": lambda w, data: w.server.receive_advert(Advert.from_bytes(data).member, data),
    "shares": lambda w, data: w.server.receive_shares(0, data),
    "masked": lambda w, data: w.server.receive_masked(0, data, w.vectors[0]),
    "complaint": lambda w, data: w.server.receive_complaint(0, data),
    "confirmation": lambda w, data: w.server.receive_confirmation(0, data),
    "unmasking": lambda w, data: w.server.receive_unmasking(0, data),
}
DECODERS = CLIENT | SERVER
NUMBERS = {"advert": 1, "bulletin": 2, "shares": 3, "delivery": 4, "masked": 5, "survivors": 6, "confirmation": 7}
NUMBERS |= {"quorum": 8, "unmasking": 9, "complaint": 10}


@cache
def valid(name: str) -> bytes:
    """Return a valid message of a kind."""
    return ready(name)[1]


def ready(name: str) -> tuple[World, bytes]:
    """Return a world in which a message of a kind is due to or from member 0, and that message."""
    world = World(4)
    first = world.client(0)
    if name == "advert":
        return world, first.advertise()
    world.advertise()
    if name == "bulletin":
        return world, world.bulletin.to_bytes
    own = world.share_of(0)
    if name == "shares":
        return world, own
    world.server.receive_shares(0, own)
    for member in (1, 2, 3):
        world.server.receive_shares(member, world.share_of(member))
    world.server.close_shares(BINDING)
    if name == "delivery":
        return world, world.server.delivery(0)
    if name == "complaint":
        return world, ComplaintError([1, 2]).message
    return later(world, name)


def later(world: World, name: str) -> tuple[World, bytes]:
    message, vector = world.masked(0)
    if name == "masked":
        return world, message
    world.server.receive_masked(0, message, vector)
    for member in (1, 2, 3):
        world.server.receive_masked(member, *world.masked(member))
    survivors = world.server.close_masked()
    if name == "survivors":
        return world, survivors
    confirmation = world.clients[0].confirm(survivors)
    if name == "confirmation":
        return world, confirmation
    world.server.receive_confirmation(0, confirmation)
    for member in (1, 2, 3):
        world.server.receive_confirmation(member, world.clients[member].confirm(survivors))
    quorum = world.server.quorum()
    return world, quorum if name == "quorum" else world.clients[0].unmask(quorum)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Return what changes, cuts, repeats or inserts a piece of a message."""
    at, size = draw(st.integers(0, 1000)), draw(st.integers(0, 9))
    piece = draw(st.binary(max_size=9) | st.sampled_from([b"\0\0\0\0", b"\xff" * 4, b"\0\0\0\1"]))
    times = draw(st.sampled_from([1, 1, 1, 2, 50]))

    def mutate(data: bytes) -> bytes:
        place = at % (len(data) + 1)
        return data[:place] + piece * times + data[place + size :]

    return mutate


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=60)
@given(mutate=mutations(), again=mutations())
def test_a_mutated_message_is_read_or_refused(
    name: str, mutate: Callable[[bytes], bytes], again: Callable[[bytes], bytes]
) -> None:
    world, message = ready(name)
    for data in (mutate(message), again(mutate(message))):
        try:
            DECODERS[name](world, data)
        except SecureAggregationError as error:
            assert str(error)


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=30)
@given(data=st.binary(max_size=400))
def test_random_bytes_are_read_or_refused(name: str, data: bytes) -> None:
    world, _ = ready(name)
    head = b"fvsa\x01" + bytes([NUMBERS[name]])
    for attempt in (data, head + data):
        try:
            DECODERS[name](world, attempt)
        except SecureAggregationError as error:
            assert str(error)


@given(st.text(max_size=200))
def test_random_text_is_no_parameters(text: str) -> None:
    with pytest.raises(SecureAggregationError):
        Parameters.from_text(text)


@pytest.mark.parametrize("name", DECODERS)
def test_the_message_that_is_due_is_read(name: str) -> None:
    world, message = ready(name)
    DECODERS[name](world, message)
    assert len(message) == len(valid(name))
