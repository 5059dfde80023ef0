"""SIGTERM ends a command as Ctrl-C does, with its own exit code, and only while the command wants that."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import typer

from fedml_core.console import command
from fedml_core.termination import Terminated, terminable


def test_sigterm_ends_a_command_with_what_is_left_and_143(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned: list[str] = []
    with pytest.raises(typer.Exit) as ended, command(as_json=True) as console, terminable(console):
        console.on_interrupt = lambda: "; 2 rounds are kept"
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)
        finally:
            cleaned.append("closed")
    assert ended.value.exit_code == 143
    assert cleaned == ["closed"]
    shown = capsys.readouterr()
    assert shown.err == "error: terminated; 2 rounds are kept\n"
    assert '"kind": "Terminated"' in shown.out and '"exit_code": 143' in shown.out
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_answers_ctrl_c_answers_sigterm_too() -> None:
    assert issubclass(Terminated, KeyboardInterrupt)


def test_ctrl_c_inside_is_left_to_the_command() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as ended, command(quiet=True) as console, terminable(console):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_changes() -> None:
    before, inside = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with command() as console, terminable(console):
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert inside == [before]
