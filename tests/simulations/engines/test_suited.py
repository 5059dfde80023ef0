"""The engine that is chosen by rule: the same one each time, so that a resumed run gives the same bits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clients.memory import InProcessMemory
from clients.torch_trainer import TorchTrainer
from fedml_core import Examples, Task
from server import FixedSampling, History
from simulations import Engine, Fused, Iid, Sequential, Suited, Tuned, Vectorised, simulate
from simulations.engines.engine import Stage
from simulations.engines.suited import suitable
from simulations.population import population_of
from strategies import FedAvg, Scaffold, Strategy

PLAIN = FedAvg()


def points(count: int, *shape: int) -> Examples:
    drawn = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    return Examples.of(drawn, (drawn.flatten(1)[:, 0] > 0).long())


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 150_000), nn.ReLU(), nn.Linear(150_000, 2))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))


def task_of(model: Callable[[], nn.Module]) -> Task:
    shape = (1, 4, 4) if model is convolutional else (4,)
    return Task.classification(model=model, classes=2, train_data=lambda: points(120, *shape))


def stage_of(model: Callable[[], nn.Module]) -> Stage:
    task = task_of(model)
    population = population_of(task, Iid(), 4, seed=0)
    return Stage(task, FedAvg(), TorchTrainer(task, device="cpu"), population, InProcessMemory())


@pytest.mark.parametrize(
    ("model", "chosen"), [(dense, Tuned(threads=1, inner=Fused())), (wide, Fused()), (convolutional, Sequential())]
)
def test_dense_stacks_are_fused_small_ones_in_one_thread_and_the_rest_trains_one_by_one(
    model: Callable[[], nn.Module], chosen: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    assert [suitable(stage_of(model)) for _ in range(2)] == [chosen, chosen]
    assert suitable(stage_of(model), skip_failures=True).skip_failures
    if model is not wide:
        with caplog.at_level(logging.WARNING):
            assert_equal(run(chosen, model=model), run(Suited(), model=model))
        assert caplog.records == []


def test_on_a_gpu_clients_train_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of(convolutional)
    monkeypatch.setattr(TorchTrainer, "device", torch.device("cuda", 0))
    monkeypatch.setattr(Vectorised, "trainer", lambda *_: None)
    assert suitable(stage) == Vectorised()


def run(engine: Engine, strategy: Strategy = PLAIN, model: Callable[[], nn.Module] = dense, **rest: Any) -> History:
    settings: dict[str, Any] = {"clients": 8, "rounds": 5, "sampling": FixedSampling(5), "seed": 2, "device": "cpu"}
    return simulate(task_of(model), strategy, engine=engine, **{**settings, **rest})


def assert_equal(one: History, other: History) -> None:
    assert torch.equal(one.parameters, other.parameters)
    assert [dict(report.metrics["train"]) for report in one.reports] == [
        dict(report.metrics["train"]) for report in other.reports
    ]


@pytest.mark.parametrize("model", [dense, convolutional], ids=["fused", "one-by-one"])
@pytest.mark.parametrize("strategy", [FedAvg(), Scaffold(population=8)], ids=lambda one: type(one).__name__)
def test_a_resumed_run_gives_the_bits_of_one_that_was_not_interrupted(
    model: Callable[[], nn.Module], strategy: Strategy, tmp_path: Path
) -> None:
    whole = run(Suited(), strategy, model)
    run(Suited(), strategy, model, rounds=2, out=tmp_path / "run")
    assert_equal(whole, run(Suited(), strategy, model, out=tmp_path / "run", resume=True))


def test_it_can_be_named_in_a_run_toml() -> None:
    assert Engine.from_config("suited") == Suited()
    assert Engine.from_config({"name": "suited", "skip_failures": True}) == Suited(skip_failures=True)
