"""Doubles for secure sums: clients with real sessions behind a channel that can lose or change any message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clients.client import Client
from clients.standing import Counter, Standing
from fedml_core.errors import RefusalError
from fedml_core.message_frames import assignment_from_frame, assignment_to_frame, reply_from_frame, reply_to_frame
from fedml_core.messages import Arrival, Assignment, Reply, SecureWork
from server.coordinator import Coordinator
from server.plan import Plan
from server.secagg import SecureGathering
from server.secure_exchange import Witnesses
from simulations.virtual_sites import AnySite
from strategies import FedAvg
from strategies.secure import SecAggPlus, SecureAggregation
from strategies.strategy import Strategy
from tests.doubles import PullChannel, data_of

DIGEST = "ab" * 32
SIZE = 7
COUNT = 6
Tamper = Callable[[str, int, Assignment], Assignment | None]
"""Given the exchange, the client and what it would be sent: what it is sent, or None for nothing."""


class Keys:
    """Identity keys of `count` members, and the roster that names them."""

    def __init__(self, count: int) -> None:
        self.private = {member: Ed25519PrivateKey.generate() for member in range(count)}
        self.roster = {member: key.public_key().public_bytes_raw() for member, key in self.private.items()}

    def witnesses(self) -> Witnesses:
        """Return what a server believes."""
        return Witnesses(self.roster, DIGEST)


KEYS = Keys(COUNT)


class RememberedAttempts:
    """A counter that outlives the client that it is given to, as a file would."""

    def __init__(self) -> None:
        self.last: dict[str, int] = {}

    def advance(self, run: str, round_number: int, attempt: int) -> None:
        """Refuse what is not newer."""
        if attempt <= self.last.get(run, -1):
            raise RefusalError("replay", f"attempt {attempt} of run {run} is not newer than {self.last[run]}")
        self.last[run] = attempt


class SecureChannel(PullChannel):
    """`PullChannel` whose clients take part in secure sums; every message crosses as a frame.

    `lost`: (round, exchange, client) whose answers never come. `tamper`: changes what clients are sent.
    """

    def __init__(
        self,
        keys: Keys,
        size: int,
        *,
        lost: Sequence[tuple[int, str, int]] = (),
        tamper: Tamper | None = None,
        digests: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(len(keys.private), size)
        self.keys, self.lost, self.tamper = keys, frozenset(lost), tamper
        self.counters: list[Counter] = [RememberedAttempts() for _ in keys.private]
        self.digests = digests or {}
        self.members = {number: self.fresh(number) for number in keys.private}
        self.exchanges: list[tuple[int, str]] = []
        self.seen: list[tuple[str, int, Reply]] = []

    def fresh(self, number: int) -> Client:
        """Return a client process that has just begun, with what its predecessor left on disk."""
        standing = Standing(
            number,
            self.keys.roster,
            self.digests.get(number, DIGEST),
            self.keys.private[number].sign,
            self.counters[number],
            AnySite(),
        )
        load = partial(data_of, number, self.size)
        return Client(number, load, self.trainer, self.memory, standing=standing)

    def deliver(self, assignments: Mapping[int, Assignment], timeout_s: float | None) -> Iterator[Arrival]:
        """Carry one exchange."""
        first = next(iter(assignments.values()))
        assert isinstance(first.work, SecureWork)
        stage = first.work.stage
        self.exchanges.append((first.round, stage))
        for number, assignment in assignments.items():
            sent = self.tamper(stage, number, assignment) if self.tamper else assignment
            if sent is None:
                continue
            reply = self.members[number].answer(assignment_from_frame(assignment_to_frame(sent)))
            if (first.round, stage, number) in self.lost:
                continue
            self.seen.append((stage, number, reply))
            frame = reply_to_frame(reply)
            yield Arrival(number, reply_from_frame(frame), frame.size_bytes)


def secure_coordinator(strategy: SecureAggregation, channel: SecureChannel, **settings: object) -> Coordinator:
    """Return a coordinator of secure sums at round 0."""
    plan, spec = Plan(strategy, **settings), channel.trainer.spec  # type: ignore[arg-type]  # a test's own settings
    gathering = SecureGathering(strategy, spec, ("examples", "loss"), channel.keys.witnesses)
    state = Coordinator.begin(plan, spec, torch.zeros(channel.size), "a-run")
    return Coordinator(plan, spec, state, gathering=gathering)


def secure(inner: Strategy | None = None, **settings: object) -> SecureAggregation:
    protocol = SecAggPlus(corrupt_share=0.2, **settings)  # type: ignore[arg-type]  # a test's own settings
    return SecureAggregation(inner or FedAvg(), protocol, clip=8.0, max_weight=10)


def in_the_clear(strategy: Strategy, rounds: int, without: Mapping[int, int] | None = None) -> Coordinator:
    """Return the coordinator after rounds in the clear; `without`: the client that is lost in a round."""
    channel = PullChannel(COUNT, SIZE)
    plan = Plan(strategy)
    state = Coordinator.begin(plan, channel.trainer.spec, torch.zeros(SIZE), "a-run")
    coordinator = Coordinator(plan, channel.trainer.spec, state)
    for report in coordinator.rounds(channel, rounds):
        lost = (without or {}).get(report.round + 1)
        channel.changes = {} if lost is None else {lost: lambda reply: None}
    return coordinator


def comes_to_the_same_as_in_the_clear(inner: Strategy, coordinator: Coordinator, channel: SecureChannel) -> None:
    """Require of three rounds of secure sums, with everybody, the model and the examples of three in the clear."""
    reports = list(coordinator.rounds(channel, 3))
    expected = in_the_clear(inner, 3)
    assert all(report.status == "ok" and report.replies == COUNT for report in reports)
    # 2^32 / 12 steps to a range of 80: each coordinate of the sum is off by a few 10^-8 of it.
    torch.testing.assert_close(coordinator.state.parameters, expected.state.parameters, rtol=0, atol=2e-6)
    assert reports[-1].metrics["train"]["examples"] == sum(range(1, COUNT + 1))
