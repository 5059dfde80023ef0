"""The commands of an operator: who may take part, how the server proves itself, and the run. The root mounts them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedml_core.console import (
    AsJson,
    Changes,
    Console,
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

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedml_core.identity import Roster as SignedRoster
    from fedml_core.identity import Site
    from fedml_core.tls import ServerTls

keys = typer.Typer()
commands = typer.Typer()

Roster = Annotated[Path, typer.Option(help="The file that lists the sites; made by the first enrolment.")]
Operator = Annotated[
    Path | None,
    typer.Option("--operator", help="The folder with the operator's key; signs the roster. A signed one needs it."),
]
Folder = Annotated[Path, typer.Argument(help="Where the files are kept.", show_default=False)]
Hosts = Annotated[
    list[str],
    typer.Option("--host", help="A name or IP address by which clients reach the server; repeatable."),
]

_ROSTER = Path("roster.json")
_EXAMPLES = """Examples:

[bold]fedveil server run.toml --listen 127.0.0.1:8443 --insecure[/bold]  tries it out on this machine

[bold]fedveil server run.toml --listen 0.0.0.0:8443 --tls tls --roster roster.json[/bold]  for real machines

[bold]fedveil server run.toml --listen 0.0.0.0:8443 --tls tls --roster roster.json --resume[/bold]  after a crash or
Ctrl-C: clients come back by themselves

[bold]fedveil keys --help[/bold] says how certificate and roster are made."""


@keys.command("enrol")
def enrol_site(
    public: Annotated[Path, typer.Argument(help="The site-public.json that the site sent.", show_default=False)],
    name: Annotated[str, typer.Option(help="What the site is called in reports.", show_default=False)],
    client_id: Annotated[int, typer.Option("--id", help="Its client number.", show_default=False)],
    roster: Roster = _ROSTER,
    operator: Operator = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """At the operator: admit the site that sent PUBLIC. Compare fingerprints over the telephone: mail can be forged."""
    with command(as_json=as_json, debug=debug) as console:
        from fedml_core.identity import enrol

        _tell_site(console, enrol(roster, public, name=name, client_id=client_id, operator=_key(operator)), roster)


@keys.command("revoke")
def revoke_site(
    name: Annotated[str, typer.Argument(help="The site's name on the roster.", show_default=False)],
    roster: Roster = _ROSTER,
    operator: Operator = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """At the operator: admit the site NAME no longer. Its number and its keys stay taken."""
    with command(as_json=as_json, debug=debug) as console:
        from fedml_core.identity import revoke

        _tell_site(console, revoke(roster, name, operator=_key(operator)), roster)


@keys.command("list")
def list_sites(roster: Roster = _ROSTER, as_json: AsJson = False, debug: Debug = False) -> None:
    """Anywhere: show every site that was ever enrolled, and who signed the roster."""
    with command(as_json=as_json, debug=debug) as console:
        from fedml_core.identity import read_roster

        read = read_roster(roster)
        sites = [_site_facts(site) for site in read.sites]
        for site in sites:
            state = "revoked" if site["revoked"] else "admitted"
            console.say(f"{site['id']:>6}  {state:<8}  {site['fingerprint']}  {site['name']}")
        if read.operator:
            console.say(f"change {read.serial}, signed by the operator {read.operator}")
        console.result({"roster": str(roster), **_signer(read), "sites": sites})


@keys.command("operator")
def new_operator(folder: Folder, as_json: AsJson = False, debug: Debug = False) -> None:
    """At the operator: make, once, the key that signs the roster, in FOLDER. Every site pins its public half."""
    with command(as_json=as_json, debug=debug) as console:
        from fedml_core.identity import OPERATOR_FILE, OPERATOR_PUBLIC_FILE, new_operator_key

        digits = new_operator_key(folder).hex()
        secret, public = folder / OPERATOR_FILE, folder / OPERATOR_PUBLIC_FILE
        console.table(
            [
                ("stays here", f"{secret}"),
                ("for every site", f"{public}"),
                ("operator", f"{digits}  (for secure_aggregation.operator of every site.toml)"),
            ]
        )
        console.result({"key": str(secret), "public": str(public), "operator": digits})


@keys.command("sign")
def sign(
    operator: Annotated[Path, typer.Option(help="The folder with the operator's key.", show_default=False)],
    roster: Roster = _ROSTER,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """At the operator: sign an unsigned roster, or take over another operator's. Then send it to every site."""
    with command(as_json=as_json, debug=debug) as console:
        from fedml_core.identity import read_operator_key, sign_roster

        signed = sign_roster(roster, read_operator_key(operator))
        console.table([("roster", f"{roster}"), ("change", f"{signed.serial}"), ("operator", f"{signed.operator}")])
        console.result({"roster": str(roster), **_signer(signed)})


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


