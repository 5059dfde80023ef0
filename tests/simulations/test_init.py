"""`fedveil init` writes a project that runs as it is, and overwrites nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml_core.config import load_run, load_site
from fedml_core.loading import load_task
from tests.simulations.project_cases import fedveil, last_json, nothing_stays


@pytest.fixture(autouse=True)
def forget_tasks() -> Iterator[None]:
    with nothing_stays():
        yield


def test_the_project_runs_as_it_is(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    made = fedveil("init", demo)
    assert made.exit_code == 0, made.output
    assert f"next: fedveil simulate {demo / 'run.toml'}" in made.stdout
    options = ("--rounds", "2", "--out", tmp_path / "out", "--json", "--no-plots")
    result = fedveil("simulate", demo / "run.toml", *options)
    assert result.exit_code == 0, result.output
    assert last_json(result)["rounds"] == 2
    assert sorted(path.name for path in demo.iterdir() if path.is_file()) == [
        "README.md",
        "run.toml",
        "site.toml",
        "task.py",
    ]


def test_its_site_holds_what_its_simulation_gives_the_client(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    fedveil("init", demo)
    site = load_site(demo / "site.toml")
    run = load_run(demo / "run.toml")
    assert site.data["clients"] == run.clients.count
    assert site.data["partition"] == run.clients.partition
    task = load_task(site.task, site.folder)
    assert task.site_data is not None
    assert len(task.site_data(site.data).train) > 0


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    assert fedveil("init", tmp_path).exit_code == 0
    assert (tmp_path / "run.toml").exists()


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    result = fedveil("init", tmp_path / "demo")
    assert result.exit_code == 2
    assert "is a file" in result.stderr


def test_json_names_what_was_written(tmp_path: Path) -> None:
    result = fedveil("init", tmp_path / "demo", "--json")
    assert [Path(file).name for file in last_json(result)["files"]] == ["task.py", "run.toml", "site.toml", "README.md"]
