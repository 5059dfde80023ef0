"""The guards see what they are there to see."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.guards import global_generators, only_loopback, running, wait_until
from tests.sources import ROOT

WAITS = "import sys; print('up', flush=True); sys.stdin.read()"
STARTS_ONE_THAT_WAITS = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {WAITS!r}])"


def test_a_thread_that_keeps_the_process_alive_is_seen_until_it_ends() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="left-behind")
    before = running()
    thread.start()
    try:
        assert [item.split(" (")[0] for item in running() - before] == ["thread left-behind"]
    finally:
        release.set()
        thread.join()
    assert running() == before


def test_a_child_process_is_seen_until_it_ends() -> None:
    before = running()
    with subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        assert [item.split(":")[0] for item in running() - before] == [f"process {child.pid}"]
        child.kill()
        child.wait()
        assert running() == before


def test_a_grandchild_whose_parent_is_gone_is_seen() -> None:
    before = running()
    command = [sys.executable, "-c", STARTS_ONE_THAT_WAITS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"  # the grandchild says so
        child.wait()
        found = [item.split(":")[0] for item in running() - before]
        assert len(found) == 1
        assert found != [f"process {child.pid}"]
        assert child.stdin is not None
        child.stdin.close()
        assert wait_until(lambda: running() == before, 30)


def test_waiting_gives_up_when_patience_ends() -> None:
    assert wait_until(lambda: True, 0)
    assert not wait_until(lambda: False, 0)


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 80), ("2001:db8::1", 80), ("example.invalid", 80)])
def test_a_connection_that_leaves_the_machine_is_refused(host: str, port: int) -> None:
    with pytest.raises(RuntimeError, match=f"tried to reach {host}; tests use loopback only"):
        socket.create_connection((host, port), timeout=1)


def test_loopback_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = ("localhost", listener.getsockname()[1])
        with socket.create_connection(address, timeout=30) as caller:
            assert caller.getpeername() == listener.getsockname()


def test_local_sockets_and_other_events_are_nobodys_business() -> None:
    only_loopback("socket.connect", (None, "/run/some.socket"))
    only_loopback("open", ("192.0.2.1",))
    only_loopback("socket.getaddrinfo", (None, 80))


@pytest.mark.parametrize(
    "draw", [lambda: random.random(), lambda: np.random.rand(), lambda: torch.rand(1)], ids=["python", "numpy", "torch"]
)
def test_a_draw_from_a_global_generator_is_seen(draw: object) -> None:
    assert callable(draw)
    before = global_generators()
    assert global_generators() == before
    draw()
    assert global_generators() != before


def test_every_test_starts_from_the_same_generators_and_one_thread() -> None:
    assert random.random() == random.Random(0).random()
    assert np.random.rand() == np.random.RandomState(0).rand()
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("leaks", [True, False])
def test_a_session_that_leaves_a_process_fails_and_names_the_file(leaks: bool, tmp_path: Path) -> None:
    test = f"""
        import subprocess, sys
        import tests.conftest

        tests.conftest.PATIENCE_S = 0.2

        def test_that_passes():
            child = subprocess.Popen([sys.executable, "-c", {WAITS!r}], stdin=subprocess.PIPE)
            if not {leaks}:
                child.communicate()
    """
    (tmp_path / "test_leak.py").write_text(textwrap.dedent(test))
    (tmp_path / "pytest.ini").write_text("[pytest]")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", str(tmp_path)]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ("first seen after test_leak.py" in outcome.stdout) == leaks
    assert ("1 passed, 1 error" in outcome.stdout) == leaks
    assert (outcome.returncode == 0) != leaks
