"""The commands do what their help says: run, resume, compare, report, list."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.history import read_history
from tests.simulations.project_cases import RUN, TASK, fedveil, last_json, nothing_stays, project
from tests.sources import ROOT


@pytest.fixture(autouse=True)
def forget_tasks() -> Iterator[None]:
    with nothing_stays():
        yield


def test_json_is_the_last_line_of_stdout_and_alone_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = fedveil("simulate", project(tmp_path), "--out", out, "--json", "--no-plots")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1
    answer = last_json(result)
    assert answer["rounds"] == 3
    assert answer["clients"] == 4
    assert answer["protection"] == "none"
    assert answer["epsilon"] is None
    assert answer["engine"] == "suited"
    assert answer["out"] == str(out)
    assert answer["seconds"] >= 0
    assert answer["bytes_up"] == sum(report.bytes_up for report in read_history(out))
    assert answer["bytes_down"] == sum(report.bytes_down for report in read_history(out))
    assert set(answer["metrics"]) == {"server", "train"}
    assert answer["metrics"]["server"]["examples"] == 20
    assert Path(answer["report"]).read_text().startswith("# Run report")


def test_people_read_what_the_server_could_see(tmp_path: Path) -> None:
    result = fedveil("simulate", project(tmp_path), "--out", tmp_path / "out", "--no-plots")
    assert result.exit_code == 0, result.output
    rows = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert rows["rounds"].strip() == "3"
    assert "every update of every participant" in rows["server saw"]
    assert "no differential privacy" in rows["privacy"]
    assert rows["replies"].strip() == "12 of 12 counted"
    assert "--central" in rows["next"]
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["round 1/3", "round 2/3", "round 3/3"]


def test_quiet_says_nothing_when_all_is_well(tmp_path: Path) -> None:
    result = fedveil("simulate", project(tmp_path), "--out", tmp_path / "out", "--quiet", "--no-plots")
    assert (result.exit_code, result.output) == (0, "")


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    run = project(tmp_path, RUN + '\n[sampling]\nname = "FixedSampling"\nsize = 2\n')
    quiet = ("--json", "--quiet", "--no-plots")
    whole = last_json(fedveil("simulate", run, "--out", tmp_path / "whole", "--rounds", "4", *quiet))
    broken = tmp_path / "broken"
    fedveil("simulate", run, "--out", broken, "--rounds", "2", *quiet)
    resumed = last_json(fedveil("simulate", run, "--out", broken, "--rounds", "4", "--resume", *quiet))
    assert resumed["rounds"] == 4
    assert resumed["metrics"] == whole["metrics"]


def test_the_out_folder_of_the_file_is_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project(tmp_path / "project", RUN.replace("rounds = 3", 'rounds = 1\nout = "results"'))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert fedveil("simulate", run, "--no-plots").exit_code == 0
    assert (tmp_path / "elsewhere" / "results" / "summary.json").exists()
    assert sorted(path.name for path in (tmp_path / "project").iterdir() if path.is_file()) == ["run.toml", "task.py"]


def test_overwrite_replaces_the_run(tmp_path: Path) -> None:
    run, out = project(tmp_path), tmp_path / "out"
    fedveil("simulate", run, "--out", out, "--quiet", "--no-plots")
    result = fedveil("simulate", run, "--out", out, "--rounds", "2", "--overwrite", "--no-plots")
    assert result.exit_code == 0, result.output
    assert [report.round for report in read_history(out)] == [1, 2]


def test_seed_and_set_reach_the_run(tmp_path: Path) -> None:
    run = project(tmp_path)
    options = ("--json", "--quiet", "--no-plots", "--rounds", "1")
    first = last_json(fedveil("simulate", run, "--out", tmp_path / "a", *options))
    other = last_json(fedveil("simulate", run, "--out", tmp_path / "b", "--seed", "1", *options))
    faster = last_json(fedveil("simulate", run, "--out", tmp_path / "c", "--set", "training.epochs=9", *options))
    losses = {answer["metrics"]["server"]["loss"] for answer in (first, other, faster)}
    assert len(losses) == 3


def test_central_trains_as_often_on_the_pooled_data_and_compares(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = fedveil("simulate", project(tmp_path), "--out", out, "--central", "--json", "--no-plots")
    assert result.exit_code == 0, result.output
    central = last_json(result)["central"]
    assert central["examples"] == 20
    assert 0 <= central["accuracy"] <= 1
    assert json.loads((out / "summary.json").read_text())["central"] == central
    assert "federated against central: loss" in result.stderr


def test_plots_are_drawn_unless_told_otherwise(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = fedveil("simulate", project(tmp_path), "--out", out, "--rounds", "1")
    assert result.exit_code == 0, result.output
    drawn = {path.name for path in (out / "plots").iterdir()}
    assert {"metrics.png", "traffic.png", "participation.png", "labels.png"} <= drawn
    text = (out / "report.md").read_text()
    assert all(f"](plots/{name})" in text for name in drawn)


def test_a_run_whose_rounds_are_all_void_fails_with_its_reason(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = fedveil("simulate", project(tmp_path), "--out", out, "--set", "simulation.faults.nan=1.0")
    assert result.exit_code == 1
    assert "all 3 rounds were void" in result.stderr.splitlines()[-1]
    assert len(read_history(out)) == 3


def test_excluded_replies_are_counted_by_rule(tmp_path: Path) -> None:
    faults = ("--set", "simulation.faults.nan=0.5", "--set", "simulation.faults.drop=0.2", "--rounds", "5")
    out = tmp_path / "out"
    result = fedveil("simulate", project(tmp_path), "--out", out, "--no-plots", *faults)
    assert result.exit_code == 0, result.output
    reports = read_history(out)
    excluded = [exclusion.rule for report in reports for exclusion in report.excluded]
    missing = sum(len(report.missing) for report in reports)
    assert set(excluded) == {"non-finite"}
    assert f"{missing} missing, {len(excluded)} excluded (non-finite {len(excluded)})" in result.stdout


def test_a_clients_failure_ends_the_run_or_is_skipped_as_the_file_says(tmp_path: Path) -> None:
    task = TASK + (
        "\n\ndef shares(client):\n"
        "    from fedml_core.data import ClientData\n"
        "    return ClientData(rows(10 // abs(client - 2)))\n\n\n"
        "import dataclasses\n"
        "task = dataclasses.replace(task, train_data=None, client_data=shares)\n"
    )
    run = project(tmp_path, RUN.replace("count = 4", "count = 3"), task)
    ended = fedveil("simulate", run, "--out", tmp_path / "a", "--no-plots")
    assert ended.exit_code == 2
    assert "client 2: client_data(2) failed: ZeroDivisionError" in ended.stderr
    skip = ("--set", "simulation.on_client_error=skip", "--out", tmp_path / "b", "--no-plots", "--rounds", "1")
    skipped = fedveil("simulate", run, *skip, "--set", "clients.count=4")
    assert skipped.exit_code == 0, skipped.output
    assert "3 of 4 counted, 1 excluded (task 1)" in skipped.stdout


def test_early_stopping_is_told(tmp_path: Path) -> None:
    stop = '\n[early_stopping]\nmetric = "server.accuracy"\npatience = 1\nminimum_change = 1.0\n'
    result = fedveil("simulate", project(tmp_path, RUN + stop), "--out", tmp_path / "out", "--no-plots")
    assert result.exit_code == 0, result.output
    assert "2, stopped early" in result.stdout.splitlines()[0]


def test_ctrl_c_leaves_a_history_and_says_how_to_go_on(tmp_path: Path) -> None:
    task = TASK.replace("(x[:, 0] > 0).long())", "(x[:, 0] > 0).long())\n\n\ncalls = []\n") + (
        "\n\ndef stop(outputs, targets):\n"
        "    calls.append(1)\n"
        "    if not outputs.requires_grad and len(targets) == 20 and len(calls) > 6:\n"
        "        raise KeyboardInterrupt\n"
        "    return targets.float()\n\n\n"
        "import dataclasses\n"
        "task = dataclasses.replace(task, metrics={**task.metrics, 'stop': stop})\n"
    )
    run, out = project(tmp_path, task=task), tmp_path / "out"
    result = fedveil("simulate", run, "--out", out, "--rounds", "9")
    assert result.exit_code == 130, result.output
    kept = len(read_history(out))
    assert 0 < kept < 9
    line = result.stderr.splitlines()[-1]
    assert line == (
        f"error: interrupted; {kept} rounds are kept in {out}; "
        f"go on with: fedveil simulate {run} --resume --set rounds=9 --out {out}"
    )
    shown = fedveil("report", out, "--no-plots")
    assert shown.exit_code == 0
    assert "not finished" in shown.stdout


def test_ctrl_c_before_the_first_round_says_that_nothing_is_kept(tmp_path: Path) -> None:
    task = TASK.replace("def rows(count):", "def rows(count):\n    raise KeyboardInterrupt")
    result = fedveil("simulate", project(tmp_path, task=task), "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted; no round was finished, so nothing is kept\n"


def test_report_shows_the_run_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = fedveil("simulate", project(tmp_path), "--out", out, "--central", "--no-plots")
    shown = fedveil("report", out, "--json")
    assert shown.exit_code == 0, shown.output
    again = [line for line in first.stdout.splitlines() if not line.startswith(("report", "next"))]
    assert shown.stderr.splitlines()[: len(again)] == again
    assert last_json(shown)["finished"] is True
    assert (out / "plots" / "metrics.png").stat().st_size > 0


def test_list_names_every_kind_with_arguments_and_purpose() -> None:
    result = fedveil("list", "--json")
    assert result.exit_code == 0, result.output
    kinds = last_json(result)
    names = {kind: {entry["name"] for entry in entries} for kind, entries in kinds.items()}
    assert {"FedAvg", "FedProx", "FedAdam"} <= names["strategies"]
    assert {"EveryClient", "FixedSampling", "PoissonSampling"} <= names["samplings"]
    assert "ByExamples" in names["weightings"]
    assert "sequential" in names["engines"]
    proximal = next(entry for entry in kinds["strategies"] if entry["name"] == "FedProx")
    assert proximal["arguments"]["mu"] == "required"
    assert all(entry["about"] for entries in kinds.values() for entry in entries)


def test_list_shows_what_must_be_given_first() -> None:
    result = fedveil("list", "strategies")
    assert "FedProx(mu, max_weight = 1e+09, " in result.stdout


def test_list_of_one_kind_is_for_people() -> None:
    result = fedveil("list", "samplings")
    assert result.exit_code == 0
    assert "FixedSampling(size)" in result.stdout
    assert "strategies" not in result.stdout


def test_help_names_the_options_and_how_to_start() -> None:
    result = fedveil("simulate", "--help")
    assert result.exit_code == 0
    for word in ("--set", "--resume", "--central", "--json", "fedveil init demo", "Examples"):
        assert word in result.stdout


def test_the_version_is_shown() -> None:
    result = fedveil("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("fedveil")


def command_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in a process of its own whose working directory comes first on the path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "simulations.app", *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_task_beside_modules_of_our_names_runs(tmp_path: Path) -> None:
    project(tmp_path / "project")
    for name in ("server.py", "clients.py", "strategies.py", "fedml_core.py"):
        (tmp_path / "project" / name).write_text("raise RuntimeError('shadowed')\n")
    (tmp_path / "elsewhere").mkdir()
    done = command_in(
        tmp_path / "elsewhere", "simulate", "../project/run.toml", "--rounds", "1", "--json", "--no-plots"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rounds"] == 1


def test_a_module_of_our_name_in_the_working_directory_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text("raise RuntimeError('shadowed')\n")
    done = command_in(tmp_path, "--help")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"'server' is fedveil's own package, but Python finds {tmp_path / 'server.py'}" in done.stderr


def test_help_is_shown_without_importing_what_is_heavy() -> None:
    code = (
        "import sys, typer\n"
        "from simulations.app import app\n"
        "try: app(['simulate', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'flwr', 'sklearn', 'pydantic', 'cryptography'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
