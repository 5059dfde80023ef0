"""Whom the server of a secure sum waits for at its end: no longer than masks are left, but for the next round."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from fedml_core.messages import Arrival, Assignment, SecureAnswer, TrainWork
from fedml_core.secagg.masks import add_masks
from fedml_core.training import Training
from server.gathering import Gathered, Order
from server.secagg import SecureGathering
from strategies import FedAvg
from strategies.secure import SecAggPlus, SecureAggregation
from tests.secure_cases import Keys, SecureChannel

SIZE = 5
COUNT = 6
KEYS = Keys(COUNT)
# More than half of six members and one corrupt one.
THRESHOLD = 4


class Liars(SecureChannel):
    """A channel whose clients in `lying` change one byte of the shares that they pass on."""

    lying: frozenset[int] = frozenset()

    def deliver(self, assignments: Mapping[int, Assignment], timeout_s: float | None) -> Iterator[Arrival]:
        """Carry one exchange."""
        for arrival in super().deliver(assignments, timeout_s):
            body = arrival.reply.body
            if arrival.client in self.lying and isinstance(body, SecureAnswer) and "unmasking" in body.parts:
                wrong = bytearray(body.parts["unmasking"])
                wrong[-36] ^= 1
                reply = dataclasses.replace(arrival.reply, body=SecureAnswer({"unmasking": bytes(wrong)}))
                arrival = dataclasses.replace(arrival, reply=reply)
            yield arrival


def gather(channel: SecureChannel, *, following: bool = False) -> Gathered:
    """Return one secure sum of everybody; `following`: whether the same cohort is expected in the next round."""
    strategy = SecureAggregation(FedAvg(), SecAggPlus(corrupt_share=0.2, attempts=1), clip=8.0, max_weight=10)
    spec = channel.trainer.spec
    gathering = SecureGathering(strategy, spec, ("examples", "loss"), channel.keys.witnesses)
    work = TrainWork(Training(), strategy.client_half())
    assignment = Assignment("a-run", 1, spec.fingerprint, torch.zeros(SIZE), work)
    state = strategy.init(spec)
    return gathering.gather(channel, Order(assignment, range(COUNT), state, range(COUNT) if following else ()))


def mean_of(gathered: Gathered) -> torch.Tensor:
    return gathered.total.values / gathered.total.weight


def expected() -> torch.Tensor:
    """Client i has i + 1 examples and moves by i / 2."""
    weights = torch.arange(1.0, COUNT + 1)
    return ((weights - 1) * 0.5 * weights).sum().div(weights.sum()).expand(SIZE)


def unmasking_of(channel: SecureChannel) -> list[int]:
    return [client for stage, client, _ in channel.seen if stage == "unmask"]


def test_shares_that_open_nothing_more_are_not_waited_for() -> None:
    channel = SecureChannel(KEYS, SIZE)
    gathered = gather(channel)
    assert unmasking_of(channel) == list(range(THRESHOLD))
    assert gathered.accepted == tuple(range(COUNT))
    torch.testing.assert_close(mean_of(gathered), expected(), rtol=0, atol=2e-6)


def test_everybody_is_waited_for_where_shares_for_the_next_round_come_along() -> None:
    channel = SecureChannel(KEYS, SIZE)
    gathered = gather(channel, following=True)
    assert unmasking_of(channel) == list(range(COUNT))
    torch.testing.assert_close(mean_of(gathered), expected(), rtol=0, atol=2e-6)


def test_a_wrong_share_makes_the_server_wait_for_the_others() -> None:
    channel = Liars(KEYS, SIZE)
    channel.lying = frozenset({1})
    gathered = gather(channel)
    assert unmasking_of(channel) == list(range(COUNT))
    torch.testing.assert_close(mean_of(gathered), expected(), rtol=0, atol=2e-6)


def test_masks_come_off_before_the_last_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """the server unmasks while replies arrive."""
    channel, at = SecureChannel(KEYS, SIZE), list[int]()

    def noting(total: Any, masks: Any, **settings: Any) -> None:
        at.extend([len(unmasking_of(channel))] * len(masks))
        add_masks(total, masks, **settings)

    monkeypatch.setattr("fedml_core.secagg.opening.add_masks", noting)
    gather(channel, following=True)
    assert at == [THRESHOLD] * COUNT
