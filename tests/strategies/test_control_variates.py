from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from clients.client import Client
from clients.memory import InProcessMemory
from clients.torch_trainer import TorchTrainer
from fedml_core.data import ClientData, Examples
from fedml_core.messages import Assignment, TrainWork
from fedml_core.model import ModelSpec
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.transform import Draws, State
from fedml_core.update import Update
from strategies import FedAvg, Scaffold, Strategy

Floats = np.ndarray[Any, np.dtype[np.float64]]

# Client i minimises sum(a_i (w - b_i)²) / 2: different curvatures and optima, so local steps drift apart.
CURVATURES = np.array([[1.0, 0.2, 3.0], [4.0, 1.0, 0.5], [0.3, 2.0, 1.0], [2.0, 5.0, 0.1]])
OPTIMA = np.array([[1.0, -1.0, 0.5], [-1.0, 2.0, 0.0], [3.0, 0.5, -2.0], [0.0, 1.0, 1.0]])
OPTIMUM = (CURVATURES * OPTIMA).sum(axis=0) / CURVATURES.sum(axis=0)
RATE, STEPS = 0.1, 10
COHORTS = [[0, 1, 2, 3], [0, 2], [3], [1, 2, 3], [0, 1], [2, 3], [0, 3], [1], [0, 1, 2, 3], [1, 3]]


def gradient(client: int, w: Floats) -> Floats:
    return np.asarray(CURVATURES[client] * (w - OPTIMA[client]))


def scaffold_of_the_paper(cohorts: list[list[int]], global_rate: float) -> list[Floats]:
    """Return x after each round of Algorithm 1 with option II, line by line, in float64."""
    x, c = np.zeros(3), np.zeros(3)
    c_i = np.zeros((len(OPTIMA), 3))
    history = []
    for cohort in cohorts:
        delta_y, delta_c = [], []
        for i in cohort:
            y = x.copy()
            for _ in range(STEPS):
                y = y - RATE * (gradient(i, y) - c_i[i] + c)
            c_plus = c_i[i] - c + (x - y) / (STEPS * RATE)
            delta_y.append(y - x)
            delta_c.append(c_plus - c_i[i])
            c_i[i] = c_plus
        x = x + global_rate * np.mean(delta_y, axis=0)
        c = c + len(cohort) / len(OPTIMA) * np.mean(delta_c, axis=0)
        history.append(x)
    return history


def rounds_of(strategy: Strategy, cohorts: list[list[int]]) -> list[Floats]:
    """Return the model after each round, clients training with plain SGD under the strategy's guide."""
    spec = ModelSpec.of_size(3)
    half, parameters, state = strategy.client_half(), torch.zeros(3), strategy.init(spec)
    memories: dict[int, State] = {}
    history = []
    for number, cohort in enumerate(cohorts):
        accumulator, told = strategy.accumulator(spec), strategy.told(state)
        for client in cohort:
            memory = memories.get(client, half.memory(spec))
            offset = half.guide(told, memory).offset
            steered = np.zeros(3) if offset is None else offset.double().numpy()
            start = parameters.double().numpy()
            w = start
            for _ in range(STEPS):
                w = w - RATE * (gradient(client, w) + steered)
            facts = {"step_size": torch.tensor(STEPS * RATE, dtype=torch.float64)}
            update = Update.of(torch.from_numpy(w - start).float(), 1.0, examples=1.0).replace(facts=facts)
            encoded, memories[client] = half.encode(update, told, memory, Draws.of(number, client))
            accumulator.add(encoded.outgoing())
        parameters, state = strategy.step(parameters, accumulator.total(), state, Draws.of(number))
        history.append(parameters.double().numpy())
    return history


