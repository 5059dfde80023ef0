"""A server and its sites in one process, over real connections: the model is the simulation's, whatever goes wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from fedml_core.config import load_run, load_site
from fedml_core.data import targets_of
from fedml_core.errors import RunError, SpecMismatchError
from fedml_core.evaluation import Evaluator
from fedml_core.handshake import Hello
from fedml_core.loading import load_task
from fedml_core.storage import load_tree
from server.configure import plan_from
from server.coordinator import Coordinator
from server.fleet import FleetServer
from server.fleet_channel import FleetChannel
from server.round import RoundReport
from simulations.configure import simulation_from
from tests.fleet_cases import fast_heartbeats
from tests.fleet_run_cases import PATIENCE_S, TASK, fleet_project, insecure, same_model, sites, until
from tests.guards import wait_until
from tests.simulations.project_cases import nothing_stays
from tests.sources import ROOT

NAME = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def forget_tasks() -> Iterator[None]:
    with nothing_stays():
        yield


@pytest.fixture
def server() -> Iterator[FleetServer]:
    with FleetServer("127.0.0.1", 0, insecure=True) as opened:
        yield opened


class Fleet:
    """A project's run over a server of this process."""

    def __init__(self, folder: Path, server: FleetServer, *changes: str) -> None:
        self.config = load_run(folder / "run.toml", changes)
        self.task = load_task(self.config.task, folder)
        self.plan = plan_from(self.config)
        self.evaluator = evaluator = Evaluator(self.task, self.plan.seed, device="cpu")
        self.said: list[str] = []
        self.channel = FleetChannel(
            server,
            Hello(NAME, self.plan.seed, evaluator.spec),
            minimum_clients=self.config.server.minimum_clients,
            say=self.said.append,
        )
        state = Coordinator.begin(self.plan, evaluator.spec, evaluator.initial(), NAME)
        held_out = self.task.test_data() if self.task.test_data else None
        assert held_out is not None
        self.coordinator = Coordinator(
            self.plan, evaluator.spec, state, evaluate=lambda parameters: evaluator.evaluate(parameters, held_out)
        )

    def rounds(self, count: int) -> Iterator[RoundReport]:
        return self.coordinator.rounds(self.channel, count)


STRATEGIES = {
    "FedAvg": "strategy=FedAvg",
    "FedProx": 'strategy={name = "FedProx", mu = 0.3}',
    "Scaffold": 'strategy={name = "Scaffold", population = 3}',
    "Compressed": 'strategy={name = "Compressed", strategy = "FedAvg", compression = {name = "TopK", fraction = 0.5}}',
}


@pytest.mark.parametrize("change", STRATEGIES.values(), ids=STRATEGIES)
def test_a_fleet_ends_in_the_model_of_its_simulation(tmp_path: Path, server: FleetServer, change: str) -> None:
    fleet_project(tmp_path)
    fleet = Fleet(tmp_path, server, change)
    with sites(tmp_path, (0, 1, 2), insecure(server.address[1])) as wards:
        reports = list(fleet.rounds(3))
        fleet.channel.farewell("done")
        for ward in wards:
            ward.goes_home()
            assert (ward.facts["trained"], ward.facts["evaluated"], ward.facts["failed"]) == (3, 3, 0)
    simulated = simulation_from(fleet.config, fleet.task).run()
    assert same_model(fleet.coordinator.state.parameters, simulated.parameters)
    assert not same_model(simulated.parameters, fleet.evaluator.initial())
    for report, other in zip(reports, simulated.reports, strict=True):
        assert list(report.participants) == [0, 1, 2] and not report.excluded and not report.missing
        assert set(report.metrics) == {"train", "server", "clients"}
        for place in report.metrics:
            assert report.metrics[place] == pytest.approx(other.metrics[place], abs=1e-5)
        # Sums that were added in another order have other last digits, and JSON shows every digit that there is.
        assert report.bytes_up == pytest.approx(other.bytes_up, abs=30)
        assert report.bytes_down == pytest.approx(other.bytes_down, abs=30)


