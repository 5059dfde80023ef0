"""Every example runs as its README says, and reaches what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import root_mean_squared_error

from fedml_core import Examples, Task
from fedml_core.loading import load_task
from tests.shown_commands import commands, flaws, inline_commands
from tests.simulations.project_cases import fedveil, nothing_stays
from tests.sources import ROOT

EXAMPLES = ROOT / "examples"
PROJECTS = ("breast_cancer", "diabetes", "digits", "iris")
FLOWER_APP = "flower_app"
PAGES = sorted(EXAMPLES.glob("*/*.md"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with nothing_stays():
        yield


def run(name: str, *more: str) -> Mapping[str, Any]:
    """Return the summary of an example's run, compared with the pooled data."""
    result = fedveil("simulate", str(EXAMPLES / name / "run.toml"), "--central", "--json", "--no-plots", *more)
    assert result.exit_code == 0, result.output
    summary: Mapping[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return summary


def pooled(name: str) -> tuple[Examples, Examples, Task]:
    task = load_task("task.py", EXAMPLES / name)
    assert task.train_data is not None and task.test_data is not None
    train, test = task.train_data(), task.test_data()
    assert isinstance(train, Examples) and isinstance(test, Examples)
    return train, test, task


def test_every_folder_is_an_example_that_is_tested() -> None:
    found = {path.name for path in EXAMPLES.iterdir() if path.is_dir() and not path.name.startswith(("_", "."))}
    assert found == {*PROJECTS, FLOWER_APP}


@pytest.mark.parametrize("name", PROJECTS)
def test_an_example_is_a_task_a_run_and_a_page_of_some_ten_lines(name: str) -> None:
    assert (EXAMPLES / name / "task.py").is_file() and (EXAMPLES / name / "run.toml").is_file()
    assert 6 <= len((EXAMPLES / name / "README.md").read_text().splitlines()) <= 20


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_the_commands_of_its_page_name_what_exists(path: Path) -> None:
    page = path.read_text()
    assert commands(page)
    assert flaws([*commands(page), *inline_commands(page)]) == []


def test_digits_come_within_a_point_and_a_half_of_the_pooled_data() -> None:
    summary = run("digits")
    assert summary["clients"] == 100 and summary["void_rounds"] == 0
    assert summary["metrics"]["server"]["accuracy"] >= summary["central"]["accuracy"] - 0.015
    assert summary["central"]["accuracy"] > 0.94


def test_five_hospitals_of_unequal_size_find_tumours_as_well_as_their_pooled_data() -> None:
    summary = run("breast_cancer")
    assert summary["clients"] == 5
    assert summary["metrics"]["server"]["accuracy"] >= summary["central"]["accuracy"] - 0.02
    assert summary["metrics"]["clients"]["examples"] > 80
    labels = json.loads(Path("out/breast_cancer/labels.json").read_text())
    sizes = [sum(row) for row in labels["counts"]]
    assert max(sizes) > 3 * min(sizes)


def test_hospitals_learn_as_well_under_secure_aggregation() -> None:
    result = fedveil("simulate", str(EXAMPLES / "breast_cancer" / "secure.toml"), "--json", "--no-plots")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["protection"] == "secure aggregation (SecAgg+, active server)"
    assert summary["void_rounds"] == 0 and summary["metrics"]["server"]["accuracy"] > 0.93
    assert Path("out/breast_cancer_secure/secagg.jsonl").read_text().count("\n") == 12


def test_five_hospital_processes_go_on_securely_when_one_is_killed(tmp_path: Path) -> None:
    script, folder = EXAMPLES / "breast_cancer" / "hospitals.py", tmp_path / "hospitals"
    done = subprocess.run(
        [sys.executable, script, folder], capture_output=True, text=True, timeout=240, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    history = [json.loads(line) for line in (folder / "run" / "history.jsonl").read_text().splitlines()]
    assert len(history) == 8 and all(report["status"] == "ok" for report in history)
    assert any(4 in report["participants"] for report in history)
    assert history[-1]["participants"] == [0, 1, 2, 3]
    assert "checks hold" in done.stdout


def test_a_thousand_clients_of_which_a_tenth_drop_out_are_summed_securely() -> None:
    smaller = ("--rounds", "1", "--set", "clients.count=120", "--set", "strategy.protocol.minimum=60")
    result = fedveil("simulate", str(EXAMPLES / "digits" / "secure.toml"), "--json", "--no-plots", *smaller)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["void_rounds"] == 0 and summary["clients"] == 120


# What of a private run of the digits is done here, the epsilon that its rounds cost, and the accuracy that it reaches.
PRIVATE = {
    "private.toml": (("--rounds", "20"), (3.5, 3.7), 0.85),
    "correlated.toml": (("--rounds", "12"), (7.9, 8.0), 0.85),
    "hospitals.toml": (("--rounds", "8"), (4.2, 4.4), 0.85),
    "distributed.toml": (
        (
            *("--rounds", "4", "--set", "clients.count=100", "--set", "strategy.strategy.cohort_size=100"),
            *("--set", "strategy.strategy.honest=80", "--set", "strategy.protocol.minimum=85"),
            *("--set", "strategy.strategy.noise_multiplier=1.3"),
        ),
        (7.0, 8.0),
        0.5,
    ),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_run_of_the_digits_says_what_its_rounds_cost_and_learns(name: str) -> None:
    shorter, (least, most), accuracy = PRIVATE[name]
    result = fedveil("simulate", str(EXAMPLES / "digits" / name), "--json", "--no-plots", *shorter)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert least < summary["epsilon"] < most
    assert summary["privacy"]["unit"] == ("example" if name == "hospitals.toml" else "client")
    assert summary["metrics"]["server"]["accuracy"] > accuracy


def test_every_private_run_of_the_digits_has_a_page_and_a_test() -> None:
    page = (EXAMPLES / "digits" / "private.md").read_text()
    linear = [path.name for path in (EXAMPLES / "digits").glob("*.toml") if "task.py:linear" in path.read_text()]
    assert sorted(linear) == sorted(PRIVATE)
    assert all(f"fedveil simulate examples/digits/{name}" in page for name in linear)


def test_iris_from_libsvm_text_is_at_most_one_flower_worse_than_scikit_learn() -> None:
    train, test, _ = pooled("iris")
    oracle = LogisticRegression(max_iter=1000).fit(train.inputs[0].numpy(), train.targets.numpy())
    expected = oracle.score(test.inputs[0].numpy(), test.targets.numpy())
    reached = run("iris")["metrics"]["server"]["accuracy"]
    assert expected > 0.9
    assert round((expected - reached) * len(test)) <= 1


def test_diabetes_is_predicted_as_well_as_by_least_squares_on_the_pooled_data() -> None:
    train, test, _ = pooled("diabetes")
    oracle = LinearRegression().fit(train.inputs[0].numpy(), train.targets.numpy())
    expected = root_mean_squared_error(test.targets.numpy(), oracle.predict(test.inputs[0].numpy()))
    summary = run("diabetes")
    assert summary["metrics"]["server"]["rmse"] == pytest.approx(float(expected), rel=0.05)
    assert summary["metrics"]["server"]["rmse"] == pytest.approx(summary["central"]["rmse"], rel=0.05)


def test_the_flower_app_learns_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from simulations import run_flower_apps

    monkeypatch.syspath_prepend(str(EXAMPLES / FLOWER_APP))
    from digits_app.client_app import app as client_app  # type: ignore[import-not-found]
    from digits_app.server_app import app as server_app  # type: ignore[import-not-found]

    try:
        nodes = [{"partition-id": place, "num-partitions": 4} for place in range(4)]
        settings = {"num-rounds": 3, "learning-rate": 0.02, "epochs": 2}
        run_flower_apps(server_app, client_app, clients=nodes, run_config=settings)
    finally:
        for name in [name for name in sys.modules if name.startswith("digits_app")]:
            del sys.modules[name]
    accuracies = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "accuracy" in line]
    assert len(accuracies) == 3 and accuracies[-1] > accuracies[0] and accuracies[-1] > 0.4


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # in Flower's own packing
def test_flower_accepts_the_app() -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    folder = EXAMPLES / FLOWER_APP
    config, warnings = load_and_validate(folder / "pyproject.toml", check_module=False)
    assert not warnings
    assert config["tool"]["flwr"]["app"]["components"]["serverapp"] == "digits_app.server_app:app"
    packed = build_fab_from_disk(folder)
    assert b"digits_app/server_app.py" in packed and b"digits_app/client_app.py" in packed


def test_examples_draw_the_same_data_each_time() -> None:
    first, again = pooled("digits")[0], pooled("digits")[0]
    assert torch.equal(first.targets, again.targets)
