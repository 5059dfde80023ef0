"""Other keys, members, models and sessions: everything that a message could be taken from or put into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.bulletin import Advert, Bulletin
from fedml_core.secagg.client import ClientSession, ComplaintError
from fedml_core.secagg.codec import Kind, Writer
from fedml_core.secagg.party import Party
from fedml_core.secagg.server import ServerSession
from fedml_core.secagg.survivors import write_survivors
from tests.adversary import weakened
from tests.adversary.malicious_server import MaliciousServer
from tests.adversary.players import BINDING, World, boxes_of, identity, opened_by, parameters_of

VICTIM = 3


def invented_company() -> tuple[World, NDArray[np.uint32]]:
    """Surround a victim that believes every signature with the server's own members; return the sum less theirs."""
    world = World(5)
    for member in world.members:
        sign = identity(member if member == VICTIM else 99).sign
        world.clients[member] = ClientSession(
            world.parameters, Party(member, world.roster, sign, weakened.believe_everybody)
        )
    world.server = ServerSession(world.parameters, range(5), world.roster, verify=weakened.believe_everybody)
    return world, world.run() - world.sum_of(set(range(5)) - {VICTIM})


def test_members_with_other_keys_than_the_pinned_ones_are_refused_by_everybody() -> None:
    # "substituted keys: flip one key byte, all honest abort"
    world = World(5)
    world.advertise()
    adverts = list(world.bulletin.adverts)
    fresh = Advert.from_bytes(ClientSession(world.parameters, Party(1, {}, identity(99).sign)).advertise())
    adverts[1] = fresh
    writer = Writer(Kind.BULLETIN).number(5)
    for advert in adverts:
        advert.write(writer)
    for client in world.clients.values():
        with pytest.raises(SecureAggregationError, match="member 1 is not signed"):
            client.read_bulletin(writer.bytes())


def test_without_signatures_an_invented_company_gives_the_victim_away() -> None:
    world, found = invented_company()
    assert np.array_equal(found, world.vectors[VICTIM])


def test_the_victim_leaves_an_invented_company() -> None:
    world = World(5)
    advert = world.clients[VICTIM].advertise()
    others = [ClientSession(world.parameters, Party(m, {}, identity(99).sign)) for m in (0, 1, 2, 4)]
    adverts = sorted([advert, *(one.advertise() for one in others)], key=lambda data: data[6:10])
    data = Writer(Kind.BULLETIN).number(5).bytes() + b"".join(one[6:] for one in adverts)
    with pytest.raises(SecureAggregationError, match="member 0 is not signed by its identity key"):
        world.clients[VICTIM].read_bulletin(data)


def test_a_bulletin_with_another_advert_of_oneself_is_refused() -> None:
    world = World(4)
    world.advertise()
    again = world.client(0)
    again.advertise()
    with pytest.raises(SecureAggregationError, match="does not hold member 0's advert as it was sent"):
        again.share(world.bulletin)


def test_a_bulletin_that_was_checked_against_another_roster_or_parameters_is_refused() -> None:
    for other in (
        lambda w: Bulletin.checked(w.parameters, w.bulletin.adverts, dict(w.roster)),
        lambda w: dataclasses.replace(w.bulletin, parameters=parameters_of(minimum=3)),
    ):
        world = World(4)
        world.advertise()
        with pytest.raises(SecureAggregationError, match="not checked against this member's parameters and roster"):
            world.clients[0].share(other(world))


@pytest.mark.parametrize("missing", [1, 2])
def test_a_shrunken_cohort_is_refused(missing: int) -> None:
    world = World(5, minimum=5)
    messages = {member: world.clients[member].advertise() for member in world.members}
    for member in range(5 - missing):
        world.server.receive_advert(member, messages[member])
    with pytest.raises(ThresholdError):
        world.server.close_adverts()
    data = Writer(Kind.BULLETIN).number(5 - missing).bytes() + b"".join(messages[m][6:] for m in range(5 - missing))
    with pytest.raises(ThresholdError, match="the minimum is 5"):
        world.clients[0].read_bulletin(data)


def swapped_model() -> World:
    """Give the victim another model than the others, whose updates are nothing; ignore that it says so."""
    world = World(5, length=50)
    for member in world.members:
        if member != VICTIM:
            world.vectors[member][:] = 0
    world.advertise()
    world.share()
    for member in world.members:
        binding = bytes(32) if member == VICTIM else BINDING
        _, vector = world.masked(member, binding)
        message = Writer(Kind.MASKED).fixed(world.server.bound, 32).bytes()
        world.server.receive_masked(member, message, vector)
    return world


def test_who_was_given_another_model_is_excluded_by_its_own_word() -> None:
    # "A4 binding: change one byte of model at one client: result is an abort, never a sum."
    world = World(5)
    world.advertise()
    world.share()
    message, vector = world.masked(VICTIM, bytes(32))
    with pytest.raises(SecureAggregationError, match="member 3 masked for another model"):
        world.server.receive_masked(VICTIM, message, vector)


