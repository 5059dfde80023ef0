"""A whole round of sums with assistants through the coordinator: the same model as in the clear, whoever is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fedml_core.errors import ConfigError
from fedml_core.messages import Arrival, Assignment, Failure, Refusal, SecureAnswer, SecureWork
from fedml_core.secagg import transcript
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.transcript import Verdict
from fedml_core.update import Update
from server.coordinator import Coordinator
from server.plan import Plan
from server.sampling import FixedSampling
from server.secagg_assisted import AssistedGathering
from server.secure_exchange import Witnesses
from server.wording import server_saw
from strategies import FedAdam, FedAvg, FedProx, Scaffold
from strategies.secure import AssistedOneShot, SecureAggregation
from strategies.strategy import Strategy
from tests.secure_cases import (
    COUNT,
    DIGEST,
    KEYS,
    SIZE,
    Keys,
    SecureChannel,
    comes_to_the_same_as_in_the_clear,
)

STAGES = ["assist-advertise", "contribute", "assist-gather", "assist-witness", "assist-answer"]


def assisted(inner: Strategy | None = None, **settings: Any) -> SecureAggregation:
    protocol = AssistedOneShot(**{"assistants": (0, 1, 2), **settings})
    return SecureAggregation(inner or FedAvg(), protocol, clip=8.0, max_weight=10)


def coordinator_of(
    strategy: SecureAggregation, channel: SecureChannel, kept: list[Any] | None = None, **settings: Any
) -> Coordinator:
    """Return a coordinator of assisted sums at round 0; `kept`: is given what each attempt recorded."""
    plan, spec = Plan(strategy, **settings), channel.trainer.spec
    record = None if kept is None else kept.append
    gathering = AssistedGathering(strategy, spec, ("examples", "loss"), channel.keys.witnesses, record=record)
    state = Coordinator.begin(plan, spec, torch.zeros(channel.size), "a-run")
    return Coordinator(plan, spec, state, gathering=gathering)


def mean_of(clients: list[int]) -> torch.Tensor:
    """Return the weighted mean of what clients move by in the first round."""
    weights = torch.tensor([client + 1.0 for client in clients])
    return ((torch.tensor([0.5 * client for client in clients]) * weights).sum() / weights.sum()).expand(SIZE)


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("inner", [FedAvg(), FedAdam(), FedProx(mu=0.1), Scaffold(population=COUNT)], ids=repr)
def test_any_additive_strategy_runs_unchanged_under_assisted_sums(inner: Strategy, active: bool) -> None:
    channel = SecureChannel(KEYS, SIZE)
    comes_to_the_same_as_in_the_clear(inner, coordinator_of(assisted(inner, active=active), channel), channel)
    assert [stage for _, stage in channel.exchanges] == STAGES * 3


def test_the_report_says_who_assisted_and_against_whom_it_holds() -> None:
    reports = []
    for active in (True, False):
        coordinator = coordinator_of(assisted(active=active), channel := SecureChannel(KEYS, SIZE))
        reports.append(next(coordinator.rounds(channel, 1)))
    facts = reports[0].secure
    assert facts is not None
    named = {name: facts[name] for name in ("contributors", "assistants", "threshold", "quorum", "active", "lost")}
    assert named == {
        "contributors": COUNT,
        "assistants": [0, 1, 2],
        "threshold": 1,
        "quorum": 2,
        "active": True,
        "lost": [],
    }
    assert facts["attempts"] == 1 and facts["exchanges"] == 5 and set(facts["stage_seconds"]) == set(STAGES)
    assert "even if it breaks the protocol" in server_saw(reports[0].protection)
    assert "as long as it follows the protocol" in server_saw(reports[1].protection)


def test_assistants_need_not_be_in_the_cohort() -> None:
    strategy = assisted(assistants=(3, 4, 5))
    coordinator = coordinator_of(strategy, channel := SecureChannel(KEYS, SIZE), sampling=FixedSampling(3))
    report = next(coordinator.rounds(channel, 1))
    assert report.status == "ok" and report.replies == report.cohort == 3
    torch.testing.assert_close(coordinator.state.parameters, mean_of(list(report.participants)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("client", [4, 1])
def test_a_client_that_never_contributes_leaves_the_sum_of_the_others_exact(client: int) -> None:
    """Client 1 is an assistant, too, and goes on as one."""
    coordinator = coordinator_of(assisted(), channel := SecureChannel(KEYS, SIZE, lost=[(1, "contribute", client)]))
    report = next(coordinator.rounds(channel, 1))
    assert report.status == "ok" and list(report.missing) == [client]
    others = [other for other in range(COUNT) if other != client]
    torch.testing.assert_close(coordinator.state.parameters, mean_of(others), rtol=0, atol=2e-6)
    assert report.secure is not None and report.secure["lost"] == []


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "contribute"])
def test_one_assistant_lost_at_any_exchange_costs_the_sum_nothing(stage: str, active: bool) -> None:
    channel = SecureChannel(KEYS, SIZE, lost=[(1, stage, 1)])
    coordinator = coordinator_of(assisted(active=active), channel)
    report = next(coordinator.rounds(channel, 1))
    assert report.status == "ok" and report.replies == COUNT
    torch.testing.assert_close(coordinator.state.parameters, mean_of(list(range(COUNT))), rtol=0, atol=2e-6)
    assert report.secure is not None and report.secure["lost"] == [{"assistant": 1, "reason": "it did not answer"}]
    again = 1 if stage == "assist-answer" else 0
    assert [one for _, one in channel.exchanges] == STAGES + ["assist-answer"] * again


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "contribute"])
def test_one_assistant_too_many_lost_makes_the_round_void_and_reveals_nothing(stage: str) -> None:
    channel = SecureChannel(KEYS, SIZE, lost=[(1, stage, 1), (1, stage, 2)])
    coordinator = coordinator_of(assisted(), channel)
    reports = coordinator.rounds(channel, 2)
    report = next(reports)
    assert report.status == "void" and "assistant 2: it did not answer" in report.why
    assert torch.equal(coordinator.state.parameters, torch.zeros(SIZE))
    assert report.secure is not None and report.secure["contributors"] == 0
    # Two attempts, but only one as soon as anybody may have signed.
    assert report.secure["attempts"] == (1 if stage in ("assist-witness", "assist-answer") else 2)
    assert next(reports).status == "ok"


@pytest.mark.parametrize("active", [True, False])
def test_with_five_assistants_any_two_may_be_lost(active: bool) -> None:
    strategy = assisted(assistants=(0, 1, 2, 3, 4), threshold=2, active=active)
    channel = SecureChannel(KEYS, SIZE, lost=[(1, "assist-gather", 4), (1, "assist-answer", 0)])
    coordinator = coordinator_of(strategy, channel)
    report = next(coordinator.rounds(channel, 1))
    assert report.status == "ok" and report.secure is not None
    assert [row["assistant"] for row in report.secure["lost"]] == [0, 4]
    torch.testing.assert_close(coordinator.state.parameters, mean_of(list(range(COUNT))), rtol=0, atol=2e-6)


def test_a_client_that_was_given_another_model_is_excluded_and_the_sum_is_that_of_the_others() -> None:
    """A4 binding: one changed byte of the model at one client is never a sum."""

    def change(stage: str, client: int, assignment: Assignment) -> Assignment:
        if stage == "contribute" and client == 4:
            return dataclasses.replace(assignment, parameters=assignment.parameters + 2**-20)
        return assignment

    channel = SecureChannel(KEYS, SIZE, tamper=change)
    coordinator = coordinator_of(assisted(), channel)
    report = next(coordinator.rounds(channel, 1))
    assert [(row.client, row.rule) for row in report.excluded] == [(4, "secure-sum")]
    assert "another model" in report.excluded[0].reason
    torch.testing.assert_close(coordinator.state.parameters, mean_of([0, 1, 2, 3, 5]), rtol=0, atol=2e-6)


def with_part(name: str, change: Callable[[bytes], bytes], *, stage: str, client: int) -> Any:
    """Return a tampering that changes one part of what one client is sent."""

    def tamper(at: str, number: int, assignment: Assignment) -> Assignment:
        work = assignment.work
        if at != stage or number != client or not isinstance(work, SecureWork):
            return assignment
        parts = {**work.parts, name: change(work.parts[name])}
        return dataclasses.replace(assignment, work=dataclasses.replace(work, parts=parts))

    return tamper


def flipped(message: bytes) -> bytes:
    return message[:-1] + bytes([message[-1] ^ 1])


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("assist-advertise", "parameters"),
        ("assist-gather", "panel"),
        ("assist-gather", "roundup"),
        ("assist-witness", "contributors"),
    ],
)
def test_an_assistant_that_was_told_something_else_is_lost_and_the_sum_is_taken_without_it(
    stage: str, name: str
) -> None:
    channel = SecureChannel(KEYS, SIZE, tamper=with_part(name, flipped, stage=stage, client=2))
    coordinator = coordinator_of(assisted(), channel)
    report = next(coordinator.rounds(channel, 1))
    excluded = [row.client for row in report.excluded]
    if name == "roundup":  # the last byte is of the last contribution's signature
        assert report.status == "ok" and excluded == [5] and "assistant 2" in report.excluded[0].reason
    else:
        assert report.status == "ok" and report.replies == COUNT and excluded == []
        assert report.secure is not None and [row["assistant"] for row in report.secure["lost"]] == [2]


def test_an_assistant_that_refuses_more_than_half_is_lost_and_the_members_are_not() -> None:
    """It was told of other work, so every contribution looks forged to it."""
    tamper = with_part("binding", flipped, stage="assist-gather", client=2)
    coordinator = coordinator_of(assisted(), channel := SecureChannel(KEYS, SIZE, tamper=tamper))
    report = next(coordinator.rounds(channel, 1))
    assert report.status == "ok" and report.replies == COUNT and report.excluded == ()
    assert report.secure is not None
    assert report.secure["lost"] == [{"assistant": 2, "reason": f"it refused {COUNT} of {COUNT} contributions"}]


def test_assistants_that_all_refuse_everybody_make_the_round_void() -> None:
    tampers = [with_part("binding", flipped, stage="assist-gather", client=one) for one in range(3)]

    def all_of(stage: str, client: int, assignment: Assignment) -> Assignment:
        for tamper in tampers:
            assignment = tamper(stage, client, assignment)
        return assignment

    coordinator = coordinator_of(assisted(), channel := SecureChannel(KEYS, SIZE, tamper=all_of))
    report = next(coordinator.rounds(channel, 1))
    assert report.status == "void" and "assistant 0: it refused 6 of 6" in report.why
    assert torch.equal(coordinator.state.parameters, torch.zeros(SIZE))
    assert "assist-witness" not in [stage for _, stage in channel.exchanges]


def test_an_assistant_signs_once_in_a_round_however_often_it_is_tried() -> None:
    """contributors are signed once in a round, in whatever process and however often the round is tried."""
    channel = SecureChannel(KEYS, SIZE, lost=[(1, "assist-answer", one) for one in range(3)])
    assert next(coordinator_of(assisted(), channel).rounds(channel, 1)).status == "void"
    channel.lost = frozenset()
    for one in range(3):
        channel.members[one] = channel.fresh(one)
    coordinator = coordinator_of(assisted(), channel)
    reports = coordinator.rounds(channel, 2)
    report = next(reports)
    assert report.status == "void" and "assistant 0: refused by its policy, rule replay" in report.why
    assert torch.equal(coordinator.state.parameters, torch.zeros(SIZE))
    assert next(reports).status == "ok"


@pytest.mark.parametrize(("stage", "client"), [("contribute", 3), ("assist-advertise", 1)])
def test_an_attempt_that_was_taken_part_in_before_is_refused_in_each_role(stage: str, client: int) -> None:
    """A5 replay counter: an attempt is taken part in once in each role, in whatever process."""
    offers: list[Assignment] = []

    def keep(at: str, number: int, assignment: Assignment) -> Assignment:
        offers.extend([assignment] if (at, number) == (stage, client) else [])
        return assignment

    channel = SecureChannel(KEYS, SIZE, tamper=keep)
    assert next(coordinator_of(assisted(), channel).rounds(channel, 1)).status == "ok"
    channel.members[client] = channel.fresh(client)
    body = channel.members[client].answer(offers[0]).body
    assert isinstance(body, Refusal) and body.rule == "replay"


class Miscounting(SecureChannel):
    """A channel whose assistant 1 sums up other masks."""

    def deliver(self, assignments: Mapping[int, Assignment], timeout_s: float | None) -> Iterator[Arrival]:
        """Carry one exchange."""
        for arrival in super().deliver(assignments, timeout_s):
            body = arrival.reply.body
            if arrival.client == 1 and isinstance(body, SecureAnswer) and "answer" in body.parts:
                assert body.vector is not None
                wrong = SecureAnswer(body.parts, body.vector + np.uint32(1))
                arrival = dataclasses.replace(arrival, reply=dataclasses.replace(arrival.reply, body=wrong))
            yield arrival


def test_two_assistants_that_disagree_make_the_sum_void_and_agreeing_ones_are_compared() -> None:
    honest = coordinator_of(assisted(each=2), channel := SecureChannel(KEYS, SIZE))
    assert next(honest.rounds(channel, 1)).status == "ok"
    torch.testing.assert_close(honest.state.parameters, mean_of(list(range(COUNT))), rtol=0, atol=2e-6)
    coordinator = coordinator_of(assisted(each=2), other := Miscounting(KEYS, SIZE))
    report = next(coordinator.rounds(other, 1))
    assert report.status == "void" and "summed up other masks" in report.why
    assert torch.equal(coordinator.state.parameters, torch.zeros(SIZE))


def test_every_attempt_leaves_a_transcript_that_passes_its_check() -> None:
    kept: list[Any] = []
    channel = SecureChannel(KEYS, SIZE, lost=[(1, "assist-gather", one) for one in (0, 1)])
    coordinator = coordinator_of(assisted(), channel, kept)
    statuses = [report.status for report in coordinator.rounds(channel, 2)]
    assert statuses == ["void", "ok"] and [one["result"] is None for one in kept] == [True, True, False]
    for one in kept:
        found = transcript.check(one, KEYS.roster, roster_digest=DIGEST)
        assert found and all(finding.verdict is not Verdict.FAILED for finding in found)
    forged = {**kept[-1], "contributors": kept[-1]["contributors"][:-1]}
    found = transcript.check(forged, KEYS.roster, roster_digest=DIGEST)
    assert any(finding.verdict is Verdict.FAILED for finding in found)


def test_nothing_that_leaves_a_client_depends_on_its_update_but_the_masked_vector() -> None:
    """A3 wire leakage: lengths are constant, and no number of a client is beside the vector."""
    channel = SecureChannel(KEYS, SIZE)
    next(coordinator_of(assisted(), channel).rounds(channel, 1))
    sizes: dict[str, set[int]] = {}
    vectors: dict[str, list[Any]] = {}
    for stage, _, reply in channel.seen:
        assert isinstance(reply.body, SecureAnswer)
        sizes.setdefault(stage, set()).add(sum(len(part) for part in reply.body.parts.values()))
        vectors.setdefault(stage, []).append(reply.body.vector)
    assert {stage: len(each) for stage, each in sizes.items()} == dict.fromkeys(STAGES, 1)
    assert {stage for stage, each in vectors.items() if each[0] is not None} == {"contribute", "assist-answer"}
    contributed = vectors["contribute"]
    assert all(vector.shape == contributed[0].shape and vector.dtype == np.uint32 for vector in contributed)


def test_clients_with_equal_updates_send_unlike_vectors() -> None:
    """nothing of an update leaves unmasked."""
    channel = SecureChannel(KEYS, SIZE)
    for number in range(COUNT):
        channel.members[number] = channel.fresh(number)
        secure = channel.members[number]._secure
        assert secure is not None
        secure.assisted._train = lambda assignment: Update.of(torch.zeros(SIZE), 1.0, examples=0.0, loss=0.0)
    next(coordinator_of(assisted(), channel).rounds(channel, 1))
    sent = [
        reply.body.vector.tobytes()
        for stage, _, reply in channel.seen
        if stage == "contribute" and isinstance(reply.body, SecureAnswer) and reply.body.vector is not None
    ]
    assert len(set(sent)) == COUNT and bytes(len(sent[0])) not in sent


def test_a_nan_and_a_weight_beyond_its_range_never_leave_a_client() -> None:
    protocol = AssistedOneShot(assistants=(0, 1, 2))
    strategy = SecureAggregation(FedAvg(), protocol, clip=8.0, max_weight=4)
    report = next(coordinator_of(strategy, channel := SecureChannel(KEYS, SIZE)).rounds(channel, 1))
    # Clients 4 and 5 hold 5 and 6 examples.
    assert sorted(report.participants) == [0, 1, 2, 3]
    assert all("max_weight" in row.reason for row in report.excluded) and len(report.excluded) == 2
    bodies = [reply.body for stage, client, reply in channel.seen if stage == "contribute" and client > 3]
    assert [type(body) for body in bodies] == [Failure, Failure]


def test_fewer_contributors_than_the_minimum_are_no_sum() -> None:
    channel = SecureChannel(KEYS, SIZE, lost=[(1, "contribute", client) for client in (0, 1, 2)])
    report = next(coordinator_of(assisted(minimum=4), channel).rounds(channel, 1))
    assert report.status == "void" and "the minimum is 4" in report.why
    assert report.secure is not None and report.secure["attempts"] == 2


def test_an_assistant_that_no_roster_names_is_an_error_before_anybody_is_asked() -> None:
    channel = SecureChannel(Keys(3), SIZE)
    with pytest.raises(ConfigError, match="the roster has no client 5"):
        coordinator_of(assisted(assistants=(0, 1, 5)), channel)
    strategy = assisted(assistants=(0, 1, 5), active=False)
    gathering = AssistedGathering(strategy, channel.trainer.spec, ("examples", "loss"), Witnesses)
    assert gathering.looks_ahead is False


def test_the_parameters_name_the_assistants_beside_what_the_vector_means() -> None:
    offered: list[Parameters] = []

    def keep(stage: str, client: int, assignment: Assignment) -> Assignment:
        if stage == "contribute" and isinstance(assignment.work, SecureWork):
            offered.append(Parameters.from_text(assignment.work.parts["parameters"].decode()))
        return assignment

    channel = SecureChannel(KEYS, SIZE, tamper=keep)
    next(coordinator_of(assisted(lying=1), channel).rounds(channel, 1))
    assert offered[0].encoding["assisted"] == {"assistants": [0, 1, 2], "threshold": 1, "lying": 1}
    assert offered[0].encoding["clip"] == 8.0 and offered[0].roster == DIGEST
