"""A whole round of secure sums through the coordinator: the same model as in the clear, whoever is lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from clients.replay import ReplayCounter
from fedml_core.messages import Assignment, Failure, Refusal, SecureAnswer, SecureWork
from strategies import FedAdam, FedAvg, FedProx, Scaffold
from strategies.secure import AdaptiveRange, SecAggPlus, SecureAggregation
from strategies.strategy import Strategy
from tests.secure_cases import (
    COUNT,
    KEYS,
    SIZE,
    SecureChannel,
    comes_to_the_same_as_in_the_clear,
    in_the_clear,
    secure,
    secure_coordinator,
)


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("inner", [FedAvg(), FedAdam(), FedProx(mu=0.1), Scaffold(population=COUNT)], ids=repr)
def test_any_additive_strategy_runs_unchanged_under_secure_aggregation(inner: Strategy, active: bool) -> None:
    channel = SecureChannel(KEYS, SIZE)
    comes_to_the_same_as_in_the_clear(inner, secure_coordinator(secure(inner, active=active), channel), channel)


def test_a_cohort_that_stays_waits_for_three_exchanges_a_round() -> None:
    coordinator = secure_coordinator(secure(), channel := SecureChannel(KEYS, SIZE))
    list(coordinator.rounds(channel, 3))
    stages = [stage for _, stage in channel.exchanges]
    assert stages == ["advertise", "share", *["mask", "confirm", "unmask"] * 3]


def test_a_semi_honest_run_has_one_exchange_less_and_says_so() -> None:
    coordinator = secure_coordinator(secure(active=False), channel := SecureChannel(KEYS, SIZE))
    reports = list(coordinator.rounds(channel, 2))
    assert [stage for _, stage in channel.exchanges] == ["advertise", "share", *["mask", "unmask"] * 2]
    assert "semi-honest" in reports[0].protection


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "confirm", "unmask"])
def test_a_client_lost_at_any_exchange_leaves_the_sum_of_the_others_exact(stage: str) -> None:
    coordinator = secure_coordinator(secure(), channel := SecureChannel(KEYS, SIZE, lost=[(1, stage, 4)]))
    report = next(coordinator.rounds(channel, 1))
    in_the_sum = stage in ("confirm", "unmask")
    assert report.status == "ok" and report.replies == (COUNT if in_the_sum else COUNT - 1)
    assert list(report.missing) == ([] if in_the_sum else [4])
    counted = [client for client in range(COUNT) if in_the_sum or client != 4]
    weights = torch.tensor([client + 1.0 for client in counted])
    mean = (torch.tensor([0.5 * client for client in counted]) * weights).sum() / weights.sum()
    torch.testing.assert_close(coordinator.state.parameters, mean.expand(SIZE), rtol=0, atol=2e-6)


def test_too_many_lost_leave_the_model_unchanged_and_the_next_attempt_has_fresh_keys() -> None:
    lost = [(1, "mask", client) for client in (0, 1, 2)]
    channel = SecureChannel(KEYS, SIZE, lost=lost)
    coordinator = secure_coordinator(secure(attempts=2), channel)
    report = next(coordinator.rounds(channel, 2))
    assert report.status == "void" and "masked vectors" in report.why
    assert torch.equal(coordinator.state.parameters, torch.zeros(SIZE))
    assert [stage for _, stage in channel.exchanges] == ["advertise", "share", "mask"] * 2
    adverts = [
        reply.body.parts["advert"]
        for stage, _, reply in channel.seen
        if stage == "advertise" and isinstance(reply.body, SecureAnswer)
    ]
    assert len(set(adverts)) == 2 * COUNT
    assert next(coordinator.rounds(channel, 2)).status == "ok"


def test_a_client_that_was_given_another_model_is_excluded_and_the_sum_is_that_of_the_others() -> None:
    """A4 binding: one changed byte of the model at one client is never a sum."""

    def change(stage: str, client: int, assignment: Assignment) -> Assignment:
        if stage == "mask" and client == 2:
            return dataclasses.replace(assignment, parameters=assignment.parameters + 2**-20)
        return assignment

    channel = SecureChannel(KEYS, SIZE, tamper=change)
    report = next(secure_coordinator(secure(), channel).rounds(channel, 1))
    assert [(row.client, row.rule) for row in report.excluded] == [(2, "secure-sum")]
    assert "another model" in report.excluded[0].reason and report.replies == COUNT - 1


@pytest.mark.parametrize("field", ["round", "attempt", "minimum", "bits", "roster", "corrupt_share"])
def test_a_client_that_was_given_other_parameters_is_no_part_of_the_sum(field: str) -> None:
    """A4 binding: one changed parameter at one client is an abort of that client, never a sum with it."""
    channel = SecureChannel(KEYS, SIZE, tamper=lambda *sent: _with_other_parameters(field, *sent))
    report = next(secure_coordinator(secure(), channel).rounds(channel, 1))
    assert report.replies == COUNT - 1 and 2 not in report.participants
    assert [row.client for row in report.excluded] == [2]


def _with_other_parameters(field: str, stage: str, client: int, assignment: Assignment) -> Assignment:
    work = assignment.work
    assert isinstance(work, SecureWork)
    if stage != "advertise" or client != 2:
        return assignment
    other = {"round": 2, "attempt": 2**31, "minimum": 4, "bits": 64, "roster": "cd" * 32, "corrupt_share": 0.25}
    from fedml_core.secagg.parameters import Parameters

    parameters = Parameters.from_text(work.parts["parameters"].decode())
    changed = dataclasses.replace(parameters, **{field: other[field]})  # type: ignore[arg-type]  # one of its fields
    parts = {"context": changed.context, "parameters": changed.to_text().encode()}
    return dataclasses.replace(assignment, work=dataclasses.replace(work, parts=parts))


def test_an_attempt_that_was_begun_before_is_refused_by_a_client_that_began_anew(tmp_path: Path) -> None:
    """A5 replay counter: killed between stages 2 and 4 and asked for the same attempt, it refuses from disk state."""
    channel = SecureChannel(KEYS, SIZE)
    channel.counters[3] = ReplayCounter(tmp_path / "replay.json")
    channel.members[3] = channel.fresh(3)
    offers: list[Assignment] = []

    def kill(stage: str, client: int, assignment: Assignment) -> Assignment:
        if client == 3 and stage == "advertise":
            offers.append(assignment)
        if client == 3 and stage == "confirm":
            channel.members[3] = channel.fresh(3)
        return assignment

    channel.tamper = kill
    report = next(secure_coordinator(secure(), channel).rounds(channel, 1))
    assert report.status == "ok" and report.replies == COUNT
    body = channel.members[3].answer(offers[0]).body
    assert isinstance(body, Refusal) and body.rule == "replay"


def test_nothing_that_leaves_a_client_depends_on_its_update_but_the_masked_vector() -> None:
    """A3 wire leakage: lengths are constant, and no number of a client is beside the vector."""
    sizes: dict[str, set[int]] = {}
    channel = SecureChannel(KEYS, SIZE)
    next(secure_coordinator(secure(), channel).rounds(channel, 1))
    for stage, _, reply in channel.seen:
        assert isinstance(reply.body, SecureAnswer)
        assert set(vars(reply.body)) == {"parts", "vector"}
        sizes.setdefault(stage, set()).add(sum(len(part) for part in reply.body.parts.values()))
    assert {stage: len(each) for stage, each in sizes.items()} == dict.fromkeys(sizes, 1)
    vectors = [
        reply.body.vector
        for stage, _, reply in channel.seen
        if stage == "mask" and isinstance(reply.body, SecureAnswer) and reply.body.vector is not None
    ]
    assert len(vectors) == COUNT
    assert all(vector.shape == vectors[0].shape and vector.dtype == np.uint32 for vector in vectors)


def test_a_site_with_another_roster_is_refused_by_itself_and_named() -> None:
    channel = SecureChannel(KEYS, SIZE, digests={1: "00" * 32})
    report = next(secure_coordinator(secure(), channel).rounds(channel, 1))
    assert [(row.client, row.rule) for row in report.excluded] == [(1, "refused")]
    assert "roster" in report.excluded[0].reason and report.replies == COUNT - 1


def test_a_nan_and_a_weight_beyond_its_range_never_leave_a_client() -> None:
    strategy = SecureAggregation(FedAvg(), SecAggPlus(corrupt_share=0.1, dropout_share=0.3), clip=8.0, max_weight=4)
    channel = SecureChannel(KEYS, SIZE)
    report = next(secure_coordinator(strategy, channel).rounds(channel, 1))
    # Clients 4 and 5 hold 5 and 6 examples.
    assert sorted(report.participants) == [0, 1, 2, 3]
    assert {row.client for row in report.excluded} == {4, 5}
    assert all("max_weight" in row.reason for row in report.excluded)
    failures = [reply.body for stage, client, reply in channel.seen if stage == "mask" and client > 3]
    assert all(isinstance(body, Failure) for body in failures)


def test_the_range_follows_the_updates_by_what_the_sums_made_public() -> None:
    strategy = SecureAggregation(
        FedAvg(), SecAggPlus(corrupt_share=0.1), clip=64.0, max_weight=10, adapt=AdaptiveRange(growth=4.0)
    )
    channel = SecureChannel(KEYS, SIZE)
    coordinator = secure_coordinator(strategy, channel)
    clips = [float(coordinator.state.strategy["clip"]) for _ in coordinator.rounds(channel, 4)]
    assert clips[0] < 64.0 and clips == sorted(clips, reverse=True)
    expected = in_the_clear(FedAvg(), 4)
    torch.testing.assert_close(coordinator.state.parameters, expected.state.parameters, rtol=0, atol=2e-6)


def test_clipped_coordinates_are_counted_in_the_sum_and_reported() -> None:
    strategy = SecureAggregation(FedAvg(), SecAggPlus(corrupt_share=0.1), clip=1.0, max_weight=10)
    report = next(secure_coordinator(strategy, channel := SecureChannel(KEYS, SIZE)).rounds(channel, 1))
    # Client i moves by i / 2: those of clients 3, 4 and 5 are larger than 1, in all 7 coordinates.
    assert report.secure is not None and report.secure["clipped"] == 3 * SIZE
