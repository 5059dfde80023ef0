"""Secure sums inside an ordinary Flower app: the model of FedAvg in the clear, and nothing of a node on the wire."""

from __future__ import annotations

import numpy as np
import pytest

from clients.flower import secure_mod
from fedml_core.flower_secure import Lesson
from simulations.flower_grid import Fault, LocalGrid
from strategies import FedAvg, FedProx, FlowerStrategy, SecAggPlus, SecureAggregation
from tests.strategies.flower_cases import (
    BUT_THE_LAST,
    CLIENTS,
    EVERYBODY,
    START,
    Vector,
    honest,
    least_squares,
    record_of,
    vector_of,
)
from tests.strategies.flower_secure_cases import (
    LAST,
    app_of,
    assert_moved,
    excluded,
    run,
    stage_of,
    strategy_of,
)

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp


@pytest.mark.parametrize("threads", [1, 3])
def test_three_rounds_end_in_the_model_of_fedavg_in_the_clear(threads: int) -> None:
    clear, theirs = run(FlowerStrategy(FedAvg(), min_nodes=CLIENTS), least_squares(), 3)
    app, mod = least_squares(), secure_mod()
    mine = strategy_of(metrics=("residual",))
    moved, ours = run(mine, lambda message, context: mod(message, context, app), 3, threads=threads)
    np.testing.assert_allclose(moved, clear, rtol=0, atol=1e-6)
    assert np.abs(clear).max() > 0.1
    # A sum of metrics over examples is taken in steps far below 1e-4; both means are of float32 numbers.
    for number in (1, 2, 3):
        assert dict(ours.train_metrics_clientapp[number]) == pytest.approx(
            dict(theirs.train_metrics_clientapp[number]), abs=1e-4
        )


def test_the_app_is_given_what_an_ordinary_strategy_would_have_sent() -> None:
    given: list[RecordDict] = []

    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 0:
            given.append(message.content)
        return honest(message, context)

    plain = ClientApp()
    plain.train()(train)
    run(FlowerStrategy(FedProx(mu=0.5), min_nodes=CLIENTS), plain)
    run(strategy_of(SecureAggregation(FedProx(mu=0.5), SecAggPlus(active=False), clip=5, max_weight=99)), app_of(train))
    in_clear, in_secret = given
    assert list(in_clear) == list(in_secret) == ["arrays", "config"]
    assert in_clear["config"] == in_secret["config"] == ConfigRecord({"server-round": 1, "proximal-mu": 0.5})
    assert isinstance(in_secret["arrays"], ArrayRecord)
    np.testing.assert_array_equal(vector_of(in_secret["arrays"]), START)
    assert list(in_secret["arrays"]) == list(record_of(START))


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.DROP, Fault.LATE])
@pytest.mark.parametrize("stage", ["introduce", "advertise", "share", "mask", "unmask"])
def test_a_node_lost_at_any_exchange_leaves_the_mean_of_the_others(stage: str, fault: Fault) -> None:
    def faults(node: int, message: Message) -> Fault | None:
        return fault if node == LAST and stage_of(message) == stage else None

    strategy = strategy_of()
    moved, _ = run(strategy, app_of(), faults=faults)
    # Whoever sent a masked vector is in the sum, even if nothing is heard of it afterwards.
    assert_moved(moved, EVERYBODY if stage == "unmask" else BUT_THE_LAST)
    assert strategy.gathered is not None
    assert len(strategy.gathered.accepted) == CLIENTS - (stage != "unmask")


def test_too_few_survivors_leave_the_model_as_it_was_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    def faults(node: int, message: Message) -> Fault | None:
        return Fault.ERROR if node >= LAST - 1 and stage_of(message) == "mask" else None

    strategy = strategy_of()
    moved, result = run(strategy, app_of(), faults=faults)
    np.testing.assert_array_equal(moved, 0)
    assert strategy.gathered is not None
    assert strategy.gathered.facts["attempts"] == 2
    assert "round 1 changed nothing: the secure sum stopped" in caplog.text
    assert not result.train_metrics_clientapp


def test_the_round_after_a_void_one_succeeds() -> None:
    def faults(node: int, message: Message) -> Fault | None:
        early = message.metadata.group_id == "1"
        return Fault.ERROR if early and node >= LAST - 1 and stage_of(message) == "mask" else None

    moved, _ = run(strategy_of(), app_of(), 2, faults=faults)
    assert_moved(moved, EVERYBODY)


