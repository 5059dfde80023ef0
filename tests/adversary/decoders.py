"""Every decoder of secure aggregation's messages, by kind: a message that is due in a sum, and what reads it.

`test_decoders.py` gives them mutated messages and random bytes; `fuzz.py` what a fuzzer finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedml_core.secagg.assisted import Panel
from fedml_core.secagg.bulletin import Advert, Bulletin
from fedml_core.secagg.client import ComplaintError
from fedml_core.secagg.codec import Kind
from tests.adversary.players import BINDING, World
from tests.fedml_core.secagg.assisted_cases import FIRST_ASSISTANT, Assisted

FIRST = FIRST_ASSISTANT


@dataclass(frozen=True)
class Due:
    """A message, what reads it, and the session of the party that does, where an error ends that session."""

    message: bytes
    read: Callable[[bytes], object]
    session: Any = None


def due(kind: Kind) -> Due:
    """Return the message of a kind that is due in a new sum; only the first reading of it counts."""
    return _assisted(kind) if kind >= Kind.ASSISTANT else _secagg(kind)


def _secagg(kind: Kind) -> Due:
    world = World(4)
    server = world.server
    if kind is Kind.ADVERT:
        message = world.client(0).advertise()
        return Due(message, lambda data: server.receive_advert(Advert.from_bytes(data).member, data))
    world.advertise()
    if kind is Kind.BULLETIN:
        message, parameters = world.bulletin.to_bytes, world.parameters
        return Due(message, lambda data: Bulletin.read(parameters, data, world.roster, world.verify))
    own = world.share_of(0)
    if kind is Kind.SHARES:
        return Due(own, lambda data: server.receive_shares(0, data))
    server.receive_shares(0, own)
    for member in (1, 2, 3):
        server.receive_shares(member, world.share_of(member))
    server.close_shares(BINDING)
    if kind is Kind.DELIVERY:
        client = world.clients[0]
        return Due(server.delivery(0), lambda data: client.receive(data, BINDING), client)
    if kind is Kind.COMPLAINT:
        return Due(ComplaintError([1, 2]).message, lambda data: server.receive_complaint(0, data))
    return _masked(kind, world)


def _masked(kind: Kind, world: World) -> Due:
    client, server = world.clients[0], world.server
    message, vector = world.masked(0)
    if kind is Kind.MASKED:
        return Due(message, lambda data: server.receive_masked(0, data, vector))
    server.receive_masked(0, message, vector)
    for member in (1, 2, 3):
        server.receive_masked(member, *world.masked(member))
    survivors = server.close_masked()
    if kind is Kind.SURVIVORS:
        return Due(survivors, client.confirm, client)
    confirmation = client.confirm(survivors)
    if kind is Kind.CONFIRMATION:
        return Due(confirmation, lambda data: server.receive_confirmation(0, data))
    server.receive_confirmation(0, confirmation)
    for member in (1, 2, 3):
        server.receive_confirmation(member, world.clients[member].confirm(survivors))
    quorum = server.quorum()
    if kind is Kind.QUORUM:
        return Due(quorum, client.unmask, client)
    return Due(client.unmask(quorum), lambda data: server.receive_unmasking(0, data))


def _assisted(kind: Kind) -> Due:
    world = Assisted()
    assistant, server = world.assistants[FIRST], world.server
    if kind is Kind.ASSISTANT:
        return Due(assistant.advertise(), lambda data: server.receive_advert(FIRST, data))
    world.advertise()
    if kind is Kind.ASSISTANTS:
        return Due(server.panel.to_bytes, lambda data: Panel.read(world.parameters, data, world.roster))
    if kind is Kind.CONTRIBUTION:
        message, vector = world.masked(0)
        return Due(message, lambda data: server.receive_contribution(0, data, vector))
    world.contribute()
    roundup = server.roundup(FIRST)
    if kind is Kind.ROUNDUP:
        return Due(roundup, assistant.gather, assistant)
    if kind is Kind.REFUSALS:
        return Due(assistant.gather(roundup), lambda data: server.receive_gathered(FIRST, data))
    server.receive_gathered(FIRST, assistant.gather(roundup))
    for other in (FIRST + 1, FIRST + 2):
        server.receive_gathered(other, world.assistants[other].gather(server.roundup(other)))
    return _witnessed(kind, world)


def _witnessed(kind: Kind, world: Assisted) -> Due:
    assistant, server = world.assistants[FIRST], world.server
    contributors = server.close_contributions()
    if kind is Kind.CONTRIBUTORS:
        return Due(contributors, assistant.witness, assistant)
    if kind is Kind.WITNESS:
        return Due(assistant.witness(contributors), lambda data: server.receive_witness(FIRST, data))
    for one in server.live:
        server.receive_witness(one, world.assistants[one].witness(contributors))
    who, requests = next(iter(server.requests().items()))
    asked = world.assistants[who]
    if kind is Kind.WITNESSES:
        return Due(requests[0], asked.answer, asked)
    message, vector = asked.answer(requests[0])
    return Due(message, lambda data: server.receive_answer(who, data, vector))
