from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_core.compression import StochasticQuantize, TopK
from fedml_core.errors import ConfigError, ReplyError, RunError, StrategyError
from fedml_core.transform import Guide, State, Transform, chain
from fedml_core.weighting import ByMetric, Uniform
from fedml_core.wire import from_frame, to_frame
from simulations.flower_grid import FIRST_NODE_ID, LocalGrid, run_flower_apps
from strategies import (
    Compressed,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FlowerStrategy,
    Krum,
    Scaffold,
    Strategy,
    WeightedFedAvg,
)
from strategies.flower import _numpy
from tests.strategies.flower_cases import SIZE, START, Vector, record_of, reply_to, vector_of

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict  # isort: skip
from flwr.clientapp import ClientApp  # isort: skip
from flwr.serverapp import Grid, ServerApp  # isort: skip
from flwr.serverapp import strategy as flower  # isort: skip

CLIENTS = 4
EXAMPLES = (10, 20, 30, 40)
DELTAS = [np.full(SIZE, value, np.float32) for value in (1.0, 2.0, 3.0, 4.0)]
EVERYBODY = 3.0  # the mean of DELTAS by EXAMPLES
BUT_THE_LAST = 140 / 60  # the same without the last client

Tamper = Callable[[Message, Message], Message]


def honest(message: Message, context: Context) -> Message:
    """Move by the client's own delta, and report."""
    place = int(str(context.node_config["partition-id"]))
    vector = vector_of(message.content.array_records["arrays"]) + DELTAS[place]
    return reply_to(message, vector, EXAMPLES[place], accuracy=place / 10)


