"""Actors of a Ray cluster: the same answer, whoever works and whoever dies, on a cluster that nobody else can reach."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedml_core import ClientData, Task
from fedml_core.errors import ConfigError, TaskError
from fedml_core.loading import load_task
from simulations import Auto, Engine, Fused, Processes, Ray, simulate
from simulations.engines.ray import Room
from simulations.engines.ray_cluster import local_cluster
from strategies import FedAvg, Scaffold, Strategy
from tests.simulations.engines.engine_cases import NO_DISK, SETTINGS, TASK, killing, points, same, without_a_disk
from tests.simulations.project_cases import nothing_stays

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray, an extra, is not installed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One cluster for all that need one; an engine uses what the program has."""
    with local_cluster(cpus=3) as ray:
        yield ray


@needs_ray
def test_a_cluster_of_its_own_gives_the_answer_of_one_process_and_leaves_nothing() -> None:
    before, debugger = set(Path("/tmp").glob("fedveil-ray-*")), os.environ.get("PYTHONBREAKPOINT")
    handler = signal.getsignal(signal.SIGTERM)
    same(simulate(TASK, FedAvg(), **SETTINGS), simulate(TASK, FedAvg(), engine=Ray(workers=2), **SETTINGS))
    assert not importlib.import_module("ray").is_initialized()
    assert set(Path("/tmp").glob("fedveil-ray-*")) <= before
    assert os.environ.get("PYTHONBREAKPOINT") == debugger and "RAY_AUTH_TOKEN" not in os.environ
    assert signal.getsignal(signal.SIGTERM) == handler


@needs_ray
def test_a_cluster_of_ours_is_open_to_this_machine_alone(cluster: Any) -> None:
    assert cluster.util.get_node_ip_address() == "127.0.0.1"
    assert [node["NodeManagerAddress"] for node in cluster.nodes()] == ["127.0.0.1"]


@needs_ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("strategy", "inner"),
    [(Scaffold(population=12), Fused(clients_at_once=3)), (FedAvg(), Auto())],
    ids=["with-memories", "auto-inside"],
)
def test_actors_with_any_engine_inside_give_the_answer_of_one_process(strategy: Strategy, inner: Engine) -> None:
    expected = simulate(TASK, strategy, **SETTINGS)
    same(expected, simulate(TASK, strategy, engine=Ray(workers=2, inner=inner), **SETTINGS))


