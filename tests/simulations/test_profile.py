"""Profiles: parts that add up, workers' time folded in, traces that viewers read, and a limit to hold them against."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedml_core import ClientData, Examples, Task, Training
from fedml_core.errors import ConfigError, TaskError
from fedml_core.spans import recorder
from server import EvaluationPlan, FixedSampling
from simulations import Engine, Processes, Sequential, Simulation, Virtual, speed_limit
from simulations.profile import PARTS, Profile, Profiler, RoundProfile
from simulations.speed_limit import examples_per_s
from strategies import FedAvg
from tests.simulations.project_cases import fedveil, last_json, nothing_stays, project

BY_CLIENTS = EvaluationPlan(clients=FixedSampling(2))


def examples(count: int) -> Examples:
    x = torch.linspace(-1, 1, count).unsqueeze(1)
    return Examples.of(x, (x[:, 0] > 0).long())


TASK = Task.classification(
    model=lambda: nn.Linear(1, 2), classes=2, train_data=lambda: examples(120), test_data=lambda: examples(30)
)


@pytest.fixture(autouse=True)
def forget_tasks() -> Iterator[None]:
    with nothing_stays():
        yield


def simulation(engine: Engine | None = None) -> Simulation:
    chosen = Sequential() if engine is None else engine
    training = Training(epochs=2, batch_size=5)
    return Simulation(
        TASK, FedAvg(), clients=6, rounds=3, holdout=0.2, engine=chosen, training=training, evaluation=BY_CLIENTS
    )


def profiled(chosen: Simulation, out: Path | None = None, trace: bool = False) -> Profiler:
    with Profiler(chosen.training, trace=trace) as profiler:
        chosen.run(out=out, callbacks=[profiler])
    return profiler


def test_parts_add_up_to_the_round_and_rounds_to_the_run(tmp_path: Path) -> None:
    found = profiled(simulation(), tmp_path / "run").profile()
    assert [row.round for row in found.rounds] == [1, 2, 3]
    for row in (*found.rounds, found.total):
        assert tuple(row.parts) == PARTS
        assert sum(row.parts.values()) == pytest.approx(row.seconds)
        assert sum(row.shares().values()) == pytest.approx(1)
        assert all(row.parts[name] > 0 for name in PARTS if name != "idle")
        assert row.parts["idle"] == 0
    assert found.total.seconds == pytest.approx(sum(row.seconds for row in found.rounds))


def test_examples_are_counted_as_often_as_they_are_visited() -> None:
    found = profiled(simulation()).profile()
    assert [row.visits for row in found.rounds] == [2 * 96] * 3
    assert found.examples_per_s == pytest.approx(6 * 96 / found.total.seconds)


def test_worker_processes_tell_where_their_time_went() -> None:
    found = profiled(simulation(Processes(workers=2)), trace=True).profile()
    for row in found.rounds:
        assert row.parts["compute"] > 0 and row.parts["data"] > 0 and row.parts["idle"] >= 0
        assert sum(row.parts.values()) == pytest.approx(row.seconds)


def test_a_run_that_nobody_profiles_sends_no_spans_from_its_workers() -> None:
    seen: list[object] = []
    simulation(Processes(workers=1)).run(callbacks=[lambda report, state: seen.append(recorder())])
    assert seen == [None] * 3


def test_profiling_does_not_change_the_result() -> None:
    plain = simulation().run()
    with Profiler(Training()) as profiler:
        watched = simulation().run(callbacks=[profiler])
    assert torch.equal(plain.parameters, watched.parameters)


def test_waiting_for_workers_is_divided_as_they_divided_their_time() -> None:
    own, workers = {"workers": 1_000, "record": 200}, {"compute": 600.0, "data": 200.0}
    row = RoundProfile.of(4, 1_500, own, workers, visits=10)
    assert row.parts["compute"] == pytest.approx(600e-9) and row.parts["data"] == pytest.approx(200e-9)
    assert row.parts["idle"] == pytest.approx(200e-9) and row.parts["record"] == pytest.approx(200e-9)
    assert row.parts["other"] == pytest.approx(300e-9)


def test_workers_that_were_busy_while_nobody_waited_leave_no_idle_time() -> None:
    row = RoundProfile.of(1, 1_000, {"workers": 400}, {"compute": 600.0, "data": 200.0}, visits=1)
    assert row.parts["compute"] == pytest.approx(300e-9) and row.parts["data"] == pytest.approx(100e-9)
    assert row.parts["idle"] == pytest.approx(0) and row.parts["other"] == pytest.approx(600e-9)


def test_waiting_for_workers_that_did_nothing_is_idle() -> None:
    assert RoundProfile.of(1, 1_000, {"workers": 400}, {}, visits=0).parts["idle"] == pytest.approx(400e-9)


def row_of(number: int) -> RoundProfile:
    return RoundProfile.of(number, 2_000_000_000, {"compute": 1_500_000_000, "record": 100_000_000}, {}, visits=500.0)


def test_people_read_the_total_the_share_of_the_limit_and_the_rounds() -> None:
    assert Profile([row_of(1), row_of(2)], limit=1000.0).lines() == [
        "profile of 2 rounds, 4.000 s",
        "  compute          3.000 s   75.0%",
        "  record           0.200 s    5.0%",
        "  other            0.800 s   20.0%",
        "  250 examples/s, 25.0% of what plain centralised SGD at batch 500 makes here (1,000)",
        "  round 1: 2.000 s: compute 75%, record 5%, other 20%",
        "  round 2: 2.000 s: compute 75%, record 5%, other 20%",
    ]


def test_of_many_rounds_the_last_twenty_are_shown() -> None:
    lines = Profile([row_of(number) for number in range(1, 31)]).lines()
    assert "  the last 20 rounds:" in lines and "  250 examples/s" in lines
    assert [line.split(":")[0] for line in lines[-20:]] == [f"  round {number}" for number in range(11, 31)]


def test_scripts_read_numbers() -> None:
    body = Profile([row_of(1)], limit=1000.0).to_json()
    assert body["shares"]["compute"] == 0.75 and body["share_of_limit"] == 0.25
    assert body["rounds"][0]["parts"]["record"] == 0.1 and set(body["parts"]) == set(PARTS)
    assert json.loads(json.dumps(body)) == body
    assert Profile([]).to_json()["share_of_limit"] is None


def spans_of(path: Path) -> list[dict[str, Any]]:
    events = json.loads(path.read_text())["traceEvents"]
    assert all(set(event) >= {"name", "ph", "pid", "tid"} for event in events)
    return [event for event in events if event["ph"] == "X"]


def test_a_trace_holds_rounds_and_the_spans_within_them(tmp_path: Path) -> None:
    profiled(simulation(), tmp_path / "run", trace=True).write_trace(tmp_path / "trace.json")
    events = spans_of(tmp_path / "trace.json")
    counts = {name: sum(event["name"] == name for event in events) for name in ("compute", "record", "round 2")}
    assert counts == {"compute": 18, "record": 3, "round 2": 1}
    whole = next(event for event in events if event["name"] == "round 2")
    inside = [e for e in events if whole["ts"] <= e["ts"] and e["ts"] + e["dur"] <= whole["ts"] + whole["dur"]]
    assert sum(event["name"] == "compute" for event in inside) == 6


def test_a_trace_shows_each_worker_as_a_process(tmp_path: Path) -> None:
    profiled(simulation(Processes(workers=2)), trace=True).write_trace(tmp_path / "trace.json")
    processes = {event["pid"] for event in spans_of(tmp_path / "trace.json") if event["name"] == "compute"}
    assert 1 <= len(processes) <= 2
    names = [e["args"]["name"] for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if "args" in e]
    assert "coordinator" in names and sum(name.startswith("worker") for name in names) == len(processes)


def test_a_trace_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the trace .*; name another file"):
        Profiler(Training(), trace=True).write_trace(tmp_path / "file" / "trace.json")


def test_the_command_shows_the_profile_and_writes_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_limit, "_BLOCKS", 1)
    run, trace = project(tmp_path), tmp_path / "trace.json"
    arguments = ("simulate", run, "--out", tmp_path / "out", "--no-plots", "--profile", "--trace", trace)
    shown = fedveil(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "profile of 3 rounds" in shown.stdout and "of what plain centralised SGD at batch 500" in shown.stdout
    assert f"wrote {trace}" in shown.stderr
    assert {event["name"] for event in spans_of(trace)} >= {"data", "compute", "transforms", "accumulate", "evaluate"}


def test_json_includes_the_profile_and_only_if_it_was_asked_for(tmp_path: Path) -> None:
    options = ("simulate", project(tmp_path), "--json", "--quiet", "--no-plots")
    answer = last_json(fedveil(*options, "--out", tmp_path / "a", "--profile"))["profile"]
    assert answer["examples_per_s"] > 0 and answer["limit_examples_per_s"] > 0 and len(answer["rounds"]) == 3
    traced = last_json(fedveil(*options, "--out", tmp_path / "b", "--trace", tmp_path / "trace.json"))
    assert "profile" not in traced and (tmp_path / "trace.json").exists()


def test_the_limit_is_measured_on_any_population_and_leaves_torch_as_it_was(untouched_generators: None) -> None:
    one = Task.classification(
        model=lambda: nn.Sequential(nn.Linear(1, 2), nn.Dropout()),
        classes=2,
        client_data=lambda client: ClientData(examples(client % 3)),
    )
    before = torch.get_num_threads()
    assert examples_per_s(one, Virtual(1000, lambda client: ClientData(examples(client % 3))), seconds=0.01) > 0
    assert torch.get_num_threads() == before


def test_a_limit_that_cannot_be_measured_says_why() -> None:
    with pytest.raises(TaskError, match="none of the first 200 clients has an example"):
        examples_per_s(TASK, Virtual(3, lambda client: ClientData(examples(0))), seconds=0.01)
    ragged = Virtual(9, lambda client: ClientData(Examples.of(torch.zeros(3, client + 1), torch.zeros(3).long())))
    with pytest.raises(TaskError, match="joining the clients' examples failed to measure the limit"):
        examples_per_s(TASK, ragged, seconds=0.01)
