"""`fedveil server` and `fedveil client`: what they say, what they leave behind, and how they end.

One side runs here as a command, the other in threads; `test_fleet_end_to_end` has both as processes.
"""

from __future__ import annotations

import json
import os
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click.testing
import pytest
import torch

from clients.run import Connection
from fedml_core.evaluation import Evaluator
from fedml_core.handshake import Hello
from fedml_core.identity import enrol, new_site_keys, read_roster
from fedml_core.loading import load_task
from fedml_core.tls import ServerTls, new_authority
from server.fleet import FleetServer
from server.fleet_channel import FleetChannel
from server.history import read_history
from server.run import RosterFile
from tests.fleet_run_cases import TASK, final_parameters, fleet_project, free_port, insecure, same_model, sites, until
from tests.simulations.project_cases import fedveil, last_json, nothing_stays

QUICK = ("--no-plots", "--json", "--quiet")


@pytest.fixture(autouse=True)
def forget_tasks() -> Iterator[None]:
    with nothing_stays():
        yield


def serve(folder: Path, port: int, *arguments: str | Path) -> click.testing.Result:
    return fedveil("server", folder, "--listen", f"127.0.0.1:{port}", "--insecure", *arguments)


def last_line(result: click.testing.Result) -> str:
    return result.stderr.splitlines()[-1]


def test_the_server_leaves_what_a_simulation_leaves_and_shows_the_same_summary(tmp_path: Path) -> None:
    folder, port = fleet_project(tmp_path / "project"), free_port()
    out, simulated = tmp_path / "out", tmp_path / "simulated"
    with sites(folder, (0, 1, 2), insecure(port)) as wards:
        result = serve(folder, port, "--out", out)
        for ward in wards:
            ward.goes_home()
            assert ward.facts["goodbye"] == "the run is done after 3 rounds"
    assert result.exit_code == 0, result.output
    other = fedveil("simulate", folder, "--out", simulated)
    assert same_model(final_parameters(out), final_parameters(simulated))
    ours, theirs = (dict(line.split("  ", 1) for line in shown.stdout.splitlines()) for shown in (result, other))
    for name in ("rounds", "test data", "clients' held-out data", "training", "replies", "server saw", "privacy"):
        assert ours[name].strip() == theirs[name].strip()
    kept = {path.name for path in out.iterdir()}
    assert kept == {"checkpoint.fedveil", "history.jsonl", "summary.json", "report.md", "plots"}
    assert (out / "plots" / "metrics.png").stat().st_size > 0
    said = result.stderr.splitlines()
    assert said[0] == f"listening on 127.0.0.1:{port}, without TLS, for this machine only"
    assert said[1] == "waiting for clients: 0 of 3"
    assert sum("joined" in line for line in said) == 3
    assert [line.split(":")[0] for line in said if line.startswith("round")] == ["round 1/3", "round 2/3", "round 3/3"]


def test_json_is_the_last_line_of_stdout_and_alone_there_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, port = fleet_project(tmp_path), free_port()
    with sites(folder, (0, 1, 2), insecure(port)):
        result = serve(folder, port, "--out", tmp_path / "out", "--rounds", "2", *QUICK)
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1
    answer = last_json(result)
    assert (answer["rounds"], answer["clients"], answer["engine"], answer["protection"]) == (2, 3, "fleet", "none")
    assert answer["stopped_early"] is False and set(answer["metrics"]) == {"server", "train", "clients"}
    assert answer == {**json.loads((tmp_path / "out" / "summary.json").read_text()), "report": answer["report"]}


def test_a_run_goes_on_where_it_stopped_and_a_finished_folder_is_not_overwritten(tmp_path: Path) -> None:
    folder, out = fleet_project(tmp_path), tmp_path / "out"
    for rounds, options in (("2", ()), ("4", ("--resume",))):
        port = free_port()
        with sites(folder, (0, 1, 2), insecure(port)):
            result = serve(folder, port, "--out", out, "--rounds", rounds, *QUICK, *options)
            assert result.exit_code == 0, result.output
            assert last_json(result)["rounds"] == int(rounds)
    assert [report.round for report in read_history(out)] == [1, 2, 3, 4]
    fedveil("simulate", folder, "--out", tmp_path / "simulated", "--rounds", "4", *QUICK)
    assert same_model(final_parameters(out), final_parameters(tmp_path / "simulated"))
    again = serve(folder, free_port(), "--out", out, *QUICK)
    assert again.exit_code == 2
    assert "holds a run; go on with --resume, replace it with --overwrite" in last_line(again)
    both = serve(folder, free_port(), "--out", out, "--resume", "--overwrite")
    assert (both.exit_code, "give one of them" in last_line(both)) == (2, True)


