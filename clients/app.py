"""The commands of a site: its keys, and taking part. The root command mounts them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedml_core.console import AsJson, Debug, Quiet, command

keys = typer.Typer()
ledger = typer.Typer()
commands = typer.Typer()

_EXAMPLES = """Examples:

[bold]fedveil client site.toml --server 127.0.0.1:8443 --insecure[/bold]  tries it out on this machine

[bold]fedveil client site.toml --server fl.example.org:8443 --authority ca.pem[/bold]  for real machines

The server never sends code: it can ask only for what the task on this machine does."""


@keys.command("new")
def new_keys(
    folder: Annotated[Path, typer.Argument(help="Where they are kept; made if there is none.", show_default=False)],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """At a site: make its keys in FOLDER. Mail site-public.json to the operator; site-keys.json stays with you."""
    with command(as_json=as_json, debug=debug) as console:
        from fedml_core.identity import KEYS_FILE, PUBLIC_FILE, new_site_keys

        made = new_site_keys(folder)
        secret, public = folder / KEYS_FILE, folder / PUBLIC_FILE
        console.table(
            [
                ("stays here", f"{secret}"),
                ("for the operator", f"{public}"),
                ("fingerprint", f"{made.fingerprint}  (read it to the operator over the telephone)"),
            ]
        )
        console.result({"keys": str(secret), "public": str(public), "fingerprint": made.fingerprint})


Where = Annotated[Path, typer.Argument(help="The site.toml, a folder with one, a run's folder, or the file itself.")]
Head = Annotated[Path | None, typer.Option(help="The file that says how far the ledger went, if not beside it.")]


@ledger.command("show")
def show_ledger(
    where: Where = Path("site.toml"),
    delta: Annotated[float | None, typer.Option(help="At which epsilon is given; by default the site.toml's.")] = None,
    head: Head = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Anywhere: say what was spent on the data, by run and in all, with unit, adjacency, sampling and delta."""
    with command(as_json=as_json, debug=debug) as console:
        from clients.ledger_report import find, say_spent

        say_spent(console, find(where, head), delta)


@ledger.command("verify")
def verify_ledger(
    where: Where = Path("site.toml"),
    noted: Annotated[str | None, typer.Option("--noted", help="A hash of the ledger that was noted earlier.")] = None,
    head: Head = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Anywhere: check that no entry was changed, exchanged or taken out; names the first one that was."""
    with command(as_json=as_json, debug=debug) as console:
        from clients.ledger_report import find, say_verified

        say_verified(console, find(where, head), noted)


@ledger.command("export")
def export_ledger(
    where: Where = Path("site.toml"),
    out: Annotated[Path | None, typer.Option(help="A new file; by default stdout.")] = None,
    head: Head = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Anywhere: write every entry as one JSON line, with its hash. It holds names and numbers, no data."""
    with command(as_json=as_json, debug=debug) as console:
        from clients.ledger_report import find, say_export

        say_export(console, find(where, head), out)


@commands.command("client", epilog=_EXAMPLES)
def take_part(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server's address.", show_default=False)],
    site: Annotated[Path, typer.Argument(help="The site.toml, or the folder that holds it.")] = Path("site.toml"),
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS and no keys; a server on this machine.")] = False,
    authority: Annotated[Path | None, typer.Option(help="The federation's ca.pem, if SITE does not name it.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Take part with this site's data, as SITE says, until the server says that the run is over."""
    with command(as_json=as_json, quiet=quiet, debug=debug) as console:
        from clients.run import Connection, serve_site

        serve_site(console, site, Connection(server=server, insecure=insecure, authority=authority))
