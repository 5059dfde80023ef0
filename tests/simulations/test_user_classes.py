"""A class that the user's task defines can be named in run.toml like one of ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml_core.config import load_run
from fedml_core.loading import load_task
from simulations.configure import simulation_from
from simulations.partition import Partitioner
from simulations.simulate import Simulation
from tests.simulations.project_cases import RUN, TASK, fedveil, last_json, nothing_stays, project

CLASSES = """
from dataclasses import dataclass

from fedml_core.transform import Transform, chain
from fedml_core.weighting import Weigh, Weighting
from server.sampling import Sampling
from simulations.partition_contract import Partitioner
from strategies.strategy import Strategy


@dataclass(frozen=True)
class RootOfExamples(Weighting):
    def weight(self, update):
        return update.sums["examples"] ** 0.5


@dataclass(frozen=True)
class HalveAtTheServer(Transform):
    share: float = 0.5

    def decode(self, total, state, draws):
        return total.replace(values=total.values * self.share), state


@dataclass(frozen=True, kw_only=True)
class Careful(Strategy):
    weighting: Weighting
    extra: Transform = HalveAtTheServer()

    def pipeline(self):
        return chain(self.extra, Weigh(self.weighting))


@dataclass(frozen=True)
class TheFirstOnes(Sampling):
    size: int

    def cohort(self, clients, round_number, seed):
        return list(clients)[: self.size]


@dataclass(frozen=True)
class InBlocks(Partitioner):
    first: int

    def deal(self, examples, clients, rng):
        rest = range(self.first, examples.count)
        return [range(self.first), *(rest[client :: clients - 1] for client in range(clients - 1))]
"""

TABLES = """
[strategy]
name = "Careful"
weighting = "RootOfExamples"
extra = { name = "HalveAtTheServer", share = 0.25 }

[sampling]
name = "TheFirstOnes"
size = 2
"""


@pytest.fixture(autouse=True)
def forget_tasks() -> Iterator[None]:
    with nothing_stays():
        yield


def simulation_in(folder: Path) -> Simulation:
    run = RUN.replace("count = 4", 'count = 4\npartition = { name = "InBlocks", first = 10 }')
    config = load_run(project(folder, run + TABLES, TASK + CLASSES))
    return simulation_from(config, load_task(config.task, config.folder))


def test_each_is_built_from_its_table(tmp_path: Path) -> None:
    simulation = simulation_in(tmp_path)
    assert simulation.strategy.to_config() == {
        "name": "Careful",
        "max_weight": 1e9,
        "weighting": {"name": "RootOfExamples"},
        "extra": {"name": "HalveAtTheServer", "share": 0.25},
    }
    assert simulation.sampling.cohort(range(4), 1, 0) == [0, 1]
    assert [len(simulation.population.load(client).train) for client in range(4)] == [10, 10, 10, 10]


def test_a_run_uses_them(tmp_path: Path) -> None:
    simulation_in(tmp_path)
    result = fedveil("simulate", tmp_path, "--out", tmp_path / "out", "--json", "--no-plots")
    assert result.exit_code == 0, result.output
    assert "2 of 2 replies" in result.stderr
    assert last_json(result)["rounds"] == 3


def test_a_wrong_argument_of_theirs_is_told_with_the_nearest(tmp_path: Path) -> None:
    run = project(tmp_path, RUN, TASK + CLASSES)
    result = fedveil("simulate", run, "--set", "clients.partition={name='InBlocks', frist=3}")
    assert result.exit_code == 2
    assert "clients.partition: InBlocks has no argument 'frist'; did you mean 'first'?" in result.stderr


def test_ours_are_found_by_class_name_too() -> None:
    assert {"Dirichlet", "Iid", "Shards", "ByKey", "Explicit"} <= set(Partitioner.members)


def test_a_class_may_not_take_the_name_of_one_of_ours(tmp_path: Path) -> None:
    run = project(tmp_path, RUN, TASK + CLASSES.replace("Careful", "FedAvg"))
    result = fedveil("simulate", run)
    assert result.exit_code == 2
    assert "takes the name of fedveil's own; rename it" in result.stderr
    assert result.stderr.startswith("error: task.py, line ")
