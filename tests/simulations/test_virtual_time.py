"""The virtual clock: durations worked out by hand, lateness, waiting, faults, resuming, engines, files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedml_core import ClientData, Examples, Task, Training
from fedml_core.errors import CheckpointError, RunError
from server import EvaluationPlan, FixedSampling, RoundReport, read_history
from server.report import read_run, write_report
from simulations import (
    Constant,
    Daily,
    Faults,
    Fleet,
    LogNormal,
    Processes,
    Simulation,
    Tiers,
    Trace,
    VirtualClock,
    simulate,
)
from simulations.virtual_time import reached
from strategies import FedAvg, Scaffold
from tests.simulations.project_cases import RUN, fedveil, last_json, nothing_stays, project

QUIET = EvaluationPlan(every=0)


def examples(count: int) -> Examples:
    x = torch.linspace(-1, 1, count).unsqueeze(1)
    return Examples.of(x, (x[:, 0] > 0).long())


# Client i holds i + 1 examples.
TASK = Task.classification(
    model=lambda: nn.Linear(1, 2), classes=2, client_data=lambda client: ClientData(examples(client + 1))
)
POOLED = Task.classification(
    model=lambda: nn.Linear(1, 2), classes=2, train_data=lambda: examples(120), test_data=lambda: examples(30)
)


@pytest.fixture(autouse=True)
def forget_tasks() -> Iterator[None]:
    with nothing_stays():
        yield


def run(fleet: Fleet | None, **settings: Any) -> list[RoundReport]:
    chosen: dict[str, Any] = {"clients": 4, "rounds": 2, "evaluation": QUIET, **settings}
    return list(simulate(TASK, FedAvg(), fleet=fleet, **chosen).reports)


def test_without_a_fleet_there_is_no_virtual_time() -> None:
    assert [(report.virtual_seconds, report.virtual_clock) for report in run(None)] == [(None, None)] * 2


def test_a_round_lasts_as_long_as_its_slowest_client() -> None:
    reports = run(Fleet(examples_per_s=2.0, latency_s=0.25), training=Training(epochs=3))
    # Client 3 visits 4 examples 3 times at 2 a second, and two messages take 0.25 s each.
    assert [report.virtual_seconds for report in reports] == [6.5, 6.5]
    assert [report.virtual_clock for report in reports] == [6.5, 13.0]


def test_steps_are_counted_in_batches_that_a_client_can_fill() -> None:
    reports = run(Fleet(examples_per_s=1.0), training=Training(steps=5, batch_size=3), rounds=1)
    assert reports[0].virtual_seconds == 15.0


def test_messages_take_their_bytes_over_the_bandwidth() -> None:
    down = run(Fleet(download_bytes_per_s=100.0), rounds=1)[0]
    assert down.virtual_seconds == pytest.approx(down.bytes_down / down.cohort / 100.0, abs=1e-6)
    up = run(Fleet(upload_bytes_per_s=100.0), rounds=1)[0]
    assert up.virtual_seconds is not None
    # The digits of a client's own loss and count make its message a few dozen bytes longer or shorter.
    assert abs(up.virtual_seconds * 100.0 - up.bytes_up / up.cohort) < 64
    assert up.virtual_seconds * 100.0 > 4 * 4


def test_whoever_needs_longer_than_the_deadline_is_late_and_the_round_lasts_until_it() -> None:
    report = run(Fleet(examples_per_s=1.0), round_timeout_s=2.5, rounds=1)[0]
    assert (report.participants, report.missing) == ([0, 1], [2, 3])
    assert report.virtual_seconds == 2.5
    everyone = run(Fleet(examples_per_s=1.0), round_timeout_s=4.0, rounds=1)[0]
    assert (everyone.replies, everyone.virtual_seconds) == (4, 4.0)
    early = run(Fleet(examples_per_s=2.0), round_timeout_s=4.0, rounds=1)[0]
    assert (early.replies, early.virtual_seconds) == (4, 2.0)


def test_a_deadline_that_nobody_meets_makes_rounds_void() -> None:
    with pytest.raises(RunError, match="all 2 rounds were void"):
        run(Fleet(examples_per_s=0.1), round_timeout_s=1.0)


def test_without_a_fleet_the_deadline_makes_nobody_late() -> None:
    assert run(None, round_timeout_s=1e-9, rounds=1)[0].replies == 4


def test_who_drops_out_is_waited_for_until_the_deadline_if_there_is_one() -> None:
    faults = Faults(drop=0.5)
    endless = run(Fleet(examples_per_s=1.0), faults=faults, rounds=8, seed=1)
    waited = run(Fleet(examples_per_s=1.0), faults=faults, rounds=8, seed=1, round_timeout_s=50.0)
    assert any(report.missing for report in endless)
    for without, within in zip(endless, waited, strict=True):
        assert without.participants == within.participants
        assert without.virtual_seconds == max((client + 1 for client in without.participants), default=0)
        assert within.virtual_seconds == (50.0 if within.missing else without.virtual_seconds)


def test_only_who_is_there_is_asked_and_the_server_waits_for_somebody() -> None:
    together = Daily(on_s=10.0, period_s=100.0, spread_s=0.0)
    reports = run(Fleet(examples_per_s=0.5, availability=together), rounds=4)
    # 8 s each: rounds start at 0 and 8, then all are away until 100.
    assert [report.virtual_clock for report in reports] == [8.0, 16.0, 108.0, 116.0]
    assert [report.virtual_seconds for report in reports] == [8.0, 8.0, 92.0, 8.0]
    assert all(report.cohort == 4 for report in reports)


def test_a_trace_that_has_ended_leaves_nobody_to_ask(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("client,start_s,end_s\n1,0,1\n3,5,6\n")
    reports = run(Fleet(examples_per_s=1.0, availability=Trace(str(tmp_path / "t.csv"))), rounds=4)
    assert [report.participants for report in reports] == [[1], [3], [], []]
    assert [report.virtual_clock for report in reports] == [2.0, 9.0, 9.0, 9.0]
    assert [report.why for report in reports[2:]] == ["no client could be asked"] * 2


def test_evaluations_by_clients_take_no_virtual_time() -> None:
    by_clients = EvaluationPlan(clients=FixedSampling(3), server=False)
    history = simulate(
        POOLED, FedAvg(), clients=4, rounds=1, holdout=0.2, fleet=Fleet(examples_per_s=1.0), evaluation=by_clients
    )
    assert history.reports[0].virtual_seconds == 24.0 and "clients" in history.reports[0].metrics


FLEET = Fleet(
    examples_per_s=LogNormal(20.0, 1.0),
    download_bytes_per_s=Tiers((500.0, 5000.0), (0.3, 0.7)),
    upload_bytes_per_s=Tiers((100.0, 1000.0), (0.3, 0.7)),
    latency_s=0.1,
    availability=Daily(on_s=20.0, period_s=60.0),
    targets={"server.accuracy": 0.6, "server.loss": 0.0},
)
SETTINGS: dict[str, Any] = {
    "clients": 12,
    "sampling": FixedSampling(3),
    "fleet": FLEET,
    "round_timeout_s": 4.0,
    "faults": Faults(drop=0.1, nan=0.1),
    "seed": 4,
}


def times(reports: Any) -> list[tuple[Any, ...]]:
    return [(r.round, r.virtual_seconds, r.virtual_clock, tuple(r.participants), tuple(r.missing)) for r in reports]


@pytest.mark.parametrize("strategy", [FedAvg(), Scaffold(population=12)], ids=lambda one: type(one).__name__)
def test_a_resumed_run_goes_on_at_the_same_time_bit_for_bit(tmp_path: Path, strategy: Any) -> None:
    straight = simulate(POOLED, strategy, rounds=6, **SETTINGS)
    simulate(POOLED, strategy, rounds=3, out=tmp_path / "run", **SETTINGS)
    resumed = simulate(POOLED, strategy, rounds=6, out=tmp_path / "run", resume=True, **SETTINGS)
    assert times(straight.reports) == times(resumed.reports) == times(read_history(tmp_path / "run"))
    assert torch.equal(straight.parameters, resumed.parameters)
    assert len({report.virtual_seconds for report in straight.reports}) > 1
    assert any(report.missing for report in straight.reports)


def test_a_run_is_not_resumed_on_another_fleet(tmp_path: Path) -> None:
    simulate(POOLED, FedAvg(), rounds=1, out=tmp_path / "run", **SETTINGS)
    other = {**SETTINGS, "fleet": dataclasses.replace(FLEET, latency_s=0.2)}
    with pytest.raises(CheckpointError, match=r"was on fleet .*latency_s=0.1.* now it is on .*latency_s=0.2"):
        simulate(POOLED, FedAvg(), rounds=2, out=tmp_path / "run", resume=True, **other)
    targets = {**SETTINGS, "fleet": dataclasses.replace(FLEET, targets={})}
    assert len(simulate(POOLED, FedAvg(), rounds=2, out=tmp_path / "run", resume=True, **targets).reports) == 2


def test_a_run_without_a_fleet_is_not_resumed_on_one(tmp_path: Path) -> None:
    simulate(POOLED, FedAvg(), rounds=1, clients=12, out=tmp_path / "run")
    with pytest.raises(CheckpointError, match="was on fleet none, now it is on Fleet"):
        simulate(POOLED, FedAvg(), rounds=2, clients=12, fleet=FLEET, out=tmp_path / "run", resume=True)


def test_a_run_on_a_fleet_is_not_resumed_without_it(tmp_path: Path) -> None:
    simulate(POOLED, FedAvg(), rounds=1, clients=12, fleet=FLEET, out=tmp_path / "run")
    with pytest.raises(CheckpointError, match="was on fleet Fleet.*, now it is on none; restore the old one"):
        simulate(POOLED, FedAvg(), rounds=2, clients=12, out=tmp_path / "run", resume=True)


def test_every_engine_has_the_same_time() -> None:
    one = simulate(POOLED, FedAvg(), rounds=3, **SETTINGS)
    two = simulate(POOLED, FedAvg(), rounds=3, engine=Processes(workers=2), **SETTINGS)
    assert times(one.reports) == times(two.reports)


def test_the_fleet_does_not_change_what_is_learnt() -> None:
    plain = simulate(POOLED, FedAvg(), clients=5, rounds=3)
    timed = simulate(POOLED, FedAvg(), clients=5, rounds=3, fleet=Fleet(examples_per_s=LogNormal(5.0)))
    assert torch.equal(plain.parameters, timed.parameters)


def test_a_huge_population_costs_a_cohort() -> None:
    loaded: list[int] = []

    def make(client: int) -> ClientData:
        loaded.append(client)
        return ClientData(examples(5))

    task = Task.classification(model=lambda: nn.Linear(1, 2), classes=2, client_data=make)
    fleet = Fleet(examples_per_s=LogNormal(5.0), availability=Daily())
    simulate(task, FedAvg(), clients=10**9, rounds=2, sampling=FixedSampling(5), fleet=fleet, evaluation=QUIET)
    # Once to count and once to train, for 5 clients in each of 2 rounds.
    assert len(loaded) == 20 and len(set(loaded)) == 10


def test_a_client_is_counted_once_however_often_it_is_asked() -> None:
    loaded: list[int] = []

    def make(client: int) -> ClientData:
        loaded.append(client)
        return ClientData(examples(5))

    task = Task.classification(model=lambda: nn.Linear(1, 2), classes=2, client_data=make)
    simulate(task, FedAvg(), clients=2, rounds=3, fleet=Fleet(examples_per_s=1.0), evaluation=QUIET)
    assert len(loaded) == 2 * (1 + 3)


def report_of(number: int, accuracy: float | None, clock: float | None) -> RoundReport:
    metrics = {} if accuracy is None else {"server": {"accuracy": accuracy, "loss": 1 - accuracy}}
    first = run(None, rounds=1)[0]
    return dataclasses.replace(first, round=number, metrics=metrics, virtual_clock=clock)


def test_a_target_is_reached_by_the_first_round_that_meets_it() -> None:
    rounds = [report_of(1, 0.5, 10.0), report_of(2, None, 20.0), report_of(3, 0.75, 30.0), report_of(4, 0.7, 40.0)]
    found = reached(rounds, {"server.accuracy": 0.75, "server.loss": 0.3, "clients.accuracy": 0.1})
    assert found["server.accuracy"] == {"target": 0.75, "round": 3, "virtual_seconds": 30.0}
    assert found["server.loss"] == {"target": 0.3, "round": 3, "virtual_seconds": 30.0}
    assert found["clients.accuracy"] == {"target": 0.1, "round": None, "virtual_seconds": None}
    assert reached([report_of(1, float("nan"), 1.0)], {"server.accuracy": 0.5})["server.accuracy"]["round"] is None


def test_the_summary_the_report_and_a_plot_tell_the_time_to_a_target(tmp_path: Path) -> None:
    history = simulate(POOLED, FedAvg(), rounds=6, out=tmp_path, **SETTINGS)
    summary = history.summary
    assert summary["virtual_seconds"] == history.reports[-1].virtual_clock
    accuracy = summary["targets"]["server.accuracy"]
    assert accuracy["round"] is not None
    assert accuracy["virtual_seconds"] == history.reports[accuracy["round"] - 1].virtual_clock
    rows = dict(read_run(tmp_path).rows)
    assert rows["server.accuracy 0.6"].startswith(f"in round {accuracy['round']}, after ")
    assert rows["server.loss 0"] == "not reached"
    assert "virtual time" in rows
    assert "plots/virtual_time.png" in write_report(read_run(tmp_path)).read_text()


TABLE = """
round_timeout_s = 30

