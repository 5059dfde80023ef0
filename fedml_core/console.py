"""What the commands share: where words go, where JSON goes, and how every ending becomes one line and an exit code.

Exit codes: 0 done; 1 the run failed, or a bug of ours; 2 a mistake that the user can mend; 130 interrupted (Ctrl-C).
With `--json` the last line of stdout is one JSON object and nothing else is on stdout; people read stderr.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fedml_core.errors import FedveilError
from fedml_core.loading import place_in_task
from fedml_core.strict_json import json_value

__all__ = [
    "AsJson",
    "Changes",
    "Console",
    "Debug",
    "Out",
    "Overwrite",
    "Plots",
    "Quiet",
    "Resume",
    "Rounds",
    "RunFile",
    "Seed",
    "command",
]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing unless something goes wrong.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

RunFile = Annotated[Path, typer.Argument(help="The run.toml, or the folder that holds it.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change any key of the run.toml; repeatable.")
]
Rounds = Annotated[int | None, typer.Option(help="Rounds in all, resumed ones included.")]
Seed = Annotated[int | None, typer.Option(help="Of everything that must reproduce.")]
Out = Annotated[Path | None, typer.Option(help="Folder for history, report and plots.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")]
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the plots.")]

INTERRUPTED = 130


class Console:
    """Words for people and one object for scripts.

    `on_interrupt`: returns what is said after "interrupted": a command sets it to what is left and how to go on.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.debug = debug
        self.on_interrupt: Callable[[], str] = str

    @property
    def live(self) -> bool:
        """Return whether a display that redraws itself makes sense."""
        return not self.quiet and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Say a result to people: on stdout, or on stderr where stdout belongs to a script."""
        if not self.quiet:
            typer.echo(text, err=self.as_json)

    def note(self, text: str) -> None:
        """Say to people what is going on: on stderr."""
        if not self.quiet:
            typer.echo(text, err=True)

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Say rows of a name and what it is, aligned."""
        width = max((len(name) for name, _ in rows), default=0)
        for name, text in rows:
            self.say(f"{name:<{width}}  {text}".rstrip())

    def result(self, value: Mapping[str, Any]) -> None:
        """Give scripts the result, if they asked for it; NaN and infinities become null, which JSON can hold."""
        if self.as_json:
            typer.echo(json.dumps(json_value(value), separators=(", ", ": ")))

    def failed(self, kind: str, message: str, code: int) -> typer.Exit:
        """Say what went wrong and return the exit to raise."""
        typer.secho(f"error: {message}", err=True, fg=typer.colors.RED)
        self.result({"error": message, "kind": kind, "exit_code": code})
        return typer.Exit(code)


@contextmanager
def command(*, as_json: bool = False, quiet: bool = False, debug: bool = False) -> Iterator[Console]:
    """Give a command its console, and end it with one line and an exit code whatever happens inside.

    Raises: typer.Exit: after every error, with its exit code; with `debug`, after the traceback.
    """
    console = Console(as_json=as_json, quiet=quiet, debug=debug)
    try:
        yield console
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        raise console.failed("Interrupted", f"interrupted{console.on_interrupt()}", INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read stdout has gone; the interpreter must not complain about that when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except Exception as error:
        if debug:
            typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)
        raise console.failed(*_explained(error)) from error


def _explained(error: Exception) -> tuple[str, str, int]:
    """Return the error's kind, its line and its exit code."""
    kind, said = type(error).__name__, str(error).strip()
    if isinstance(error, FedveilError):
        return kind, said, error.exit_code
    if (place := place_in_task(error)) is not None:
        return kind, f"{place}: {kind}: {said}; the task's own code failed", 2
    if isinstance(error, OSError) and error.strerror:
        return kind, f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}", 1
    if isinstance(error, MemoryError):
        return kind, "out of memory; use fewer or smaller clients, or a smaller model", 1
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    line = f"this is a bug in fedveil: {kind}: {said}{place}; run it again with --debug and report what it shows"
    return kind, line, 1
