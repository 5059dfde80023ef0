"""A server that wants the sums of groups: on a sparse graph, whose members see little of each other."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.survivors import write_survivors
from tests.adversary import weakened
from tests.adversary.malicious_server import MaliciousServer, copied, ring_of, strip_pairs, strip_self
from tests.adversary.players import World

Refused = dict[int, str]


def sparse_world() -> World:
    return World(104, dropout_share=0.05, security_bits=20, length=2)


def asked(server: MaliciousServer, survivors: Sequence[int]) -> Refused:
    """Have everybody confirm one list and unmask; return who refused to, and why."""
    refused: Refused = {}
    signatures: dict[int, bytes] = {}
    message = write_survivors(survivors)
    for member in survivors:
        try:
            signatures[member] = server.world.clients[member].confirm(message)
        except SecureAggregationError as error:
            refused[member] = str(error)
    proof = server.quorum_of(dict(sorted(signatures.items())))
    for member in signatures:
        with contextlib.suppress(SecureAggregationError):
            server.answer(member, proof)
    return refused


def sum_of_group(server: MaliciousServer, group: Sequence[int], gone: Sequence[int]) -> NDArray[np.uint32]:
    """Return the sum of a group's updates, from its vectors and what was opened."""
    bulletin, loot = server.bulletin, server.loot
    total = np.zeros_like(server.vectors[group[0]])
    for member in group:
        total += server.vectors[member]
        strip_self(bulletin, member, loot.seed(member), total)
    for member in gone:
        beside = [other for other in group if member in server.held[other]]
        strip_pairs(bulletin, member, loot.key(member), beside, total)
    return total


# One list that cuts the ring at two places: what is left has too few holders at the cuts.


def cut_at_two_places(server: MaliciousServer) -> tuple[list[int], list[int]]:
    """Return a group on the ring, and the members around it without whom it is by itself."""
    ring, width = ring_of(server.bulletin), server.bulletin.degree // 2
    return ring[width : 3 * width], [*ring[:width], *ring[3 * width : 4 * width]]


def test_a_border_declared_dropped_is_refused_by_everybody() -> None:
    # "the survivors fall apart into groups whose sums could be told apart"
    server = MaliciousServer(sparse_world())
    server.collect()
    _, border = cut_at_two_places(server)
    survivors = [member for member in range(104) if member not in border]
    refused = asked(server, survivors)
    assert set(refused) == set(survivors) and not server.loot.seeds
    assert all("fall apart" in why or "holders of shares survived" in why for why in refused.values())


def test_without_connectedness_the_threshold_stops_those_beside_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    weakened.without_connectedness(monkeypatch)
    server = MaliciousServer(sparse_world())
    server.collect()
    group, border = cut_at_two_places(server)
    refused = asked(server, [member for member in range(104) if member not in border])
    assert all("holders of shares survived" in why for why in refused.values())
    assert {group[0], group[-1]} <= refused.keys()
    assert not server.loot.opens(server.loot.seeds, group[0])


# Two gaps with corrupt members in them, who hold shares: as many as the drawing of the graph may well put there.

MOST_IN_TWO_GAPS = 13
"""Of 20 corrupt members among 200, at a degree of 20 or 22; more are there with a probability below 2^-20."""


def bridged_cut() -> tuple[MaliciousServer, list[int], list[int], Refused]:
    """Return a server whose corrupt members bridge two gaps, the group between, who is declared gone, who refuses."""
    server = MaliciousServer(World(200, corrupt_share=0.1, dropout_share=0.02, security_bits=20, length=2))
    bulletin = server.bulletin
    ring, width = ring_of(bulletin), bulletin.degree // 2
    corrupt, gone = [], []
    for start, count in ((0, 7), (5 * width, MOST_IN_TWO_GAPS - 7)):
        corrupt += ring[start : start + count]
        gone += ring[start + count : start + width]
    keys = {member: copied(server.world.clients[member]._masking.secret()) for member in corrupt}  # type: ignore[union-attr]
    server.collect()
    refused = asked(server, [member for member in range(200) if member not in gone])
    for member in corrupt:
        server.loot.take_all(member, server.held[member])
    group = ring[width : 5 * width]
    for member in group:
        for friend in corrupt:
            if friend in server.held[member]:
                strip_pairs(bulletin, friend, keys[friend], [member], server.vectors[member])
    return server, group, gone, refused


