"""Rounds: what a model becomes, what a bad reply does to it (nothing), and what a report says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fedml_core.errors import CheckpointError, ConfigError, RunError
from fedml_core.messages import Failure, Refusal, Reply
from fedml_core.update import Update
from server.checkpoint import RunState, load_checkpoint, save_checkpoint
from server.coordinator import Coordinator
from server.plan import EarlyStopping, EvaluationPlan, Plan
from server.sampling import EveryClient, FixedSampling
from strategies import FedAdam, FedAvg, FedMedian
from tests.doubles import Change, PullChannel, with_update, with_values

SIZE = 4


def coordinator_of(plan: Plan, channel: PullChannel, **rest: object) -> Coordinator:
    state = Coordinator.begin(plan, channel.trainer.spec, torch.zeros(SIZE), "run")
    return Coordinator(plan, channel.trainer.spec, state, **rest)  # type: ignore[arg-type]


def test_a_round_of_fedavg_adds_the_mean_weighted_by_examples() -> None:
    channel = PullChannel(4, SIZE)
    coordinator = coordinator_of(Plan(FedAvg()), channel)
    report = next(coordinator.rounds(channel, 1))
    # Client i holds i + 1 examples and pulls half of the way to i: sum((i + 1) i / 2) / sum(i + 1) = 10 / 10.
    assert torch.allclose(coordinator.state.parameters, torch.ones(SIZE))
    assert (report.status, report.cohort, report.replies, list(report.participants)) == ("ok", 4, 4, [0, 1, 2, 3])
    assert report.metrics["train"]["examples"] == 10
    assert report.bytes_up > 4 * 4 * SIZE and report.bytes_down > 4 * 4 * SIZE
    assert report.protection == "none"


def nan(update: Update) -> Update:
    return update.replace(values=torch.full((SIZE,), float("nan")))


def one_infinity(update: Update) -> Update:
    return update.replace(values=torch.tensor([0.0, float("inf"), 0.0, 0.0]))


def opposite_infinities(update: Update) -> Update:
    return update.replace(values=torch.tensor([float("-inf"), float("inf"), 0.0, 0.0]))


def broadcastable(update: Update) -> Update:
    return update.replace(values=torch.ones(1))


def too_long(update: Update) -> Update:
    return update.replace(values=torch.ones(SIZE + 1))


def two_rows(update: Update) -> Update:
    return update.replace(values=torch.ones(2, SIZE))


def double_precision(update: Update) -> Update:
    return update.replace(values=torch.ones(SIZE, dtype=torch.float64))


def negative_weight(update: Update) -> Update:
    return update.replace(weight=torch.tensor(-5.0, dtype=torch.float64))


def zero_weight(update: Update) -> Update:
    return update.replace(weight=torch.tensor(0.0, dtype=torch.float64))


def nan_weight(update: Update) -> Update:
    return update.replace(weight=torch.tensor(float("nan"), dtype=torch.float64))


def enormous_weight(update: Update) -> Update:
    return update.replace(weight=torch.tensor(1e30, dtype=torch.float64))


def nan_loss(update: Update) -> Update:
    return update.replace(sums={**update.sums, "loss": torch.tensor(float("nan"), dtype=torch.float64)})


BAD_UPDATES = [
    ("non-finite", nan),
    ("non-finite", one_infinity),
    ("non-finite", opposite_infinities),
    ("non-finite", nan_loss),
    ("shape", broadcastable),
    ("shape", too_long),
    ("shape", two_rows),
    ("dtype", double_precision),
    ("weight", negative_weight),
    ("weight", zero_weight),
    ("weight", nan_weight),
    ("weight", enormous_weight),
]


def other_run(reply: Reply) -> Reply:
    return dataclasses.replace(reply, run="another")


def old_round(reply: Reply) -> Reply:
    return dataclasses.replace(reply, round=0)


def other_model(reply: Reply) -> Reply:
    return dataclasses.replace(reply, fingerprint="0" * 32)


def somebody_else(reply: Reply) -> Reply:
    return dataclasses.replace(reply, client=2)


def refusal(reply: Reply) -> Reply:
    return dataclasses.replace(reply, body=Refusal("rounds", "3 rounds allowed"))


def failure(reply: Reply) -> Reply:
    return dataclasses.replace(reply, body=Failure("crashed", "out of memory"))


BAD_REPLIES: list[tuple[str, Change]] = [
    ("run", other_run),
    ("round", old_round),
    ("fingerprint", other_model),
    ("client", somebody_else),
    ("refused", refusal),
    ("crashed", failure),
]


@pytest.mark.parametrize("strategy", [FedAvg(), FedMedian()], ids=["sum", "collect"])
@pytest.mark.parametrize(
    ("rule", "change"),
    [*((rule, with_update(change)) for rule, change in BAD_UPDATES), *BAD_REPLIES],
    ids=[getattr(change, "__name__", "") for _, change in (*BAD_UPDATES, *BAD_REPLIES)],
)
def test_a_bad_reply_is_excluded_and_attributed_and_the_round_is_that_of_the_others(
    strategy: FedAvg | FedMedian, rule: str, change: Change
) -> None:
    sound = PullChannel(4, SIZE, {3: lambda reply: None})
    expected = coordinator_of(Plan(strategy), sound)
    next(expected.rounds(sound, 1))
    channel = PullChannel(4, SIZE, {3: change})
    coordinator = coordinator_of(Plan(strategy), channel)
    report = next(coordinator.rounds(channel, 1))
    assert [(row.client, row.rule) for row in report.excluded] == [(3, rule)]
    assert report.status == "ok" and report.replies == 3
    assert torch.equal(coordinator.state.parameters, expected.state.parameters)


def test_a_second_reply_and_a_stranger_are_excluded() -> None:
    class Doubling(PullChannel):
        def exchange(self, assignment, cohort, timeout_s):  # type: ignore[no-untyped-def]
            arrivals = list(super().exchange(assignment, cohort, timeout_s))
            yield from [*arrivals, arrivals[0], dataclasses.replace(arrivals[1], client=9)]

    channel = Doubling(3, SIZE)
    report = next(coordinator_of(Plan(FedAvg()), channel).rounds(channel, 1))
    assert [(row.client, row.rule) for row in report.excluded] == [(0, "duplicate"), (9, "unknown-client")]
    assert report.replies == 3


def test_too_few_replies_make_a_round_void_and_leave_everything_unchanged() -> None:
    lost = dict.fromkeys(range(3), with_values(torch.full((SIZE,), float("nan"))))
    channel = PullChannel(4, SIZE, lost)
    coordinator = coordinator_of(Plan(FedAdam(), minimum_replies=2), channel)
    before = coordinator.state
    report = next(coordinator.rounds(channel, 2))
    assert report.status == "void"
    assert report.why == (
        "1 good replies arrived, the minimum is 2; of 3 that did not count, client 0: values or sums hold NaN or "
        "infinity; the client's training diverged"
    )
    assert torch.equal(coordinator.state.parameters, before.parameters)
    assert coordinator.state.strategy == before.strategy and coordinator.state.round == 1


def test_a_run_of_void_rounds_only_has_failed() -> None:
    channel = PullChannel(2, SIZE, {0: lambda reply: None, 1: lambda reply: None})
    coordinator = coordinator_of(Plan(FedAvg()), channel)
    reports = []
    with pytest.raises(RunError, match="all 3 rounds were void, so the model is untrained; the last because 0 good"):
        for report in coordinator.rounds(channel, 3):
            reports.append(report)  # extend would lose them when the last step raises
    assert [report.status for report in reports] == ["void"] * 3
    assert reports[0].missing == [0, 1]


def test_an_empty_population_makes_a_void_round() -> None:
    channel = PullChannel(0, SIZE)
    coordinator = coordinator_of(Plan(FedAvg()), channel)
    assert next(coordinator.rounds(channel, 2)).why == "no client could be asked"


def test_zero_rounds_are_refused() -> None:
    channel = PullChannel(2, SIZE)
    with pytest.raises(ConfigError, match="rounds must be >= 1, got 0"):
        next(coordinator_of(Plan(FedAvg()), channel).rounds(channel, 0))


def test_evaluation_averages_over_clients_are_exact_and_come_when_due() -> None:
    channel = PullChannel(4, SIZE)
    plan = Plan(FedAvg(), evaluation=EvaluationPlan(every=2, clients=EveryClient()))
    coordinator = coordinator_of(plan, channel, evaluate=lambda p: {"examples": 2.0, "loss": 2 * float(p.sum())})
    reports = list(coordinator.rounds(channel, 3))
    assert ["server" in report.metrics for report in reports] == [False, True, True]
    model = coordinator.state.parameters
    expected = sum((i + 1) * float((i - model).norm()) for i in range(4)) / 10
    assert reports[-1].metrics["clients"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert reports[-1].metrics["clients"]["examples"] == 10
    assert reports[-1].metrics["server"]["loss"] == pytest.approx(float(model.sum()))


def test_early_stopping_ends_the_run_after_its_patience() -> None:
    channel = PullChannel(2, SIZE)
    plan = Plan(FedAvg(), early_stopping=EarlyStopping("server.loss", patience=3))
    losses = iter([5.0, 4.0, 4.5, 4.4, 4.3, 1.0])
    coordinator = coordinator_of(plan, channel, evaluate=lambda _: {"examples": 1.0, "loss": next(losses)})
    assert len(list(coordinator.rounds(channel, 100))) == 5
    assert coordinator.stopped_early and coordinator.state.best == 4.0


def test_early_stopping_knows_which_metrics_are_better_when_higher() -> None:
    assert EarlyStopping("server.accuracy").better(0.9, 0.8)
    assert EarlyStopping("server.loss").better(0.8, 0.9)
    assert not EarlyStopping("server.loss", minimum_change=0.2).better(0.8, 0.9)
    with pytest.raises(ConfigError, match="metric must be server.NAME"):
        EarlyStopping("accuracy")


@pytest.mark.parametrize("strategy", [FedAvg(), FedAdam(), FedMedian()], ids=lambda strategy: type(strategy).__name__)
def test_a_run_stopped_after_any_round_goes_on_to_the_same_model_bit_for_bit(
    tmp_path: Path, strategy: FedAvg | FedAdam | FedMedian
) -> None:
    plan = Plan(strategy, sampling=FixedSampling(3))
    whole = PullChannel(8, SIZE)
    straight = coordinator_of(plan, whole)
    list(straight.rounds(whole, 6))
    for stop in range(1, 6):
        channel = PullChannel(8, SIZE)
        first = coordinator_of(plan, channel)
        list(first.rounds(channel, stop))
        save_checkpoint(tmp_path, first.state, plan)
        state = load_checkpoint(tmp_path, plan, channel.trainer.spec.fingerprint)
        second = Coordinator(plan, channel.trainer.spec, state)
        list(second.rounds(channel, 6))
        assert torch.equal(second.state.parameters, straight.state.parameters)
        assert channel.asked == whole.asked


def test_a_checkpoint_of_another_plan_or_model_is_refused_with_the_difference(tmp_path: Path) -> None:
    channel = PullChannel(8, SIZE)
    plan = Plan(FedAvg())
    fingerprint = channel.trainer.spec.fingerprint
    save_checkpoint(tmp_path, Coordinator.begin(plan, channel.trainer.spec, torch.zeros(SIZE), "run"), plan)
    assert isinstance(load_checkpoint(tmp_path, plan, fingerprint), RunState)
    with pytest.raises(CheckpointError, match="holds a run with seed = 0, now it is 1"):
        load_checkpoint(tmp_path, Plan(FedAvg(), seed=1), fingerprint)
    with pytest.raises(CheckpointError, match="holds a run with strategy = "):
        load_checkpoint(tmp_path, Plan(FedAdam()), fingerprint)
    with pytest.raises(CheckpointError, match=f"of model {fingerprint}, the task's model is now ffff"):
        load_checkpoint(tmp_path, plan, "ffff")


def test_an_evaluation_that_does_not_count_is_noted_with_its_client() -> None:
    def refuse_evaluations(reply: Reply) -> Reply:
        return reply if isinstance(reply.body, Update) else dataclasses.replace(reply, body=Failure("disk", "gone"))

    channel = PullChannel(3, SIZE, {1: refuse_evaluations})
    plan = Plan(FedAvg(), evaluation=EvaluationPlan(clients=EveryClient()))
    report = next(coordinator_of(plan, channel).rounds(channel, 1))
    assert report.excluded == () and report.notes == ("client 1's evaluation does not count (disk): gone",)
    assert report.metrics["clients"]["examples"] == 4