[simulation.fleet]
examples_per_s = { name = "log-normal", median = 5.0, sigma = 0.3 }
download_bytes_per_s = 1000
upload_bytes_per_s = { name = "tiers", values = [100, 1000], shares = [0.5, 0.5] }
latency_s = 0.1
availability = { name = "trace", path = "devices.json" }
targets = { "server.accuracy" = 0.2 }
"""


def with_fleet(table: str) -> str:
    top, _, tables = table.partition("[simulation.fleet]")
    return f"{top}{RUN}\n[simulation.fleet]{tables}"


def test_a_run_toml_describes_a_fleet(tmp_path: Path) -> None:
    path = project(tmp_path / "project", with_fleet(TABLE))
    (tmp_path / "project" / "devices.json").write_text('{"0": [[0, 900]], "2": [[0, 900]]}')
    answer = last_json(fedveil("simulate", path, "--out", tmp_path / "out", "--json", "--quiet", "--no-plots"))
    assert answer["virtual_seconds"] > 0
    assert answer["targets"]["server.accuracy"]["round"] == 1
    assert {client for report in read_history(tmp_path / "out") for client in report.participants} == {0, 2}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("examples_per_second = 1", "simulation.fleet: Fleet has no argument 'examples_per_second'; did you mean"),
        ("examples_per_s = 0", "simulation.fleet: examples_per_s must be > 0, got 0"),
        ("examples_per_s = true", "simulation.fleet: examples_per_s must be a number, got True"),
        ('examples_per_s = "fast"', "unknown spread 'fast'"),
        ('examples_per_s = { name = "tiers", values = [0, 1] }', "examples_per_s: no client's number may lie so low"),
        ("latency_s = -1", "latency_s must be >= 0, got -1"),
        ('availability = "weekly"', "unknown availability 'weekly'"),
        ("availability = 3", "availability"),
        ("targets = { accuracy = 0.9 }", "metric must be server.NAME, clients.NAME or train.NAME, got 'accuracy'"),
        ("targets = { server.accuracy = 0.9 }", 'put the whole name in quotes, "server.NAME"'),
        ('targets = { "server.accuracy" = "x" }', "targets: server.accuracy must be a number, got 'x'"),
        ('availability = { name = "trace", path = "none.csv" }', "none.csv cannot be read"),
    ],
)
def test_a_fleet_that_cannot_be_is_one_clear_line(tmp_path: Path, table: str, said: str) -> None:
    path = project(tmp_path, f"{RUN}\n[simulation.fleet]\n{table}\n")
    result = fedveil("simulate", path, "--out", tmp_path / "out", "--no-plots")
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_fleets_families_are_listed() -> None:
    assert {entry["name"] for entry in last_json(fedveil("list", "spreads", "--json"))["spreads"]} >= {"LogNormal"}
    names = {entry["name"] for entry in last_json(fedveil("list", "availabilities", "--json"))["availabilities"]}
    assert names >= {"Always", "Daily", "Trace"}


def test_the_clock_of_a_script_can_be_asked() -> None:
    simulation = Simulation(POOLED, FedAvg(), clients=4)
    clock = VirtualClock(Fleet(examples_per_s=Constant(10.0)), simulation.population, seed=0)
    assert clock.begin_round() == range(4) and clock.now_s == 0.0
    clock.restore({**clock.to_tree(), "now_s": 12.5})
    assert (clock.now_s, clock.round_s) == (12.5, 0.0)
    took = Fleet(examples_per_s=10.0, latency_s=1.0).seconds([0, 1], np.array([20, 40]), 5, 5, seed=0)
    assert took.tolist() == [4.0, 6.0]
