"""What the exchanges of every secure sum have in common at the server: messages, checks, costs and attempts.

Trust: whoever runs it sees what the protocol's messages show, and takes none of them for good before the protocol did.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from fedml_core.bulk import BulkArrival, GatheredArrival
from fedml_core.errors import FedveilError, ReplyError, SecureAggregationError
from fedml_core.message_frames import assignment_to_frame
from fedml_core.messages import Arrived, Assignment, Channel, SecureAnswer, SecureWork
from fedml_core.ring import RingSum
from fedml_core.secagg.adverts import Verify, verify
from fedml_core.update import Total
from server.gathering import Gathered, Order
from server.validation import Done, Exclusion, Intake

__all__ = [
    "Attempt",
    "Exchanges",
    "Handle",
    "Ledger",
    "Outcome",
    "Witnesses",
    "milliseconds",
    "take_attempts",
    "to_all",
]

Handle = Callable[[int, SecureAnswer], None]
Record = Callable[[Mapping[str, Any]], object]


@dataclass(frozen=True)
class Witnesses:
    """Whose signatures the server believes: identity keys by member, and the digest of the roster that has them."""

    keys: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    digest: str = ""
    verify: Verify = verify


class Attempt(Protocol):
    """One attempt at the secure sum of a round.

    `accepted`: whose sum it is, once it ran. `final`: if it fails, the round must not be tried again.
    """

    accepted: Sequence[int]
    final: bool

    @property
    def opened(self) -> bool:
        """Return whether anybody was asked for what opens the sum: it counts as released then, whatever came of it."""
        ...

    def run(self) -> Total:
        """Return the decoded sum.

        Raises: SecureAggregationError: if the attempt cannot reach one.
        """
        ...

    def facts(self, total: Total) -> dict[str, Any]:
        """Return what is told of the protocol, once it ran."""
        ...

    def at_fault(self) -> frozenset[int]:
        """Return who is left out of the next attempt."""
        ...

    def transcript(self) -> Mapping[str, Any] | None:
        """Return what was recorded, as far as it came; None of an attempt that did not begin."""
        ...


class Ledger:
    """What a round's exchanges cost, and who was excluded in them, over all attempts."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self.excluded: dict[int, Exclusion] = {}
        self.bytes_up = self.bytes_down = self.exchanges = self.attempts = 0
        self.stages: dict[str, float] = {}

    def exclude(self, rows: Iterable[Exclusion]) -> None:
        """Keep who was excluded; of a client, the first reason."""
        for row in rows:
            self.excluded.setdefault(row.client, row)

    def gathered(self, total: Total, accepted: Sequence[int], facts: Mapping[str, Any]) -> Gathered:
        """Return a sum of the clients `accepted`."""
        alive = frozenset(accepted)
        excluded = tuple(row for client, row in self.excluded.items() if client not in alive)
        named = alive.union(row.client for row in excluded)
        missing = [client for client in self._order.cohort if client not in named]
        every = {**facts, **self.costs()}
        return Gathered(total, accepted, excluded, missing, self.bytes_up, self.bytes_down, facts=every)

    def nothing(self, why: str, size: int, facts: Mapping[str, Any]) -> Gathered:
        """Return that there is no sum, and why."""
        return replace(self.gathered(Total(torch.zeros(size), 0.0, 0), (), facts), why=why)

    def costs(self) -> dict[str, Any]:
        """Return attempts, exchanges and the seconds of each kind of exchange."""
        seconds = {stage: round(spent, 6) for stage, spent in self.stages.items()}
        return {"attempts": self.attempts, "exchanges": self.exchanges, "stage_seconds": seconds}


def take_attempts(
    order: Order,
    begin: Callable[[Ledger, Sequence[int]], Attempt],
    *,
    most: int,
    size: int,
    empty: Mapping[str, Any],
    record: Record | None = None,
) -> Gathered:
    """Return the sum of the first attempt that reaches one, or why none did.

    Guarantees: after an attempt whose sum may have been opened, `order.again` is asked before the next one.
    Args: begin: returns an attempt with a cohort. most: attempts. size: of the model. empty: what is told of the
        protocol if there is no sum. record: is given what each attempt recorded.
    """
    ledger, why, left_out, opened = Ledger(order), "", frozenset[int](), False
    for _ in range(most):
        cohort = [client for client in order.cohort if client not in left_out]
        if not cohort:
            break
        if opened and (refusal := _refused_again(order)):
            why = f"{why}; it was not tried again: {refusal}"
            break
        ledger.attempts += 1
        attempt = begin(ledger, cohort)
        try:
            total = attempt.run()
            return ledger.gathered(total, attempt.accepted, attempt.facts(total))
        except SecureAggregationError as error:
            why = f"the secure sum stopped: {error}"
        finally:
            left_out |= attempt.at_fault()
            if record is not None and (recorded := attempt.transcript()) is not None:
                record(recorded)
        if attempt.final:
            break
        opened = attempt.opened
    return ledger.nothing(why, size, empty)