def test_what_scaffold_remembers_stays_at_the_sites(tmp_path: Path, server: FleetServer) -> None:
    fleet_project(tmp_path)
    fleet = Fleet(tmp_path, server, STRATEGIES["Scaffold"])
    with sites(tmp_path, (0, 1, 2), insecure(server.address[1])):
        list(fleet.rounds(2))
    kept = sorted(path.relative_to(tmp_path) for path in (tmp_path / "memory" / NAME).rglob("*") if path.is_file())
    assert kept == [Path("memory") / NAME / f"client-{number}.fedveil" for number in range(3)]
    assert load_tree(tmp_path / kept[0], "memory")["round"] == 2
    assert fleet.coordinator.state.extra == {}


def test_a_site_that_comes_late_takes_part_from_a_later_round(tmp_path: Path, server: FleetServer) -> None:
    fleet_project(tmp_path)
    fleet = Fleet(tmp_path, server, "server.minimum_clients=2", "evaluation.clients=EveryClient")
    connection = insecure(server.address[1])
    took_part: list[list[int]] = []
    with sites(tmp_path, (0, 2), connection), ExitStack() as later:
        for report in fleet.rounds(500):
            took_part.append(list(report.participants))
            if report.round == 1:
                later.enter_context(sites(tmp_path, (1,), connection))
            if took_part[-1] == [0, 1, 2]:
                break
    assert took_part[0] == [0, 2] and took_part[-1] == [0, 1, 2]
    assert all(members == [0, 2] for members in took_part[:-1])
    assert "client 1 (ward-b) joined" in fleet.said


def test_a_site_that_leaves_is_missed_aloud_and_the_others_go_on(tmp_path: Path, server: FleetServer) -> None:
    fleet_project(tmp_path)
    fleet = Fleet(tmp_path, server, "server.minimum_clients=2")
    with sites(tmp_path, (0, 1, 2), insecure(server.address[1])) as wards:
        until(lambda: fleet.channel.clients(1) == [0, 1, 2], "all three are there")
        took_part = []
        for report in fleet.rounds(4):
            took_part.append(list(report.participants))
            if report.round == 2:
                wards[1].service.stop.set()
                wards[1].goes_home()
    assert took_part == [[0, 1, 2], [0, 1, 2], [0, 2], [0, 2]]
    assert "client 1 (ward-b) left" in fleet.said


def test_two_sites_of_one_number_are_told_apart_on_both_sides(tmp_path: Path, server: FleetServer) -> None:
    fleet_project(tmp_path)
    twin = (tmp_path / "site-2.toml").read_text().replace("id = 2", "id = 0")
    (tmp_path / "site-2.toml").write_text(twin)
    fleet = Fleet(tmp_path, server, "server.minimum_clients=1", "evaluation.clients=EveryClient")
    connection = insecure(server.address[1])
    with sites(tmp_path, (0,), connection) as (first,):
        assert fleet.channel.clients(1) == [0]
        with sites(tmp_path, (2,), connection) as (second,):
            for report in fleet.rounds(500):
                assert list(report.participants) == [0]
                if any("not take this client in yet" in line for line in second.said):
                    break
            fleet.channel.farewell("done")
            second.thread.join(PATIENCE_S)
        first.goes_home()
    assert any("client 0 (ward-c) cannot take part: client 0 (ward-a) is connected" in line for line in fleet.said)
    assert [type(error) for error in second.raised] == [RunError]
    assert "another client that is connected has the number 0" in str(second.raised[0])


def test_a_site_with_another_model_is_named_on_both_sides_and_the_run_goes_on(
    tmp_path: Path, server: FleetServer
) -> None:
    fleet_project(tmp_path)
    other = fleet_project(
        tmp_path / "other", TASK.replace("nn.Linear(3, 4)", "nn.Linear(3, 5)").replace("(4, 2)", "(5, 2)")
    )
    fleet = Fleet(tmp_path, server, "server.minimum_clients=1")
    connection = insecure(server.address[1])
    with sites(tmp_path, (0,), connection), sites(other, (1,), connection) as (stranger,):
        for report in fleet.rounds(500):
            assert list(report.participants) == [0]
            if any("ward-b" in line for line in fleet.said):
                break
        stranger.thread.join(PATIENCE_S)
        assert not stranger.thread.is_alive()
    (error,) = stranger.raised
    assert isinstance(error, SpecMismatchError)
    assert f"client 1 (ward-b) cannot take part: {error}" in fleet.said
    assert "first difference at 0.weight (4, 3) float32 of the server and 0.weight (5, 3) float32" in str(error)


