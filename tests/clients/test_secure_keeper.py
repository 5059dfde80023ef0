"""A keeper answers at its socket, to nobody else's processes, until it is told to end."""

from __future__ import annotations

import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clients.secure_keeper import KeptSessions, keeping, main
from clients.secure_sessions import Caller, SecureSessions
from fedml_core.errors import ChannelError, ConfigError, RefusalError
from fedml_core.messages import Assignment, Failure, Refusal, SecureWork, TrainWork
from fedml_core.training import Training
from fedml_core.update import Update
from tests.clients.test_secagg import PARAMETERS
from tests.sources import ROOT

CALLER = Caller("1", "1000", 0, active=False)
SOCKET = Path("k.sock")


@pytest.fixture(autouse=True)
def _short_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short


def exchange(stage: str = "advertise", **parts: bytes) -> Assignment:
    return Assignment("a-run", 1, "f", torch.empty(0), SecureWork(stage, parts))


def untouched(assignment: Assignment) -> Update:
    raise AssertionError("nothing was to be trained")


def test_only_the_same_user_can_reach_the_socket() -> None:
    with keeping(SOCKET, SecureSessions()):
        assert stat.S_IMODE(SOCKET.stat().st_mode) & 0o077 == 0


def test_a_second_keeper_does_not_take_the_place_of_the_first() -> None:
    with keeping(SOCKET, SecureSessions()):
        with pytest.raises(ConfigError, match="in use"), keeping(SOCKET, SecureSessions()):
            raise AssertionError("two keepers at one socket")
        assert KeptSessions(SOCKET).introduce(CALLER) == 0


def test_a_keeper_takes_the_place_of_one_that_was_killed() -> None:
    with socket.socket(socket.AF_UNIX) as line:
        line.bind(str(SOCKET))
    assert SOCKET.is_socket()
    with keeping(SOCKET, SecureSessions()):
        assert KeptSessions(SOCKET).introduce(CALLER) == 0


def test_a_file_that_is_no_socket_is_left_alone() -> None:
    SOCKET.write_text("mine")
    with pytest.raises(ConfigError, match="no socket"), keeping(SOCKET, SecureSessions()):
        raise AssertionError("a keeper at a file")
    assert SOCKET.read_text() == "mine"


def test_without_a_keeper_the_error_says_how_to_start_one() -> None:
    with pytest.raises(ChannelError, match=r"start python -m clients\.secure_keeper k\.sock"):
        KeptSessions(SOCKET).introduce(CALLER)


def test_a_refusal_crosses_with_its_rule() -> None:
    active = Caller("1", "1000", 0, active=True)
    with keeping(SOCKET, SecureSessions()):
        with pytest.raises(RefusalError, match="fedveil-site") as caught:
            KeptSessions(SOCKET).introduce(active)
        reply = KeptSessions(SOCKET).answer(active, exchange(), untouched)
    assert caught.value.rule == "identity"
    assert isinstance(reply.body, Refusal)
    assert reply.body.rule == "identity"


def test_an_exchange_of_no_session_is_a_failure_that_says_so() -> None:
    with keeping(SOCKET, SecureSessions()):
        reply = KeptSessions(SOCKET).answer(CALLER, exchange("share", context=b"c", bulletin=b"b"), untouched)
    assert isinstance(reply.body, Failure)
    assert reply.body.rule == "session"


def test_training_in_the_clear_is_refused() -> None:
    plain = Assignment("a-run", 1, "f", torch.ones(3), TrainWork(Training()))
    with keeping(SOCKET, SecureSessions()):
        reply = KeptSessions(SOCKET).answer(CALLER, plain, untouched)
    assert isinstance(reply.body, Refusal)
    assert "under secure aggregation only" in reply.body.reason


def test_a_server_that_asks_for_the_active_mode_in_the_parameters_alone_is_refused_before_any_key_is_made() -> None:
    sessions = SecureSessions()
    text = PARAMETERS.to_text().encode()
    with keeping(SOCKET, sessions):
        reply = KeptSessions(SOCKET).answer(CALLER, exchange(context=PARAMETERS.context, parameters=text), untouched)
    assert isinstance(reply.body, Refusal)
    assert reply.body.rule == "identity"
    assert len(sessions) == 0


@pytest.mark.parametrize("sent", [b"", b"\xff" * 8, b"\x00" * 8, (5).to_bytes(8, "big") + b"hello"])
def test_what_is_no_question_is_answered_by_silence_and_the_keeper_goes_on(sent: bytes) -> None:
    with keeping(SOCKET, SecureSessions()):
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(30)
            line.connect(str(SOCKET))
            line.sendall(sent)
            line.shutdown(socket.SHUT_WR)
            assert line.recv(1) == b""
        assert KeptSessions(SOCKET).introduce(CALLER) == 0


def test_a_site_that_cannot_be_read_ends_the_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert main([str(SOCKET), "--site", "missing.toml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "missing.toml" in said
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_command_answers_until_sigterm_and_leaves_no_socket_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clients.secure_keeper", str(SOCKET)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment) as keeper:
        try:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == "keeping secure sums at k.sock\n"
            assert KeptSessions(SOCKET).introduce(CALLER) == 0
            keeper.terminate()
            assert keeper.wait(60) == 0
        finally:
            keeper.kill()
    assert not SOCKET.exists()
