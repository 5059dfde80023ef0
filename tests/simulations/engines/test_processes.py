"""Worker processes: the same answer, whoever works and whoever dies."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedml_core import ClientData
from fedml_core.errors import ConfigError, RunError, TaskError
from simulations import Faults, Processes, Sequential, Simulation, simulate
from simulations.engines import processes
from simulations.engines.chunk_worker import Job
from simulations.population import Virtual
from strategies import FedAdam, FedAvg, FedMedian, Scaffold, Strategy
from tests.simulations.engines.engine_cases import NO_DISK, SETTINGS, TASK, killing, points, same, without_a_disk


@pytest.mark.parametrize(
    "strategy",
    [FedAvg(), FedAdam(), FedMedian(), Scaffold(population=12)],
    ids=lambda strategy: type(strategy).__name__,
)
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_answer_of_one_process(strategy: Strategy, workers: int) -> None:
    expected = simulate(TASK, strategy, **SETTINGS)
    same(expected, simulate(TASK, strategy, engine=Processes(workers=workers), **SETTINGS))


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
    task = without_a_disk()
    with pytest.raises(TaskError, match=NO_DISK):
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


@pytest.mark.parametrize(
    "strategy", [FedAvg(), FedMedian(), Scaffold(population=6)], ids=lambda strategy: type(strategy).__name__
)
def test_a_large_models_parameters_and_sums_are_shared_round_after_round(strategy: Strategy) -> None:
    large = dataclasses.replace(TASK, model=lambda: nn.Sequential(nn.Linear(3, 600), nn.Linear(600, 150)))
    settings = {**SETTINGS, "clients": 6}
    expected = simulate(large, strategy, **settings)
    same(expected, simulate(large, strategy, engine=Processes(workers=2), **settings))


class Idle:
    """A process that never is one."""

    def __init__(self, target: Any, args: Any, daemon: bool) -> None:
        self.device, self.exitcode = args[2], 0

    def start(self) -> None:
        """Do nothing."""

    def is_alive(self) -> bool:
        return False

    def join(self) -> None:
        """Do nothing."""


def test_workers_share_out_the_devices_and_a_replacement_takes_the_lost_ones() -> None:
    job = Job(Sequential(), TASK, FedAvg(), Virtual(4, lambda client: ClientData(points(8, 1))), Faults(), 0)
    crew = processes._Processes(job, ["cuda:0", "cuda:1", "cuda:2"], 4 * 51)
    assert crew._context.get_start_method() == "spawn"  # a process that was forked cannot use a GPU
    pipe = crew._context.Pipe
    crew._context = SimpleNamespace(Pipe=pipe, Process=Idle)
    workers: Any = crew.start(5)
    try:
        assert [one._process.device for one in workers] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
        workers[1].end()
        workers[2].end()
        workers += crew.start(2)
        assert [one._process.device for one in workers[5:]] == ["cuda:2", "cuda:1"]
    finally:
        for one in workers:
            one.end()
        crew.close()
