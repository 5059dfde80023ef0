"""The sessions of secure sums of one site whose messages come one by one, each with its own way to train.

Guarantees: a session's secrets stay in the memory of the process that holds this object; an exchange whose session
    another process began is refused, and says so.
Trust: as `clients.secagg`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from clients.secagg import SecureMember
from clients.secure_policy import CohortFloor
from clients.site_standing import standing_of, unsigned
from clients.standing import Standing
from fedml_core.config import SecureAggregationTable, load_site
from fedml_core.errors import FedveilError, RefusalError, ReplyError, SecureAggregationError
from fedml_core.messages import Assignment, Body, Failure, Refusal, Reply, SecureWork
from fedml_core.secagg.parameters import Parameters
from fedml_core.update import Update

__all__ = ["Caller", "SecureSessions", "Sessions", "Train", "refuse_plainly"]

Train = Callable[[Assignment], Update]
"""Returns the encoded update of an assignment with training; raises FedveilError and nothing else."""

_IDLE_S = 7200.0
"""A session that waited so long for its next exchange is over; twice what Flower waits for a reply."""


@dataclass(frozen=True)
class Caller:
    """Which node of which run a message was for, its number in the sum, and whether the server asks for active mode."""

    run: str
    node: str
    member: int
    active: bool


class Sessions(Protocol):
    """Where a node's sessions live: in this process, or in another one of the site."""

    def introduce(self, caller: Caller) -> int:
        """Return the number under which this node takes part; raise RefusalError if it does not."""
        ...

    def answer(self, caller: Caller, assignment: Assignment, train: Train) -> Reply:
        """Return the reply to one exchange; what fails is in the reply."""
        ...


class SecureSessions:
    """Holds a site's sessions in this process, by run and node; may be used by many threads.

    Args: site: the site.toml, for who the site is, what it pins and what it insists on; its `task` is not used. None
        for nodes without identity, which take part in semi-honest sums only. minimum_cohort: what those insist on.
    Raises: ConfigError: if the site.toml, its keys or its roster cannot be used. RefusalError: if it is not the newest
        roster that this site has seen.
    """

    def __init__(self, site: Path | None = None, *, minimum_cohort: int = 3) -> None:
        self._standing = _anonymous(minimum_cohort) if site is None else standing_of(load_site(site))
        self._identified = bool(self._standing.roster)
        self._durable = site is not None
        self._parts: dict[tuple[str, str], _Part] = {}
        self._lock = threading.Lock()

    def introduce(self, caller: Caller) -> int:
        """Return this site's own number in active mode, the server's proposal in semi-honest mode."""
        if not caller.active:
            return caller.member
        if not self._identified:
            raise _no_identity()
        return self._standing.member

    def answer(self, caller: Caller, assignment: Assignment, train: Train) -> Reply:
        """Return the reply to one exchange."""
        try:
            body: Body = self._answer(caller, assignment, train)
        except FedveilError as error:
            body = refuse_plainly(error)
        return Reply(assignment.run, assignment.round, caller.member, assignment.fingerprint, body)

    def close(self) -> None:
        """Overwrite the secrets of every session; those at work end by themselves."""
        with self._lock:
            for part in self._parts.values():
                part.member.wipe()
            self._parts.clear()

    def __len__(self) -> int:
        """Return how many nodes have a session that waits to go on."""
        return sum(part.member.busy for part in self._parts.values())

    def _answer(self, caller: Caller, assignment: Assignment, train: Train) -> Body:
        work = assignment.work
        if not isinstance(work, SecureWork):
            raise RefusalError("secure-aggregation", "this node trains under secure aggregation only")
        if self.introduce(caller) != caller.member:
            raise RefusalError("member", f"the server calls this node member {caller.member}, which it is not")
        return self._part(caller, begins=work.stage == "advertise").answer(assignment, work, train)

    def _part(self, caller: Caller, begins: bool) -> _Part:
        key, now = (caller.run, caller.node), time.monotonic()
        with self._lock:
            for old in [one for one, part in self._parts.items() if part.idle_since < now - _IDLE_S]:
                self._parts.pop(old).member.wipe()
            if begins and (key not in self._parts or self._parts[key].number != caller.member):
                if key in self._parts:
                    self._parts[key].member.wipe()
                counter = self._standing.counter if self._durable else _CountedHere()
                self._parts[key] = _Part(replace(self._standing, member=caller.member, counter=counter))
            if key not in self._parts:
                raise ReplyError(
                    "session",
                    "this process holds no session of this node: it began anew, or Flower gives each message a process "
                    "of its own, as SuperNodes and Ray do; let clients.secure_keeper hold the sessions",
                )
            return self._parts[key]


class _Part:
    """One node's part in a run: its sessions, and how it trains in the exchange at hand."""

    def __init__(self, standing: Standing) -> None:
        self.member, self.number = SecureMember(standing, self._trained), standing.member
        self.idle_since = time.monotonic()
        self._lock = threading.Lock()
        self._train: Train = _untrained

    def answer(self, assignment: Assignment, work: SecureWork, train: Train) -> Body:
        with self._lock:
            self.idle_since, self._train = float("inf"), train
            try:
                return self.member.answer(assignment, work)
            finally:
                self.idle_since, self._train = time.monotonic(), _untrained

    def _trained(self, assignment: Assignment) -> Update:
        return self._train(assignment)


@dataclass
class _CountedHere:
    """The counter of a node without a file to count in: it trusts the server anyway, and only notices mistakes."""

    last: dict[str, int] = field(default_factory=dict)

    def advance(self, run: str, round_number: int, attempt: int) -> None:
        """Refuse an attempt that is not newer than every one before."""
        if attempt <= self.last.get(run, -1):
            raise RefusalError("replay", f"the server asks for attempt {attempt} again, at round {round_number}")
        self.last[run] = attempt


@dataclass(frozen=True)
class _AnonymousFloor(CohortFloor):
    """The floor of a node without identity: it believes that the server follows the protocol, or does nothing."""

    def check(self, parameters: Parameters) -> None:
        """Check what the server asks for."""
        if parameters.active:
            raise _no_identity()
        super().check(parameters)


def refuse_plainly(error: FedveilError) -> Refusal | Failure:
    """Return what a server may know of an error: refusals and protocol failures whole, of others only the kind."""
    if isinstance(error, RefusalError):
        return Refusal(error.rule, str(error))
    if isinstance(error, ReplyError):
        return Failure(error.rule, str(error))
    if isinstance(error, SecureAggregationError):
        return Failure("secure-sum", str(error))
    # Other errors may name files of the site.
    return Failure("site", f"this node could not take part ({type(error).__name__}); its own log says why")


def _no_identity() -> RefusalError:
    return RefusalError(
        "identity",
        "the server asks for the active mode and this node has no identity; name its site.toml as fedveil-site in the "
        "node config, or use SecAggPlus(active=False) if the server is trusted to follow the protocol",
    )


def _anonymous(minimum_cohort: int) -> Standing:
    table = SecureAggregationTable(minimum_cohort=minimum_cohort, allow_semi_honest=True)
    nobody: Mapping[int, bytes] = {}
    return Standing(0, nobody, "", unsigned, _CountedHere(), _AnonymousFloor(table))


def _untrained(assignment: Assignment) -> Update:
    raise SecureAggregationError("the exchange brings no training")
