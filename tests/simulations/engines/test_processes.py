"""Worker processes: the same answer, whoever works and whoever dies."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedml_core import ClientData, Examples, Task, Training
from fedml_core.errors import ConfigError, RunError, TaskError
from server import EvaluationPlan, EveryClient, History
from simulations import Faults, Processes, QuantitySkew, Sequential, Simulation, simulate
from strategies import FedAdam, FedAvg, FedMedian, Scaffold, Strategy


def points(count: int, seed: int) -> Examples:
    drawn = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return Examples.of(drawn, (drawn[:, 0] > 0).long() + (drawn[:, 1] > 0).long())


TASK = Task.classification(
    model=lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)),
    classes=3,
    train_data=lambda: points(240, 1),
    test_data=lambda: points(60, 2),
)
SETTINGS: Mapping[str, Any] = {
    "clients": 12,
    "rounds": 3,
    "partition": QuantitySkew(1.0),
    "holdout": 0.2,
    "training": Training(batch_size=8),
    "evaluation": EvaluationPlan(clients=EveryClient()),
    "faults": Faults(drop=0.1, nan=0.1),
}


def same(one: History, other: History) -> None:
    torch.testing.assert_close(one.parameters, other.parameters, rtol=1e-5, atol=1e-6)
    for a, b in zip(one.reports, other.reports, strict=True):
        assert (a.participants, a.missing, a.excluded) == (b.participants, b.missing, b.excluded)
        assert a.bytes_down == b.bytes_down
        for place in a.metrics:
            assert dict(a.metrics[place]) == pytest.approx(dict(b.metrics[place]), rel=1e-5)


@pytest.mark.parametrize(
    "strategy",
    [FedAvg(), FedAdam(), FedMedian(), Scaffold(population=12)],
    ids=lambda strategy: type(strategy).__name__,
)
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_answer_of_one_process(strategy: Strategy, workers: int) -> None:
    expected = simulate(TASK, strategy, **SETTINGS)
    same(expected, simulate(TASK, strategy, engine=Processes(workers=workers), **SETTINGS))


def killing(place: Path, when: int) -> Task:
    """Return a task whose client 5 kills the process that loads it, until it has done so `when` times."""
    parent = os.getpid()

    def load(client: int) -> ClientData:
        if client == 5 and os.getpid() != parent:
            deaths = len(list(place.iterdir()))
            if deaths < when:
                (place / str(deaths)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return ClientData(points(10 + client, client))

    return Task.classification(model=lambda: nn.Linear(3, 3), classes=3, client_data=load)


@pytest.mark.parametrize("strategy", [FedAvg(), Scaffold(population=12)], ids=lambda strategy: type(strategy).__name__)
def test_a_killed_workers_clients_are_done_again(tmp_path: Path, strategy: Strategy) -> None:
    expected = simulate(killing(tmp_path, 0), strategy, clients=12, rounds=2)
    (tmp_path / "deaths").mkdir()
    task = killing(tmp_path / "deaths", 1)
    same(expected, simulate(task, strategy, clients=12, rounds=2, engine=Processes(workers=2)))
    assert len(list((tmp_path / "deaths").iterdir())) == 1


def test_a_client_that_kills_every_worker_ends_the_run_with_a_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"3 workers died in round 1, the last with exit code -9"):
        simulate(killing(tmp_path, 100), FedAvg(), clients=12, rounds=2, engine=Processes(workers=2))


def test_a_failing_client_is_named_or_skipped_as_in_one_process() -> None:
    def load(client: int) -> ClientData:
        if client == 3:
            raise OSError("disk 3 is gone")
        return ClientData(points(8, client))

    task = Task.classification(model=lambda: nn.Linear(3, 3), classes=3, client_data=load)
    with pytest.raises(TaskError, match=r"client 3: client_data\(3\) failed: OSError: disk 3 is gone"):
        simulate(task, FedAvg(), clients=6, rounds=1, engine=Processes(workers=2))
    history = simulate(task, FedAvg(), clients=6, rounds=1, engine=Processes(workers=2, skip_failures=True))
    assert [(row.client, row.rule) for row in history.reports[0].excluded] == [(3, "task")]


def test_more_workers_than_clients_are_no_problem() -> None:
    expected = simulate(TASK, FedAvg(), clients=2, rounds=1)
    same(expected, simulate(TASK, FedAvg(), clients=2, rounds=1, engine=Processes(workers=4)))


def test_a_small_model_leaves_the_workers_their_processors_and_gives_threads_back() -> None:
    before, seen = torch.get_num_threads(), list[int]()
    torch.set_num_threads(3)
    try:
        engine = Processes(workers=2)
        run = Simulation(TASK, FedAvg(), clients=4, rounds=2, engine=engine)
        run.run(callbacks=[lambda *_: seen.append(torch.get_num_threads())])
        assert seen == [1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_large_model_keeps_its_threads_between_rounds() -> None:
    before, seen = torch.get_num_threads(), list[int]()
    large = dataclasses.replace(TASK, model=lambda: nn.Sequential(nn.Linear(3, 1001), nn.Linear(1001, 1000)))
    torch.set_num_threads(3)
    try:
        run = Simulation(large, FedAvg(), clients=2, rounds=1, engine=Processes(workers=1))
        run.run(callbacks=[lambda *_: seen.append(torch.get_num_threads())])
        assert seen == [3]
    finally:
        torch.set_num_threads(before)


def test_no_process_is_left_behind() -> None:
    import multiprocessing

    before = {process.pid for process in multiprocessing.active_children()}
    simulate(TASK, FedAvg(), clients=4, rounds=1, engine=Processes(workers=2))
    assert {process.pid for process in multiprocessing.active_children()} <= before


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="workers must be >= 1, got 0"):
        Processes(workers=0)
    with pytest.raises(ConfigError, match="processes cannot run processes inside"):
        Processes(inner=Processes())
    assert Processes().inner == Sequential()
