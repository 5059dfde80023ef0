"""The sequential engine's settings reach the trainer, what it has to say reaches the user, and answers stay."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from torch import nn

from clients.memory import InProcessMemory
from clients.torch_trainer import TorchTrainer
from fedml_core.data import ClientData
from fedml_core.errors import ConfigError
from fedml_core.messages import Assignment, TrainWork
from fedml_core.task import Task
from fedml_core.training import Training
from server import FixedSampling
from simulations.engines.engine import Engine, Stage
from simulations.engines.processes import Processes
from simulations.engines.sequential import Sequential
from simulations.engines.tuned import Tuned
from simulations.population import Virtual
from simulations.simulate import simulate
from strategies import FedAvg
from tests.clients.layout_cases import ResNet, Viewing, images

TASK = Task.classification(model=ResNet, classes=3, train_data=lambda: images(60))


def run(engine: Engine, task: Task = TASK, **rest: Any) -> torch.Tensor:
    settings = {"clients": 6, "rounds": 2, "sampling": FixedSampling(3), "training": Training(batch_size=5)}
    return simulate(task, FedAvg(), engine=engine, device="cpu", **{**settings, **rest}).parameters


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize(
    "engine",
    [
        Sequential(memory_layout="channels_last"),
        Sequential(memory_layout="contiguous"),
        Sequential(deterministic=True),
        Tuned(threads=1, keep_freed_memory=True, inner=Sequential(memory_layout="contiguous")),
        Processes(workers=2, inner=Sequential(memory_layout="contiguous")),
        Processes(workers=2),
    ],
    ids=str,
)
def test_layouts_and_determinism_do_not_change_the_answer(engine: Engine) -> None:
    close(run(engine), run(Sequential()))


def test_a_run_repeats_bit_for_bit() -> None:
    assert torch.equal(run(Sequential()), run(Sequential()))


def test_settings_can_stand_in_a_run_toml() -> None:
    table = {"name": "sequential", "memory_layout": "contiguous", "deterministic": True}
    assert Engine.from_config(table, "engine") == Sequential(memory_layout="contiguous", deterministic=True)


def test_an_unknown_layout_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="memory_layout must be one of auto, channels_last, contiguous, got 'nhwc'"):
        run(Sequential(memory_layout="nhwc"))  # type: ignore[arg-type]


def test_the_user_is_told_once_that_a_model_keeps_the_default_layout() -> None:
    told: list[str] = []
    task = Task.classification(model=Viewing, classes=3)
    trainer = TorchTrainer(task, device="cpu")
    population = Virtual(3, lambda client: ClientData(images(10, seed=client)))
    stage = Stage(task, FedAvg(), trainer, population, InProcessMemory(), tell=told.append)
    work = TrainWork(Training(batch_size=5))
    assignment = Assignment("run", 1, trainer.spec.fingerprint, trainer.initial(), work)
    with closing(Sequential().open(stage)) as session:
        replies = list(session.run(assignment, [0, 1, 2]))
    assert len(replies) == 3
    assert len(told) == 1 and "keeps the default layout" in told[0]


@pytest.mark.parametrize("model", [ResNet, Viewing])
def test_sessions_that_take_turns_train_each_in_its_own_layout(model: type[nn.Module]) -> None:
    told, seen = list[str](), list[bool]()

    class Watching(model):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
            return super().forward(x)  # type: ignore[no-any-return]

    task = Task.classification(model=Watching, classes=3)
    trainer = TorchTrainer(task, device="cpu")
    population = Virtual(3, lambda client: ClientData(images(5, seed=client)))
    stage = Stage(task, FedAvg(), trainer, population, InProcessMemory(), tell=told.append)
    assignment = Assignment("run", 1, trainer.spec.fingerprint, trainer.initial(), TrainWork(Training(batch_size=5)))
    sessions = [Sequential().open(stage), Sequential(memory_layout="contiguous").open(stage)]
    turns = []
    for session in (*sessions, *sessions):
        list(session.run(assignment, [0]))
        turns.append(seen.copy())
        seen.clear()
    if model is ResNet:
        assert turns == [[True], [False], [True], [False]] and told == []
    else:
        # Its first turn fails in channels-last and begins anew; then it is known, and said once.
        assert turns == [[True, False], [False], [False], [False]] and len(told) == 1


def test_a_worker_passes_on_what_its_trainer_says(caplog: pytest.LogCaptureFixture) -> None:
    task = Task.classification(model=Viewing, classes=3, train_data=lambda: images(60))
    close(run(Processes(workers=1), task), run(Sequential(memory_layout="contiguous"), task))
    assert [record.name for record in caplog.records] == ["simulations.engines.engine"]
