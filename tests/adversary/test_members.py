"""Members that send wrong shares, commit to something else, or accuse others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg import faults, opening, robust, shamir
from fedml_core.secagg.client import SHARE_SIZE, ComplaintError
from fedml_core.secagg.codec import Kind, Reader, Writer
from fedml_core.secagg.secrets import Secret
from tests.adversary.players import BINDING, World, opened_by


def unmasking_of(shares: list[bytes]) -> bytes:
    writer = Writer(Kind.UNMASKING).number(len(shares))
    for share in shares:
        writer.fixed(share, SHARE_SIZE)
    return writer.bytes()


def lied(share: bytes) -> bytes:
    """Return a share of something else."""
    return shamir.to_bytes(shamir.uniform(len(share) // 4))


def answered(world: World, lies: dict[int, list[int]]) -> None:
    """Take every member's shares; `lies` says whose shares which member changes."""
    quorum = world.confirm(world.until_masked())
    for member in world.server.confirmed:
        shares = opened_by(world.clients[member].unmask(quorum))
        for owner in lies.get(member, ()):
            shares[owner] = lied(shares[owner])
        world.server.receive_unmasking(member, unmasking_of(shares))


@pytest.mark.parametrize("liars", [[0], [4, 9], [0, 1]])
def test_wrong_shares_are_found_attributed_and_left_out_of_the_sum(liars: list[int]) -> None:
    # "a secret that does not match what its owner advertised is never returned."
    # "a member is named a liar only for bytes that no honest member passes on, or for wrong shares of more owners than
    # there may be corrupt members: one of those owners is honest, and dealt it right ones."
    world = World(12, corrupt_share=0.17)
    answered(world, {liar: list(range(12)) for liar in liars})
    assert np.array_equal(world.server.unmask(), world.sum_of(range(12)))
    assert world.server.liars == set(liars) and world.server.at_fault() == frozenset(liars)


def test_a_share_that_its_owner_dealt_wrongly_frames_nobody() -> None:
    # "of a wrong share alone, its holder and its owner may each be the cause; shares are not committed to."
    world = World(12, corrupt_share=0.17)
    answered(world, {3: [5], 7: [5]})
    assert np.array_equal(world.server.unmask(), world.sum_of(range(12)))
    assert world.server.liars == set() == world.server.at_fault()


def test_bytes_that_are_no_share_name_their_sender() -> None:
    world = World(8, corrupt_share=0.13)
    quorum = world.confirm(world.until_masked())
    for member in range(8):
        shares = opened_by(world.clients[member].unmask(quorum))
        if member == 2:
            shares[6] = b"\xff" * SHARE_SIZE
        world.server.receive_unmasking(member, unmasking_of(shares))
    assert np.array_equal(world.server.unmask(), world.sum_of(range(8)))
    assert world.server.liars == {2}


def test_one_liar_costs_one_careful_opening_not_one_for_each_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    careful = robust.reconstruct_despite_liars

    def counted(points: Sequence[int], *more: Any) -> robust.Recovered:
        calls.append(len(points))
        return careful(points, *more)

    monkeypatch.setattr(opening, "reconstruct_despite_liars", counted)
    world = World(12, corrupt_share=0.17)
    answered(world, {0: list(range(12))})
    world.server.unmask()
    assert len(calls) <= 3


def test_too_many_liars_mean_no_sum_rather_than_a_wrong_one() -> None:
    world = World(5)
    answered(world, {liar: [2] for liar in (0, 1, 3)})
    before = world.server.masked_total.copy()
    with pytest.raises(SecureAggregationError, match="the secret of member 2 cannot be opened"):
        world.server.unmask()
    assert not np.array_equal(before, world.sum_of(range(5)))
    assert not np.array_equal(world.server.masked_total, world.sum_of(range(5)))


def test_a_member_that_committed_to_another_seed_is_named_and_left_out() -> None:
    world = World(6, corrupt_share=0.2)
    world.advertise()
    world.clients[4]._seed = Secret.fresh(32)
    world.share()
    quorum = world.confirm(world.mask())
    with pytest.raises(SecureAggregationError, match="the secret of member 4 cannot be opened"):
        world.unmask(quorum)
    assert world.server.at_fault() == frozenset({4})