def test_a_server_that_ignores_it_finds_no_sum_and_no_update() -> None:
    # "a mask between two members belongs to one session, model and work, and has opposite signs at its two ends."
    # "whoever knows one member's secret key knows its masks with everybody; the server does for those who are lost."
    world = swapped_model()
    survivors = world.server.close_masked()
    signatures = {member: world.clients[member].confirm(survivors) for member in world.members}
    with pytest.raises(SecureAggregationError, match="member 3 did not sign"):
        world.server.receive_confirmation(VICTIM, signatures.pop(VICTIM))
    for member, signature in signatures.items():
        world.server.receive_confirmation(member, signature)
    total = world.unmask(world.server.quorum())
    same = np.count_nonzero(total == world.vectors[VICTIM])
    assert same < 3  # of 50; masks that do not cancel leave nothing


def test_without_binding_the_model_that_only_the_victim_saw_tells_its_update(monkeypatch: pytest.MonkeyPatch) -> None:
    weakened.without_binding(monkeypatch)
    world = swapped_model()
    total = world.unmask(world.confirm(world.server.close_masked()))
    assert np.array_equal(total, world.vectors[VICTIM])


@pytest.mark.parametrize("field", ["run", "round", "attempt", "length", "minimum", "corrupt_share", "roster"])
def test_a_member_with_any_other_parameter_is_in_no_sum(field: str) -> None:
    # "A4 binding: change one byte of round, attempt, roster or any parameter at one client: an abort, never a sum."
    other = {"run": "s", "round": 2, "attempt": 1, "length": 9, "minimum": 3, "corrupt_share": 0.1, "roster": "cd"}
    world = World(4)
    stranger = ClientSession(parameters_of(**{field: other[field]}), Party(3, world.roster, identity(3).sign))
    with pytest.raises(SecureAggregationError, match="member 3 is not signed"):
        world.server.receive_advert(3, stranger.advertise())


REPLAYS: dict[str, Callable[[World, World], object]] = {
    "advert": lambda new, old: new.server.receive_advert(0, old.bulletin.advert(0).to_bytes()),
    "bulletin": lambda new, old: new.clients[0].share(new.clients[0].read_bulletin(old.bulletin.to_bytes)),
}


@pytest.mark.parametrize("change", [{"attempt": 1}, {"round": 2}, {"run": "s"}])
@pytest.mark.parametrize("name", REPLAYS)
def test_adverts_and_bulletins_of_another_attempt_are_refused(name: str, change: dict[str, Any]) -> None:
    old, new = World(4), World(4, **change)
    old.advertise()
    if name == "bulletin":
        new.advertise()
    with pytest.raises(SecureAggregationError):
        REPLAYS[name](new, old)


@pytest.mark.parametrize("change", [{}, {"attempt": 1}])
def test_boxes_of_another_session_sender_or_receiver_never_open(change: dict[str, Any]) -> None:
    # "replayed ciphertexts rejected 100 %"
    for which in ("past", "other sender", "other receiver", "zeros"):
        old, new = World(4), World(4, **change)
        for world in (old, new):
            world.advertise()
            world.share()
        boxes = boxes_of(new.server.delivery(0))
        boxes[2] = {
            "past": boxes_of(old.server.delivery(0))[2],
            "other sender": boxes[3],
            "other receiver": boxes_of(new.server.delivery(1))[2],
            "zeros": bytes(88),
        }[which]
        with pytest.raises(ComplaintError, match="members 2 cannot"):
            new.clients[0].receive(delivery_of(boxes), BINDING)


def delivery_of(boxes: dict[int, bytes]) -> bytes:
    writer = Writer(Kind.DELIVERY).number(len(boxes))
    for sender, box in sorted(boxes.items()):
        writer.number(sender).fixed(box, 88)
    return writer.bytes()


def test_confirmations_and_quorums_of_another_model_or_attempt_are_worth_nothing() -> None:
    old, new = World(4), World(4, attempt=1)
    quorum = old.confirm(old.until_masked())
    survivors = new.until_masked()
    with pytest.raises(SecureAggregationError, match="did not sign"):
        new.server.receive_confirmation(0, b"fvsa\x01\x07" + quorum[-64:])
    new.clients[0].confirm(survivors)
    with pytest.raises(ThresholdError, match="0 members confirmed"):
        new.clients[0].unmask(quorum)


def test_a_lost_members_key_opens_nothing_of_what_it_sent_late() -> None:
    # A vector that arrives after its sender was declared gone: its key is opened, its seed never.
    server = MaliciousServer(World(6, corrupt_share=0.2))
    server.collect()
    survivors = [0, 1, 2, 4, 5]
    signatures = {m: server.world.clients[m].confirm(write_survivors(survivors)) for m in survivors}
    for member in survivors:
        server.answer(member, server.quorum_of(signatures))
    assert server.loot.opens(server.loot.keys, VICTIM) and VICTIM not in server.loot.seeds


def test_nothing_is_given_for_who_sent_no_shares() -> None:
    world = World(6, corrupt_share=0.2)
    world.advertise()
    world.share(lost={2})
    quorum = world.confirm(world.mask())
    assert len(opened_by(world.clients[0].unmask(quorum))) == 5