def _refused_again(order: Order) -> str:
    """Return why another sum of the round must not be opened, or ""."""
    try:
        if order.again is not None:
            order.again()
    except FedveilError as error:
        return str(error)
    return ""


class SecureIntake(Intake):
    """Hands each good answer of one exchange to the protocol, which may refuse it."""

    def __init__(self, assignment: Assignment, cohort: Iterable[int], handle: Handle) -> None:
        super().__init__(assignment, list(cohort))
        self._handle = handle

    def accept(self, client: int, body: Done) -> None:
        if not isinstance(body, SecureAnswer):
            raise ReplyError("kind", "a secure sum's answer was asked for, something else came")
        try:
            self._handle(client, body)
        except KeyError as error:
            raise ReplyError("secure-sum", f"the answer lacks its {error.args[0]}") from error
        except SecureAggregationError as error:
            raise ReplyError("secure-sum", str(error)) from error

    def accept_bulk(self, arrival: BulkArrival | GatheredArrival) -> None:
        """Take what a simulation has masked and added up."""
        if not isinstance(arrival, GatheredArrival) or not isinstance(arrival.accumulator, RingSum):
            super().accept_bulk(arrival)
            return
        self._see([*arrival.accepted, *(client for client, _, _ in arrival.excluded)])
        self.gathered.append(arrival)
        self.accepted.extend(arrival.accepted)
        self.excluded.extend(Exclusion(*row) for row in arrival.excluded)

    @property
    def gathered(self) -> list[GatheredArrival]:
        return self.__dict__.setdefault("_gathered", [])  # type: ignore[no-any-return]  # made on first use


@dataclass(frozen=True)
class Outcome:
    """Whose answers of an exchange were taken, whose were not, and what a simulation added up already."""

    accepted: Sequence[int] = ()
    excluded: Sequence[Exclusion] = ()
    gathered: Sequence[GatheredArrival] = ()


class Exchanges:
    """Carries the exchanges of one round over a channel, and puts their costs into a ledger."""

    def __init__(self, channel: Channel, order: Order, ledger: Ledger) -> None:
        self._channel, self._order, self.ledger = channel, order, ledger

    def ask(
        self,
        context: bytes,
        stage: str,
        parts: Mapping[int, Mapping[str, bytes]],
        handle: Handle,
        *,
        training: Assignment | None = None,
        enough: Callable[[], bool] | None = None,
    ) -> Outcome:
        """Send each client its parts, handle the answers, and return who answered what.

        Args: training: the model and the work to send along. enough: asked after each answer; once it says so, no
            further ones are waited for.
        """
        base = self._order.assignment if training is None else training
        train = None if training is None else self._order.train
        parameters = base.parameters if training is not None else base.parameters.new_empty(0)
        made: dict[int, Assignment] = {}
        assignments: dict[int, Assignment] = {}
        for client, own in parts.items():
            # Equal parts make one assignment, so that a channel may encode it once.
            if id(own) not in made:
                work = SecureWork(stage, {"context": context, **own}, train)
                made[id(own)] = replace(base, parameters=parameters, work=work)
            assignments[client] = made[id(own)]
        if not assignments:
            return Outcome()
        started = time.perf_counter()
        intake = SecureIntake(next(iter(assignments.values())), assignments, handle)
        arrivals = self._channel.deliver(assignments, self._order.timeout_s)
        intake.take(arrivals if enough is None else _until(arrivals, enough))
        ledger = self.ledger
        ledger.stages[stage] = ledger.stages.get(stage, 0.0) + time.perf_counter() - started
        ledger.exchanges += 1
        ledger.bytes_up += intake.bytes_up
        sizes = {id(one): assignment_to_frame(one).size_bytes for one in made.values()}
        ledger.bytes_down += sum(sizes[id(one)] for one in assignments.values())
        return Outcome(intake.accepted, intake.excluded, intake.gathered)


def _until(arrivals: Iterable[Arrived], enough: Callable[[], bool]) -> Iterator[Arrived]:
    """Yield arrivals until it is enough; a channel that yields them from a generator hears that at once."""
    try:
        for arrival in arrivals:
            yield arrival
            if enough():
                return
    finally:
        if isinstance(arrivals, Generator):
            arrivals.close()


def to_all(members: Iterable[int], parts: Mapping[str, bytes]) -> dict[int, Mapping[str, bytes]]:
    """Return the same parts for each; that they are the very same object lets them be encoded once."""
    return {member: parts for member in members}  # noqa: C420 - dict.fromkeys of a mutable value is refused as well


def milliseconds() -> Callable[[], int]:
    """Return serial numbers that grow in this process, and from one process to the next: the clock's milliseconds."""
    last = 0

    def following() -> int:
        nonlocal last
        last = max(last + 1, int(time.time() * 1000))
        return last

    return following
