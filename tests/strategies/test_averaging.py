from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedml_core.errors import ConfigError, ReplyError, StrategyError
from fedml_core.message_frames import assignment_from_frame, assignment_to_frame
from fedml_core.messages import Assignment, TrainWork
from fedml_core.model import ModelSpec
from fedml_core.training import Training
from fedml_core.transform import Draws, Guide, Transform
from fedml_core.update import Update
from fedml_core.weighting import ByExamples, ByMetric, Uniform, Weighting
from strategies import FedAvg, FedProx, StepDecay, Strategy, WeightedFedAvg
from tests.strategies.flower_cases import assert_same, ours, prepared, theirs

from flwr.serverapp import strategy as flower  # isort: skip

PAIRS = [(np.array([1.0, 0.0]), 3), (np.array([5.0, 4.0]), 1)]


def mean_of(strategy: Strategy, contributions: list[Any]) -> list[float]:
    stepped, _ = strategy.aggregate(np.zeros(2), contributions)
    return [float(x) for x in stepped]


@pytest.mark.parametrize(
    ("mine", "other"),
    [(FedAvg(), flower.FedAvg()), (FedProx(mu=0.5), flower.FedProx(proximal_mu=0.5))],
    ids=["FedAvg", "FedProx"],
)
def test_five_rounds_equal_flowers(mine: Strategy, other: flower.Strategy) -> None:
    rounds = prepared(rounds=5, clients=6)
    assert_same(ours(mine, rounds), theirs(other, rounds))


def test_fedavg_is_the_mean_by_examples() -> None:
    assert mean_of(FedAvg(), PAIRS) == [2.0, 1.0]


def test_fedavg_can_count_every_client_alike() -> None:
    assert mean_of(FedAvg(weighting=Uniform()), PAIRS) == [3.0, 2.0]


def test_the_server_learning_rate_scales_the_step_of_the_parameters_and_not_of_the_buffers() -> None:
    spec, strategy = ModelSpec.of(torch.nn.BatchNorm1d(1)), FedAvg(server_learning_rate=0.5)
    stepped, _ = strategy.aggregate(np.zeros(4), [(np.ones(4), 1)], strategy.init(spec))
    assert stepped.tolist() == [0.5, 0.5, 1.0, 1.0]


def test_a_schedule_can_stand_for_the_server_learning_rate() -> None:
    strategy = FedAvg(server_learning_rate=StepDecay(1.0, every=1, factor=0.5))
    parameters, state = strategy.aggregate(np.zeros(1), [(np.ones(1), 1)])
    parameters, state = strategy.aggregate(parameters, [(np.ones(1), 1)], state)
    assert parameters.tolist() == [1.5]


def test_a_metric_weighs_by_its_average_and_not_by_its_sum() -> None:
    contributions = [(np.array([1.0, 0.0]), 100, {"accuracy": 0.25}), (np.array([5.0, 4.0]), 1, {"accuracy": 0.75})]
    assert mean_of(WeightedFedAvg(weighting=ByMetric("accuracy")), contributions) == [4.0, 3.0]
    assert mean_of(WeightedFedAvg(weighting=ByMetric("accuracy", power=0.0)), contributions) == [3.0, 2.0]


def test_a_client_that_lacks_the_metric_is_refused_with_what_it_reports() -> None:
    with pytest.raises(ReplyError, match="update 1: the client reports no 'accuracy' to weigh by; it reports examples"):
        mean_of(WeightedFedAvg(weighting=ByMetric("accuracy")), [(*PAIRS[0], {"accuracy": 0.5}), PAIRS[1]])


@pytest.mark.parametrize("accuracy", [0.0, -1.0])
def test_a_metric_that_is_not_positive_gives_no_weight(accuracy: float) -> None:
    with pytest.raises(ReplyError, match="a weight must be > 0"):
        mean_of(WeightedFedAvg(weighting=ByMetric("accuracy")), [(*PAIRS[0], {"accuracy": accuracy})])


