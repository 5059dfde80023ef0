from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fedml_core.errors import ConfigError
from fedml_core.model import ModelSpec
from fedml_core.named import Named
from strategies import (
    ExponentialDecay,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    Strategy,
)
from tests.strategies.flower_cases import assert_same, ours, prepared, theirs

from flwr.serverapp import strategy as flower  # isort: skip

ROUNDS = prepared(rounds=5, clients=4)


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        (FedAvgM(server_momentum=0.0), flower.FedAvgM()),
        (FedAvgM(), flower.FedAvgM(server_momentum=0.9)),
        (
            FedAvgM(server_learning_rate=0.5, server_momentum=0.7),
            flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.7),
        ),
        (FedAdagrad(), flower.FedAdagrad()),
        (FedAdagrad(learning_rate=0.03, tau=0.1), flower.FedAdagrad(eta=0.03, tau=0.1)),
        (FedAdam(), flower.FedAdam()),
        (
            FedAdam(learning_rate=0.02, beta_1=0.5, beta_2=0.9, tau=0.01),
            flower.FedAdam(eta=0.02, beta_1=0.5, beta_2=0.9, tau=0.01),
        ),
        (FedYogi(), flower.FedYogi()),
        (
            FedYogi(learning_rate=0.2, beta_1=0.5, beta_2=0.9, tau=0.01),
            flower.FedYogi(eta=0.2, beta_1=0.5, beta_2=0.9, tau=0.01),
        ),
    ],
    ids=repr,
)
def test_five_rounds_equal_flowers_with_the_same_arguments(mine: Strategy, other: flower.Strategy) -> None:
    assert_same(ours(mine, ROUNDS), theirs(other, ROUNDS))


@pytest.mark.parametrize(
    ("mine", "other"), [(FedAdam(), flower.FedAdam(eta=0.101)), (FedYogi(), flower.FedYogi(beta_2=0.98))], ids=repr
)
def test_the_comparison_with_flower_notices_an_argument_that_differs_by_a_little(
    mine: Strategy, other: flower.Strategy
) -> None:
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same(ours(mine, ROUNDS), theirs(other, ROUNDS))


@pytest.mark.parametrize("strategy", [FedAvgM(), FedAdagrad(), FedAdam(), FedYogi()], ids=repr)
def test_a_server_optimizer_leaves_averaged_buffers_to_the_mean(strategy: Strategy) -> None:
    spec = ModelSpec.of(torch.nn.BatchNorm1d(2))  # 4 parameters, then 4 running statistics
    assert (spec.parameter_count, spec.size) == (4, 8)
    parameters, state = np.zeros(8, np.float32), strategy.init(spec)
    deltas = [(np.full(8, 1.0), 3), (np.full(8, 5.0), 1)]
    for expected in (2.0, 4.0):
        parameters, state = strategy.aggregate(parameters, deltas, state)
        assert parameters[4:].tolist() == [expected] * 4
    assert all(value.shape == (4,) for value in state["0"].values() if isinstance(value, torch.Tensor))


def test_the_first_step_of_adam_is_the_formula_by_hand() -> None:
    # One client moves by 0.5: m = 0.05, v = 0.0025; the corrections take the exponent 2 in round 1, as Flower's do.
    stepped, _ = FedAdam(learning_rate=0.1).aggregate(np.zeros(1), [(np.array([0.5]), 7)])
    rate = 0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    assert stepped[0] == pytest.approx(rate * 0.05 / (0.05 + 1e-3), rel=1e-6)


def test_a_schedule_scales_each_rounds_step() -> None:
    decayed = FedAvgM(server_learning_rate=ExponentialDecay(1.0, factor=0.5), server_momentum=0.0)
    parameters, state, steps = np.zeros(1), None, []
    for _ in range(3):
        after, state = decayed.aggregate(parameters, [(np.ones(1), 1)], state)
        steps.append(float((after - parameters)[0]))
        parameters = after
    assert steps == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("strategy", [FedAvgM(), FedAdagrad(), FedAdam(), FedYogi()], ids=repr)
def test_a_round_without_replies_keeps_the_moments(strategy: Strategy) -> None:
    one = [(np.ones(3), 1)]
    parameters, state = strategy.aggregate(np.zeros(3), one)
    skipped = strategy.aggregate(parameters, [], state)
    assert skipped[0] is parameters
    assert skipped[1] is state
    again = strategy.aggregate(*skipped[:1], one, skipped[1])[0]
    assert again.tolist() == strategy.aggregate(parameters, one, state)[0].tolist()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (FedAdam, {"beta_1": 1.0}, "beta_1 must be >= 0 and < 1, got 1.0"),
        (FedAdam, {"beta_2": -0.1}, "beta_2 must be >= 0 and < 1, got -0.1"),
        (FedAdam, {"tau": 0}, "tau must be > 0, got 0"),
        (FedYogi, {"tau": float("nan")}, "tau must be > 0, got nan"),
        (FedAdagrad, {"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        (FedAdagrad, {"learning_rate": "fast"}, "learning_rate must be a number or a schedule, got 'fast'"),
        (FedAdagrad, {"tau": float("inf")}, "tau must be > 0, got inf"),
        (FedAvgM, {"server_momentum": 1}, "server_momentum must be >= 0 and < 1, got 1"),
        (FedAvgM, {"server_momentum": True}, "server_momentum must be a number, got True"),
        (FedAdam, {"weighting": "examples"}, r"weighting must be a Weighting such as ByExamples\(\), got str"),
        (FedAdam, {"max_weight": 0}, "max_weight must be > 0, got 0"),
    ],
)
def test_a_wrong_argument_is_refused_at_construction(kind: type[Strategy], arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        kind(**arguments)


def test_strategies_are_values_that_travel_by_name() -> None:
    strategy = FedAdam(learning_rate=ExponentialDecay(0.1, factor=0.9), beta_1=0.8)
    config = strategy.to_config()
    assert config["learning_rate"] == {"name": "ExponentialDecay", "initial": 0.1, "factor": 0.9}
    assert Strategy.from_config(config) == strategy
    assert Strategy.from_config("FedAvg") == FedAvg()
    assert isinstance(strategy, Named)
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.beta_1 = 0.5  # type: ignore[misc]  # that it cannot be set is the claim