@pytest.mark.parametrize("global_rate", [1.0, 0.5])
def test_scaffold_is_the_papers_pseudocode_round_by_round(global_rate: float) -> None:
    mine = rounds_of(Scaffold(population=4, server_learning_rate=global_rate), COHORTS)
    paper = scaffold_of_the_paper(COHORTS, global_rate)
    # Values are around 1 and pass through float32 once a round.
    np.testing.assert_allclose(np.stack(mine), np.stack(paper), rtol=0, atol=1e-6)


def test_the_oracle_notices_a_wrong_population() -> None:
    mine = rounds_of(Scaffold(population=5), COHORTS)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        np.testing.assert_allclose(np.stack(mine), np.stack(scaffold_of_the_paper(COHORTS, 1.0)), rtol=0, atol=1e-3)


def test_scaffold_finds_the_optimum_that_fedavg_with_many_local_steps_misses() -> None:
    everyone = [[0, 1, 2, 3]] * 300
    # FedAvg's fixed point: after K steps a client has gone the share 1 - (1 - rate a)^K of the way to its own optimum.
    share = 1 - (1 - RATE * CURVATURES) ** STEPS
    drifted = (share * OPTIMA).sum(axis=0) / share.sum(axis=0)
    assert np.abs(drifted - OPTIMUM).max() > 0.2
    np.testing.assert_allclose(rounds_of(FedAvg(), everyone)[-1], drifted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(rounds_of(Scaffold(population=4), everyone)[-1], OPTIMUM, rtol=0, atol=1e-6)


def test_scaffold_finds_the_optimum_when_half_of_the_population_takes_part() -> None:
    halves = [[0, 1], [2, 3], [0, 2], [1, 3], [0, 3], [1, 2]] * 100
    np.testing.assert_allclose(rounds_of(Scaffold(population=4), halves)[-1], OPTIMUM, rtol=0, atol=1e-5)


LEAST_SQUARES = Task.regression(model=lambda: torch.nn.Linear(1, 1, bias=False))


def least_squares_data(client: int) -> ClientData:
    # Inputs of different sizes are different curvatures; targets are fitted by different slopes.
    inputs = torch.full((4, 1), (0.5, 1.0, 2.0)[client])
    return ClientData(Examples.of(inputs, (3.0, -1.0, 1.0)[client] * inputs))


def trained_with_torch(strategy: Strategy, rounds: int) -> float:
    """Return the slope that real clients learn, with memories of their own."""
    trainer, memory = TorchTrainer(LEAST_SQUARES, device="cpu"), InProcessMemory()
    parameters, state = torch.zeros(1), strategy.init(trainer.spec)

    def client(number: int) -> Client:
        load: Callable[[], ClientData] = lambda: least_squares_data(number)  # noqa: E731 - a def would be longer
        return Client(number, load, trainer, memory)

    training = Training(steps=5, batch_size=4, learning_rate=0.1)
    for number in range(1, rounds + 1):
        accumulator = strategy.accumulator(trainer.spec)
        work = TrainWork(training, strategy.client_half(), strategy.told(state))
        assignment = Assignment("run", number, trainer.spec.fingerprint, parameters, work)
        for place in range(3):
            body = client(place).handle(assignment).body
            assert isinstance(body, Update)
            accumulator.add(body)
        parameters, state = strategy.step(parameters, accumulator.total(), state, Draws.of(number))
    return float(parameters)


def test_scaffold_removes_the_drift_of_real_torch_clients() -> None:
    # Mean squared error has curvature 2 x²: 0.5, 2 and 8.
    curvatures, slopes = np.array([0.5, 2.0, 8.0]), np.array([3.0, -1.0, 1.0])
    optimum = float((curvatures * slopes).sum() / curvatures.sum())
    share = 1 - (1 - 0.1 * curvatures) ** 5
    drifted = float((share * slopes).sum() / share.sum())
    assert abs(drifted - optimum) > 0.01
    assert trained_with_torch(FedAvg(), 40) == pytest.approx(drifted, abs=1e-4)
    assert trained_with_torch(Scaffold(population=3), 150) == pytest.approx(optimum, abs=1e-4)
