from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from fedml_core.compression import StochasticQuantize, TopK
from fedml_core.errors import ConfigError, RunError, StrategyError
from fedml_core.transform import Guide, State, Transform, chain
from fedml_core.weighting import ByMetric, Uniform
from fedml_core.wire import from_frame, to_frame
from simulations.flower_apps import run_flower_apps
from simulations.flower_grid import LocalGrid
from strategies import (
    Compressed,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FlowerStrategy,
    Scaffold,
    Strategy,
    WeightedFedAvg,
)
from tests.strategies.flower_cases import (
    CLIENTS,
    START,
    Vector,
    honest,
    least_squares,
    moved,
    one_round,
    record_of,
    vector_of,
)

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict  # isort: skip
from flwr.serverapp import Grid, ServerApp  # isort: skip
from flwr.serverapp import strategy as flower  # isort: skip


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