def test_a_cohort_that_stays_waits_for_two_exchanges_from_the_second_round_on() -> None:
    strategy = strategy_of()
    sent: list[tuple[str, str]] = []

    def faults(node: int, message: Message) -> None:
        if node == LAST:
            sent.append((message.metadata.group_id, stage_of(message)))

    moved, _ = run(strategy, app_of(), 3, faults=faults)
    assert_moved(moved, 3 * EVERYBODY)
    assert [stage for number, stage in sent if number == "1"] == ["introduce", "advertise", "share", "mask", "unmask"]
    assert [stage for number, stage in sent if number != "1"] == ["mask", "unmask"] * 2


def test_a3_nothing_leaves_a_node_but_masked_vectors_and_keys() -> None:
    seen: list[tuple[str, int, Message]] = []
    contexts: list[Context] = []
    app = app_of()

    def recorded(message: Message, context: Context) -> Message:
        stage = stage_of(message)
        reply = app(message, context)
        seen.append((stage, context.node_id, reply))
        contexts.append(context)
        return reply

    moved, _ = run(strategy_of(metrics=("accuracy",)), recorded)
    assert_moved(moved, EVERYBODY)
    for _, _, reply in seen:
        assert not reply.content.metric_records
        texts = repr({name: dict(record) for name, record in reply.content.config_records.items()})
        for word in ("num-examples", "accuracy", "examples", "weight", "loss"):
            assert word not in texts
        for record in reply.content.array_records.values():
            assert {array.dtype for array in record.values()} <= {"uint8", "uint32"}
    masked = {node: _largest(reply) for stage, node, reply in seen if stage == "mask"}
    assert len(masked) == CLIENTS
    # Whole models of 15 equal steps: unmasked, all ring elements of the update would be nearly one value.
    for vector in masked.values():
        assert len(np.unique(vector)) == len(vector)
    trained = {(START + np.float32(place + 1)).tobytes() for place in range(CLIENTS)}
    sent = b"".join(
        array.data for _, _, reply in seen for r in reply.content.array_records.values() for array in r.values()
    )
    assert not any(vector[:16] in sent for vector in trained)
    assert all(not context.state for context in contexts)


def _largest(reply: Message) -> Vector:
    vectors = [array for array in reply.content.array_records["arrays"].values() if array.dtype == "uint32"]
    assert len(vectors) == 1
    size = int(vectors[0].shape[0])
    return np.frombuffer(vectors[0].data[: 4 * size], "<u4")


@pytest.mark.parametrize("what", ["arrays", "config", "plan"])
def test_a4_a_node_that_is_sent_another_lesson_does_not_train_on_it(what: str) -> None:
    trained: list[int] = []

    def train(message: Message, context: Context) -> Message:
        trained.append(context.node_id)
        return honest(message, context)

    app = app_of(train)

    def tampered(message: Message, context: Context) -> Message:
        if context.node_id == LAST and stage_of(message) == "mask":
            lesson = Lesson.read(message.content)
            content = RecordDict(dict(message.content))
            if what == "arrays":
                content["model"] = record_of(vector_of(lesson.arrays) + np.float32(1e-3))
            elif what == "config":
                content["config"] = ConfigRecord({**lesson.config, "server-round": 1.0})
            else:
                plan = ConfigRecord(dict(message.content.config_records["plan"]))
                plan["vector"] = list(reversed(lesson.vector))
                content["plan"] = plan
            message.content = content
        return app(message, context)

    strategy = strategy_of()
    moved, _ = run(strategy, tampered)
    assert_moved(moved, BUT_THE_LAST)
    assert sorted(trained) == [LAST - 3, LAST - 2, LAST - 1]
    assert "not the one that the masks would be bound to" in excluded(strategy)[CLIENTS - 1][1]


def test_a_strategy_can_be_started_twice() -> None:
    strategy, app = strategy_of(), app_of()
    with LocalGrid(app, clients=CLIENTS) as grid:
        first = strategy.start(grid, record_of(START), num_rounds=2)
        second = strategy.start(grid, first.arrays, num_rounds=1)
    assert_moved(vector_of(second.arrays) - START, 3 * EVERYBODY)
