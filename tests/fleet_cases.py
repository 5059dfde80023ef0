"""What the fleet's tests share: clients in threads and in processes, waiting, keys, and raw calls to the Fleet API."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from clients.fleet import FleetClient, _Wire
from fedml_core.identity import node_key_bytes
from fedml_core.wire import Frame
from server.fleet import FleetServer
from server.fleet_letters import LinkFailure
from tests.guards import wait_until
from tests.sources import ROOT

# isort: split
from flwr.proto import fleet_pb2
from flwr.proto.node_pb2 import Node
from flwr.superlink.servicer.fleet import fleet_handlers

PATIENCE_S = 60.0
Back = Frame | LinkFailure


def soon(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as `condition` holds, and fail if it never does."""
    assert wait_until(condition, PATIENCE_S), f"never happened: {what}"


def online(server: FleetServer, count: int) -> list[int]:
    """Return the ids of the nodes, as soon as there are `count`."""
    soon(lambda: len(server.nodes()) == count, f"{count} nodes online, there are {len(server.nodes())}")
    return list(server.nodes())


def gather(server: FleetServer, sent: Mapping[str, int]) -> dict[int, Back]:
    """Return what came back for each message of `sent`, by the node that it was sent to; each comes once."""
    back: dict[int, Back] = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(back) < len(sent):
        assert time.monotonic() < deadline, f"only {len(back)} of {len(sent)} came back"
        for message_id, found in server.poll(1.0):
            assert sent[message_id] not in back
            back[sent[message_id]] = found
    return back


def texts(back: Mapping[int, Back]) -> dict[int, tuple[str, str] | LinkFailure]:
    """Return kind and header of each frame: frames compare by identity."""
    return {node: (one.kind, one.header) if isinstance(one, Frame) else one for node, one in back.items()}


def is_empty(server: FleetServer) -> bool:
    """Return whether the server keeps nothing of what was exchanged."""
    links = server._link.links
    return not (len(server._link.store) or links.num_message_ins() or links.num_message_res())


def answer(frame: Frame) -> Frame:
    """Do what a frame says: raise, or send it back."""
    if frame.kind == "raise":
        raise LookupError("patient 4711 is missing")
    return Frame("echo", frame.header, frame.arrays)


@dataclass
class Runner:
    """A client that serves in a thread: what it said about its connection, and what it raised."""

    client: FleetClient
    handler: Callable[[Frame], Frame] = answer
    stop: threading.Event = field(default_factory=threading.Event)
    said: list[str] = field(default_factory=list)
    raised: list[Exception] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        try:
            self.client.serve(self.handler, self.stop, self.said.append)
        except Exception as error:  # noqa: BLE001 - kept for the test to look at
            self.raised.append(error)

    def hears(self, words: str) -> None:
        found = wait_until(lambda: any(words in line for line in self.said), PATIENCE_S)
        assert found, f"the client never said {words!r}; it said {self.said}"

    def end(self) -> None:
        self.stop.set()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()


@contextmanager
def running(*clients: FleetClient, handler: Callable[[Frame], Frame] = answer) -> Iterator[list[Runner]]:
    """Serve in threads, and end them."""
    runners = [Runner(client, handler) for client in clients]
    try:
        yield runners
    finally:
        for runner in runners:
            runner.stop.set()
        for runner in runners:
            runner.end()


def local(server: FleetServer, **options: Any) -> FleetClient:
    """Return an insecure client of `server` that tries often."""
    return FleetClient(f"127.0.0.1:{server.address[1]}", insecure=True, longest_wait_s=0.3, **options)


@contextmanager
def raw_node(server: FleetServer) -> Iterator[tuple[_Wire, Node, Callable[[], object]]]:
    """Be a node without a `FleetClient`: online, asking only what the test asks; the function goes online again."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = node_key_bytes(key.public_key())
    hello = fleet_pb2.ActivateNodeRequest(public_key=public, heartbeat_interval=30)
    with _Wire(f"http://127.0.0.1:{server.address[1]}", key, None) as wire:
        wire.RegisterNode(fleet_pb2.RegisterNodeFleetRequest(public_key=public))
        node = Node(node_id=wire.ActivateNode(hello).node_id)
        yield wire, node, lambda: wire.ActivateNode(hello)
        with suppress(httpx.HTTPError):
            wire.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=node.node_id))


@contextmanager
def fast_heartbeats(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """Let the servers of this process admit heartbeats faster than Flower's ten seconds; the interval is the value."""
    with monkeypatch.context() as patched:
        patched.setattr(fleet_handlers, "HEARTBEAT_MIN_INTERVAL", 0.1)
        yield 2.0


@dataclass
class Process:
    """A client in a process of its own; see `tests.fleet_process` for what it does and reports."""

    popen: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(json.loads(line))

    def says(self, key: str) -> Any:
        """Return the first report that has `key`, as soon as there is one."""
        soon(lambda: any(key in line for line in self.lines), f"the process reports {key!r}; it said {self.lines}")
        return next(line[key] for line in self.lines if key in line)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.popen.pid, number)

    def end(self) -> int:
        """Return the exit status; a process that does not end is killed, and fails the test."""
        try:
            return self.popen.wait(PATIENCE_S)
        finally:
            self.popen.kill()
            self.popen.wait()
            self._reader.join()
            if self.popen.stdout is not None:
                self.popen.stdout.close()


@contextmanager
def processes(server: FleetServer, home: Path, count: int, heartbeat_s: float = 10.0) -> Iterator[list[Process]]:
    """Run `count` clients as processes whose home is `home`; kill what is left of them."""
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("FLWR_HOME", None)
    command = [sys.executable, "-m", "tests.fleet_process", f"127.0.0.1:{server.address[1]}", str(heartbeat_s)]
    started = [
        Process(subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, text=True))
        for _ in range(count)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.popen.kill()
        for process in started:
            process.end()