def test_a_fixed_sampling_asks_all_where_fewer_are_connected(tmp_path: Path) -> None:
    folder, port = fleet_project(tmp_path), free_port()
    with sites(folder, (0, 1, 2), insecure(port)):
        sampling = 'sampling={name = "FixedSampling", size = 20}'
        result = serve(folder, port, "--out", tmp_path / "out", "--rounds", "1", "--set", sampling, *QUICK)
    assert result.exit_code == 0, result.output
    assert [list(report.participants) for report in read_history(tmp_path / "out")] == [[0, 1, 2]]


def test_who_waits_too_long_for_clients_gives_up_with_the_remedy(tmp_path: Path) -> None:
    folder = fleet_project(tmp_path)
    result = serve(folder, free_port(), "--out", tmp_path / "out", "--set", "server.wait_s=0.05", "--no-plots")
    assert result.exit_code == 1
    assert last_line(result) == (
        "error: 0 of 3 clients were there after 0.05 s, before round 1; start more, or lower "
        f"server.minimum_clients; every round is in {tmp_path / 'out'}"
    )


def test_a_run_whose_rounds_are_all_void_fails_and_sends_its_clients_home(tmp_path: Path) -> None:
    broken = TASK.replace(
        "def points(count):", "def fail(settings):\n    raise ValueError('row 17')\n\n\ndef points(count):"
    )
    folder = fleet_project(tmp_path, broken.replace("lambda settings: site_share(task, settings)", "fail"))
    port = free_port()
    with sites(folder, (0, 1, 2), insecure(port)) as wards:
        result = serve(folder, port, "--out", tmp_path / "out", "--rounds", "2", "--no-plots")
        for ward in wards:
            ward.goes_home()
            assert (ward.facts["failed"], ward.facts["goodbye"]) == (4, "the run failed")
            assert any("row 17" in line for line in ward.said)
    assert result.exit_code == 1
    assert "all 2 rounds were void" in last_line(result)
    assert "row 17" not in (tmp_path / "out" / "history.jsonl").read_text() + result.output
    excluded = [row for report in read_history(tmp_path / "out") for row in report.excluded]
    assert {(row.rule, row.reason) for row in excluded} == {
        ("task", "TaskError from ValueError; the site's own log says more")
    }


def interrupts(task: str) -> str:
    """Return a task whose server is interrupted when it evaluates for the second time."""
    stop = (
        "calls = []\n\n\ndef stop(outputs, targets):\n"
        "    calls.append(1)\n"
        "    if len(targets) == 50 and len(calls) > 1:\n"
        "        raise KeyboardInterrupt\n"
        "    return targets.float()\n\n\n"
    )
    return task.replace("task = ", stop + "task = ").replace(
        "    classes=2,\n", "    classes=2,\n    metrics={'s': stop},\n"
    )


