"""The commands about privacy alone: what it costs, what a site would answer, and attacks. The root mounts them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedml_core.console import AsJson, Changes, Debug, Quiet, RunFile, command

commands = typer.Typer()

_ACCOUNT_EXAMPLES = """Examples:

[bold]fedveil account --noise-multiplier 1 --sampling-rate 0.1 --steps 100 --delta 1e-5[/bold]

[bold]fedveil account --target-epsilon 4 --sampling-rate 0.1 --steps 100 --delta 1e-5[/bold]  finds the noise

[bold]fedveil account --events spent.json --delta 1e-5 --adjacency replace-one --unit client[/bold]"""


@commands.command(epilog=_ACCOUNT_EXAMPLES)
def account(
    delta: Annotated[float, typer.Option(help="Below 1 over the number of units.", show_default=False)],
    noise_multiplier: Annotated[float | None, typer.Option(help="Noise over one unit's bound.")] = None,
    target: Annotated[float | None, typer.Option("--target-epsilon", help="Instead: find the noise for it.")] = None,
    steps: Annotated[int, typer.Option(help="Rounds or steps; for a tree, those between two restarts.")] = 1,
    sampling_rate: Annotated[float | None, typer.Option(help="Of a secret Poisson sample in each step.")] = None,
    population: Annotated[int | None, typer.Option(help="How many units there are.")] = None,
    sample: Annotated[int | None, typer.Option("--sample-size", help="Of a secret sample of fixed size.")] = None,
    mechanism: Annotated[str, typer.Option(help="gaussian, laplace, local, tree or matrix.")] = "gaussian",
    sensitivity: Annotated[float | None, typer.Option(help="Of a matrix: the whole run's, over one bound.")] = None,
    restarts: Annotated[int | None, typer.Option(help="Of a tree: how often it is begun anew.")] = None,
    events: Annotated[Path | None, typer.Option(metavar="FILE", help="Instead: a JSON list of events.")] = None,
    adjacency: Annotated[
        str | None, typer.Option(help="add-or-remove-one, replace-one or replace-special; else the mechanism's own.")
    ] = None,
    unit: Annotated[str, typer.Option(help="Whose data the answer is about: example or client.")] = "example",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what noise costs: epsilon at a delta, with unit, adjacency, sampling and accountant. Nothing is run."""
    with command(as_json=as_json, debug=debug) as console:
        from simulations.account import Question, answer

        question = Question(
            delta=delta,
            unit=unit,
            adjacency=adjacency,
            mechanism=mechanism,
            noise_multiplier=noise_multiplier,
            target=target,
            steps=steps,
            sampling_rate=sampling_rate,
            population=population,
            sample=sample,
            sensitivity=sensitivity,
            restarts=restarts,
            events=events,
        )
        answer(console, question)


_PLAN_EXAMPLES = """Examples:

[bold]fedveil plan run.toml[/bold]

[bold]fedveil plan run.toml --set strategy.noise_multiplier=1.2 --budget 8 --plot epsilon.png[/bold]"""


@commands.command(epilog=_PLAN_EXAMPLES)
def plan(
    run: RunFile = Path("run.toml"),
    budget: Annotated[float | None, typer.Option(help="The epsilon not to go beyond.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw epsilon over rounds.")] = None,
    overrides: Changes = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what RUN would cost in privacy, how much signal the noise leaves, and what to change. Nothing is trained."""
    with command(as_json=as_json, debug=debug) as console:
        from simulations.privacy_plan import Question, say_outlook

        say_outlook(console, Question(run, overrides or (), budget, plot))


@commands.command("dry-run")
def dry_run(
    site: Annotated[Path, typer.Argument(help="The site.toml, or the folder that holds it.", show_default=False)],
    run: Annotated[Path, typer.Argument(help="The run.toml, or the folder that holds it.", show_default=False)],
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="As which the server would be reached.")] = "",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """At a site: say what SITE's policy and budget would answer RUN; ends with 1 if a round would be refused.

    Nothing is trained, sent or written down.
    """
    with command(as_json=as_json, debug=debug) as console:
        from simulations.dry_run import say_answer

        if code := say_answer(console, site, run, server):
            raise typer.Exit(code)


_AUDIT_EXAMPLES = """Examples:

[bold]fedveil audit run.toml[/bold]  ends with 1 if a claim does not hold

[bold]fedveil audit run.toml --set rounds=5 --canaries 500 --json --quiet | tail -n 1[/bold]  for scripts"""


@commands.command(epilog=_AUDIT_EXAMPLES)
def audit(
    run: RunFile = Path("run.toml"),
    out: Annotated[Path | None, typer.Option(help="Folder for audit.json and audit.html.")] = None,
    changes: Changes = None,
    canaries: Annotated[int | None, typer.Option(help="How many; else by the model's size.")] = None,
    shadows: Annotated[int, typer.Option("--shadow-models", help="For membership inference; 0 for none.")] = 16,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the pictures.")] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Attack the run that RUN describes, and hold what it claims against what the attacks find."""
    with command(as_json=as_json, quiet=quiet, debug=debug) as console:
        from simulations.audit.audit_file import Request, audit_file

        request = Request(
            path=run, overrides=changes or (), out=out, canaries=canaries, shadows=shadows, pictures=plots
        )
        if audit_file(console, request) == "FAIL":
            raise typer.Exit(1)
