import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from fedml_core.errors import ConfigError, RunError, StrategyError
from simulations.flower_apps import run_flower_apps
from simulations.flower_grid import Fault, LocalGrid
from simulations.flower_nodes import FIRST_NODE_ID

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict  # isort: skip
from flwr.clientapp import ClientApp  # isort: skip
from flwr.clientapp.mod import LocalDpMod, arrays_size_mod  # isort: skip
from flwr.common.constant import ErrorCode  # isort: skip
from flwr.serverapp import Grid, ServerApp  # isort: skip
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Result  # isort: skip
from flwr.supercore.task_identity import TaskIdentity  # isort: skip

Floats = np.ndarray[Any, np.dtype[np.float64]]
SIZES = (3, 8, 5, 11)
STEP = 0.05
A, B, C = FIRST_NODE_ID, FIRST_NODE_ID + 1, FIRST_NODE_ID + 2


@pytest.fixture(autouse=True)
def same_sampling() -> Iterator[None]:
    """Flower samples nodes, hence the order of the sums, with the global generator."""
    state = random.getstate()
    random.seed(7)
    yield
    random.setstate(state)


def data_of(partition: int) -> tuple[Floats, Floats]:
    generator = np.random.default_rng(partition)
    inputs = generator.normal(size=(SIZES[partition], 2))
    return inputs, inputs @ np.array([2.0, -1.0]) + generator.normal(size=SIZES[partition])


def trained(weights: Floats, partition: int) -> Floats:
    """Two steps of gradient descent on least squares."""
    inputs, targets = data_of(partition)
    for _ in range(2):
        weights = weights - STEP * inputs.T @ (inputs @ weights - targets) / len(targets)
    return weights


