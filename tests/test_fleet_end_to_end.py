"""Real processes through the command line: what users do on one machine, with and without TLS, and what may happen."""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.history import read_history
from tests.fleet_run_cases import (
    TASK,
    Command,
    SiteThread,
    commands,
    final_parameters,
    fleet_project,
    free_port,
    insecure,
    same_model,
    sites,
    until,
)
from tests.simulations.project_cases import fedveil, nothing_stays
from tests.sources import ROOT

Start = Callable[..., Command]


@pytest.fixture(autouse=True)
def forget_tasks() -> Iterator[None]:
    with nothing_stays():
        yield


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with commands(tmp_path) as started:
        yield started


def address_of(server: Command) -> str:
    """Return where a server with port 0 listens."""
    found = re.search(r"listening on (127\.0\.0\.1:\d+)", server.says("listening on"))
    assert found
    return found[1]


def test_three_sites_learn_the_digits_as_their_simulation_does(tmp_path: Path, start: Start) -> None:
    example = ROOT / "examples" / "digits"
    options = ("--rounds", "3", "--no-plots")
    server = start("server", example / "fleet.toml", "--listen", "127.0.0.1:0", "--insecure", "--out", "out", *options)
    address = address_of(server)
    sites = [
        start("client", example / "sites" / f"{number}.toml", "--server", address, "--insecure") for number in range(3)
    ]
    simulated = fedveil("simulate", example / "fleet.toml", "--out", tmp_path / "simulated", *options, "--json")
    answer = server.ends(0)
    for number, site in enumerate(sites):
        told = site.ends(0)
        assert (told["client"], told["trained"], told["failed"]) == (number, 3, 0)
        assert told["goodbye"] == "the run is done after 3 rounds"
        assert (told["rounds"], told["protection"], told["epsilon"], told["engine"]) == (3, "none", None, "fleet")
        assert told["bytes_up"] > 0 and told["bytes_down"] > 0 and told["metrics"]["train"]["examples"] > 0
    assert same_model(final_parameters(tmp_path / "out"), final_parameters(tmp_path / "simulated"))
    expected = json.loads(simulated.stdout)["metrics"]["server"]
    assert answer["metrics"]["server"] == pytest.approx(expected, abs=1e-4)
    assert answer["clients"] == 3 and expected["accuracy"] > 0.8


def test_enrolled_sites_over_tls_and_one_that_is_enrolled_while_the_server_runs(tmp_path: Path, start: Start) -> None:
    fleet_project(tmp_path)
    assert fedveil("keys", "server", tmp_path / "tls", "--host", "127.0.0.1").exit_code == 0
    for number in (0, 1):
        keys, roster = tmp_path / f"keys-{number}", tmp_path / "roster.json"
        assert fedveil("keys", "new", keys).exit_code == 0
        public, name = keys / "site-public.json", f"clinic-{number}"
        if number == 1:
            server = start(
                *("server", ".", "--listen", "127.0.0.1:0", "--tls", "tls", "--roster", "roster.json", "--no-plots"),
                *("--set", "server.minimum_clients=2", "--rounds", "2", "--out", "out"),
            )
            address = address_of(server)
            first, late = (
                start("client", f"site-{number}.toml", "--server", address, "--authority", "tls/ca.pem")
                for number in (0, 1)
            )
            late.says("has not enrolled this site's node key; ask its operator")
            server.says("waiting for clients: 1 of 2 (clinic-0)")
        enrolled = fedveil("keys", "enrol", public, "--name", name, "--id", str(number), "--roster", roster)
        assert enrolled.exit_code == 0, enrolled.output
    assert server.ends(0)["clients"] == 2
    assert (first.ends(0)["trained"], late.ends(0)["trained"]) == (2, 2)
    assert "the roster has changed: 2 sites are admitted" in server.said
    assert "client 1 (clinic-1) joined" in server.said
    assert not any("without TLS" in line for line in server.said)


HELD = TASK.replace(
    "task = ",
    """import threading
from pathlib import Path

HOLD, evaluated = Path(__file__).with_name("hold"), []


def gate(outputs, targets):
    evaluated.append(len(targets) == 50)
    while sum(evaluated) > 2 and evaluated[-1] and HOLD.exists():
        threading.Event().wait(0.05)
    return targets.float()


task = """,
).replace("    classes=2,\n", "    classes=2,\n    metrics={'gate': gate},\n")
"""A task whose server, which has the 50 test examples, stops in its third round as long as a file is there."""


def test_a_server_that_is_killed_and_interrupted_ends_where_an_unbroken_one_does(tmp_path: Path, start: Start) -> None:
    fleet_project(tmp_path, HELD)
    hold, out, port = tmp_path / "hold", tmp_path / "out", free_port()
    change = ("--set", 'strategy={name = "Scaffold", population = 3}', "--rounds", "6", "--no-plots")
    line = ("server", "run.toml", "--listen", f"127.0.0.1:{port}", "--insecure", "--out", "out", *change)

    def stops_after(rounds: int, trained: int, wards: list[SiteThread]) -> None:
        until(lambda: all(ward.service.facts["trained"] == trained for ward in wards), f"{trained} times trained")
        assert len(read_history(out)) == rounds

    hold.touch()
    with sites(tmp_path, (0, 1, 2), insecure(port)) as wards:
        killed = start(*line)
        stops_after(2, trained=3, wards=wards)
        killed.send(signal.SIGKILL)
        killed.ends(-signal.SIGKILL)
        for ward in wards:
            ward.hears("cannot be reached")

        resumed = start(*line, "--resume")
        stops_after(4, trained=6, wards=wards)
        resumed.send(signal.SIGINT)
        assert resumed.ends(130)["kind"] == "Interrupted"
        command = resumed.said[-1].removeprefix("error: interrupted; 4 rounds are kept in out; go on with: fedveil ")
        assert command.startswith(f"server run.toml --resume --listen 127.0.0.1:{port} --insecure")

        hold.unlink()
        last = start(*shlex.split(command), "--no-plots")
        assert last.ends(0)["rounds"] == 6
        for ward in wards:
            ward.goes_home()
            # A round that was under way when its server ended was trained, and trained again.
            assert (ward.facts["trained"], ward.facts["failed"]) == (8, 0)
    reports = read_history(out)
    assert [report.round for report in reports] == [1, 2, 3, 4, 5, 6]
    assert all(list(report.participants) == [0, 1, 2] for report in reports)
    fedveil("simulate", tmp_path, "--out", tmp_path / "unbroken", *change, "--quiet")
    assert same_model(final_parameters(out), final_parameters(tmp_path / "unbroken"))


def test_both_sides_wait_for_each_other_and_end_cleanly_when_told_to(tmp_path: Path, start: Start) -> None:
    fleet_project(tmp_path)
    address = f"127.0.0.1:{free_port()}"
    site = start("client", "site-1.toml", "--server", address, "--insecure")
    site.says(f"{address} cannot be reached (ConnectError); trying again in", times=2)
    server = start("server", ".", "--listen", address, "--insecure", "--out", "out")
    server.says("waiting for clients: 1 of 3 (ward-b)")
    site.says(f"{address} answers again")
    site.send(signal.SIGINT)
    assert site.ends(130) == {
        "error": "interrupted; trained 0 times, evaluated 0 times, failed 0 times; start it again to go on",
        "kind": "Interrupted",
        "exit_code": 130,
    }
    server.says("client 1 (ward-b) left")
    server.says("waiting for clients: 0 of 3", times=2)
    server.send(signal.SIGTERM)
    assert server.ends(143)["error"] == "terminated; no round was finished, so nothing is kept"
