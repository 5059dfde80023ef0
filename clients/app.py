"""The commands of a site: so far, its keys. The root command mounts them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedml_core.console import AsJson, Debug, command

keys = typer.Typer()


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
