"""What a client of a secure sum refuses, and what is left of it afterwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from clients.secagg import SecureMember
from clients.standing import Standing
from fedml_core.binding import binding_of
from fedml_core.errors import RefusalError, SecureAggregationError, TaskError
from fedml_core.message_frames import assignment_from_frame, assignment_to_frame
from fedml_core.messages import Assignment, EvaluateWork, Failure, Refusal, SecureWork, TrainWork
from fedml_core.secagg.client import ClientSession, Phase
from fedml_core.secagg.parameters import Parameters
from fedml_core.training import Training
from fedml_core.update import Update
from simulations.virtual_sites import AnySite
from tests.secure_cases import (
    DIGEST,
    KEYS,
    SIZE,
    Keys,
    RememberedAttempts,
    SecureChannel,
    secure,
    secure_coordinator,
)

PARAMETERS = Parameters(
    run="a-run",
    round=1,
    attempt=7,
    length=SIZE + 4,
    bits=32,
    encoding={"clip": 1.0, "clients": 3, "max_weight": 10, "scalars": [["count", "examples", 100]]},
    minimum=2,
    corrupt_share=0.0,
    dropout_share=0.0,
    roster=DIGEST,
)


def member(floor: AnySite | None = None, keys: Keys = KEYS) -> SecureMember:
    standing = Standing(0, keys.roster, DIGEST, keys.private[0].sign, RememberedAttempts(), floor or AnySite())
    return SecureMember(standing, lambda assignment: Update.of(torch.ones(SIZE), 1.0, examples=1.0))


def _phase(session: object) -> Phase:
    assert isinstance(session, ClientSession)
    return session.phase


def exchange(stage: str, **parts: bytes) -> tuple[Assignment, SecureWork]:
    work = SecureWork(stage, parts)
    return Assignment("a-run", 1, "f", torch.empty(0), work), work


def advertise(parameters: Parameters = PARAMETERS) -> tuple[Assignment, SecureWork]:
    return exchange("advertise", context=parameters.context, parameters=parameters.to_text().encode())


def test_a_floor_that_says_no_is_heard_before_any_key_is_made() -> None:
    class High(AnySite):
        def check(self, parameters: Parameters) -> None:
            raise RefusalError("minimum_cohort", "the server asks for 2, this site's minimum_cohort is 5")

    strict = member(High())
    with pytest.raises(RefusalError, match="minimum_cohort is 5"):
        strict.answer(*advertise())
    assert not strict.busy


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("share", {"context": PARAMETERS.context, "bulletin": b""}),
        ("mask", {"context": PARAMETERS.context, "delivery": b""}),
        ("confirm", {"context": PARAMETERS.context, "survivors": b""}),
        ("unmask", {"context": PARAMETERS.context, "quorum": b""}),
        ("unmask", {}),
        ("dance", {}),
    ],
)
def test_an_exchange_out_of_order_or_without_its_parts_is_an_error(stage: str, parts: dict[str, bytes]) -> None:
    fresh = member()
    with pytest.raises(SecureAggregationError):
        fresh.answer(*exchange(stage, **parts))
    begun = member()
    begun.answer(*advertise())
    with pytest.raises(SecureAggregationError):
        begun.answer(*exchange(stage, **parts))


def test_an_encoding_that_this_version_does_not_know_is_refused() -> None:
    odd = dataclasses.replace(PARAMETERS, encoding={**PARAMETERS.encoding, "more": 1})
    with pytest.raises(SecureAggregationError, match="does not know"):
        member().answer(*advertise(odd))


def test_parameters_of_another_run_are_refused() -> None:
    with pytest.raises(SecureAggregationError, match="another run"):
        member().answer(*advertise(dataclasses.replace(PARAMETERS, run="b-run")))


def test_a_new_attempt_wipes_the_one_before() -> None:
    one = member()
    one.answer(*advertise())
    before = one._held[PARAMETERS.context].session
    assert _phase(before) is Phase.ADVERTISED
    one.answer(*advertise(dataclasses.replace(PARAMETERS, attempt=8)))
    assert _phase(before) is Phase.OVER and len(one._held) == 1


def test_training_that_fails_ends_the_session_and_sends_no_vector() -> None:
    channel = SecureChannel(KEYS, SIZE)

    def fail(assignment: Assignment) -> Update:
        raise TaskError("the loader failed")

    secret = channel.members[2]._secure
    assert secret is not None
    secret._train = fail
    report = next(secure_coordinator(secure(), channel).rounds(channel, 1))
    assert 2 not in report.participants
    bodies = [reply.body for stage, client, reply in channel.seen if (stage, client) == ("mask", 2)]
    assert [type(body) for body in bodies] == [Failure]
    assert all(_phase(held.session) is Phase.OVER for held in secret._held.values())


def test_a_client_without_a_roster_takes_part_in_no_secure_sum() -> None:
    channel = SecureChannel(KEYS, SIZE)
    channel.members[0]._secure = None
    body = channel.members[0].answer(advertise()[0]).body
    assert isinstance(body, Failure | Refusal)


def test_the_binding_is_the_same_on_both_sides_of_a_wire_and_differs_with_every_input() -> None:
    """A4 binding: model, run, round, training, pipeline and what is told all change it."""
    strategy = secure()
    train = TrainWork(Training(batch_size=4), strategy.client_half(), {"rate": torch.tensor([0.5])}, seed=3)
    base = Assignment("a-run", 1, "f", torch.arange(4.0), train)
    masked = dataclasses.replace(base, work=SecureWork("mask", {"delivery": b"x"}, train))
    assert binding_of(base) == binding_of(masked)
    assert binding_of(assignment_from_frame(assignment_to_frame(masked))) == binding_of(base)
    others = [
        dataclasses.replace(base, run="b-run"),
        dataclasses.replace(base, round=2),
        dataclasses.replace(base, fingerprint="g"),
        dataclasses.replace(base, parameters=torch.tensor([0.0, 1.0, 2.0, 3.0 + 2**-20])),
        dataclasses.replace(base, work=dataclasses.replace(train, seed=4)),
        dataclasses.replace(base, work=dataclasses.replace(train, training=Training(batch_size=5))),
        dataclasses.replace(base, work=dataclasses.replace(train, told={"rate": torch.tensor([0.25])})),
        dataclasses.replace(base, work=dataclasses.replace(train, told={"other": torch.tensor([0.5])})),
    ]
    assert len({binding_of(one) for one in [base, *others]}) == len(others) + 1
    with pytest.raises(SecureAggregationError, match="nothing that masks could be bound to"):
        binding_of(dataclasses.replace(base, work=EvaluateWork()))