def last_does(tamper: Tamper) -> Callable[[Message, Context], Message]:
    """Return clients of which the last answers what `tamper` makes of its instruction and its honest reply."""

    def client(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        return tamper(message, reply) if context.node_config["partition-id"] == CLIENTS - 1 else reply

    return client


def one_round(
    strategy: FlowerStrategy,
    client: Callable[[Message, Context], Message] = honest,
    arrays: ArrayRecord | None = None,
    more: Callable[[list[Message]], Iterable[Message]] = list,
) -> tuple[ArrayRecord, MetricRecord | None]:
    """Return the outcome of one round of training; `more` tampers with the list of replies."""
    with LocalGrid(client, clients=CLIENTS) as grid:
        messages = strategy.configure_train(1, arrays or record_of(START), ConfigRecord(), grid)
        outcome, metrics = strategy.aggregate_train(1, more(grid.send_and_receive(messages)))
    assert outcome is not None
    return outcome, metrics


def moved(outcome: ArrayRecord) -> Vector:
    return vector_of(outcome) - START


def with_arrays(record: ArrayRecord, examples: Any = 40, **metrics: Any) -> Tamper:
    def tamper(message: Message, reply: Message) -> Message:
        report = MetricRecord({"num-examples": examples, "accuracy": 0.3, **metrics})
        return Message(RecordDict({"arrays": record, "metrics": report}), reply_to=message)

    return tamper


def with_records(**records: Any) -> Tamper:
    return lambda message, reply: Message(RecordDict(records), reply_to=message)


def changed(**arrays: np.ndarray[Any, Any] | Array) -> ArrayRecord:
    """Return the honest last reply's arrays with some replaced or added."""
    record = record_of(START + 4)
    for name, array in arrays.items():
        record[name] = array if isinstance(array, Array) else Array(array)
    return record


def without(name: str) -> ArrayRecord:
    record = record_of(START + 4)
    del record[name]
    return record


def raw(data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array("float32", (3,), stype, data)


def npz_of(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


METRICS = MetricRecord({"num-examples": 40, "accuracy": 0.3})
HUGE_HEADER = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
HUGE_HEADER += b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n"

BAD_REPLIES: dict[str, tuple[Tamper, str]] = {
    "NaN arrays": (with_arrays(changed(bias=np.full(3, np.nan, np.float32))), "non-finite"),
    "infinite arrays": (with_arrays(changed(bias=np.full(3, np.inf, np.float32))), "non-finite"),
    "numbers beyond float32": (with_arrays(changed(bias=np.full(3, 1e300))), "non-finite"),
    "NaN weight": (with_arrays(changed(), float("nan")), "weight"),
    "infinite weight": (with_arrays(changed(), float("inf")), "weight"),
    "weight of 10^12": (with_arrays(changed(), 10**12), "weight"),
    "weight beyond every float": (with_arrays(changed(), 10**400), "weight"),
    "negative weight": (with_arrays(changed(), -5), "weight"),
    "weight of zero": (with_arrays(changed(), 0), "weight"),
    "weight that is a list": (with_arrays(changed(), [1, 2]), "weight"),
    "NaN metric": (with_arrays(changed(), loss=float("nan")), "non-finite"),
    "wrong shape": (with_arrays(changed(weight=np.zeros((9, 9), np.float32))), "shape"),
    "broadcastable shape (1, 4)": (with_arrays(changed(weight=np.zeros((1, 4), np.float32))), "shape"),
    "broadcastable shape (4,)": (with_arrays(changed(weight=np.zeros(4, np.float32))), "shape"),
    "broadcastable shape ()": (with_arrays(changed(bias=np.array(0.0, np.float32))), "shape"),
    "integers": (with_arrays(changed(bias=np.zeros(3, np.int64))), "dtype"),
    "complex numbers": (with_arrays(changed(bias=np.zeros(3, np.complex64))), "dtype"),
    "text": (with_arrays(changed(bias=np.array(["a", "b", "c"]))), "dtype"),
    "missing array": (with_arrays(without("bias")), "keys"),
    "extra array": (with_arrays(changed(extra=np.zeros(2, np.float32))), "keys"),
    "no array": (with_arrays(ArrayRecord()), "keys"),
    "no MetricRecord": (with_records(arrays=record_of(START)), "metrics"),
    "two MetricRecords": (with_records(arrays=record_of(START), a=METRICS, b=METRICS), "metrics"),
    "no ArrayRecord": (with_records(metrics=METRICS), "arrays"),
    "two ArrayRecords": (with_records(a=record_of(START), b=record_of(START), metrics=METRICS), "arrays"),
    "no weight key": (with_records(arrays=record_of(START), metrics=MetricRecord({"accuracy": 1.0})), "weight"),
    "nothing at all": (with_records(), "arrays"),
    "bytes that are no array": (with_arrays(changed(bias=raw(b"\x00" * 40))), "malformed"),
    "no bytes": (with_arrays(changed(bias=raw(b""))), "malformed"),
    "a zip file": (with_arrays(changed(bias=raw(npz_of(np.zeros(3))))), "malformed"),
    "pickled objects": (with_arrays(changed(bias=raw(np.array([None] * 3, object).dumps()))), "malformed"),
    "a header of 4 petabytes": (with_arrays(changed(bias=raw(HUGE_HEADER))), "malformed"),
    "another serialisation": (with_arrays(changed(bias=raw(b"", stype="torch.tensor"))), "malformed"),
}


@pytest.mark.parametrize(("tamper", "rule"), BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_a_bad_reply_neither_counts_nor_stops_the_round_and_is_logged(
    tamper: Tamper, rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    outcome, metrics = one_round(FlowerStrategy(FedAvg()), last_does(tamper))
    np.testing.assert_allclose(moved(outcome), BUT_THE_LAST, rtol=0, atol=1e-6)
    assert dict(metrics or {}) == {"accuracy": pytest.approx((0.0 * 10 + 0.1 * 20 + 0.2 * 30) / 60)}
    assert [record.getMessage().split(": ")[:2] for record in caplog.records if record.name == "strategies.flower"] == [
        ["round 1", f"the reply of node {FIRST_NODE_ID + 3} does not count ({rule})"]
    ]


@pytest.mark.parametrize(("tamper", "rule"), BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_if_every_reply_is_bad_the_model_stays_as_it_was(tamper: Tamper, rule: str) -> None:
    strategy = FlowerStrategy(FedAdam())
    outcome, metrics = one_round(strategy, lambda message, context: tamper(message, honest(message, context)))
    assert vector_of(outcome).tolist() == START.tolist()
    assert metrics is None


def test_honest_replies_are_averaged_by_examples() -> None:
    outcome, metrics = one_round(FlowerStrategy(FedAvg()))
    np.testing.assert_allclose(moved(outcome), EVERYBODY, rtol=0, atol=1e-6)
    assert dict(metrics or {}) == {"accuracy": pytest.approx(0.2)}


@pytest.mark.parametrize("tamper", [with_arrays(changed(), extra=1.0), with_arrays(changed(), extra=[1.0, 2.0])])
def test_a_metric_that_only_one_client_reports_stops_nothing(tamper: Tamper) -> None:
    outcome, metrics = one_round(FlowerStrategy(FedAvg()), last_does(tamper))
    np.testing.assert_allclose(moved(outcome), EVERYBODY, rtol=0, atol=1e-6)
    assert metrics is not None
    assert set(metrics) == {"accuracy", "extra"}


def test_floats_of_another_size_are_as_good() -> None:
    tamper = with_arrays(changed(bias=(START[12:] + 4).astype(np.float64)))
    outcome, _ = one_round(FlowerStrategy(FedAvg()), last_does(tamper))
    np.testing.assert_allclose(moved(outcome), EVERYBODY, rtol=0, atol=1e-6)
    assert outcome["bias"].numpy().dtype == np.float32


def test_a_client_that_raises_is_named_and_the_others_are_averaged(caplog: pytest.LogCaptureFixture) -> None:
    def raising(message: Message, reply: Message) -> Message:
        raise ValueError("secret")

    outcome, _ = one_round(FlowerStrategy(FedAvg()), last_does(raising))
    np.testing.assert_allclose(moved(outcome), BUT_THE_LAST, rtol=0, atol=1e-6)
    assert f"round 1: the reply of node {FIRST_NODE_ID + 3} does not count (error)" in caplog.text


def test_the_second_reply_of_a_node_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    outcome, _ = one_round(FlowerStrategy(FedAvg()), more=lambda replies: [*replies, replies[0], replies[0]])
    np.testing.assert_allclose(moved(outcome), EVERYBODY, rtol=0, atol=1e-6)
    assert caplog.text.count("(duplicate): it replied before") == 2


def test_a_reply_of_a_node_that_was_not_asked_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    strategy = FlowerStrategy(FedAvg(), fraction_train=0.5)
    with LocalGrid(honest, clients=CLIENTS) as grid:
        asked = list(strategy.configure_train(1, record_of(START), ConfigRecord(), grid))
        nodes = {message.metadata.dst_node_id for message in asked}
        other = next(node for node in grid.get_node_ids() if node not in nodes)
        uninvited = Message(asked[0].content, other, "train")
        replies = grid.send_and_receive([*asked, uninvited])
        outcome, _ = strategy.aggregate_train(1, replies)
    assert outcome is not None
    places = [node - FIRST_NODE_ID for node in nodes]
    expected = sum((place + 1) * EXAMPLES[place] for place in places) / sum(EXAMPLES[place] for place in places)
    np.testing.assert_allclose(moved(outcome), expected, rtol=0, atol=1e-6)
    assert f"node {other} does not count (unknown)" in caplog.text


def test_an_error_that_flower_reports_names_the_node_and_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
    strategy = FlowerStrategy(FedAvg())
    with LocalGrid(honest, clients=CLIENTS) as grid:
        asked = list(strategy.configure_train(1, record_of(START), ConfigRecord(), grid))
        replies = grid.send_and_receive([*asked, Message(asked[0].content, 77, "train")])
        strategy.aggregate_train(1, replies)
    assert [r.metadata.src_node_id for r in replies if r.has_error()] != []
    assert "(error): it failed: 'there is no such node'" in caplog.text


def test_a_step_that_overflows_leaves_the_model_and_the_state_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    def client(message: Message, context: Context) -> Message:
        return reply_to(message, np.full(SIZE, 3e38, np.float32), 1)

    strategy = FlowerStrategy(FedAdam())
    outcome, _ = one_round(strategy, client)
    assert vector_of(outcome).tolist() == START.tolist()
    assert strategy.state is None
    assert "round 1 changed nothing: FedAdam's step is not finite" in caplog.text


def test_a_cohort_too_small_for_the_rule_leaves_the_model_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    outcome, _ = one_round(FlowerStrategy(Krum(malicious=2)))
    assert vector_of(outcome).tolist() == START.tolist()
    assert "round 1 changed nothing: Krum needs a cohort of at least" in caplog.text


@settings(max_examples=150)
@given(st.data())
def test_no_bytes_of_a_client_raise_anything_but_a_reply_error(data: st.DataObject) -> None:
    good = Array(np.arange(6, dtype=np.float32)).data
    broken = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    try:
        assert isinstance(_numpy(raw(bytes(broken[:cut]))), np.ndarray)
    except ReplyError as error:
        assert error.rule == "malformed"


MATRICES = [np.random.default_rng(place).normal(size=(8 + place, SIZE)) for place in range(CLIENTS)]


def least_squares() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        place = int(str(context.node_config["partition-id"]))
        inputs = MATRICES[place].astype(np.float32)
        vector = vector_of(message.content.array_records["arrays"])
        for _ in range(3):
            vector = vector - np.float32(0.05) * inputs.T @ (inputs @ vector - place) / len(inputs)
        return reply_to(message, vector, len(inputs), residual=float(np.abs(inputs @ vector - place).mean()))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        place = int(str(context.node_config["partition-id"]))
        vector = vector_of(message.content.array_records["arrays"])
        loss = float(np.mean((MATRICES[place] @ vector - place) ** 2))
        report = MetricRecord({"num-examples": len(MATRICES[place]), "loss": loss})
        return Message(RecordDict({"metrics": report}), reply_to=message)

    return app


def started(strategy: flower.Strategy, rounds: int = 5) -> tuple[flower.Result, list[Vector]]:
    """Return the result of a stock ServerApp, and the model after each round."""
    results: list[flower.Result] = []
    models: list[Vector] = []

    def central(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        models.append(vector_of(arrays))
        return MetricRecord({"norm": float(np.linalg.norm(models[-1]))})

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        # Flower samples, hence orders its sums, with the global generator.
        random.seed(3)
        initial, config = record_of(START), ConfigRecord({"rate": 0.1})
        results.append(strategy.start(grid, initial, num_rounds=rounds, train_config=config, evaluate_fn=central))

    run_flower_apps(server_app, least_squares(), clients=CLIENTS)
    return results[0], models


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        (FedAvg(), flower.FedAvg()),
        (FedAvgM(server_momentum=0.8), flower.FedAvgM(server_momentum=0.8)),
        (FedAdam(learning_rate=0.02), flower.FedAdam(eta=0.02)),
        (FedMedian(), flower.FedMedian()),
        (FedProx(mu=0.1), flower.FedProx(proximal_mu=0.1)),
    ],
    ids=repr,
)
def test_a_stock_server_app_gives_the_same_run_as_with_flowers_own_strategy(
    mine: Strategy, other: flower.Strategy
) -> None:
    (ours, our_models), (theirs, their_models) = started(FlowerStrategy(mine)), started(other)
    np.testing.assert_allclose(np.stack(our_models), np.stack(their_models), rtol=0, atol=5e-6)
    assert np.abs(our_models[-1] - START).max() > 0.05
    for kind in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
        mine_now, theirs_now = getattr(ours, kind), getattr(theirs, kind)
        assert list(mine_now) == list(theirs_now)
        for number, metrics in theirs_now.items():
            assert dict(mine_now[number]) == pytest.approx(dict(metrics), rel=1e-4)


def test_a_run_whose_clients_all_fail_ends_with_the_model_it_began_with() -> None:
    def failing(message: Message, context: Context) -> Message:
        raise RuntimeError

    with LocalGrid(failing, clients=CLIENTS) as grid:
        result = FlowerStrategy(FedAdam()).start(grid=grid, initial_arrays=record_of(START), num_rounds=2)
    assert vector_of(result.arrays).tolist() == START.tolist()
    assert result.train_metrics_clientapp == {}


def test_a_metric_can_weigh_since_flower_reports_averages() -> None:
    outcome, _ = one_round(FlowerStrategy(WeightedFedAvg(weighting=ByMetric("accuracy"))))
    # The first client's accuracy is 0, which is no weight; the others' are 0.1, 0.2 and 0.3.
    np.testing.assert_allclose(moved(outcome), (0.1 * 2 + 0.2 * 3 + 0.3 * 4) / 0.6, rtol=0, atol=1e-5)


def test_client_halves_without_memory_run_on_the_clients_behalf() -> None:
    outcome, _ = one_round(FlowerStrategy(Compressed(FedAvg(weighting=Uniform()), StochasticQuantize(12))))
    np.testing.assert_allclose(moved(outcome), 2.5, rtol=0, atol=4 / 2047)


def test_integers_stay_the_servers_and_buffers_take_the_mean() -> None:
    def client(message: Message, context: Context) -> Message:
        record = message.content.array_records["arrays"]
        arrays = {name: array.numpy() for name, array in record.items()}
        sent = {name: Array(np.asarray(a + 1 if a.dtype.kind == "f" else a + 5)) for name, a in arrays.items()}
        report = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": ArrayRecord(sent), "metrics": report}), reply_to=message)

    module = torch.nn.BatchNorm1d(2)
    initial = ArrayRecord(module.state_dict())
    strategy = FlowerStrategy(FedAdam(learning_rate=0.01), buffers=[name for name, _ in module.named_buffers()])
    outcome, _ = one_round(strategy, client, initial)
    assert list(outcome) == list(initial)
    assert int(outcome["num_batches_tracked"].numpy()) == 0
    assert outcome["running_mean"].numpy().tolist() == [1.0, 1.0]
    assert 0 < float(outcome["weight"].numpy()[0]) - 1 < 0.02
    module.load_state_dict(outcome.to_torch_state_dict())


def test_the_round_and_fedproxs_mu_are_sent_without_changing_the_callers_config() -> None:
    config = ConfigRecord({"rate": 0.1})
    with LocalGrid(honest, clients=CLIENTS) as grid:
        prox = list(FlowerStrategy(FedProx(mu=0.25)).configure_train(7, record_of(START), config, grid))
        plain = list(FlowerStrategy(FedAvg()).configure_evaluate(7, record_of(START), config, grid))
    assert prox[0].content["config"] == ConfigRecord({"rate": 0.1, "server-round": 7, "proximal-mu": 0.25})
    assert plain[0].content["config"] == ConfigRecord({"rate": 0.1, "server-round": 7})
    assert (prox[0].metadata.message_type, plain[0].metadata.message_type) == ("train", "evaluate")
    assert config == ConfigRecord({"rate": 0.1})


def cohort(strategy: FlowerStrategy, server_round: int, clients: int = 10) -> list[int]:
    with LocalGrid(honest, clients=clients) as grid:
        messages = strategy.configure_train(server_round, record_of(START), ConfigRecord(), grid)
        return [message.metadata.dst_node_id for message in messages]


def test_cohorts_have_the_asked_size_and_follow_the_seed_and_the_round() -> None:
    strategy = FlowerStrategy(FedAvg(), fraction_train=0.39)
    assert [len(set(cohort(strategy, number))) for number in (1, 2)] == [3, 3]
    assert cohort(strategy, 1) == cohort(FlowerStrategy(FedAvg(), fraction_train=0.39), 1)
    others = [cohort(strategy, number) for number in range(2, 8)]
    others.append(cohort(FlowerStrategy(FedAvg(), fraction_train=0.39, seed=1), 1))
    assert any(other != cohort(strategy, 1) for other in others)
    assert len(cohort(FlowerStrategy(FedAvg(), fraction_train=0.01, min_nodes=5), 1)) == 5
    assert cohort(FlowerStrategy(FedAvg(), fraction_train=0.0), 1) == []


def test_no_training_is_no_change() -> None:
    outcome, metrics = one_round(FlowerStrategy(FedAvg(), fraction_train=0))
    assert vector_of(outcome).tolist() == START.tolist()
    assert metrics is None


class LateGrid(LocalGrid):
    """A grid whose nodes connect one by one, each time somebody asks."""

    connected = 0

    def get_node_ids(self) -> list[int]:
        self.connected += 1
        return super().get_node_ids()[: self.connected - 1]


def test_nodes_are_waited_for() -> None:
    with LateGrid(honest, clients=CLIENTS) as grid:
        messages = FlowerStrategy(FedAvg(), min_nodes=2).configure_train(1, record_of(START), ConfigRecord(), grid)
        assert len(list(messages)) == 2


def test_too_few_nodes_are_an_error_in_the_end() -> None:
    with LocalGrid(honest, clients=3) as grid, pytest.raises(RunError, match="3 nodes connected within 0 s, 4 are"):
        FlowerStrategy(FedAvg(), min_nodes=4, wait_s=0).configure_train(1, record_of(START), ConfigRecord(), grid)


def run_of(strategy: FlowerStrategy, arrays: ArrayRecord, rounds: int) -> ArrayRecord:
    with LocalGrid(least_squares(), clients=CLIENTS) as grid:
        return strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds).arrays


def test_a_saved_state_goes_on_where_it_stopped() -> None:
    # Momentum knows no round number, so that two halves are a whole although `start` counts from 1 again.
    whole = run_of(FlowerStrategy(FedAvgM()), record_of(START), 4)
    first, second = FlowerStrategy(FedAvgM()), FlowerStrategy(FedAvgM())
    half = run_of(first, record_of(START), 2)
    assert first.state is not None
    second.state = from_frame(to_frame("state", first.state))
    np.testing.assert_array_equal(vector_of(run_of(second, half, 2)), vector_of(whole))
    without_state = run_of(FlowerStrategy(FedAvgM()), half, 2)
    assert np.abs(vector_of(without_state) - vector_of(whole)).max() > 1e-3


def test_a_state_of_another_model_is_refused() -> None:
    strategy = FlowerStrategy(FedAvgM())
    strategy.state = {"0": {"round": 1, "momentum": torch.zeros(3)}, "1": {}}
    with pytest.raises(StrategyError, match="the strategy's state is of another model; set state to None"):
        one_round(strategy)


def test_evaluation_averages_good_replies_by_examples_and_excludes_bad_ones(caplog: pytest.LogCaptureFixture) -> None:
    reports: list[dict[str, Any]] = [
        {"num-examples": 1, "loss": 4.0},
        {"num-examples": 3, "loss": 8.0},
        {"num-examples": 3, "loss": float("nan")},
        {"num-examples": -3, "loss": 0.0},
    ]

    def client(message: Message, context: Context) -> Message:
        report = MetricRecord(reports[int(str(context.node_config["partition-id"]))])
        return Message(RecordDict({"metrics": report}), reply_to=message)

    strategy = FlowerStrategy(FedAvg())
    with LocalGrid(client, clients=CLIENTS) as grid:
        replies = grid.send_and_receive(strategy.configure_evaluate(1, record_of(START), ConfigRecord(), grid))
        assert strategy.aggregate_evaluate(1, replies) == MetricRecord({"loss": 7.0})
        assert strategy.aggregate_evaluate(1, replies[2:]) is None
    assert caplog.text.count("does not count") == 4


def test_aggregating_before_configuring_says_what_comes_first() -> None:
    with pytest.raises(StrategyError, match="call configure_train before it"):
        FlowerStrategy(FedAvg()).aggregate_train(1, [])


@dataclass(frozen=True)
class _Steers(Transform):
    def guide(self, told: State, memory: State) -> Guide:
        return Guide(offset=torch.ones(1))


@dataclass(frozen=True, kw_only=True)
class _Steered(Strategy):
    def pipeline(self) -> Transform:
        return chain(_Steers())


@dataclass(frozen=True, kw_only=True)
class _Protected(FedAvg):
    def protection(self) -> str:
        return "secure aggregation"


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Scaffold(population=4), "Scaffold's clients remember something between rounds, which Flower's ClientApps"),
        (Compressed(FedAvg(), TopK(0.1)), "Compressed's clients remember something between rounds"),
        (_Steered(), "_Steered steers each local step, which Flower's config cannot say"),
        (_Protected(), "_Protected cannot give 'secure aggregation' here; run it with fedveil's own clients"),
        (flower.FedAvg(), "FlowerStrategy takes one of fedveil's strategies, got FedAvg"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_strategy_that_flowers_clients_cannot_serve_is_refused(strategy: Any, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        FlowerStrategy(strategy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction_train": 1.5}, "fraction_train must be >= 0 and <= 1, got 1.5"),
        ({"fraction_evaluate": -0.1}, "fraction_evaluate must be >= 0 and <= 1, got -0.1"),
        ({"min_nodes": 0}, "min_nodes must be >= 1, got 0"),
        ({"wait_s": -1}, "wait_s must be >= 0, got -1"),
    ],
)
def test_a_wrong_argument_is_refused_at_construction(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        FlowerStrategy(FedAvg(), **arguments)


def test_a_buffer_that_is_not_there_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(StrategyError, match="buffer 'running_mean' is not among the model's arrays: bias, weight"):
        cohort(FlowerStrategy(FedAvg(), buffers=["running_mean"]), 1)
