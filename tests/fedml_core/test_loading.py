"""The user's code is found and loaded, never shadows ours, and its mistakes are told with file and line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml_core.errors import TaskError
from fedml_core.loading import OUR_PACKAGES, load_task, place_in_task
from fedml_core.task import Task

HEAD = "from torch import nn\nfrom fedml_core.task import Task\n"
PROBLEM = "Task.regression(model=lambda: nn.Linear(1, 1))"


@pytest.fixture(autouse=True)
def same_modules() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, text: str, name: str = "task.py") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def failure(reference: str, folder: Path) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(reference, folder)
    return str(caught.value)


def test_a_file_holds_its_task_under_the_name_task(tmp_path: Path) -> None:
    write(tmp_path, f"{HEAD}other = {PROBLEM}\ntask = {PROBLEM}\n")
    assert isinstance(load_task("task.py", tmp_path), Task)


def test_the_only_task_of_a_file_may_have_any_name(tmp_path: Path) -> None:
    write(tmp_path, f"{HEAD}problem = {PROBLEM}\n")
    assert isinstance(load_task("task.py", tmp_path), Task)


def test_an_attribute_can_be_named(tmp_path: Path) -> None:
    write(tmp_path, f"{HEAD}a = {PROBLEM}\nb = {PROBLEM}\n")
    assert load_task("task.py:a", tmp_path) is not load_task("task.py:b", tmp_path)
    write(tmp_path, f"{HEAD}b = {PROBLEM}\n", "package_of_a_user/inner.py")
    assert isinstance(load_task("package_of_a_user.inner:b", tmp_path), Task)


def test_a_file_in_another_folder_can_be_named(tmp_path: Path) -> None:
    write(tmp_path, f"{HEAD}task = {PROBLEM}\n", "deeper/my task.py")
    assert isinstance(load_task("deeper/my task.py", tmp_path), Task)
    assert isinstance(load_task(str(tmp_path / "deeper" / "my task.py"), Path("/nowhere")), Task)


def test_modules_beside_a_task_can_be_imported_by_it(tmp_path: Path) -> None:
    write(tmp_path, "WIDTH = 1\n", "widths_beside_a_task.py")
    write(tmp_path, f"from widths_beside_a_task import WIDTH\n{HEAD}task = {PROBLEM}\n")
    assert isinstance(load_task("task.py", tmp_path), Task)


def test_the_tasks_folder_is_appended_to_the_path_once_and_never_comes_first(tmp_path: Path) -> None:
    write(tmp_path, f"{HEAD}task = {PROBLEM}\n")
    before = list(sys.path)
    load_task("task.py", tmp_path)
    load_task("task.py", tmp_path)
    assert sys.path == [*before, str(tmp_path)]


@pytest.mark.parametrize("name", OUR_PACKAGES)
def test_a_file_with_one_of_our_names_beside_a_task_shadows_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "raise RuntimeError('shadowed')\n", f"{name}.py")
    write(tmp_path, f"{HEAD}import {name}\nassert hasattr({name}, '__path__')\ntask = {PROBLEM}\n")
    ours = sys.modules.get(name)
    monkeypatch.delitem(sys.modules, name, raising=False)
    load_task("task.py", tmp_path)
    if ours is not None:
        sys.modules[name] = ours


@pytest.mark.parametrize("name", OUR_PACKAGES)
def test_a_task_file_may_have_one_of_our_names(tmp_path: Path, name: str) -> None:
    write(tmp_path, f"{HEAD}task = {PROBLEM}\n", f"{name}.py")
    ours = sys.modules.get(name)
    assert isinstance(load_task(f"{name}.py", tmp_path), Task)
    assert sys.modules.get(name) is ours


@pytest.mark.parametrize("reference", ["strategies", "server:task", "fedml_core.task"])
def test_one_of_our_packages_is_no_task(tmp_path: Path, reference: str) -> None:
    said = failure(reference, tmp_path)
    root = reference.split(":")[0].split(".")[0]
    assert f"fedveil's own package '{root}'" in said
    assert f"write '{root}.py'" in said


def test_importing_a_module_that_has_our_name_tells_to_rename_it(tmp_path: Path) -> None:
    write(tmp_path, "WIDTH = 1\n", "server.py")
    write(tmp_path, f"{HEAD}from server import WIDTH\ntask = {PROBLEM}\n")
    said = failure("task.py", tmp_path)
    assert said.startswith("task.py, line 3: ImportError")
    assert said.endswith("'server' is fedveil's own package: to import your server.py, rename it")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nonsuch_package\n", "task.py, line 1: ModuleNotFoundError: No module named 'nonsuch_package'"),
        ("x = 1\n1 / 0\n", "task.py, line 2: ZeroDivisionError: division by zero"),
        ("x = 1\n\ndef (:\n", "task.py, line 3: SyntaxError: invalid syntax"),
        ("def f():\n    raise ValueError\nf()\n", "task.py, line 2: ValueError"),
        ("raise ValueError('one\\ntwo')\n", "task.py, line 1: ValueError: one"),
        ("import sys\nsys.exit(4)\n", "task.py, line 2: SystemExit: 4"),
        ("from fedml_core.errors import ConfigError\nraise ConfigError('no')\n", "task.py, line 2: no"),
    ],
)
def test_a_failing_import_is_one_line_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, text)
    assert failure("task.py", tmp_path) == said


def test_a_failure_in_a_module_beside_the_task_is_told_with_that_module(tmp_path: Path) -> None:
    write(tmp_path, "x = 1\n1 / 0\n", "breaks_beside_a_task.py")
    write(tmp_path, "import breaks_beside_a_task\n")
    assert failure("task.py", tmp_path).startswith("breaks_beside_a_task.py, line 2: ZeroDivisionError")


def test_a_missing_file_and_a_missing_module_are_told(tmp_path: Path) -> None:
    assert (
        failure("task.py", tmp_path)
        == f"the task file {tmp_path / 'task.py'} does not exist; write it, or correct `task`"
    )
    assert "there is no module 'nonsuch_package' to load the task from" in failure("nonsuch_package.x", tmp_path)
    assert "neither a file nor a module" in failure("my task", tmp_path)


@pytest.mark.parametrize(
    ("text", "reference", "said"),
    [
        ("x = 1\n", "task.py", "holds no task; assign one to `task`"),
        ("task = 1\n", "task.py", "holds no task: task is a int; assign a Task to `task`"),
        (f"{HEAD}a = {PROBLEM}\n", "task.py:b", "holds no task: there is no 'b' in it"),
        (f"{HEAD}b = {PROBLEM}\na = {PROBLEM}\n", "task.py", "holds several tasks (b, a); name one: task.py:a"),
    ],
)
def test_a_file_without_one_clear_task_is_told(tmp_path: Path, text: str, reference: str, said: str) -> None:
    write(tmp_path, text)
    assert said in failure(reference, tmp_path)


def test_a_module_that_failed_is_not_kept(tmp_path: Path) -> None:
    before = set(sys.modules)
    write(tmp_path, "1 / 0\n")
    failure("task.py", tmp_path)
    assert not [name for name in set(sys.modules) - before if name.startswith("fedveil_task_")]


def test_a_file_that_changed_is_loaded_anew_under_the_same_name(tmp_path: Path) -> None:
    write(tmp_path, f"{HEAD}task = {PROBLEM}\n")
    load_task("task.py", tmp_path)
    loaded = {name for name in sys.modules if name.startswith("fedveil_task_task_")}
    write(tmp_path, f"{HEAD}import dataclasses\ntask = dataclasses.replace({PROBLEM}, classes=7)\n# longer\n")
    assert load_task("task.py", tmp_path).classes == 7
    assert {name for name in sys.modules if name.startswith("fedveil_task_task_")} == loaded


def test_the_place_of_an_error_is_the_innermost_line_of_the_users_own_code(tmp_path: Path) -> None:
    write(tmp_path, f"{HEAD}def model():\n    return nn.Linear(1, 'x')\ntask = Task.regression(model=model)\n")
    task = load_task("task.py", tmp_path)
    with pytest.raises(TypeError) as caught:
        task.model()
    assert place_in_task(caught.value) == "task.py, line 4"
    assert place_in_task(ValueError("raised nowhere")) is None