def test_a_function_weighs() -> None:
    strategy = WeightedFedAvg(weighting=lambda update: update.sums["examples"] ** 2)
    assert mean_of(strategy, PAIRS) == pytest.approx([1.4, 0.4])


def test_a_function_that_returns_one_number_weighs_a_batch_of_clients_alike() -> None:
    half = WeightedFedAvg(weighting=lambda update: 0.5).client_half()
    batch = Update(torch.ones(3, 2), torch.ones(3, dtype=torch.float64))
    encoded, _ = half.encode(batch, {}, {}, Draws.of(0))
    assert encoded.weight.tolist() == [0.5, 0.5, 0.5]
    assert encoded.values.tolist() == [[0.5, 0.5]] * 3


def test_a_function_that_returns_one_weight_for_each_parameter_is_refused() -> None:
    strategy = WeightedFedAvg(weighting=lambda update: torch.ones(2))
    with pytest.raises(StrategyError, match=r"returned shape \(2,\); one weight a client is \(\)"):
        mean_of(strategy, PAIRS)


def test_a_function_cannot_be_sent_to_a_fleet_and_the_error_says_what_can() -> None:
    def by_size(update: Update) -> Tensor:
        return update.sums["examples"]

    strategy = WeightedFedAvg(weighting=by_size)
    for refuse in (strategy.to_config, strategy.client_half().to_config):
        with pytest.raises(ConfigError, match="by_size cannot be sent to a fleet or saved; write a frozen dataclass"):
            refuse()


def test_a_named_weighting_of_ones_own_can_be_sent() -> None:
    @dataclass(frozen=True)
    class ByRoot(Weighting):
        def weight(self, update: Update) -> Tensor:
            return update.sums["examples"].sqrt()

    strategy = WeightedFedAvg(weighting=ByRoot())
    try:
        assert Strategy.from_config(strategy.to_config()) == strategy
        assert mean_of(strategy, [(np.array([1.0, 0.0]), 4), (np.array([4.0, 3.0]), 1)]) == [2.0, 1.0]
    finally:
        del Weighting.members["ByRoot"]


@pytest.mark.parametrize("wrong", [Uniform, None, "uniform", 3])
def test_what_is_no_weighting_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="weighting must be a Weighting or a function of an update"):
        WeightedFedAvg(weighting=wrong)


def test_fedprox_guides_its_clients_and_is_fedavg_otherwise() -> None:
    strategy = FedProx(mu=0.25)
    assert strategy.client_half().guide({}, {}) == Guide(mu=0.25)
    assert mean_of(strategy, PAIRS) == mean_of(FedAvg(), PAIRS)


@pytest.mark.parametrize("mu", [-1.0, float("nan"), float("inf")])
def test_fedprox_refuses_a_mu_that_pushes_away(mu: float) -> None:
    with pytest.raises(ConfigError, match=f"^mu must be >= 0, got {mu}$"):
        FedProx(mu=mu)


@pytest.mark.parametrize(
    "strategy",
    [FedAvg(), FedAvg(server_learning_rate=0.5), FedProx(mu=0.1, server_learning_rate=0.5)],
    ids=repr,
)
def test_the_client_half_arrives_as_it_was_sent(strategy: Strategy) -> None:
    half = strategy.client_half()
    told = strategy.told(strategy.init(ModelSpec.of_size(2)))
    sent = Assignment("run", 1, "f", torch.zeros(2), TrainWork(Training(), half, told))
    work = assignment_from_frame(assignment_to_frame(sent)).work
    assert isinstance(work, TrainWork)
    assert work.pipeline == half


def test_the_server_learning_rate_of_one_adds_no_transform() -> None:
    assert FedAvg(server_learning_rate=1.0).pipeline() == FedAvg().pipeline()
    assert isinstance(FedAvg().pipeline(), Transform)
    assert FedAvg().weighting == ByExamples()