def with_bad_boxes(world: World, sender: int, receivers: list[int]) -> None:
    """Have a member send boxes to some receivers that do not open."""
    places = {member: world.bulletin.place_beside(sender, member) for member in receivers}
    boxes = bytearray(world.server._enrolment.boxes[sender])
    for place in places.values():
        boxes[place * 88] ^= 1
    world.server._enrolment.boxes[sender] = bytes(boxes)


def complaints(world: World) -> None:
    for member in world.server.sharers:
        try:
            world.server.receive_masked(member, *world.masked(member))
        except ComplaintError as complaint:
            world.server.receive_complaint(member, complaint.message)


def test_boxes_that_do_not_open_are_complained_about_and_the_others_go_on() -> None:
    # "with no more corrupt members than stated, whoever more than so many others complain about is at fault."
    world = World(9, corrupt_share=0.12)
    world.advertise()
    world.share()
    with_bad_boxes(world, 5, [1, 2])
    complaints(world)
    survivors = world.server.close_masked()
    assert world.server.complaints == {1: (5,), 2: (5,)}
    total = world.unmask(world.confirm(survivors))
    assert np.array_equal(total, world.sum_of({0, 3, 4, 5, 6, 7, 8}))
    assert world.server.at_fault() == frozenset({5})


def test_a_box_with_something_else_in_it_is_complained_about_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    # Passed on, it would make its receiver look like a liar.
    world = World(5, corrupt_share=0.2)
    world.advertise()
    monkeypatch.setattr(shamir, "to_bytes", lambda shares: b"\xff" * 72)
    bad = world.share_of(2)
    monkeypatch.undo()
    world.server.receive_shares(2, bad)
    for member in (0, 1, 3, 4):
        world.server.receive_shares(member, world.share_of(member))
    world.server.close_shares(BINDING)
    with pytest.raises(ComplaintError, match="members 2 cannot"):
        world.clients[0].receive(world.server.delivery(0), BINDING)


@pytest.mark.parametrize(
    ("accusations", "left_out"),
    [
        ({0: (1,)}, {0}),
        ({0: (1, 2, 3, 4, 5)}, {0}),
        ({0: (5,), 1: (5,)}, {5}),
        ({0: (5,), 1: (5,), 2: (5, 6, 7)}, {5, 2}),
        ({0: (5,), 1: (5, 6)}, {5}),
        ({}, set()),
    ],
)
def test_one_accuser_cannot_frame_an_honest_member(accusations: dict[int, tuple[int, ...]], left_out: set[int]) -> None:
    # "of fewer complaints, either side may be the cause, and the one who complained has dropped out already."
    assert faults.judged(accusations, 1) == left_out


@pytest.mark.parametrize("accused", [(5, 5, 5), (5, 3), (0,), (99,), ()])
def test_a_complaint_cannot_count_twice_or_name_strangers(accused: tuple[int, ...]) -> None:
    world = World(9, corrupt_share=0.12)
    world.advertise()
    world.share()
    message = Writer(Kind.COMPLAINT).numbers(accused).bytes()
    with pytest.raises(SecureAggregationError, match="a complaint names"):
        world.server.receive_complaint(0, message)
    assert world.server.complaints == {} and world.server.at_fault() == frozenset()


def test_who_complained_is_out_of_the_sum() -> None:
    world = World(5)
    world.advertise()
    world.share()
    message, vector = world.masked(0)
    world.server.receive_complaint(0, ComplaintError([1]).message)
    with pytest.raises(SecureAggregationError, match="dropped out"):
        world.server.receive_masked(0, message, vector)
    with pytest.raises(SecureAggregationError, match="too late"):
        world.server.receive_complaint(0, ComplaintError([1]).message)


def test_a_member_cannot_speak_twice_or_out_of_turn() -> None:
    world = World(5)
    advert = world.clients[0].advertise()
    with pytest.raises(SecureAggregationError, match="advertises as member 0"):
        world.server.receive_advert(1, advert)
    with pytest.raises(SecureAggregationError, match="not asked"):
        world.server.receive_advert(7, advert)
    survivors = World(5).until_masked()
    assert Reader(survivors, Kind.SURVIVORS).numbers() == [0, 1, 2, 3, 4]
