"""The user's own code: found, loaded and never in the way of ours.

A task file is loaded under a name of its own, and its folder goes to the end of the module path: a server.py or a
strategies.py beside it can never stand in for fedveil's packages, and can still be named as a file.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from fedml_core.errors import FedveilError, TaskError

if TYPE_CHECKING:
    from fedml_core.task import Task

__all__ = ["OUR_PACKAGES", "load_task", "place_in_task"]

OUR_PACKAGES = ("fedml_core", "strategies", "clients", "server", "simulations")
_PREFIX = "fedveil_task_"
_roots: set[str] = set()
_folders: set[Path] = set()


def load_task(reference: str, base: Path) -> Task:
    """Return the task that `reference` names; loading it also makes the classes that its module defines known by name.

    Guarantees: none of fedveil's packages is shadowed, whatever lies beside the task. Loading the same file twice
    executes it anew under the same module name.
    Args: reference: a file relative to `base` ("task.py"), or a module ("package.module"), each optionally with
        ":attribute"; without, the attribute `task` or else the module's only Task. base: the configuration's folder.
    Raises: TaskError: if there is none, or the module fails on import: with file, line and the exception.
    """
    target, attribute = _split(reference)
    module = _load_file(base / Path(target).expanduser()) if _is_file(target) else _load_module(target, base)
    return _task_in(module, attribute, reference)


def place_in_task(error: BaseException) -> str | None:
    """Return `file, line N` of the innermost line of the user's own code in the error's traceback, or None."""
    frames = _frames(error.__traceback__)
    places = [f"{file.name}, line {line}" for file, line, module in frames if _is_users(file, module)]
    return places[-1] if places else None


def _split(reference: str) -> tuple[str, str | None]:
    target, colon, attribute = reference.rpartition(":")
    if colon and attribute.isidentifier() and target:
        return target, attribute
    return reference, None


def _is_file(target: str) -> bool:
    return target.endswith(".py") or "/" in target or "\\" in target


def _load_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise TaskError(f"the task file {path} does not exist; write it, or correct `task`")
    _append_to_path(path.parent)
    name = f"{_PREFIX}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"the task file {path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, get_type_hints and pickles of the user's classes look their module up.
    sys.modules[name] = module
    _roots.add(name)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failed(path.name, error, name) from error
    return module


def _load_module(name: str, base: Path) -> ModuleType:
    root = name.split(".")[0]
    if root in OUR_PACKAGES:
        raise TaskError(
            f"task = {name!r} names fedveil's own package {root!r}; if you mean your file, write {root + '.py'!r}"
        )
    if not all(part.isidentifier() for part in name.split(".")):
        raise TaskError(f"task = {name!r} is neither a file nor a module; write a path such as 'task.py'")
    _append_to_path(base.resolve())
    importlib.invalidate_caches()
    _roots.add(root)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise TaskError(
                f"there is no module {error.name!r} to load the task from; install it, or name a file such as 'task.py'"
            ) from error
        raise _failed(name, error, name) from error


def _append_to_path(folder: Path) -> None:
    _folders.add(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _failed(what: str, error: BaseException, module: str) -> TaskError:
    """Return the one line that says why the user's module could not be loaded."""
    if isinstance(error, SyntaxError):
        place = f"{Path(error.filename or what).name}, line {error.lineno}"
        return TaskError(f"{place}: {type(error).__name__}: {error.msg}")
    place = place_in_task(error) or what
    if isinstance(error, FedveilError):
        return TaskError(f"{place}: {error}")
    said = str(error).strip().splitlines()
    line = f"{place}: {type(error).__name__}{': ' + said[0] if said else ''}"
    root = (error.name or "").split(".")[0] if isinstance(error, ImportError) else ""
    if root in OUR_PACKAGES and any((folder / f"{root}.py").exists() for folder in _folders):
        line += f"; {root!r} is fedveil's own package: to import your {root}.py, rename it"
    return TaskError(line)


def _task_in(module: ModuleType, attribute: str | None, reference: str) -> Task:
    from fedml_core.task import Task

    own: dict[str, Any] = vars(module)
    if attribute is not None or "task" in own:
        name = attribute or "task"
        found = own.get(name)
        if isinstance(found, Task):
            return found
        got = f"{name} is a {type(found).__name__}" if name in own else f"there is no {name!r} in it"
        raise TaskError(f"{reference} holds no task: {got}; assign a Task to `{name}`")
    tasks = {name: value for name, value in own.items() if isinstance(value, Task)}
    if len(tasks) == 1:
        return next(iter(tasks.values()))
    if tasks:
        raise TaskError(f"{reference} holds several tasks ({', '.join(tasks)}); name one: {reference}:{min(tasks)}")
    raise TaskError(f"{reference} holds no task; assign one to `task`: task = Task.classification(...)")


def _frames(trace: TracebackType | None) -> Iterator[tuple[Path, int, str]]:
    while trace is not None:
        frame = trace.tb_frame
        yield Path(frame.f_code.co_filename), trace.tb_lineno, str(frame.f_globals.get("__name__", ""))
        trace = trace.tb_next


def _is_users(file: Path, module: str) -> bool:
    return file.parent in _folders or any(module == root or module.startswith(f"{root}.") for root in _roots)