def least_squares(**app_arguments: Any) -> ClientApp:
    app = ClientApp(**app_arguments)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        weights = trained(message.content.array_records["arrays"]["w"].numpy(), partition)
        metrics = MetricRecord({"num-examples": SIZES[partition], "partition": partition})
        return Message(RecordDict({"arrays": arrays(weights), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        inputs, targets = data_of(partition)
        weights = message.content.array_records["arrays"]["w"].numpy()
        loss = float(np.mean((inputs @ weights - targets) ** 2))
        metrics = MetricRecord({"num-examples": SIZES[partition], "loss": loss})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def arrays(weights: Floats) -> ArrayRecord:
    return ArrayRecord({"w": Array(weights)})


def content(**config: int) -> RecordDict:
    return RecordDict({"arrays": arrays(np.arange(2.0)), "config": ConfigRecord(dict(config))})


def started(strategy: FedAvg, client_app: Callable[[Message, Context], Message], **options: Any) -> Result:
    results: list[Result] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(strategy.start(grid, arrays(np.zeros(2)), num_rounds=3))

    run_flower_apps(server_app, client_app, clients=len(SIZES), **options)
    return results[0]


def by_hand(rule: Callable[[int, Floats, list[Floats]], Floats]) -> Floats:
    weights = np.zeros(2)
    for server_round in (1, 2, 3):
        weights = rule(server_round, weights, [trained(weights, partition) for partition in range(len(SIZES))])
    return weights


def weighted_mean(_: int, weights: Floats, updates: list[Floats]) -> Floats:
    return np.asarray(np.average(updates, axis=0, weights=SIZES))


def counting(message: Message, context: Context) -> Message:
    """Count the messages of this node in its state, and answer with the count."""
    record = context.state.setdefault("memory", MetricRecord({"count": 0}))
    assert isinstance(record, MetricRecord)
    record["count"] = int(str(record["count"])) + 1
    return Message(RecordDict({"memory": record}), reply_to=message)


def counts(replies: list[Message]) -> list[tuple[int, int]]:
    return [(r.metadata.src_node_id, int(str(r.content.metric_records["memory"]["count"]))) for r in replies]


def to(*nodes: int, ttl: float | None = None) -> list[Message]:
    return [Message(content(), node, "train", ttl=ttl) for node in nodes]


def failures(replies: list[Message]) -> list[tuple[int, int, str | None]]:
    return [(r.metadata.src_node_id, r.error.code, r.error.reason) for r in replies if r.has_error()]


# --- whole apps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_stock_fed_avg_gives_the_arithmetic_done_by_hand(threads: int) -> None:
    result = started(FedAvg(), least_squares(), threads=threads)

    final = result.arrays["w"].numpy()
    np.testing.assert_allclose(final, by_hand(weighted_mean), rtol=1e-13)
    losses = [float(np.mean((x @ final - y) ** 2)) for x, y in map(data_of, range(len(SIZES)))]
    assert result.evaluate_metrics_clientapp[3]["loss"] == pytest.approx(np.average(losses, weights=SIZES), rel=1e-13)
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]


def test_thread_count_does_not_change_one_bit() -> None:
    weights = []
    for threads in (1, 4):
        random.seed(7)
        weights.append(started(FedAvg(), least_squares(), threads=threads).arrays["w"].data)

    assert weights[0] == weights[1]


def test_stock_fed_adam_gives_its_formula() -> None:
    first, second = np.zeros(2), np.zeros(2)

    def adam(server_round: int, weights: Floats, updates: list[Floats]) -> Floats:
        nonlocal first, second
        delta = weighted_mean(server_round, weights, updates) - weights
        first = 0.9 * first + 0.1 * delta
        second = 0.99 * second + 0.01 * delta**2
        rate = 0.1 * np.sqrt(1 - 0.99 ** (server_round + 1)) / (1 - 0.9 ** (server_round + 1))
        return np.asarray(weights + rate * first / (np.sqrt(second) + 1e-3))

    result = started(FedAdam(), least_squares())

    np.testing.assert_allclose(result.arrays["w"].numpy(), by_hand(adam), rtol=1e-12)


def test_stock_fed_median_gives_the_median() -> None:
    result = started(FedMedian(), least_squares())

    expected = by_hand(lambda _, weights, updates: np.median(updates, axis=0))
    np.testing.assert_allclose(result.arrays["w"].numpy(), expected, rtol=1e-13)


def test_client_that_raises_is_left_out_and_the_others_go_on() -> None:
    honest = least_squares()

    def failing(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ValueError("patient 4711 has no label")
        return honest(message, context)

    result = started(FedAvg(), failing)

    others = (SIZES[0], 0, SIZES[2], SIZES[3])
    expected = by_hand(lambda _, weights, updates: np.asarray(np.average(updates, axis=0, weights=others)))
    np.testing.assert_allclose(result.arrays["w"].numpy(), expected, rtol=1e-13)


def test_configs_reach_the_apps_and_the_server_context_comes_back() -> None:
    server_app = ServerApp()

    def echo_configs(message: Message, context: Context) -> Message:
        values = ConfigRecord({"site": context.node_config["site"], "rate": context.run_config["rate"]})
        return Message(RecordDict({"config": values}), reply_to=message)

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        assert context.run_config == {"rate": 0.5}
        for reply in grid.send_and_receive(to(*grid.get_node_ids())):
            context.state[str(reply.metadata.src_node_id)] = reply.content["config"]

    context = run_flower_apps(
        server_app, echo_configs, clients=[{"site": "north"}, {"site": "south"}], run_config={"rate": 0.5}
    )

    assert context.node_id == 1
    assert dict(context.state[str(A)]) == {"site": "north", "rate": 0.5}
    assert dict(context.state[str(B)]) == {"site": "south", "rate": 0.5}


def test_run_opens_no_socket_and_writes_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a socket was used")

    for call in ("bind", "connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, call, refuse)
    for variable in ("HOME", "FLWR_HOME", "TMPDIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.chdir(tmp_path)

    started(FedAvg(), least_squares(), threads=2)

    assert list(tmp_path.iterdir()) == []
    assert [t.name for t in threading.enumerate() if t.name.startswith("flower-client")] == []


@pytest.mark.parametrize("before", [(None, None, None), (31, 32, 33)])
def test_flower_identity_is_restored_also_after_a_failure(
    before: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(("_task_id", "_run_id", "_node_id"), before, strict=True):
        monkeypatch.setattr(TaskIdentity, name, value)
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        assert (TaskIdentity.run_id, TaskIdentity.node_id) == (grid.run.run_id, 1)
        raise LookupError("no such model")

    for _ in range(2):
        with pytest.raises(LookupError, match="no such model"):
            run_flower_apps(server_app, counting, clients=2)
        assert (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id) == before


def test_second_run_inside_a_run_is_refused() -> None:
    with (
        LocalGrid(counting, clients=1),
        pytest.raises(RunError, match="has a flower run open already"),
        LocalGrid(counting, clients=1),
    ):
        raise AssertionError("two runs are open")


# --- clients ----------------------------------------------------------------------------------------------------------


def test_state_of_each_client_lasts_from_message_to_message() -> None:
    with LocalGrid(counting, clients=3) as grid:
        grid.send_and_receive(to(A, B))
        grid.send_and_receive(to(B))

        assert counts(grid.send_and_receive(to(B, C, A))) == [(B, 3), (C, 1), (A, 2)]


def test_nodes_cost_nothing_until_they_are_messaged() -> None:
    with LocalGrid(counting, clients=100_000) as grid:
        assert len(grid.get_node_ids()) == 100_000
        assert len(grid.contexts) == 0
        last = FIRST_NODE_ID + 99_999
        grid.send_and_receive(to(A, last))

        assert sorted(grid.contexts) == [A, last]
        assert grid.contexts[last].node_config == {"partition-id": 99_999, "num-partitions": 100_000}


def test_client_cannot_change_what_the_server_and_other_clients_hold() -> None:
    shared = RecordDict({"arrays": arrays(np.ones(2)), "config": ConfigRecord({"list": [1, 2], "seen": 0})})

    def vandal(message: Message, context: Context) -> Message:
        record, config = message.content.array_records["arrays"], message.content.config_records["config"]
        numbers = cast(list[int], config["list"])
        seen = ConfigRecord({"seen": config["seen"], "list": list(numbers), "w": record["w"].numpy().tolist()})
        record["w"].data = Array(np.zeros(2)).data
        config["seen"] = 1
        numbers.append(3)
        message.content["more"] = MetricRecord()
        message.metadata.group_id = "vandal"
        message.metadata.dst_node_id = 5
        return Message(RecordDict({"answer": seen}), reply_to=message)

    with LocalGrid(vandal, clients=2) as grid:
        messages = [Message(shared, node, "train") for node in (A, B)]
        replies = grid.send_and_receive(messages)

    assert [dict(r.content["answer"]) for r in replies] == [{"seen": 0, "list": [1, 2], "w": [1.0, 1.0]}] * 2
    assert sorted(shared) == ["arrays", "config"]
    assert shared["config"] == {"list": [1, 2], "seen": 0}
    np.testing.assert_array_equal(shared.array_records["arrays"]["w"].numpy(), np.ones(2))
    assert [m.metadata.group_id for m in messages + replies] == [""] * 4
    assert [r.metadata.src_node_id for r in replies] == [A, B]


def test_server_cannot_change_what_a_client_keeps() -> None:
    def keeper(message: Message, context: Context) -> Message:
        context.state.setdefault("model", arrays(np.ones(2)))
        return Message(RecordDict({"model": context.state["model"]}), reply_to=message)

    with LocalGrid(keeper, clients=1) as grid:
        (reply,) = grid.send_and_receive(to(A))
        reply.content.array_records["model"]["w"].data = b""
        reply.content.array_records["model"].clear()
        (again,) = grid.send_and_receive(to(A))

    np.testing.assert_array_equal(again.content.array_records["model"]["w"].numpy(), np.ones(2))


def test_server_cannot_change_a_message_that_waits_for_its_client() -> None:
    gate = threading.Event()

    def reader(message: Message, context: Context) -> Message:
        assert gate.wait(30)
        seen = ConfigRecord({"round": message.content.config_records["config"]["round"]})
        seen["group"] = message.metadata.group_id
        return Message(RecordDict({"seen": seen}), reply_to=message)

    with LocalGrid(reader, clients=1) as grid:
        waiting = content(round=2)
        messages = [Message(record, A, "train", group_id="mine") for record in (content(round=1), waiting)]
        ids = grid.push_messages(messages)
        waiting.config_records["config"]["round"] = 3
        messages[1].metadata.group_id = "other"
        gate.set()
        replies = polled(grid, ids)

    assert [dict(r.content["seen"]) for r in replies] == [{"round": 1, "group": "mine"}, {"round": 2, "group": "mine"}]


def test_array_bytes_are_never_copied() -> None:
    received: list[bytes] = []

    def echo(message: Message, context: Context) -> Message:
        received.append(message.content.array_records["arrays"]["w"].data)
        return Message(message.content, reply_to=message)

    with LocalGrid(echo, clients=1) as grid:
        sent = content()
        assert sent.object_id  # Flower then keeps views of the bytes, which `copy.deepcopy` cannot copy
        (reply,) = grid.send_and_receive([Message(sent, A, "train")])

    data = sent.array_records["arrays"]["w"].data
    assert received[0] is data
    assert reply.content.array_records["arrays"]["w"].data is data


def test_array_that_holds_a_changeable_buffer_is_copied() -> None:
    buffer = bytearray(Array(np.ones(2)).data)

    def zeroing(message: Message, context: Context) -> Message:
        reply = Message(content(), reply_to=message)
        reply.content.array_records["arrays"]["w"].data = buffer  # type: ignore[assignment] # Flower does not check
        return reply

    with LocalGrid(zeroing, clients=1) as grid:
        (reply,) = grid.send_and_receive(to(A))
    buffer[-16:] = bytes(16)

    np.testing.assert_array_equal(reply.content.array_records["arrays"]["w"].numpy(), np.ones(2))


@pytest.mark.parametrize("failure", [KeyError("secret"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_a_client_raises_comes_as_its_class_name(failure: BaseException) -> None:
    def failing(message: Message, context: Context) -> Message:
        raise failure

    with LocalGrid(failing, clients=2) as grid:
        (reply,) = grid.send_and_receive(to(B))

    assert failures([reply]) == [(B, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(failure).__name__)]


def test_client_that_returns_no_message_gets_an_error_reply() -> None:
    with LocalGrid(lambda message, context: None, clients=1) as grid:  # type: ignore[arg-type,return-value] # on purpose
        assert failures(grid.send_and_receive(to(A))) == [(A, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "TypeError")]


def test_reply_is_attributed_to_the_node_that_was_asked() -> None:
    stolen: list[Message] = []

    def liar(message: Message, context: Context) -> Message:
        stolen.append(message)
        return Message(Error(77, "none of my business"), reply_to=stolen[0])

    with LocalGrid(liar, clients=2) as grid:
        messages = to(A, B)
        replies = grid.send_and_receive(messages)

    assert failures(replies) == [(A, 77, "none of my business"), (B, 77, "none of my business")]
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages]
    assert [r.metadata.dst_node_id for r in replies] == [1, 1]
    assert len({r.metadata.message_id for r in replies}) == 2


# --- mods -------------------------------------------------------------------------------------------------------------


def test_stock_mods_act_on_every_message() -> None:
    clip = LocalDpMod(clipping_norm=0.01, sensitivity=0.0, epsilon=1.0, delta=1e-5)  # no sensitivity, so no noise
    app = ClientApp(mods=[arrays_size_mod])

    @app.train(mods=[clip])
    def train(message: Message, context: Context) -> Message:
        moved = message.content.array_records["arrays"]["w"].numpy() + np.array([3.0, 4.0])
        return Message(RecordDict({"arrays": arrays(moved)}), reply_to=message)

    with LocalGrid(app, clients=2) as grid:
        replies = grid.send_and_receive(to(A, B))

    for reply in replies:
        np.testing.assert_allclose(reply.content.array_records["arrays"]["w"].numpy(), [0.006, 1.008], rtol=1e-12)


def test_refusal_by_a_stock_mod_is_attributed_to_its_client() -> None:
    app = ClientApp(mods=[LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=1.0, delta=1e-5)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    with LocalGrid(app, clients=2) as grid:
        (reply,) = grid.send_and_receive(to(B))

    assert (reply.metadata.src_node_id, reply.error.code) == (B, ErrorCode.MOD_FAILED_PRECONDITION)
    assert "expects exactly one ArrayRecord" in str(reply.error.reason)


# --- threads and time -------------------------------------------------------------------------------------------------


def polled(grid: LocalGrid, ids: list[str]) -> list[Message]:
    """Pull until every reply is there, or a minute is over; the replies in the order of the ids."""
    deadline = time.monotonic() + 60
    replies: dict[str, Message] = {}
    while len(replies) < len(ids) and time.monotonic() < deadline:
        pulled = grid.pull_messages([message_id for message_id in ids if message_id not in replies])
        replies.update({reply.metadata.reply_to_message_id: reply for reply in pulled})
    return [replies[message_id] for message_id in ids if message_id in replies]


def test_threads_run_clients_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=30)

    def meet(message: Message, context: Context) -> Message:
        meeting.wait()
        return counting(message, context)

    with LocalGrid(meet, clients=2, threads=2) as grid:
        assert counts(grid.send_and_receive(to(A, B))) == [(A, 1), (B, 1)]


def test_one_node_handles_one_message_at_a_time_in_order() -> None:
    second_began = threading.Event()
    handled: list[int] = []
    overlaps: list[bool] = []

    def slow_first(message: Message, context: Context) -> Message:
        number = int(str(message.content.config_records["config"]["number"]))
        if number == 0:
            overlaps.append(second_began.wait(0.3))
        else:
            second_began.set()
        handled.append(number)
        return counting(message, context)

    with LocalGrid(slow_first, clients=1, threads=4) as grid:
        replies = grid.send_and_receive([Message(content(number=n), A, "train") for n in range(4)])

    assert overlaps == [False]
    assert handled == [0, 1, 2, 3]
    assert counts(replies) == [(A, 1), (A, 2), (A, 3), (A, 4)]


def test_reply_after_the_timeout_is_absent_and_thrown_away() -> None:
    gate = threading.Event()

    def waiting(message: Message, context: Context) -> Message:
        assert gate.wait(30)
        return counting(message, context)

    with LocalGrid(waiting, clients=2, threads=2) as grid:
        try:
            messages = to(A, FIRST_NODE_ID + 9)
            replies = grid.send_and_receive(messages, timeout=0)
            assert [r.metadata.src_node_id for r in replies] == [FIRST_NODE_ID + 9]
        finally:
            gate.set()
        assert counts(grid.send_and_receive(to(A))) == [(A, 2)]
        (unknown,) = grid.pull_messages([messages[0].metadata.message_id])
        assert unknown.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def test_closing_waits_for_clients_at_work_and_drops_what_none_has_begun() -> None:
    began = threading.Event()

    def working(message: Message, context: Context) -> Message:
        began.set()
        threading.Event().wait(0.05)
        return counting(message, context)

    with LocalGrid(working, clients=2) as grid:
        grid.push_messages(to(A, A, B))
        assert began.wait(30)

    assert {node: dict(context.state["memory"]) for node, context in grid.contexts.items()} == {A: {"count": 1}}


def test_reply_is_pulled_once() -> None:
    with LocalGrid(counting, clients=2) as grid:
        ids = grid.push_messages(to(B, A))

        assert counts(polled(grid, ids)) == [(B, 1), (A, 1)]
        (again,) = grid.pull_messages(ids[:1])
        assert again.error.code == ErrorCode.MESSAGE_UNAVAILABLE
        assert again.metadata.reply_to_message_id == ids[0]


def test_message_that_outlived_its_ttl_never_reaches_the_client() -> None:
    with LocalGrid(counting, clients=1) as grid:
        (old,) = to(A, ttl=5.0)
        old.metadata.created_at -= 10

        replies = grid.send_and_receive([old])

        assert failures(replies) == [(A, ErrorCode.MESSAGE_UNAVAILABLE, "the message outlived its ttl")]
        assert counts(grid.send_and_receive(to(A))) == [(A, 1)]


def test_message_whose_ttl_ends_while_the_client_works_is_not_waited_for() -> None:
    gate = threading.Event()

    def waiting(message: Message, context: Context) -> Message:
        assert gate.wait(30)
        return counting(message, context)

    with LocalGrid(waiting, clients=1) as grid:
        try:
            replies = grid.send_and_receive(to(A, ttl=0.05))
            assert failures(replies) == [(A, ErrorCode.MESSAGE_UNAVAILABLE, "the message outlived its ttl")]
        finally:
            gate.set()


def test_reply_that_outlived_its_own_ttl_is_an_error() -> None:
    def stale(message: Message, context: Context) -> Message:
        reply = Message(content(), reply_to=message, ttl=5.0)
        reply.metadata.created_at -= 10
        return reply

    with LocalGrid(stale, clients=1) as grid:
        replies = grid.send_and_receive(to(A))

    assert failures(replies) == [(A, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "the reply outlived its ttl")]


def test_reply_cannot_outlive_its_message() -> None:
    def eager(message: Message, context: Context) -> Message:
        reply = counting(message, context)
        reply.metadata.ttl = 1e9
        return reply

    with LocalGrid(eager, clients=1) as grid:
        messages = to(A, ttl=1000.0)
        (reply,) = grid.send_and_receive(messages)

    ends = [m.metadata.created_at + m.metadata.ttl for m in (messages[0], reply)]
    assert ends[1] == pytest.approx(ends[0], abs=1e-3)


# --- faults -----------------------------------------------------------------------------------------------------------


def test_faults_drop_delay_and_break_the_messages_they_name() -> None:
    plan = {A: Fault.DROP, B: Fault.LATE, C: Fault.ERROR}
    asked: list[tuple[int, str]] = []

    def hook(node_id: int, message: Message) -> Fault | None:
        asked.append((node_id, message.metadata.message_id))
        return plan.pop(node_id, None)

    with LocalGrid(counting, clients=4, faults=hook) as grid:
        messages = to(A, B, C, C + 1)
        replies = grid.send_and_receive(messages)
        after = grid.send_and_receive(to(A, B, C, C + 1))

    assert failures(replies) == [(C, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "InjectedFault")]
    assert counts([r for r in replies if not r.has_error()]) == [(C + 1, 1)]
    assert counts(after) == [(A, 1), (B, 2), (C, 1), (C + 1, 2)]
    assert asked[:4] == [(m.metadata.dst_node_id, m.metadata.message_id) for m in messages]


def test_late_client_has_done_its_work_when_the_exchange_ends() -> None:
    def working(message: Message, context: Context) -> Message:
        threading.Event().wait(0.05)
        return counting(message, context)

    with LocalGrid(working, clients=3, threads=2, faults=lambda node, message: Fault.LATE) as grid:
        messages = to(A, B, C)

        assert grid.send_and_receive(messages) == []
        assert [dict(grid.contexts[node].state["memory"]) for node in (A, B, C)] == [{"count": 1}] * 3
        (thrown_away,) = grid.pull_messages([messages[0].metadata.message_id])
        assert thrown_away.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def test_dropped_and_late_replies_never_come_to_a_poll() -> None:
    plan = {A: Fault.DROP, B: Fault.LATE}
    with LocalGrid(counting, clients=3, faults=lambda node, message: plan.get(node)) as grid:
        ids = grid.push_messages(to(A, B, C))

        assert counts(polled(grid, ids[2:])) == [(C, 1)]
        assert grid.pull_messages(ids[:2]) == []


def test_message_to_an_unknown_node_gets_an_error_reply() -> None:
    with LocalGrid(counting, clients=1) as grid:
        replies = grid.send_and_receive(to(5, A, 1))

    assert [r.metadata.src_node_id for r in replies] == [5, A, 1]
    unknown = (ErrorCode.NODE_UNAVAILABLE, "there is no such node")
    assert failures(replies) == [(5, *unknown), (1, *unknown)]


def test_failures_are_logged_without_their_text(caplog: pytest.LogCaptureFixture) -> None:
    def failing(message: Message, context: Context) -> Message:
        raise ValueError("patient 4711 has no label")

    caplog.set_level("INFO")
    with LocalGrid(failing, clients=3) as grid:
        grid.send_and_receive(to(A, B, 5))

    assert [r.getMessage() for r in caplog.records if r.name == "simulations.flower_grid"] == [
        "3 of 3 messages failed: {'ValueError': 2, 'there is no such node': 1}"
    ]


def test_server_app_that_waits_for_more_nodes_is_warned_once(caplog: pytest.LogCaptureFixture) -> None:
    started(FedAvg(), least_squares())
    assert "keeps asking" not in caplog.text
    with LocalGrid(counting, clients=1) as grid:
        for _ in range(20):
            grid.get_node_ids()

    assert caplog.text.count("keeps asking for nodes and sends nothing; this run has 1 and never gets more") == 1


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 0}, "clients must be >= 1, got 0"),
        ({"clients": True}, "clients must be a whole number, got True"),
        ({"clients": []}, r"clients must be a number or a list of node configs, got \[\]; name one at least"),
        ({"clients": "ten"}, "clients must be a number or a list of node configs, got 'ten'"),
        ({"clients": [3]}, "node config 0 must be a mapping, got int"),
        ({"clients": [{"data": None}]}, "node config 0 maps 'data' to a NoneType; use text keys, and numbers or text"),
        ({"clients": 1, "run_config": {"layers": [1]}}, "run_config maps 'layers' to a list; use text keys"),
        ({"clients": 1, "threads": 0}, "threads must be >= 1, got 0"),
        ({"clients": 1, "threads": 1.5}, "threads must be a whole number, got 1.5"),
    ],
)
def test_grid_refuses_what_it_cannot_run(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_flower_apps(ServerApp(), counting, **options)


def test_grid_refuses_messages_that_no_server_may_send() -> None:
    with LocalGrid(counting, clients=1) as grid:
        reply, endless, foreign = to(A, A, A)
        endless.metadata.ttl = -1.0
        foreign.metadata.__dict__["_run_id"] = 99
        for message, fault in [
            (Message(content(), reply_to=grid.send_and_receive([reply])[0]), "is a reply; a server sends"),
            (endless, r"to node 1000 has a ttl of -1.0 seconds; it must be > 0"),
            (foreign, "is of run 99, not 1; make it in this run"),
            (Message(Error(1), reply_to=reply), "has no content; give it a RecordDict"),
        ]:
            with pytest.raises(StrategyError, match=fault):
                grid.push_messages([*to(A), message])
        with pytest.raises(StrategyError, match="timeout must be >= 0 seconds, got -1"):
            grid.send_and_receive(to(A), timeout=-1)

        assert counts(grid.send_and_receive(to(A))) == [(A, 2)]  # nothing was sent meanwhile


def test_closed_grid_refuses_to_send() -> None:
    with LocalGrid(counting, clients=1) as grid:
        messages = to(A)

    with pytest.raises(StrategyError, match="this grid is not open; use it inside"):
        grid.push_messages(messages)


def test_fault_hook_must_return_a_fault() -> None:
    with (
        LocalGrid(counting, clients=1, faults=lambda node, message: "drop") as grid,  # type: ignore[arg-type,return-value] # on purpose
        pytest.raises(ConfigError, match="a fault hook must return a Fault or None, got str"),
    ):
        grid.push_messages(to(A))
