"""What the tests of whole fleets share: a small project with its sites, sites in threads, commands as processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clients.run import Connection
from clients.service import SiteService
from fedml_core.config import load_site
from fedml_core.loading import load_task
from fedml_core.storage import load_tree
from server.checkpoint import FILE_NAME
from tests.guards import wait_until
from tests.sources import ROOT

PATIENCE_S = 120.0

TASK = """
import torch
from torch import nn

from fedml_core import ClientData, Examples, Task
from simulations import site_share


def points(count):
    t = torch.linspace(0, 12.6, count)
    x = torch.stack([t.sin(), t.cos(), (1.7 * t).sin()], dim=1)
    return Examples.of(x, (x[:, 0] + 0.5 * x[:, 2] > 0).long())


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


task = Task.classification(
    model=model,
    classes=2,
    train_data=lambda: points(120),
    test_data=lambda: points(50),
    site_data=lambda settings: site_share(task, settings),
)
"""
RUN = """
task = "task.py"
rounds = 3
seed = 5

[clients]
count = 3
partition = { name = "quantity-skew", alpha = 2.0 }
holdout = 0.2

[training]
epochs = 2
batch_size = 8

[evaluation]
clients = { name = "EveryClient" }

[server]
minimum_clients = 3
"""
SITE = """
id = {number}
name = "ward-{letter}"
task = "task.py"

[keys]
site = "keys-{number}"

[data]
client = {number}
clients = 3
partition = {{ name = "quantity-skew", alpha = 2.0 }}
holdout = 0.2
seed = 5
"""


def fleet_project(folder: Path, task: str = TASK, run: str = RUN) -> Path:
    """Write a task, a run.toml and three sites into `folder`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.py").write_text(task)
    (folder / "run.toml").write_text(run)
    for number, letter in enumerate("abc"):
        (folder / f"site-{number}.toml").write_text(SITE.format(number=number, letter=letter))
    return folder


def final_parameters(out: Path) -> Tensor:
    """Return the parameters in a run's checkpoint."""
    parameters: Tensor = load_tree(out / FILE_NAME, "checkpoint")["parameters"]
    return parameters


def same_model(one: Tensor, other: Tensor) -> bool:
    """Return whether two runs ended in the same model: replies that arrive in another order are rounded otherwise."""
    return torch.allclose(one, other, rtol=0.0, atol=1e-6)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
    return port


@dataclass
class SiteThread:
    """A site that serves in a thread: what it said, and how it ended."""

    path: Path
    connection: Connection
    said: list[str] = field(default_factory=list)
    raised: list[Exception] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = load_site(self.path)
        self.service = SiteService(config, load_task(config.task, config.folder), self.said.append)
        self._client = self.connection.client(config)
        self.thread = threading.Thread(target=self._serve, name=f"test-{self.path.stem}")
        self.thread.start()

    def _serve(self) -> None:
        try:
            self._client.serve(self.service.handle, self.service.stop, self.said.append)
            self.facts.update(self.service.outcome())
        except Exception as error:  # noqa: BLE001 - kept for the test to look at
            self.raised.append(error)

    def hears(self, words: str) -> None:
        found = wait_until(lambda: any(words in line for line in self.said), PATIENCE_S)
        assert found, f"the site never said {words!r}; it said {self.said}, and raised {self.raised}"

    def goes_home(self) -> None:
        """Wait until it has ended by itself, without an error."""
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), f"the site did not end; it said {self.said}"
        assert self.raised == []


def insecure(port: int, **options: Any) -> Connection:
    return Connection(server=f"127.0.0.1:{port}", insecure=True, longest_wait_s=0.3, **options)


@contextmanager
def sites(folder: Path, numbers: Sequence[int], connection: Connection) -> Iterator[list[SiteThread]]:
    """Let sites of a project take part in threads; end those that are still there."""
    started: list[SiteThread] = []
    try:
        started.extend(SiteThread(folder / f"site-{number}.toml", connection) for number in numbers)
        yield started
    finally:
        for site in started:
            site.service.stop.set()
        for site in started:
            site.thread.join(PATIENCE_S)
            assert not site.thread.is_alive()


@dataclass
class Command:
    """`fedveil` as a process of its own: what it says on stderr as it says it, and its JSON at the end."""

    arguments: Sequence[str]
    folder: Path
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(self.folder)}
        environment.pop("FLWR_HOME", None)
        line = [sys.executable, "-m", "simulations.app", *self.arguments, "--json"]
        self.popen = subprocess.Popen(
            line, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.said.append(line.rstrip("\n"))

    def says(self, words: str, times: int = 1) -> str:
        """Return the line that has `words`, as soon as it was said `times` times."""
        until(lambda: sum(words in line for line in self.said) >= times or self.popen.poll() is not None, words)
        found = [line for line in self.said if words in line]
        assert len(found) >= times, f"{self.arguments} never said {words!r}; it said:\n" + "\n".join(self.said)
        return found[times - 1]

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def ends(self, code: int) -> dict[str, Any]:
        """Return the JSON at its end; fail unless it ends by itself with this exit code."""
        assert self.popen.wait(PATIENCE_S) == code, f"{self.arguments} said:\n" + "\n".join(self.said)
        assert self.popen.stdout is not None
        lines = self.popen.stdout.read().splitlines()
        self._reader.join(PATIENCE_S)
        found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return found

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self._reader.join()
        for stream in (self.popen.stdout, self.popen.stderr):
            if stream is not None:
                stream.close()


@contextmanager
def commands(folder: Path) -> Iterator[Callable[..., Command]]:
    """Give what starts `fedveil` in `folder`; kill what is left at the end."""
    started: list[Command] = []

    def start(*arguments: str | Path) -> Command:
        started.append(Command([str(argument) for argument in arguments], folder))
        return started[-1]

    try:
        yield start
    finally:
        for command in started:
            command.close()


def until(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as `condition` holds, and fail if it never does."""
    assert wait_until(condition, PATIENCE_S), f"never happened: {what}"
