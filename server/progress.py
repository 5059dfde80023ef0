"""What people watch while a run goes on: a bar that redraws itself on a terminal, a line a round anywhere else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fedml_core.console import Console
from server.round import RoundReport
from server.wording import bytes_text, headline, metrics_text, seconds_text

if TYPE_CHECKING:
    from rich.console import Console as Screen


class Progress:
    """Shows each round's report on stderr; use it in a `with` statement and call it after each round.

    Args: console: where to. rounds: how many there will be in all. screen: where the bar is drawn; by default, stderr
        if that is a terminal.

    Example:
        with Progress(console, 20) as progress:
            for report in coordinator.rounds(channel, 20):
                progress(report)
    """

    def __init__(self, console: Console, rounds: int, *, screen: Screen | None = None) -> None:
        self.last: RoundReport | None = None
        self._console = console
        self._rounds = rounds
        self._screen = screen
        self._seconds: list[float] = []
        self._open = ExitStack()
        self._show: Callable[[RoundReport, str], None] | None = None
        self._print: Callable[[str], None] = console.note

    def __enter__(self) -> Self:
        """Show the bar, on a terminal."""
        if self._screen is not None or self._console.live:
            self._show = self._start_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        self._print = self._console.note
        self._open.close()

    def __call__(self, report: RoundReport, state: object = None) -> None:
        """Show one round."""
        self.last = report
        self._seconds.append(report.seconds)
        line = _line(report)
        if self._show is not None:
            self._show(report, line)
        else:
            self._console.note(f"round {report.round}/{self._rounds}: {line}{self._left(report)}")

    def note(self, text: str) -> None:
        """Say what goes on besides rounds: a line of its own, above the bar where there is one."""
        self._print(text)

    def _left(self, report: RoundReport) -> str:
        rounds = self._rounds - report.round
        mean = sum(self._seconds) / len(self._seconds)
        return f"; {seconds_text(mean * rounds)} left" if rounds > 0 else ""

    def _start_bar(self) -> Callable[[RoundReport, str], None]:
        from rich.console import Console as Screen
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.text import Text

        columns = (MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        bar = Bar(TextColumn("round"), *columns)
        task = bar.add_task("round", total=self._rounds)
        screen = self._screen or Screen(stderr=True)
        live = self._open.enter_context(Live(Group(bar, Text("first round")), console=screen, refresh_per_second=4))

        def say(text: str) -> None:
            screen.print(text, markup=False, highlight=False)

        self._print = say

        def show(report: RoundReport, line: str) -> None:
            if report.status == "void":
                say(f"round {report.round} is void: {report.why}")
            bar.update(task, completed=report.round)
            live.update(Group(bar, Text(line)))

        return show


def _line(report: RoundReport) -> str:
    place, metrics = headline(report)
    measured = f"{metrics_text(metrics)} ({place})" if metrics else "not evaluated"
    if report.status == "void":
        measured = f"void: {report.why}"
    traffic = f"{bytes_text(report.bytes_up)} up, {bytes_text(report.bytes_down)} down"
    return f"{measured}; {report.replies} of {report.cohort} replies; {traffic}"
