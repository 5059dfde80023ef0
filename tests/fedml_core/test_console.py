"""Every ending of a command is one line and an exit code; words go to people and JSON to scripts."""

from __future__ import annotations

import json

import pytest
import typer

from fedml_core.console import Console, command
from fedml_core.errors import CheckpointError, ConfigError, RunError


def ending(error: BaseException, **options: bool) -> int:
    with pytest.raises(typer.Exit) as caught, command(**options):
        raise error
    return caught.value.exit_code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("rounds must be >= 1, got 0"), 2, "error: rounds must be >= 1, got 0"),
        (CheckpointError("it is damaged"), 2, "error: it is damaged"),
        (RunError("all 3 rounds were void"), 1, "error: all 3 rounds were void"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (OSError(28, "No space left on device", "out"), 1, "error: out: No space left on device"),
        (MemoryError(), 1, "error: out of memory; use fewer or smaller clients, or a smaller model"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    assert ending(error) == code
    assert capsys.readouterr() == ("", f"{line}\n")


def test_what_nobody_expected_is_called_a_bug_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(KeyError("x")) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: this is a bug in fedveil: KeyError: 'x' (test_console.py, line ")
    assert "--debug" in said
    assert len(said.splitlines()) == 1


def test_debug_shows_the_traceback_before_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(ConfigError("no"), debug=True) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: no"


def test_an_error_is_json_too_where_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(RunError("no result"), as_json=True) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "no result", "kind": "RunError", "exit_code": 1}
    assert err == "error: no result\n"


def test_what_is_left_is_told_after_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, command() as console:
        console.on_interrupt = lambda: "; 3 rounds are kept"
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err == "error: interrupted; 3 rounds are kept\n"


def test_an_exit_inside_a_command_is_left_alone() -> None:
    with pytest.raises(typer.Exit) as caught, command():
        raise typer.Exit(7)
    assert caught.value.exit_code == 7


def test_results_go_to_stdout_and_notes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say("a result")
    console.note("a note")
    console.result({"not": "asked for"})
    assert capsys.readouterr() == ("a result\n", "a note\n")


def test_with_json_only_the_object_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=True)
    console.say("a result")
    console.note("a note")
    console.result({"loss": float("nan"), "rows": [1.5, float("inf"), {"deep": (float("-inf"), None)}]})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": None, "rows": [1.5, None, {"deep": [None, None]}]}
    assert "NaN" not in out
    assert err == "a result\na note\n"


def test_quiet_keeps_everything_back_but_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), command(quiet=True) as console:
        console.say("a result")
        console.note("a note")
        console.table([("a", "row")])
        assert not console.live
        raise RunError("no result")
    assert capsys.readouterr() == ("", "error: no result\n")


def test_rows_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table([("a", "1"), ("longer", "2"), ("empty", "")])
    assert capsys.readouterr().out == "a       1\nlonger  2\nempty\n"
