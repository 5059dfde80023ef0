"""A server that tells members different things about who survived, and one that asks again."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import numpy as np
import pytest

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.client import ClientSession
from fedml_core.secagg.survivors import survivors_digest, write_survivors
from tests.adversary import weakened
from tests.adversary.malicious_server import MaliciousServer
from tests.adversary.players import World

VICTIM = 3


def two_stories(kind: Callable[..., ClientSession]) -> MaliciousServer:
    """Ask everybody for the sum with the victim and for the sum without it, each with a full quorum."""
    server = MaliciousServer(World(7, corrupt_share=0.15, kind=kind))
    server.collect()
    everybody = list(range(7))
    without = [member for member in everybody if member != VICTIM]
    for survivors in (everybody, without):
        signatures: dict[int, bytes] = {}
        for member in survivors:
            with contextlib.suppress(SecureAggregationError):
                signatures[member] = server.world.clients[member].confirm(write_survivors(survivors))
        for member in signatures:
            with contextlib.suppress(SecureAggregationError):
                server.answer(member, server.quorum_of(signatures))
    return server


def test_a_second_list_gets_no_answer() -> None:
    # "for no member does it give away both kinds of share, whatever it is sent."
    server = two_stories(ClientSession)
    assert server.loot.opens(server.loot.seeds, VICTIM)
    assert VICTIM not in server.loot.keys


def test_without_one_list_the_victims_update_is_the_servers() -> None:
    server = two_stories(weakened.WithoutOneList)
    assert np.array_equal(server.expose(VICTIM), server.world.vectors[VICTIM])


def collusion() -> MaliciousServer:
    """Pool what the colluding members 0 to 2 of ten hold, before anybody is asked to unmask."""
    server = MaliciousServer(World(10, corrupt_share=0.3))
    server.collect()
    for member in range(3):
        server.loot.take_all(member, server.held[member])
    return server


def test_so_many_colluding_members_as_stated_open_nothing() -> None:
    server = collusion()
    assert server.bulletin.threshold == 7
    assert not server.loot.opens(server.loot.seeds, VICTIM) and not server.loot.opens(server.loot.keys, VICTIM)


def test_without_the_threshold_floor_colluding_members_open_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    weakened.without_threshold_floor(monkeypatch, 3)
    server = collusion()
    assert np.array_equal(server.expose(VICTIM), server.world.vectors[VICTIM])


def half_and_half() -> MaliciousServer:
    """Tell one half that the victim survived, the other that it is gone; colluders 0 and 1 sign and give everything."""
    server = MaliciousServer(World(10, corrupt_share=0.2))
    server.collect()
    everybody = list(range(10))
    without = [member for member in everybody if member != VICTIM]
    for member in (0, 1):
        server.loot.take_all(member, server.held[member])
    for survivors, told in ((everybody, (3, 2, 4, 5)), (without, (6, 7, 8, 9))):
        signatures = {member: server.world.clients[member].confirm(write_survivors(survivors)) for member in told}
        for colluder in (0, 1):
            session = server.world.clients[colluder]
            signatures[colluder] = session._sign(digest_confirmed(server, survivors))
        for member in told:
            with contextlib.suppress(ThresholdError):
                server.answer(member, server.quorum_of(signatures))
    return server


def digest_confirmed(server: MaliciousServer, survivors: list[int]) -> bytes:
    return survivors_digest(server.world.clients[0]._bound, survivors)


def test_two_halves_told_different_stories_both_lack_a_quorum() -> None:
    # "a quorum is counted by members, each once, who signed the very same survivors."
    # "the lists are the server's word; a quorum of signatures makes them everybody's."
    server = half_and_half()
    assert set(server.loot.seeds[VICTIM]) == set(server.loot.keys[VICTIM]) == {0, 1}


def test_without_quorum_the_threshold_still_stands_between_two_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    weakened.without_quorum(monkeypatch)
    server = half_and_half()
    assert len(server.loot.seeds[VICTIM]) == len(server.loot.keys[VICTIM]) == 6 < server.bulletin.threshold


def test_without_both_the_victims_update_is_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    weakened.without_quorum(monkeypatch)
    weakened.without_threshold_floor(monkeypatch, 6)
    server = half_and_half()
    assert np.array_equal(server.expose(VICTIM), server.world.vectors[VICTIM])


def test_signatures_of_others_twice_or_of_strangers_make_no_quorum() -> None:
    server = MaliciousServer(World(5))
    server.collect()
    message = write_survivors(range(5))
    signatures = {member: server.world.clients[member].confirm(message) for member in range(5)}
    one = signatures[0]
    proofs: tuple[dict[int, bytes], ...] = (
        {0: one, 1: one, 2: one},
        {0: one},
        {},
        {0: one, 1: signatures[2], 2: signatures[1]},
    )
    for member, proof in enumerate(proofs):
        with pytest.raises(ThresholdError, match="the quorum is 3"):
            server.world.clients[member].unmask(server.quorum_of(proof))
    with pytest.raises(SecureAggregationError):
        server.world.clients[4].unmask(server.quorum_of({0: one, 1: signatures[1], 9: signatures[2]}))


class Schedule:
    """A random malicious server: random boxes, models, lists, signatures and repetitions; member 0 colludes."""

    def __init__(self, seed: int, count: int, kind: Callable[..., ClientSession] = ClientSession) -> None:
        self.chooser = random.Random(seed)
        self.server = MaliciousServer(World(count, corrupt_share=1 / count + 1e-9, kind=kind, length=2))
        self.lists = [self.random_list(count) for _ in range(self.chooser.randrange(1, 4))]
        self.bindings = [bytes([place]) * 32 for place in range(self.chooser.randrange(1, 3))]

    def random_list(self, count: int) -> list[int]:
        size = self.chooser.choice([count, count, count - 1, count - 1, count - 2, count // 2])
        members = sorted(self.chooser.sample(range(count), size))
        return members if self.chooser.random() < 0.9 else [*members, members[-1]]

    def play(self) -> None:
        world, server, chooser = self.server.world, self.server, self.chooser
        for member in world.server.sharers:
            senders = set(chooser.sample(world.members, chooser.choice([len(world.members)] * 12 + [2, 4])))
            with contextlib.suppress(SecureAggregationError):
                world.clients[member].receive(server.delivery_from(member, senders), chooser.choice(self.bindings))
                world.clients[member].mask(world.vectors[member].copy())
            server.held[member] = {owner: bytes(secret.view()) for owner, secret in world.clients[member]._held.items()}
        server.loot.take_all(0, server.held[0])
        signed: list[dict[int, bytes]] = [{} for _ in self.lists]
        for _ in range(12 * len(world.members)):
            place, member = chooser.randrange(len(self.lists)), chooser.choice(world.members)
            with contextlib.suppress(SecureAggregationError):
                if chooser.random() < 0.4:
                    signed[place][member] = world.clients[member].confirm(write_survivors(self.lists[place]))
                elif len(signed[place]) > chooser.randrange(len(world.members)):
                    server.answer(member, server.quorum_of(signed[place]))

    def both_kinds_from_one(self) -> bool:
        """Say whether an honest member gave both kinds of share of anybody."""
        loot = self.server.loot
        return any((holders.keys() & loot.keys.get(owner, {}).keys()) - {0} for owner, holders in loot.seeds.items())

    def both_secrets(self) -> bool:
        loot = self.server.loot
        return any(loot.opens(loot.seeds, owner) and loot.opens(loot.keys, owner) for owner in loot.seeds)


def test_no_random_schedule_gets_both_kinds_of_share() -> None:
    # "A2 dual-share: over random malicious schedules (overlapping lists, duplicate ids, different U3 per client,
    # repeated unmask) no client ever emits both share types for one peer, and no schedule with 2t > k+corrupt gives the
    # server t of both."
    answered = 0
    for seed in range(150):
        schedule = Schedule(seed, 6)
        schedule.play()
        assert not schedule.both_kinds_from_one() and not schedule.both_secrets()
        answered += bool(schedule.server.loot.seeds.keys() - {0})
    assert answered > 30  # schedules that nobody answers would prove nothing


def test_random_schedules_get_both_kinds_from_members_that_answer_twice() -> None:
    found = 0
    for seed in range(40):
        schedule = Schedule(seed, 6, weakened.WithoutOneList)
        schedule.play()
        found += schedule.both_kinds_from_one()
    assert found > 0
