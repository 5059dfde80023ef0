"""A project of a few lines that trains in milliseconds, and the command line to run it with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click.testing
from typer.testing import CliRunner

from fedml_core.named import Named
from simulations.app import app

TASK = """
import torch
from torch import nn

from fedml_core.data import Examples
from fedml_core.task import Task


def rows(count):
    x = torch.linspace(-1, 1, count).unsqueeze(1)
    return Examples.of(torch.cat([x, x * x], dim=1), (x[:, 0] > 0).long())


task = Task.classification(
    model=lambda: nn.Linear(2, 2), classes=2, train_data=lambda: rows(40), test_data=lambda: rows(20)
)
"""

RUN = """
task = "task.py"
rounds = 3

[clients]
count = 4

[training]
batch_size = 5
"""


USERS = "fedveil_task_"
"""How the names of modules begin that were loaded from a task's file."""


@contextmanager
def nothing_stays() -> Iterator[None]:
    """Forget, at the end, what a task that was loaded inside added: to the module path, the modules, the names."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith(USERS)]:
        del sys.modules[name]
    for family in Named.__subclasses__():
        for name in [name for name, member in family.members.items() if member.__module__.startswith(USERS)]:
            del family.members[name]


def project(folder: Path, run: str = RUN, task: str = TASK) -> Path:
    """Write a project into `folder` and return its run.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.py").write_text(task)
    (folder / "run.toml").write_text(run)
    return folder / "run.toml"


def fedveil(*arguments: str | Path) -> click.testing.Result:
    """Return what the command line answers; an exception that it lets through is raised."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def last_json(result: click.testing.Result) -> dict[str, Any]:
    """Return the JSON object on the last line of stdout."""
    value: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return value