def test_sites_go_on_after_their_server_was_started_anew(tmp_path: Path) -> None:
    fleet_project(tmp_path)
    with FleetServer("127.0.0.1", 0, insecure=True) as first:
        port = first.address[1]
        with sites(tmp_path, (0, 1, 2), insecure(port)) as wards:
            fleet = Fleet(tmp_path, first, STRATEGIES["Scaffold"])
            list(fleet.rounds(2))
            halfway = fleet.coordinator.state
            list(fleet.rounds(3))  # a round that the server forgets, and the sites remember
            first.close()
            for ward in wards:
                ward.hears("cannot be reached")
            with FleetServer("127.0.0.1", port, insecure=True) as second:
                again = Fleet(tmp_path, second, STRATEGIES["Scaffold"])
                again.coordinator.state = halfway
                list(again.rounds(4))
                again.channel.farewell("done")
                for ward in wards:
                    ward.goes_home()
                    assert ward.said.count(f"greeted as client {ward.facts['client']} for run {NAME[:8]}") == 2
    simulated = simulation_from(again.config, again.task)
    whole = dataclasses.replace(simulated, rounds=4).run()
    assert same_model(again.coordinator.state.parameters, whole.parameters)


@pytest.mark.parametrize(("example", "run"), [("digits", "fleet.toml"), ("breast_cancer", "run.toml")])
def test_the_sites_of_an_example_hold_what_the_clients_of_its_simulation_hold(example: str, run: str) -> None:
    folder = ROOT / "examples" / example
    config = load_run(folder / run)
    task = load_task(config.task, folder)
    assert task.site_data is not None
    population = simulation_from(config, task).population
    found = sorted((folder / "sites").glob("*.toml"))
    assert len(found) == len(population) == config.clients.count
    names = set()
    for number, path in enumerate(found):
        site = load_site(path)
        assert (site.id, path.stem) == (number, str(number))
        assert site.beside(site.task).resolve() == folder / "task.py"
        mine, theirs = task.site_data(site.data), population.load(number)
        for one, other in ((mine.train, theirs.train), (mine.test, theirs.test)):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert torch.equal(targets_of(one), targets_of(other))
        names.add(site.name)
    assert len(names) == len(found) and None not in names


KILLED = """
import sys
from pathlib import Path

from clients.run import Connection, serve_site
from fedml_core.console import Console

serve_site(Console(), Path(sys.argv[1]), Connection(server=sys.argv[2], insecure=True, heartbeat_s=float(sys.argv[3])))
"""


def test_a_site_that_is_killed_while_it_works_is_attributed_and_the_round_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet_project(tmp_path)
    hangs = TASK.replace("import torch\n", "import threading\nfrom pathlib import Path\n\nimport torch\n", 1).replace(
        "    site_data=lambda settings: site_share(task, settings),\n", "    site_data=hang,\n"
    )
    hang = (
        "def hang(settings):\n    Path(__file__).with_name('hangs').touch()\n    threading.Event().wait()\n\n\ntask ="
    )
    other = fleet_project(tmp_path / "other", hangs.replace("task =", hang, 1))
    with (
        fast_heartbeats(monkeypatch) as heartbeat_s,
        FleetServer("127.0.0.1", 0, insecure=True) as server,
        sites(tmp_path, (0, 2), insecure(server.address[1], heartbeat_s=heartbeat_s)),
    ):
        fleet = Fleet(tmp_path, server)
        address, path = f"127.0.0.1:{server.address[1]}", other / "site-1.toml"
        line = [sys.executable, "-c", KILLED, str(path), address, str(heartbeat_s)]
        with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            killer = threading.Thread(target=kill_when, args=(process, other / "hangs"))
            killer.start()
            try:
                report = next(fleet.rounds(1))
            finally:
                process.kill()
                killer.join()
    assert (list(report.participants), report.status) == ([0, 2], "ok")
    assert [(row.client, row.rule, row.reason) for row in report.excluded] == [
        (1, "lost", "it fell silent or left while it worked")
    ]
    assert "client 1 (ward-b) left" in fleet.said


def kill_when(process: subprocess.Popen[bytes], sign: Path) -> None:
    """Kill the process as soon as the file `sign` is there."""
    if wait_until(sign.exists, PATIENCE_S):
        process.kill()