SEVERAL_TASKS = """
import torch
from torch import nn

from fedml_core.data import ClientData, Examples
from fedml_core.task import Task


class Own(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)


def rows(client):
    x = torch.linspace(-1, 1, 8 + client).unsqueeze(1)
    return ClientData(Examples.of(torch.cat([x, x * x], dim=1), (x[:, 0] > 0).long()))


wanted = Task.classification(model=Own, classes=2, client_data=rows)
other = Task.classification(model=Own, classes=2, client_data=rows)
"""


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_a_task_file_is_found_by_actors_as_by_the_command(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(SEVERAL_TASKS)
    with nothing_stays():
        task = load_task("task.py:wanted", tmp_path)
        settings: dict[str, Any] = {"clients": 4, "rounds": 1, "device": "cpu"}
        same(simulate(task, FedAvg(), **settings), simulate(task, FedAvg(), engine=Ray(workers=1), **settings))
        (tmp_path / "task.py").unlink()
        with pytest.raises(TaskError, match=r"the task file .*task.py does not exist"):
            simulate(task, FedAvg(), engine=Ray(workers=1), **settings)


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_a_lost_actors_clients_are_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strategy = Scaffold(population=12)
    expected = simulate(killing(tmp_path, 0), strategy, clients=12, rounds=2)
    (tmp_path / "deaths").mkdir()
    task = killing(tmp_path / "deaths", 1)
    same(expected, simulate(task, strategy, clients=12, rounds=2, engine=Ray(workers=2)))
    assert len(list((tmp_path / "deaths").iterdir())) == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("a worker died in round 1 (ActorDiedError") and "\n" not in line


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_a_failing_client_is_named_as_in_one_process() -> None:
    task = without_a_disk()
    with pytest.raises(TaskError, match=NO_DISK):
        simulate(task, FedAvg(), clients=6, rounds=1, engine=Ray(workers=1))


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_what_the_cluster_has_no_room_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"9 workers of 1 CPUs and 0 GPUs do not fit a ray cluster of 3 CPUs"):
        simulate(TASK, FedAvg(), engine=Ray(workers=9), **SETTINGS)


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_a_task_that_cannot_be_sent_is_refused() -> None:
    lock = threading.Lock()
    task = Task.classification(
        model=lambda: nn.Linear(3, 3), classes=3, client_data=lambda client: ClientData(points(8, lock.locked()))
    )
    with pytest.raises(ConfigError, match="the task cannot be sent to ray workers .*lock"):
        simulate(task, FedAvg(), clients=2, rounds=1, engine=Ray(workers=1))


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for address in (None, "auto"):
        with pytest.raises(ConfigError, match=r"not installed; pip install 'fedveil\[ray\]'"):
            simulate(TASK, FedAvg(), engine=Ray(address=address), **SETTINGS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"workers": 0}, "workers must be >= 1, got 0"),
        ({"cpus_per_worker": 0}, "cpus_per_worker must be > 0, got 0"),
        ({"cpus_per_worker": 1.5}, "cpus_per_worker must be a whole number or below 1, got 1.5"),
        ({"gpus_per_worker": 2}, "gpus_per_worker must be >= 0 and <= 1, got 2"),
        ({"address": "ray://head:10001"}, "address must be 'auto' or host:port"),
        ({"inner": Processes()}, "ray cannot run processes inside"),
        ({"inner": Ray()}, "ray cannot run ray inside"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Ray(**arguments)


@pytest.mark.parametrize(
    ("engine", "device", "resources", "room"),
    [
        (Ray(), CPU, {"CPU": 4}, Room(4, 1, 0, "cpu")),
        (Ray(cpus_per_worker=0.5), CPU, {"CPU": 4}, Room(8, 0.5, 0, "cpu")),
        (Ray(cpus_per_worker=4), CPU, {"CPU": 2}, "1 workers of 4 CPUs and 0 GPUs do not fit"),
        (Ray(), CPU, {"CPU": 4, "GPU": 2}, Room(4, 1, 0, "cpu")),
        (Ray(), CUDA, {"CPU": 64, "GPU": 4}, Room(4, 1, 1, "cuda")),
        (Ray(workers=3), CUDA, {"CPU": 64, "GPU": 2}, Room(3, 1, 0.5, "cuda")),
        (Ray(workers=7), CUDA, {"CPU": 64, "GPU": 2}, Room(7, 1, 0.25, "cuda")),
        (Ray(workers=6), CUDA, {"CPU": 64, "GPU": 2}, Room(6, 1, 0.3333, "cuda")),
        (Ray(gpus_per_worker=0.25), CPU, {"CPU": 64, "GPU": 8}, Room(32, 1, 0.25, "cuda")),
        (Ray(gpus_per_worker=0.7, workers=3), CUDA, {"CPU": 64, "GPU": 2}, "3 workers of 1 CPUs and 0.7 GPUs do not"),
        (Ray(gpus_per_worker=0.5), CPU, {"CPU": 64}, "do not fit a ray cluster of 64 CPUs and 0 GPUs"),
    ],
)
def test_workers_share_out_processors_and_gpus(
    engine: Ray, device: torch.device, resources: Mapping[str, float], room: Room | str
) -> None:
    if isinstance(room, Room):
        assert Room.of(engine, device, resources) == room
        return
    with pytest.raises(ConfigError, match=room):
        Room.of(engine, device, resources)
