"""`fedveil server`: a run.toml over real clients, from the open port to the report."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedml_core.config import RunConfig, load_run
from fedml_core.console import Console
from fedml_core.errors import ConfigError, RunError
from fedml_core.evaluation import Evaluator
from fedml_core.handshake import Hello
from fedml_core.identity import PinnedRoster, Roster, read_roster
from fedml_core.loading import load_task
from fedml_core.task import Task
from fedml_core.termination import terminable
from fedml_core.tls import ServerTls
from server.configure import plan_from
from server.coordinator import Coordinator
from server.fleet import FleetServer
from server.fleet_channel import FleetChannel
from server.history import History, RunFolder
from server.ledger import round_books
from server.plan import Plan
from server.record import conclude, coordinator_for, finished, record_rounds, refuse_both, watched
from server.secure_exchange import Witnesses
from strategies.secure import SecureAggregation

__all__ = ["Access", "Request", "RosterFile", "serve_file"]


@dataclass(frozen=True, kw_only=True)
class Access:
    """Where the server listens and who gets in: `tls` and `roster`, or everybody on this machine if `insecure`."""

    listen: str
    tls: ServerTls | None = None
    roster: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        """Check that it is one of the two."""
        if self.insecure and (self.tls is not None or self.roster is not None):
            raise ConfigError("an insecure server uses neither certificate nor roster; leave --insecure or these out")
        if not self.insecure and (self.tls is None or self.roster is None):
            missing = "certificate and key" if self.tls is None else "roster"
            raise ConfigError(
                f"the server has no {missing}; give --tls and --roster (fedveil keys makes them), or --insecure to "
                "try it out on this machine"
            )

    @property
    def address(self) -> tuple[str, int]:
        """Return the host and the port to listen on.

        Raises: ConfigError: if that is not what `listen` holds.
        """
        host, colon, port = self.listen.rpartition(":")
        if not (colon and host and port.isascii() and port.isdecimal()):
            raise ConfigError(f"--listen must be HOST:PORT, such as 0.0.0.0:8443, got {self.listen!r}")
        return host.removeprefix("[").removesuffix("]"), int(port)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for.

    `path`: the run.toml. `overrides`: `key=value` each. `out`: in the place of the file's.
    """

    path: Path
    access: Access
    overrides: Sequence[str] = ()
    out: Path | None = None
    resume: bool = False
    overwrite: bool = False
    plots: bool = True

    def again(self, address: str) -> list[str]:
        """Return the command that goes on with this run on the same address."""
        words = ["fedveil", "server", str(self.path), "--resume", "--listen", address]
        if self.access.tls is not None:
            tls = self.access.tls
            words += ["--certificate", str(tls.certificate), "--key", str(tls.key), "--ca", str(tls.ca)]
        words += ["--insecure"] if self.access.insecure else ["--roster", str(self.access.roster)]
        words += [word for change in self.overrides for word in ("--set", change)]
        return words if self.out is None else [*words, "--out", str(self.out)]


def serve_file(console: Console, request: Request) -> None:
    """Run what a run.toml describes with the clients that connect, show it, and leave a report behind.

    Raises: FedveilError: for whatever is wrong; what was done so far stays readable and can be resumed.
    """
    refuse_both(resume=request.resume, overwrite=request.overwrite)
    config = load_run(request.path, request.overrides)
    folder = request.out or Path(config.out).expanduser()
    task = load_task(config.task, config.folder)
    plan = plan_from(config)
    with terminable(console):
        history = _serve(console, request, config, _Work(task, plan, folder))
        summary = {**history.summary, "stopped_early": len(history.reports) < config.rounds}
        conclude(console, folder, summary, plots=request.plots)


@dataclass(frozen=True)
class _Work:
    task: Task
    plan: Plan
    folder: Path


def _serve(console: Console, request: Request, config: RunConfig, work: _Work) -> History:
    plan = work.plan
    # The same model on the same device as a simulation of this file, so that both measure alike.
    evaluator = Evaluator(work.task, plan.seed, device=config.simulation.device)
    roster = None if request.access.roster is None else RosterFile(request.access.roster)
    with _listen(request.access, roster) as server:
        host, port = server.address
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        folder = RunFolder(work.folder, plan)
        state = folder.begin(
            lambda: Coordinator.begin(plan, evaluator.spec, evaluator.initial(), uuid.uuid4().hex),
            evaluator.spec,
            resume=request.resume,
            overwrite=request.overwrite,
        )
        books = round_books(config, work.folder, plan, state)
        coordinator = coordinator_for(
            work.task,
            plan,
            state if books is None else books.resumed(state),
            evaluator,
            witnesses=_witnesses(plan, roster),
            folder=folder,
            reserve=books,
        )
        console.note(f"listening on {address}{', without TLS, for this machine only' if roster is None else ''}")
        with watched(console, config.rounds, work.folder, lambda: request.again(address)) as progress:
            channel = FleetChannel(
                server,
                Hello(state.run, plan.seed, evaluator.spec),
                minimum_clients=config.server.minimum_clients,
                wait_s=config.server.wait_s,
                say=progress.note,
                on_turn=None if roster is None else lambda: roster.refresh(server, progress.note),
            )
            return _run(coordinator, channel, config.rounds, folder, progress)


def _witnesses(plan: Plan, roster: RosterFile | None) -> Callable[[], Witnesses] | None:
    """Return what tells whose signatures secure sums believe now, or None where that cannot be told."""
    strategy = plan.strategy
    if not isinstance(strategy, SecureAggregation):
        return None
    if not strategy.protocol.signed:
        return Witnesses
    if roster is None:
        return None

    def now() -> Witnesses:
        pinned = PinnedRoster.of(roster.last)
        return Witnesses(pinned.keys, pinned.digest)

    now()  # an unsigned roster is refused before anybody is waited for
    return now


def _run(
    coordinator: Coordinator,
    channel: FleetChannel,
    rounds: int,
    folder: RunFolder,
    progress: Callable[..., object],
) -> History:
    try:
        reports = record_rounds(coordinator, channel, rounds, folder=folder, callbacks=[progress])
    except RunError:
        channel.farewell("the run failed")
        raise
    channel.farewell(f"the run is done after {len(reports)} rounds")
    took_part = {client for report in reports for client in report.participants}
    return finished(coordinator, reports, folder, clients=len(took_part), engine="fleet")


def _listen(access: Access, roster: RosterFile | None) -> FleetServer:
    host, port = access.address
    if roster is None:
        return FleetServer(host, port, insecure=True)
    return FleetServer(host, port, tls=access.tls, roster=roster.read())


class RosterFile:
    """The roster as its file says it now: a site that is enrolled or revoked during a run needs no new server."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self.last = self.read()

    def read(self) -> Roster:
        """Return the roster, and remember it and which state of the file it was."""
        self._stamp = self._stamp_now()
        self.last = read_roster(self._path)
        return self.last

    def refresh(self, server: FleetServer, say: Callable[[str], object]) -> None:
        """Admit exactly the sites of the file, if it has changed; a damaged file changes nothing."""
        if self._stamp_now() == self._stamp:
            return
        try:
            roster = self.read()
        except ConfigError as error:
            say(f"the roster is left as it was: {error}")
            return
        server.set_roster(roster)
        say(f"the roster has changed: {len(roster.admitted)} sites are admitted")

    def _stamp_now(self) -> tuple[int, int] | None:
        with suppress(OSError):
            found = self._path.stat()
            return found.st_mtime_ns, found.st_ino
        return None
