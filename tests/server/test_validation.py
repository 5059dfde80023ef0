"""What a server takes in: the first sound reply of each client that was asked, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from fedml_core.accumulate import PlainSum
from fedml_core.messages import (
    Arrival,
    Assignment,
    Body,
    EvaluateWork,
    Evaluation,
    Failure,
    Refusal,
    Reply,
    TrainWork,
)
from fedml_core.training import Training
from fedml_core.update import Update
from server.validation import EvaluationIntake, Exclusion, Intake, UpdateIntake, averages

SIZE = 2
TRAIN = Assignment("run", 3, "model", torch.zeros(SIZE), TrainWork(Training()))
EVALUATE = dataclasses.replace(TRAIN, work=EvaluateWork())
COHORT = [1, 2, 5]
SUMS = {"examples": 4.0, "loss": 2.0}


def arrival(client: int, body: Body, /, **changes: Any) -> Arrival:
    reply = Reply("run", 3, client, "model", body)
    return Arrival(client, dataclasses.replace(reply, **changes), size_bytes=10)


def an_update(value: float = 1.0, **sums: float) -> Update:
    return Update.of(torch.full((SIZE,), value), 1.0, **sums)


def updates() -> UpdateIntake:
    return UpdateIntake(TRAIN, COHORT, PlainSum(SIZE, max_weight=5.0))


def evaluations() -> EvaluationIntake:
    return EvaluationIntake(EVALUATE, COHORT)


def test_good_updates_are_summed_and_their_clients_counted() -> None:
    intake = updates()
    intake.take([arrival(5, an_update(1.0, examples=2.0)), arrival(1, an_update(2.0, examples=3.0))])
    total = intake.accumulator.total()
    assert total.values.tolist() == [3.0, 3.0]
    assert (total.count, total.sums) == (2, {"examples": 5.0})
    assert (intake.accepted, intake.excluded, intake.missing, intake.bytes_up) == ([5, 1], [], [2], 20)


def test_good_evaluations_are_summed_and_averaged_by_examples() -> None:
    intake = evaluations()
    intake.take([arrival(1, Evaluation(SUMS)), arrival(2, Evaluation({"loss": 6.0, "examples": 12.0}))])
    assert intake.sums == {"examples": 16.0, "loss": 8.0}
    assert averages(intake.sums) == {"examples": 16.0, "loss": 0.5}
    assert intake.accepted == [1, 2]


@pytest.mark.parametrize("sums", [{}, {"loss": 3.0}, {"examples": 0.0, "loss": 3.0}])
def test_nothing_counted_has_no_average(sums: dict[str, float]) -> None:
    assert averages(sums) == {}


@pytest.mark.parametrize(
    ("bad", "rule", "reason"),
    [
        (arrival(4, an_update()), "unknown-client", "client 4 was not asked in round 3"),
        (arrival(1, an_update(), client=2), "client", "client 1 claims to be client 2"),
        (arrival(1, an_update(), run="x" * 99), "run", f"the reply is for run '{'x' * 40}', this is 'run'"),
        (arrival(1, an_update(), round=2), "round", "the reply is for round 2, this is round 3"),
        (
            arrival(1, an_update(), fingerprint="other"),
            "fingerprint",
            "the client's model is other, the server's model",
        ),
        (arrival(1, Refusal("rounds", "3 allowed")), "refused", "refused by its policy, rule rounds: 3 allowed"),
        (arrival(1, Failure("crashed", "no memory")), "crashed", "no memory"),
        (arrival(1, Failure("task", "no"), fingerprint="other"), "task", "no"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("make", [updates, evaluations])
def test_a_reply_that_is_not_the_one_asked_for_is_excluded(make: Any, bad: Arrival, rule: str, reason: str) -> None:
    intake: Intake = make()
    intake.take([bad])
    assert intake.excluded == [Exclusion(bad.client, rule, reason)]
    assert intake.accepted == []


def test_only_the_first_reply_of_a_client_counts_even_if_it_was_bad() -> None:
    intake = updates()
    bad = arrival(1, an_update(), round=2)
    intake.take([bad, arrival(1, an_update()), arrival(2, an_update()), arrival(2, an_update())])
    assert [(exclusion.client, exclusion.rule) for exclusion in intake.excluded] == [
        (1, "round"),
        (1, "duplicate"),
        (2, "duplicate"),
    ]
    assert intake.accepted == [2]
    assert intake.missing == [5]
    assert intake.accumulator.total().count == 1


def test_a_stranger_cannot_use_up_the_reply_of_the_client_that_it_claims_to_be() -> None:
    intake = updates()
    intake.take([arrival(1, an_update(), client=2), arrival(4, an_update(), client=2), arrival(2, an_update())])
    assert intake.accepted == [2]
    assert intake.missing == [1, 5]


BAD_UPDATES = [
    ("kind", Evaluation(SUMS), "an update was asked for, an evaluation came"),
    ("shape", an_update().replace(values=torch.ones(1, SIZE)), "one client's update must be one vector, got (1, 2)"),
    ("shape", an_update().replace(values=torch.ones(3)), "values must have shape (..., 2), got (3,)"),
    ("dtype", an_update().replace(values=torch.ones(SIZE, dtype=torch.int64)), "values must be float32, got int64"),
    ("non-finite", an_update(math.nan), "values or sums hold NaN or infinity"),
    ("weight", an_update().replace(weight=torch.tensor(5.5)), "a weight must be > 0 and <= 5, got 5.5"),
    ("metrics", an_update(**{"a b": 1.0}), "a sum may not be called 'a b': "),
    ("metrics", an_update(**{f"m{number}": 1.0 for number in range(65)}), "a reply may report at most 64 sums, got 65"),
]
BAD_EVALUATIONS = [
    ("kind", an_update(), "an evaluation was asked for, an update came"),
    ("non-finite", Evaluation({**SUMS, "loss": math.inf}), "an evaluation's sums hold NaN or infinity"),
    ("weight", Evaluation({"loss": 1.0}), "an evaluation must count examples > 0, got 0"),
    ("weight", Evaluation({"examples": -1.0, "loss": 1.0}), "an evaluation must count examples > 0, got -1.0"),
    ("metrics", Evaluation({**SUMS, "other": 1.0}), "metrics ['examples', 'loss', 'other'] are not the others'"),
    ("metrics", Evaluation({"examples": 1.0}), "metrics ['examples'] are not the others' ['examples', 'loss']"),
    ("metrics", Evaluation({**SUMS, "\x1b[2J": 1.0}), "a sum may not be called '\\x1b[2J': "),
    ("metrics", Evaluation({**SUMS, "values": 1.0}), "a sum may not be called 'values': "),
    ("metrics", Evaluation({f"m{number}": 1.0 for number in range(65)}), "a reply may report at most 64 sums, got 65"),
]


@pytest.mark.parametrize(("rule", "body", "reason"), BAD_UPDATES, ids=[row[0] for row in BAD_UPDATES])
def test_an_update_that_must_not_reach_the_sum_leaves_it_as_it_was(rule: str, body: Body, reason: str) -> None:
    intake = updates()
    intake.take([arrival(1, an_update(1.0, examples=2.0)), arrival(2, body), arrival(5, an_update(3.0, examples=1.0))])
    assert [(exclusion.client, exclusion.rule) for exclusion in intake.excluded] == [(2, rule)]
    assert intake.excluded[0].reason.startswith(reason)
    total = intake.accumulator.total()
    assert (total.values.tolist(), total.count, total.weight, total.sums) == ([4.0, 4.0], 2, 2.0, {"examples": 3.0})
    assert intake.accepted == [1, 5]


@pytest.mark.parametrize(("rule", "body", "reason"), BAD_EVALUATIONS, ids=[row[0] for row in BAD_EVALUATIONS])
def test_an_evaluation_that_must_not_be_counted_is_not(rule: str, body: Body, reason: str) -> None:
    intake = evaluations()
    intake.take([arrival(1, Evaluation(SUMS)), arrival(2, body), arrival(5, Evaluation(SUMS))])
    assert [(exclusion.client, exclusion.rule) for exclusion in intake.excluded] == [(2, rule)]
    assert intake.excluded[0].reason.startswith(reason)
    assert intake.sums == {"examples": 8.0, "loss": 4.0}
    assert intake.accepted == [1, 5]


def test_an_intake_that_does_not_say_what_it_takes_takes_nothing() -> None:
    intake = Intake(TRAIN, COHORT)
    intake.take([arrival(1, an_update()), arrival(2, Evaluation(SUMS))])
    assert intake.excluded == [
        Exclusion(1, "kind", "an intake of Intake takes no update"),
        Exclusion(2, "kind", "an intake of Intake takes no evaluation"),
    ]