@commands.command("server", epilog=_EXAMPLES)
def serve(
    run: RunFile = Path("run.toml"),
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where; port 0 takes a free one.")
    ] = "127.0.0.1:8443",
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no roster, this machine only.")] = False,
    tls: Annotated[Path | None, typer.Option(help="The folder that fedveil keys server made.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="Instead of that folder's server.pem.")] = None,
    key: Annotated[Path | None, typer.Option(help="Instead of its server-key.pem.")] = None,
    ca: Annotated[Path | None, typer.Option(help="Instead of its ca.pem.")] = None,
    roster: Annotated[Path | None, typer.Option(help="The file that lists the sites.")] = None,
    rounds: Rounds = None,
    out: Out = None,
    seed: Seed = None,
    changes: Changes = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    plots: Plots = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train with real clients, as RUN says: wait for them, run the rounds, send them home. No code is ever sent."""
    with command(as_json=as_json, quiet=quiet, debug=debug) as console:
        from server.run import Access, Request, serve_file

        files = _tls_files(tls, certificate, key, ca)
        named = [f"{name}={value}" for name, value in (("rounds", rounds), ("seed", seed)) if value is not None]
        request = Request(
            path=run,
            access=Access(listen=listen, tls=files, roster=roster, insecure=insecure),
            overrides=[*(changes or ()), *named],
            out=out,
            resume=resume,
            overwrite=overwrite,
            plots=plots,
        )
        serve_file(console, request)


@commands.command("verify-transcript")
def verify_transcript(
    file: Annotated[Path, typer.Argument(help="A run's secagg.jsonl.", show_default=False)],
    roster: Annotated[Path | None, typer.Option(help="The roster of that time; without it, no signatures.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every check, also those that hold.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check what a run recorded of its secure sums: signatures, sets, thresholds and digests. Anybody may."""
    with command(as_json=as_json, debug=debug) as console:
        from server.verify_transcript import verify_file

        verify_file(console, file, roster, every=every)


def _tls_files(folder: Path | None, certificate: Path | None, key: Path | None, ca: Path | None) -> ServerTls | None:
    """Return the files that the options name, each in the place of the folder's; None if there is no option."""
    from fedml_core.errors import ConfigError
    from fedml_core.tls import ServerTls

    given = {"--certificate": certificate, "--key": key, "--ca": ca}
    if folder is None and not any(given.values()):
        return None
    in_folder = {"--certificate": "server.pem", "--key": "server-key.pem", "--ca": "ca.pem"}
    missing = [name for name, path in given.items() if path is None and folder is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given, too; or --tls with a folder that holds all three")
    found = [path or (folder or Path()) / in_folder[name] for name, path in given.items()]
    return ServerTls(*found)


def _key(folder: Path | None) -> Ed25519PrivateKey | None:
    from fedml_core.identity import read_operator_key

    return None if folder is None else read_operator_key(folder)


def _signer(roster: SignedRoster) -> dict[str, Any]:
    return {"serial": roster.serial or None, "operator": roster.operator or None}


def _tell_site(console: Console, site: Site, roster: Path) -> None:
    from fedml_core.identity import read_roster

    signer = _signer(read_roster(roster))
    facts = _site_facts(site)
    state = "revoked" if site.revoked else "admitted"
    console.table(
        [
            ("site", f"{site.name}, client {site.client_id}, {state}"),
            ("fingerprint", f"{facts['fingerprint']}"),
            ("roster", f"{roster}"),
            ("signed", f"change {signer['serial']}; send it to every site" if signer["serial"] else "no"),
        ]
    )
    console.result({"roster": str(roster), **signer, **facts})


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
