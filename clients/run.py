"""`fedveil client`: a site takes part in a run, with its own task, data and memory, until the run is over."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clients.fleet import FleetClient
from clients.service import SiteService
from clients.site_standing import standing_of
from clients.standing import Standing
from fedml_core.config import SiteConfig, load_site
from fedml_core.console import Console
from fedml_core.errors import ConfigError
from fedml_core.identity import read_site_keys
from fedml_core.loading import load_task
from fedml_core.termination import terminable

__all__ = ["Connection", "serve_site"]


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How the server is reached: `server` is host:port; `authority` takes the place of the site.toml's.

    `heartbeat_s`, `longest_wait_s`: see `clients.fleet.FleetClient`.
    """

    server: str
    insecure: bool = False
    authority: Path | None = None
    heartbeat_s: float = 10.0
    longest_wait_s: float = 30.0

    def client(self, config: SiteConfig) -> FleetClient:
        """Return the site's end of the connection; nothing is sent yet.

        Raises: ConfigError: if the keys or the authority are missing or damaged, or the address is none.
        """
        made = partial(FleetClient, self.server, heartbeat_s=self.heartbeat_s, longest_wait_s=self.longest_wait_s)
        if self.insecure:
            return made(insecure=True, tls_ca=self.authority)
        named = config.keys.authority
        authority = self.authority or (None if named is None else config.beside(named))
        if authority is None:
            raise ConfigError(
                f"{config.path} names no authority by which to recognise the server; set keys.authority or give "
                "--authority with the ca.pem that the operator sent, or --insecure for a server on this machine"
            )
        keys = read_site_keys(config.beside(config.keys.site))
        return made(tls_ca=authority, node_key=keys.node)


def serve_site(console: Console, path: Path, connection: Connection) -> None:
    """Take part with the site that the site.toml at `path` describes, until the server says that the run is over.

    Raises: ConfigError, TaskError: before anything is sent, if the site cannot take part. SpecMismatchError: if its
        model is not the server's. ChannelError: if the server is not the trusted one. RunError: if it never let this
        site in.
    """
    config = load_site(path)
    with terminable(console):
        if connection.insecure:
            _share_the_machine()
        task = load_task(config.task, config.folder)
        service = SiteService(
            config,
            task,
            console.note,
            _tracer(console),
            standing=_standing(config),
            server=connection.server,
        )
        console.on_interrupt = lambda: f"; {_answered(service.facts)}; start it again to go on"
        connection.client(config).serve(service.handle, service.stop, console.note)
        facts = service.outcome()
        console.say(f"the server says goodbye: {facts['goodbye']}; {_answered(facts)}")
        if facts["trained"]:
            console.say(service.account)
        console.result({**facts, **service.summary, "server": connection.server})


def _standing(config: SiteConfig) -> Standing | None:
    """Return who the site is in secure sums, or None if its site.toml lets it take part in none."""
    policy = config.secure_aggregation
    if policy.operator is None and not policy.allow_semi_honest:
        return None
    return standing_of(config, threads=os.cpu_count() or 1)


def _share_the_machine() -> None:
    """Leave cores to the server and the other sites, all of which an insecure client has on its own machine.

    Three clients with torch's own choice, a thread for each core, took 40 times as long for a small model on 2 cores:
    threads that wait for work hold up those that have some. OMP_NUM_THREADS has the last word.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 4))


def _answered(facts: Mapping[str, Any]) -> str:
    return f"trained {facts['trained']} times, evaluated {facts['evaluated']} times, failed {facts['failed']} times"


def _tracer(console: Console) -> Callable[[Exception], None]:
    """Return what shows an error's traceback to people, if they asked for it."""

    def show(error: Exception) -> None:
        if console.debug:
            console.note("".join(traceback.format_exception(error)).rstrip())

    return show
