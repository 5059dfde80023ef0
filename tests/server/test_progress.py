"""What goes on besides rounds is said on a line of its own, whether or not a bar is being drawn."""

from __future__ import annotations

import io

import pytest
from rich.console import Console as Screen

from fedml_core.console import Console
from server.progress import Progress


def test_a_note_is_a_line_on_stderr_where_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(Console(), 2) as progress:
        progress.note("client 1 joined")
    assert capsys.readouterr() == ("", "client 1 joined\n")


def test_a_note_stands_above_the_bar_and_not_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = io.StringIO()
    with Progress(Console(), 2, screen=Screen(file=drawn, force_terminal=True, width=100, no_color=True)) as progress:
        progress.note("client 1 ([bold]ward-a) joined")
    lines = [line.rsplit("\x1b[2K", 1)[-1].rstrip() for line in drawn.getvalue().split("\n")]
    assert "client 1 ([bold]ward-a) joined" in lines
    progress.note("the bar is gone")
    assert capsys.readouterr() == ("", "the bar is gone\n")


def test_quiet_keeps_notes_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(Console(quiet=True), 2) as progress:
        progress.note("client 1 joined")
    assert capsys.readouterr() == ("", "")
