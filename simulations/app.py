"""The command `fedveil`: the root that mounts the commands of all roles, and the simulation's own."""

from __future__ import annotations

import simulations.own_packages  # isort: skip  # first: it checks that the packages below are ours

import io
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

import clients.app
import server.app
import simulations.app_privacy
from fedml_core.console import (
    AsJson,
    Changes,
    Debug,
    Out,
    Overwrite,
    Plots,
    Quiet,
    Resume,
    Rounds,
    RunFile,
    Seed,
    command,
)

_DOC = "Federated learning whose users can say what the server could and could not see."
_START = """Start here:

[bold]fedveil init demo[/bold]  writes a small project that runs as it is;

[bold]fedveil simulate demo/run.toml[/bold]  runs it."""

app = typer.Typer(
    name="fedveil",
    help=_DOC,
    epilog=_START,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys = typer.Typer(no_args_is_help=True, help="Who may take part: keys of sites, the roster, the server's certificate.")
keys.add_typer(clients.app.keys)
keys.add_typer(server.app.keys)
app.add_typer(keys, name="keys")
ledger = typer.Typer(no_args_is_help=True, help="What was released about a site's data: shown, checked, exported.")
ledger.add_typer(clients.app.ledger)
app.add_typer(ledger, name="ledger")
app.add_typer(server.app.commands)
app.add_typer(clients.app.commands)
app.add_typer(simulations.app_privacy.commands)

_EXAMPLES = """Examples:

[bold]fedveil simulate run.toml[/bold]

[bold]fedveil simulate run.toml --rounds 5 --set training.learning_rate=0.05 --set strategy.name=FedAdam[/bold]

[bold]fedveil simulate run.toml --resume[/bold]  after a crash or Ctrl-C: goes on with the last finished round

[bold]fedveil simulate run.toml --central[/bold]  also: what the same model reaches on the pooled data

[bold]fedveil simulate run.toml --json --quiet | tail -n 1[/bold]  for scripts

No run.toml yet? [bold]fedveil init demo[/bold] writes one, with its task and comments."""


def main() -> None:
    """Run the command line; what a terminal's encoding lacks is shown as a question mark, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"fedveil {version('fedveil')}")
    except PackageNotFoundError:
        typer.echo("fedveil, run from its source without being installed")
    raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Federated learning whose users can say what the server could and could not see."""


@app.command(epilog=_EXAMPLES)
def simulate(
    run: RunFile = Path("run.toml"),
    rounds: Rounds = None,
    out: Out = None,
    seed: Seed = None,
    changes: Changes = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    central: Annotated[bool, typer.Option("--central", help="Compare with training on the pooled data.")] = False,
    plots: Plots = True,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time of each round went.")] = False,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a Chrome trace of it.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Simulate a federation on this machine, as RUN says: a run.toml, or the folder that holds one."""
    with command(as_json=as_json, quiet=quiet, debug=debug) as console:
        from simulations.simulate_file import Request, simulate_file

        named = [f"{name}={value}" for name, value in (("rounds", rounds), ("seed", seed)) if value is not None]
        request = Request(
            path=run,
            overrides=[*(changes or ()), *named],
            out=out,
            resume=resume,
            overwrite=overwrite,
            central=central,
            plots=plots,
            profile=profile,
            trace=trace,
        )
        simulate_file(console, request)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, also of an unfinished one.")] = Path("out"),
    plots: Plots = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the summary of the run in FOLDER, finished or not, and draw its report and plots again."""
    with command(as_json=as_json, debug=debug) as console:
        from server.report import read_run, write_report

        run = read_run(folder)
        path = write_report(run, plots=plots)
        state = [] if run.finished else [("state", "not finished")]
        console.table([*state, *run.rows, ("report", f"{path}")])
        console.result({**run.summary, "finished": run.finished, "report": str(path)})


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.", show_default=False)],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a small project into FOLDER that runs as it is: a task, a run.toml and a site.toml, with comments."""
    with command(as_json=as_json, debug=debug) as console:
        from simulations.scaffold import write_project

        written = write_project(folder)
        for path in written:
            console.say(f"wrote {path}")
        console.say(f"next: fedveil simulate {folder / 'run.toml'}")
        console.result({"files": [str(path) for path in written]})


@app.command("list")
def list_names(
    kind: Annotated[
        str | None, typer.Argument(help="strategies, partitioners, samplings, ...; by default, all.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a run.toml can name, with arguments and defaults: all, or one KIND such as strategies."""
    with command(as_json=as_json, debug=debug) as console:
        from dataclasses import asdict

        from simulations.catalogue import catalogue

        found = catalogue(kind)
        for title, entries in found.items():
            console.say(f"{title}")
            for entry in entries:
                console.say(f"  {entry.call}\n      {entry.about}")
        console.result({title: [asdict(entry) for entry in entries] for title, entries in found.items()})


if __name__ == "__main__":
    main()
