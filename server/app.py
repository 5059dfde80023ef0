"""The commands of an operator: so far, who may take part and how the server proves itself. The root mounts them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedml_core.console import AsJson, Console, Debug, command

if TYPE_CHECKING:
    from fedml_core.identity import Site
    from fedml_core.tls import ServerTls

keys = typer.Typer()

Roster = Annotated[Path, typer.Option(help="The file that lists the sites; made by the first enrolment.")]
Folder = Annotated[Path, typer.Argument(help="Where the files are kept.", show_default=False)]
Hosts = Annotated[
    list[str],
    typer.Option("--host", help="A name or IP address by which clients reach the server; repeatable."),
]

_ROSTER = Path("roster.json")


@keys.command("enrol")
def enrol_site(
    public: Annotated[Path, typer.Argument(help="The site-public.json that the site sent.", show_default=False)],
    name: Annotated[str, typer.Option(help="What the site is called in reports.", show_default=False)],
    client_id: Annotated[int, typer.Option("--id", help="Its client number.", show_default=False)],
    roster: Roster = _ROSTER,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """At the server: admit the site that sent PUBLIC. Compare fingerprints over the telephone: mail can be forged."""
    with command(as_json=as_json, debug=debug) as console:
        from fedml_core.identity import enrol

        _tell_site(console, enrol(roster, public, name=name, client_id=client_id), roster)


@keys.command("revoke")
def revoke_site(
    name: Annotated[str, typer.Argument(help="The site's name on the roster.", show_default=False)],
    roster: Roster = _ROSTER,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """At the server: admit the site NAME no longer. Its number and its keys stay taken."""
    with command(as_json=as_json, debug=debug) as console:
        from fedml_core.identity import revoke

        _tell_site(console, revoke(roster, name), roster)


@keys.command("list")
def list_sites(roster: Roster = _ROSTER, as_json: AsJson = False, debug: Debug = False) -> None:
    """At the server: show every site that was ever enrolled."""
    with command(as_json=as_json, debug=debug) as console:
        from fedml_core.identity import read_roster

        sites = [_site_facts(site) for site in read_roster(roster).sites]
        for site in sites:
            state = "revoked" if site["revoked"] else "admitted"
            console.say(f"{site['id']:>6}  {state:<8}  {site['fingerprint']}  {site['name']}")
        console.result({"roster": str(roster), "sites": sites})


@keys.command("server")
def new_server_keys(folder: Folder, hosts: Hosts, as_json: AsJson = False, debug: Debug = False) -> None:
    """At the server: make its certificate in FOLDER, and the authority by which clients recognise it."""
    with command(as_json=as_json, debug=debug) as console:
        from fedml_core.tls import new_authority

        _tell_tls(console, new_authority(folder, hosts))


@keys.command("renew")
def renew_server_keys(folder: Folder, hosts: Hosts, as_json: AsJson = False, debug: Debug = False) -> None:
    """At the server: replace the certificate in FOLDER; the authority stays, so clients need no new file."""
    with command(as_json=as_json, debug=debug) as console:
        from fedml_core.tls import renew_certificate

        _tell_tls(console, renew_certificate(folder, hosts))


def _tell_site(console: Console, site: Site, roster: Path) -> None:
    facts = _site_facts(site)
    state = "revoked" if site.revoked else "admitted"
    console.table(
        [
            ("site", f"{site.name}, client {site.client_id}, {state}"),
            ("fingerprint", f"{facts['fingerprint']}"),
            ("roster", f"{roster}"),
        ]
    )
    console.result({"roster": str(roster), **facts})


def _site_facts(site: Site) -> dict[str, Any]:
    fingerprint = site.keys.fingerprint
    return {"id": site.client_id, "name": site.name, "revoked": site.revoked, "fingerprint": fingerprint}


def _tell_tls(console: Console, tls: ServerTls) -> None:
    console.table(
        [
            ("certificate", f"{tls.certificate}"),
            ("key", f"{tls.key}  (stays at the server)"),
            ("authority", f"{tls.ca}  (for every client)"),
        ]
    )
    console.result({"certificate": str(tls.certificate), "key": str(tls.key), "authority": str(tls.ca)})
