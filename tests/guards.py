"""What every test is held to: it stays on this machine, and it leaves no thread and no process behind."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.environment import MARK

BY_DESIGN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Python's own helpers, which live until the interpreter ends."""

HERE = ("localhost", "", "0.0.0.0", "::", "127.0.0.1", "::1")


def only_loopback(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: refuse connections and look-ups that leave this machine.

    Raises: RuntimeError: naming the address, in the test that asked for it.
    """
    if event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    text = host.decode() if isinstance(host, bytes) else host
    if isinstance(text, str) and text not in (*HERE, socket.gethostname()) and not _is_loopback(text):
        raise RuntimeError(f"a test tried to reach {text}; tests use loopback only")


def running() -> frozenset[str]:
    """Return what this process started and still runs: threads that keep it alive, and processes."""
    threads = (thread for thread in threading.enumerate() if thread.is_alive() and not thread.daemon)
    names = (f"thread {thread.name} ({thread.ident})" for thread in threads if thread is not threading.main_thread())
    return frozenset(names) | _processes()


def wait_until(ended: Callable[[], bool], patience_s: float) -> bool:
    """Return whether `ended` came true within `patience_s` seconds of asking every 50 ms."""
    deadline = time.monotonic() + patience_s
    while not ended():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.05)
    return True


def global_generators() -> tuple[object, ...]:
    """Return the state of the generators that everybody in this process shares."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (name, np.asarray(keys).tolist(), *rest), torch.get_rng_state().tolist()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _processes() -> frozenset[str]:
    """Return our children, and all who inherited MARK (found through /proc; elsewhere, nobody is found)."""
    mark = f"{MARK}={os.environ.get(MARK, '')}".encode()
    return frozenset(
        f"process {place.name}: {_command(place)[:100]}"
        for place in Path("/proc").glob("[0-9]*")
        if int(place.name) != os.getpid() and _is_ours(place, mark)
    )


def _is_ours(place: Path, mark: bytes) -> bool:
    try:
        state, parent = (place / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        if state in "ZX":  # it has ended, and only waits to be collected
            return False
        marked = mark in (place / "environ").read_bytes().split(b"\0")
    except OSError:  # it ended while we looked, or belongs to somebody else
        return False
    ours = int(parent) == os.getpid() or marked
    return ours and not any(name in _command(place) for name in BY_DESIGN)


def _command(place: Path) -> str:
    try:
        return (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
