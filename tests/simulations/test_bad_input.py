"""Every mistake that a user can make is answered with one line that says what to do, and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulations.project_cases import RUN, TASK, fedveil, last_json, nothing_stays, project


@pytest.fixture(autouse=True)
def forget_tasks() -> Iterator[None]:
    with nothing_stays():
        yield


LABELS = TASK.replace("(x[:, 0] > 0).long()", "(x[:, 0] > 0).long() * 7")
EMPTY = TASK.replace("rows(40)", "rows(0)")
NO_TASK = TASK.replace("task = Task", "problem = [Task").replace("rows(20)\n)", "rows(20)\n)]")
BROKEN = "import torch\n\nimport nonsuch_package\n"
SYNTAX = "import torch\n\ndef model(:\n"
QUITS = "raise SystemExit(3)\n"
SCHEDULED = RUN + '\n[sampling]\nname = "FixedSampling"\n'

FAULTS: list[tuple[str, str, str, list[str], list[str]]] = [
    # What is wrong; run.toml; task.py; options; what the line must say.
    ("toml syntax", "rounds = \n", TASK, [], ["run.toml, line 1, column 10: not TOML"]),
    ("unknown key", RUN + "epoch = 1\n", TASK, [], ["unknown key 'training.epoch'", "did you mean 'epochs'"]),
    ("unknown table", RUN + "[trainin]\n", TASK, [], ["unknown key 'trainin'", "did you mean 'training'"]),
    ("wrong type", RUN.replace("rounds = 3", 'rounds = "3"'), TASK, [], ["rounds must be a whole number, got '3'"]),
    ("wrong value", RUN.replace("batch_size = 5", "batch_size = 0"), TASK, [], ["training.batch_size must be >= 1"]),
    ("zero rounds", RUN, TASK, ["--rounds", "0"], ["on the command line: rounds must be >= 1, got 0"]),
    ("bad override", RUN, TASK, ["--set", "rounds"], ["key=value", "'rounds'"]),
    ("task is missing", RUN.replace("task.py", "tusk.py"), TASK, [], ["tusk.py does not exist"]),
    ("no task key", RUN.replace('task = "task.py"', ""), TASK, [], ["run.toml: task is missing"]),
    ("import error", RUN, BROKEN, [], ["task.py, line 3: ModuleNotFoundError", "nonsuch_package"]),
    ("syntax error", RUN, SYNTAX, [], ["task.py, line 3: SyntaxError"]),
    ("task exits", RUN, QUITS, [], ["task.py, line 1: SystemExit: 3"]),
    ("no task inside", RUN, NO_TASK, [], ["task.py holds no task", "task = Task"]),
    ("our name", RUN.replace("task.py", "strategies"), TASK, [], ["fedveil's own package", "'strategies.py'"]),
    ("unknown strategy", RUN, TASK, ["--set", "strategy=FedAvgg"], ["unknown strategy 'FedAvgg'", "'FedAvg'"]),
    (
        "unknown argument",
        RUN,
        TASK,
        ["--set", 'strategy={name="FedAvg", momentun=1}'],
        ["FedAvg has no argument 'momentun'"],
    ),
    (
        "no argument",
        RUN,
        TASK,
        ["--set", "strategy=FedProx"],
        ["run.toml with --set strategy: strategy: FedProx needs mu"],
    ),
    ("cohort", SCHEDULED + "size = 5\n", TASK, [], ["run.toml: sampling: a cohort of 5", "there are 4 clients"]),
    ("no size", SCHEDULED, TASK, [], ["run.toml: sampling: FixedSampling needs size"]),
    ("optimizer", RUN, TASK, ["--set", "training.optimizer=adamm"], ["training: unknown optimizer 'adamm'", "'Adam'"]),
    ("partitioner", RUN, TASK, ["--set", "clients.partition=dirichlt"], ["clients.partition", "'dirichlt'"]),
    ("clients", RUN, TASK, ["--set", "clients.count=41"], ["41 clients cannot share 40 examples"]),
    ("engine", RUN, TASK, ["--set", "simulation.engine=sequental"], ["unknown engine", "'sequential'"]),
    ("faults", RUN, TASK, ["--set", "simulation.faults.drop=2"], ["simulation.faults.drop must be <= 1, got 2"]),
    ("device", RUN, TASK, ["--set", "simulation.device=abacus"], ["device 'abacus' is not available"]),
    ("labels", RUN, LABELS, [], ["label 7", "out of range", "0 to 1"]),
    ("empty data", RUN, EMPTY, [], ["train_data", "no examples"]),
    ("nothing to resume", RUN, TASK, ["--resume"], ["checkpoint", "does not exist", "--resume"]),
    ("both", RUN, TASK, ["--resume", "--overwrite"], ["give one of them"]),
    ("no central data", RUN, TASK.replace("test_data", "groups"), ["--central"], ["test_data", "--central"]),
]


@pytest.mark.parametrize(("what", "run", "task", "options", "said"), FAULTS, ids=[row[0] for row in FAULTS])
def test_a_mistake_is_one_line_that_names_it(
    tmp_path: Path, what: str, run: str, task: str, options: list[str], said: list[str]
) -> None:
    result = fedveil("simulate", project(tmp_path, run, task), "--out", tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    for part in said:
        assert part in result.stderr


def test_a_missing_file_is_named_and_init_offered(tmp_path: Path) -> None:
    result = fedveil("simulate", tmp_path / "nix.toml")
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {tmp_path / 'nix.toml'} does not exist; name another file, or write a project with fedveil init\n"
    )


def test_several_mistakes_are_told_at_once_a_line_each(tmp_path: Path) -> None:
    run = project(tmp_path, 'task = "task.py"\nrounds = 0\nseed = "x"\n')
    lines = fedveil("simulate", run).stderr.splitlines()
    assert [line.split(": ")[-1] for line in lines] == [
        "rounds must be >= 1, got 0",
        "seed must be a whole number, got 'x'",
    ]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run, out = project(tmp_path), tmp_path / "out"
    assert fedveil("simulate", run, "--out", out, "--no-plots").exit_code == 0
    before = (out / "history.jsonl").read_bytes()
    result = fedveil("simulate", run, "--out", out)
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    assert "--overwrite" in result.stderr
    assert (out / "history.jsonl").read_bytes() == before


def test_a_mistake_is_json_where_json_was_asked_for(tmp_path: Path) -> None:
    result = fedveil("simulate", project(tmp_path), "--rounds", "0", "--json")
    assert len(result.stdout.splitlines()) == 1
    answer = last_json(result)
    assert answer["exit_code"] == result.exit_code == 2
    assert answer["kind"] == "ConfigError"
    assert "rounds must be >= 1" in answer["error"]


def test_only_debug_shows_a_traceback(tmp_path: Path) -> None:
    run = project(tmp_path, task=BROKEN)
    assert "Traceback" not in fedveil("simulate", run).output
    shown = fedveil("simulate", run, "--debug")
    assert shown.exit_code == 2
    assert "Traceback" in shown.stderr
    assert "import nonsuch_package" in shown.stderr


def test_an_error_in_the_users_own_strategy_is_the_users(tmp_path: Path) -> None:
    task = TASK + (
        "\nfrom dataclasses import dataclass\n"
        "from strategies.averaging import FedAvg\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Stumbles(FedAvg):\n"
        "    def told(self, state):\n"
        "        return {}['nothing']\n"
    )
    result = fedveil("simulate", project(tmp_path, task=task), "--set", "strategy=Stumbles", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "task.py, line 24: KeyError: 'nothing'; the task's own code failed" in result.stderr
    assert "bug in fedveil" not in result.stderr


@pytest.mark.parametrize("command", ["report", "init"])
def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, command: str) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = fedveil(command, tmp_path)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert str(tmp_path) in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unknown_kind_of_name_is_answered_with_the_nearest() -> None:
    result = fedveil("list", "strategy")
    assert result.exit_code == 2
    assert "did you mean 'strategies'" in result.stderr