def test_ctrl_c_keeps_the_rounds_says_how_to_go_on_and_that_goes_on(tmp_path: Path) -> None:
    folder, port, out = fleet_project(tmp_path), free_port(), tmp_path / "o u t"
    theirs = fleet_project(tmp_path / "server", interrupts(TASK))
    for number in range(3):
        path = folder / f"site-{number}.toml"
        path.write_text(path.read_text().replace('"task.py"', '"server/task.py"'))
    with sites(folder, (0, 1, 2), insecure(port)):
        result = serve(theirs, port, "--out", out, "--rounds", "4", "--set", "training.epochs=1")
        assert result.exit_code == 130, result.output
        assert len(read_history(out)) == 1
        assert last_line(result) == (
            f"error: interrupted; 1 rounds are kept in {out}; go on with: fedveil server {theirs} --resume "
            f"--listen 127.0.0.1:{port} --insecure --set training.epochs=1 --set rounds=4 --out '{out}'"
        )
        (theirs / "task.py").write_text(TASK)
        again = fedveil(*shlex.split(last_line(result).split("go on with: fedveil ")[1]), *QUICK)
    assert again.exit_code == 0, again.output
    fedveil("simulate", folder, "--out", tmp_path / "sim", "--rounds", "4", "--set", "training.epochs=1", *QUICK)
    assert same_model(final_parameters(out), final_parameters(tmp_path / "sim"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--listen", "0.0.0.0:0", "--insecure"), "an insecure server listens on 127.0.0.1 only, got '0.0.0.0'"),
        (("--listen", "127.0.0.1:0"), "the server has no certificate and key; give --tls and --roster"),
        (("--listen", "127.0.0.1:0", "--tls", "tls"), "the server has no roster; give --tls and --roster"),
        (("--listen", "127.0.0.1:0", "--certificate", "a.pem"), "--key and --ca must be given, too"),
        (("--listen", "127.0.0.1:0", "--insecure", "--roster", "r.json"), "uses neither certificate nor roster"),
        (("--listen", "127.0.0.1:0", "--tls", "none", "--roster", "none.json"), "the roster none.json cannot be read"),
        (("--listen", "8443", "--insecure"), "--listen must be HOST:PORT, such as 0.0.0.0:8443, got '8443'"),
        (("--listen", "127.0.0.1:http", "--insecure"), "--listen must be HOST:PORT"),
        (("--listen", "127.0.0.1:99999", "--insecure"), "port must be between 0 and 65535, got 99999"),
        (("--insecure", "--set", "strategy=FedAverage"), "unknown strategy 'FedAverage'; did you mean"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    fleet_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = fedveil("server", "run.toml", *arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1 and words in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_port_that_is_taken_costs_one_line_and_not_the_old_run(tmp_path: Path) -> None:
    folder, out = fleet_project(tmp_path), tmp_path / "out"
    fedveil("simulate", folder, "--out", out, *QUICK)
    with FleetServer("127.0.0.1", 0, insecure=True) as other:
        port = other.address[1]
        result = serve(folder, port, "--out", out, "--overwrite")
    assert result.exit_code == 2
    assert last_line(result).startswith(f"error: cannot listen on 127.0.0.1 port {port}: address already in use")
    assert len(read_history(out)) == 3


class Host:
    """A server that greets whoever comes, in a thread, and sends everybody home as soon as one is let in."""

    def __init__(self, server: FleetServer, folder: Path) -> None:
        self.address = f"127.0.0.1:{server.address[1]}"
        self.said: list[str] = []
        self._over = threading.Event()
        spec = Evaluator(load_task("task.py", folder), 5).spec
        self._channel = FleetChannel(server, Hello("run", 5, spec), minimum_clients=0, say=self.said.append)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            if self._channel.clients(1):
                self._channel.farewell("that was all")

    def close(self) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def hosted(server: FleetServer, folder: Path) -> Iterator[Host]:
    host = Host(server, folder)
    try:
        yield host
    finally:
        host.close()


def test_a_client_ends_well_when_the_server_says_goodbye(tmp_path: Path) -> None:
    folder = fleet_project(tmp_path)
    with FleetServer("127.0.0.1", 0, insecure=True) as server, hosted(server, folder) as host:
        result = fedveil("client", folder / "site-1.toml", "--server", host.address, "--insecure", "--json")
    assert result.exit_code == 0, result.output
    told = last_json(result)
    assert told.pop("bytes_up") > 0 and told.pop("bytes_down") > 0
    assert told == {
        "rounds": 0,
        "clients": 1,
        "metrics": {},
        "protection": "none",
        "epsilon": None,
        "privacy": None,
        "seconds": 0.0,
        "engine": "fleet",
        "out": None,
        "client": 1,
        "name": "ward-b",
        "run": "run",
        "trained": 0,
        "evaluated": 0,
        "failed": 0,
        "goodbye": "that was all",
        "server": host.address,
    }
    assert result.stderr.splitlines() == [
        f"connected to {host.address}",
        "greeted as client 1 for run run",
        f"left {host.address}",
        "the server says goodbye: that was all; trained 0 times, evaluated 0 times, failed 0 times",
    ]


def test_a_quiet_client_says_nothing(tmp_path: Path) -> None:
    folder = fleet_project(tmp_path)
    with FleetServer("127.0.0.1", 0, insecure=True) as server, hosted(server, folder) as host:
        result = fedveil("client", folder / "site-1.toml", "--server", host.address, "--insecure", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_a_client_with_another_model_ends_with_the_line_that_its_server_says(tmp_path: Path) -> None:
    folder = fleet_project(tmp_path)
    other = fleet_project(tmp_path / "other", TASK.replace("nn.Linear(4, 2)", "nn.Linear(4, 2, bias=False)"))
    with FleetServer("127.0.0.1", 0, insecure=True) as server, hosted(server, folder) as host:
        result = fedveil("client", other / "site-1.toml", "--server", host.address, "--insecure")
        until(lambda: len(host.said) > 0, "the server says it, too")
    assert result.exit_code == 2
    line = last_line(result).removeprefix("error: ")
    assert host.said[0] == f"client 1 (ward-b) cannot take part: {line}"
    assert line.startswith("the server's model ") and "only the server has 2.bias (2,) float32" in line


@pytest.fixture
def enrolled(tmp_path: Path) -> Path:
    """Return a project whose site 1 has keys on the roster, and whose server has a certificate."""
    folder = fleet_project(tmp_path)
    new_authority(folder / "tls", ["127.0.0.1"])
    new_site_keys(folder / "keys-1")
    enrol(folder / "roster.json", folder / "keys-1" / "site-public.json", name="north", client_id=1)
    return folder


@contextmanager
def secured(folder: Path) -> Iterator[Host]:
    tls = ServerTls(folder / "tls" / "server.pem", folder / "tls" / "server-key.pem", folder / "tls" / "ca.pem")
    roster = read_roster(folder / "roster.json")
    with FleetServer("127.0.0.1", 0, tls=tls, roster=roster) as server, hosted(server, folder) as host:
        yield host


def test_an_enrolled_client_is_let_in_under_its_enrolled_name(enrolled: Path) -> None:
    with secured(enrolled) as host:
        ca = enrolled / "tls" / "ca.pem"
        result = fedveil("client", enrolled / "site-1.toml", "--server", host.address, "--authority", ca)
    assert result.exit_code == 0, result.output
    assert "client 1 (north) joined" in host.said


def test_a_site_that_is_revoked_while_the_server_runs_is_out_and_a_damaged_roster_changes_nothing(
    enrolled: Path, tmp_path: Path
) -> None:
    path = enrolled / "roster.json"
    roster = RosterFile(path)
    said: list[str] = []
    tls = ServerTls(enrolled / "tls" / "server.pem", enrolled / "tls" / "server-key.pem", enrolled / "tls" / "ca.pem")
    with FleetServer("127.0.0.1", 0, tls=tls, roster=roster.read()) as server:
        spec = Evaluator(load_task("task.py", enrolled), 5).spec
        channel = FleetChannel(
            *(server, Hello("run", 5, spec)),
            minimum_clients=0,
            say=said.append,
            on_turn=lambda: roster.refresh(server, said.append),
        )
        connection = Connection(
            server=f"127.0.0.1:{server.address[1]}", authority=enrolled / "tls" / "ca.pem", longest_wait_s=0.3
        )
        with sites(enrolled, (1,), connection) as (ward,):
            until(lambda: channel.clients(1) == [1], "it is let in")
            good = path.read_bytes()
            path.write_text("{")
            assert channel.clients(2) == [1]
            path.write_bytes(good)
            assert fedveil("keys", "revoke", "north", "--roster", path).exit_code == 0
            until(lambda: channel.clients(3) == [], "it is out")
            ward.hears("has not enrolled this site's node key; ask its operator")
    assert said[0] == "client 1 (north) joined"
    assert said[1].startswith(f"the roster is left as it was: the roster {path} is not JSON")
    assert said[-2:] == ["the roster has changed: 0 sites are admitted", "client 1 (north) left"]


def test_a_client_that_claims_another_number_than_the_enrolled_one_ends_with_the_remedy(enrolled: Path) -> None:
    path = enrolled / "site-1.toml"
    path.write_text(path.read_text().replace("id = 1", "id = 2").replace("[keys]", "[keys]\nauthority = 'tls/ca.pem'"))
    with secured(enrolled) as host:
        result = fedveil("client", path, "--server", host.address)
    assert result.exit_code == 2
    reason = "its key is enrolled for client 1 and its site.toml says id = 2; correct the id"
    assert last_line(result) == f"error: the server refuses this client: {reason}"
    assert host.said == [f"client 1 (north) cannot take part: {reason}"]


def test_a_server_of_another_authority_ends_the_client_with_one_line(enrolled: Path, tmp_path: Path) -> None:
    new_authority(tmp_path / "impostor", ["127.0.0.1"])
    with secured(enrolled) as host:
        ca = tmp_path / "impostor" / "ca.pem"
        result = fedveil("client", enrolled / "site-1.toml", "--server", host.address, "--authority", ca)
    assert result.exit_code == 1
    assert last_line(result).startswith(f"error: {host.address} is not the server that this site trusts: ")
    assert host.said == []


def test_a_client_that_expects_tls_does_not_talk_to_a_server_without(enrolled: Path) -> None:
    with FleetServer("127.0.0.1", 0, insecure=True) as server, hosted(server, enrolled) as host:
        ca = enrolled / "tls" / "ca.pem"
        result = fedveil("client", enrolled / "site-1.toml", "--server", host.address, "--authority", ca)
    assert result.exit_code == 1
    assert last_line(result) == f"error: {host.address} does not speak TLS; is it the right port?"


@pytest.mark.parametrize(
    ("site", "arguments", "words"),
    [
        ("site-0.toml", ("--server", "127.0.0.1:1"), "names no authority by which to recognise the server"),
        ("site-0.toml", ("--server", "10.1.2.3:1", "--insecure"), "an insecure client uses no TLS and reaches this"),
        ("site-0.toml", ("--server", "https://a:1", "--insecure"), "server must be host:port without a scheme"),
        ("site-0.toml", ("--server", "a:1", "--authority", "ca.pem"), "keys-0 cannot be read"),
        ("site-9.toml", ("--server", "127.0.0.1:1", "--insecure"), "site-9.toml does not exist"),
        ("no-data.toml", ("--server", "127.0.0.1:1", "--insecure"), "the task bare.py has no site_data"),
        ("no-task.toml", ("--server", "127.0.0.1:1", "--insecure"), "nowhere.py does not exist"),
    ],
)
def test_a_client_that_cannot_start_says_why_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str, arguments: tuple[str, ...], words: str
) -> None:
    fleet_project(tmp_path)
    (tmp_path / "bare.py").write_text(TASK.replace("    site_data=lambda settings: site_share(task, settings),\n", ""))
    for name, task in (("no-data", "bare.py"), ("no-task", "nowhere.py")):
        (tmp_path / f"{name}.toml").write_text(f'id = 0\ntask = "{task}"\n')
    monkeypatch.chdir(tmp_path)
    result = fedveil("client", site, *arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1 and words in result.stderr


def test_help_shows_both_commands_and_how_to_try_them_out() -> None:
    shown = fedveil("--help").stdout
    assert "fedveil" in shown and " server " in shown and " client " in shown
    for name in ("server", "client"):
        shown = fedveil(name, "--help").stdout
        assert "--insecure" in shown and "Examples" in shown


@pytest.mark.parametrize(("asked", "threads"), [(None, 3), ("7", 5)])
def test_sites_that_are_tried_out_on_one_machine_share_its_cores_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, threads: int
) -> None:
    folder = fleet_project(tmp_path, TASK.replace("    site_data=lambda settings: site_share(task, settings),\n", ""))
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    torch.set_num_threads(5)
    assert fedveil("client", folder / "site-0.toml", "--server", "127.0.0.1:1", "--insecure").exit_code == 2
    assert torch.get_num_threads() == threads