def test_corrupt_members_in_two_gaps_cannot_stand_in_for_the_holders_that_are_gone() -> None:
    # "A2: partitioned graphs: a k-border declared dropped, with colluding members in it."
    server, group, _, refused = bridged_cut()
    assert server.bulletin.degree == 22 and all("holders of shares survived" in why for why in refused.values())
    assert refused and not all(server.loot.opens(server.loot.seeds, member) for member in group)


def test_without_gaps_a_group_between_corrupt_members_is_summed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weakened.without_gaps(monkeypatch)
    server, group, gone, refused = bridged_cut()
    assert server.bulletin.degree == 20 and not refused and len(group) < server.bulletin.quorum
    assert np.array_equal(sum_of_group(server, group, gone), server.world.sum_of(group))


# Boxes withheld from the rim of a group, which is not asked to confirm: nobody corrupt is needed.


def withheld() -> tuple[MaliciousServer, list[int], list[int], Refused]:
    """Return a server that keeps a group's masks inside it, the group, two who are gone, and who refuses."""
    server = MaliciousServer(sparse_world())
    bulletin = server.bulletin
    ring, width = ring_of(bulletin), bulletin.degree // 2
    group, gone = ring[1 : 3 * width - 1], [ring[0], ring[3 * width - 1]]
    rim = [*group[: width - 1], *group[1 - width :]]
    server.collect({member: {*group, *gone} for member in rim})
    survivors = [member for member in range(104) if member not in gone]
    refused: Refused = {}
    signatures: dict[int, bytes] = {}
    for member in survivors:
        if member in rim:
            continue
        try:
            signatures[member] = server.world.clients[member].confirm(write_survivors(survivors))
        except SecureAggregationError as error:
            refused[member] = str(error)
    for member in signatures:
        with contextlib.suppress(SecureAggregationError):
            server.answer(member, server.quorum_of(signatures))
    return server, group, gone, refused


def test_boxes_withheld_from_a_rim_leave_secrets_closed() -> None:
    # "A2 one sum: a server learns one sum of at least a quorum of members, or nothing."
    server, group, _, refused = withheld()
    assert not refused
    closed = [member for member in group if not server.loot.opens(server.loot.seeds, member)]
    assert len(closed) == 6  # those between the rims: half of their holders do not answer


def test_without_the_threshold_floor_a_group_is_summed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weakened.without_threshold_floor(monkeypatch, 5, degree=12)
    server, group, gone, refused = withheld()
    assert not refused and len(group) < server.bulletin.quorum
    assert np.array_equal(sum_of_group(server, group, gone), server.world.sum_of(group))


# A list for each member: the victim's neighbours are gone for enough others, and present for the victim's holders.


def a_list_for_each() -> tuple[MaliciousServer, int]:
    server = MaliciousServer(sparse_world())
    server.collect()
    bulletin = server.bulletin
    ring = ring_of(bulletin)
    victim, beside = ring[0], bulletin.neighbours(ring[0])
    room = bulletin.degree - bulletin.threshold
    missing: dict[int, set[int]] = {member: set() for member in range(104)}
    for target in sorted(beside, key=lambda one: min(ring.index(one), 104 - ring.index(one)), reverse=True):
        candidates = [one for one in bulletin.neighbours(target) if one != victim]
        common = {one: len(set(beside).intersection(bulletin.neighbours(one))) for one in candidates}
        free = [one for one in candidates if len(missing[one]) < room]
        for one in sorted(free, key=lambda one: (len(missing[one]), common[one]))[: bulletin.threshold]:
            missing[one].add(target)
    messages = {member: write_survivors([m for m in range(104) if m not in missing[member]]) for member in range(104)}
    signatures = {member: server.world.clients[member].confirm(messages[member]) for member in range(104)}
    for member in range(104):
        with contextlib.suppress(SecureAggregationError):
            server.answer(member, server.quorum_of({member: signatures[member]}))
    return server, victim


def test_a_list_for_each_member_is_no_quorum_for_anybody() -> None:
    server, _ = a_list_for_each()
    assert not server.loot.seeds and not server.loot.keys


def test_without_quorum_a_victim_is_unmasked_by_its_neighbours_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    weakened.without_quorum(monkeypatch)
    server, victim = a_list_for_each()
    vector = server.vectors[victim].copy()
    strip_self(server.bulletin, victim, server.loot.seed(victim), vector)
    for member in server.bulletin.neighbours(victim):
        strip_pairs(server.bulletin, member, server.loot.key(member), [victim], vector)
    assert np.array_equal(vector, server.world.vectors[victim])
