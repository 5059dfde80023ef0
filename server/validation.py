"""Every reply is checked here before it touches a sum; a bad one is excluded, attributed, and the round goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedml_core.accumulate import Accumulator
from fedml_core.bulk import BulkArrival, GatheredArrival
from fedml_core.errors import ReplyError, StrategyError
from fedml_core.messages import Arrival, Arrived, Assignment, Body, Evaluation, Failure, Refusal, SecureAnswer
from fedml_core.spans import span
from fedml_core.update import Update, check_sums

Done = Update | Evaluation | SecureAnswer
"""A body that is neither a refusal nor a failure."""


@dataclass(frozen=True)
class Exclusion:
    """A client whose reply did not count: the rule that it broke in one word, and the reason."""

    client: int
    rule: str
    reason: str


class Intake:
    """Takes the arrivals of one exchange, believes none of them, and keeps account of who counted and who did not.

    Guarantees: what `accept` sees came from a client of the cohort, which claims no other number, is its first reply to
    this exchange, and is for this run, round and model.
    """

    def __init__(self, assignment: Assignment, cohort: Sequence[int]) -> None:
        self._assignment = assignment
        self._cohort = frozenset(cohort)
        self._seen: set[int] = set()
        self.accepted: list[int] = []
        self.excluded: list[Exclusion] = []
        self.bytes_up = 0

    def take(self, arrivals: Iterable[Arrived]) -> None:
        """Accept or exclude each arrival, as it comes."""
        for arrival in arrivals:
            self.bytes_up += arrival.size_bytes
            if isinstance(arrival, Arrival):
                self._take_one(arrival)
            else:
                self.accept_bulk(arrival)

    def expect(self, clients: Sequence[int]) -> None:
        """Ask further clients in this exchange."""
        self._cohort |= frozenset(clients)

    def accept_bulk(self, arrival: BulkArrival | GatheredArrival) -> None:
        """Add many clients' replies that came in one piece."""
        raise StrategyError(f"{type(self).__name__} takes single replies, got a {type(arrival).__name__}")

    def _take_one(self, arrival: Arrival) -> None:
        try:
            self._check_envelope(arrival)
            self.accept(arrival.client, _work_done(arrival.reply.body))
        except ReplyError as error:
            self._exclude(arrival.client, error)
        else:
            self.accepted.append(arrival.client)

    def _exclude(self, client: int, error: ReplyError) -> None:
        self.excluded.append(Exclusion(client, error.rule, str(error)))

    def _see(self, clients: Sequence[int]) -> None:
        """Count clients of this process as having replied; none of them may be a stranger or come twice."""
        new = set(clients)
        if len(new) != len(clients) or not new <= self._cohort or new & self._seen:
            raise StrategyError("an engine returned replies of clients that were not asked, or twice; this is a bug")
        self._seen |= new

    def accept(self, client: int, body: Done) -> None:
        """Add a client's body to what this intake gathers, or raise ReplyError."""
        raise ReplyError("kind", f"an intake of {type(self).__name__} takes no {type(body).__name__.lower()}")

    @property
    def missing(self) -> list[int]:
        """Return the clients of the cohort that have not replied."""
        return sorted(self._cohort - self._seen)

    def _check_envelope(self, arrival: Arrival) -> None:
        reply, asked = arrival.reply, self._assignment
        if arrival.client not in self._cohort:
            raise ReplyError("unknown-client", f"client {arrival.client} was not asked in round {asked.round}")
        if reply.client != arrival.client:
            raise ReplyError("client", f"client {arrival.client} claims to be client {reply.client}")
        if arrival.client in self._seen:
            raise ReplyError("duplicate", f"client {arrival.client} replied to round {asked.round} before")
        self._seen.add(arrival.client)
        if reply.run != asked.run:
            raise ReplyError("run", f"the reply is for run {reply.run[:40]!r}, this is {asked.run!r}")
        if reply.round != asked.round:
            raise ReplyError("round", f"the reply is for round {reply.round}, this is round {asked.round}")
        if not isinstance(reply.body, Failure | Refusal) and reply.fingerprint != asked.fingerprint:
            raise ReplyError(
                "fingerprint", f"the client's model is {reply.fingerprint[:40]}, the server's {asked.fingerprint}"
            )


class UpdateIntake(Intake):
    """Streams updates into an accumulator, which checks shape, dtype, finiteness and weight."""

    def __init__(self, assignment: Assignment, cohort: Sequence[int], accumulator: Accumulator) -> None:
        super().__init__(assignment, cohort)
        self.accumulator = accumulator

    def accept(self, client: int, body: Done) -> None:
        """Add an update to the sum."""
        if not isinstance(body, Update):
            raise ReplyError("kind", f"an update was asked for, {_kind(body)} came")
        if body.lead:
            raise ReplyError("shape", f"one client's update must be one vector, got {tuple(body.values.shape)}")
        with span("accumulate"):
            self.accumulator.add(body, (client,))

    def accept_bulk(self, arrival: BulkArrival | GatheredArrival) -> None:
        """Add K updates at once, or what a worker has added up; of K, exclude those that must not reach a sum."""
        with span("accumulate"):
            self._add_bulk(arrival)

    def _add_bulk(self, arrival: BulkArrival | GatheredArrival) -> None:
        if isinstance(arrival, GatheredArrival):
            self._see([*arrival.accepted, *(client for client, _, _ in arrival.excluded)])
            self.accumulator.merge(arrival.accumulator)
            self.accepted.extend(arrival.accepted)
            self.excluded.extend(Exclusion(*row) for row in arrival.excluded)
            return
        self._see(arrival.clients)
        try:
            self.accumulator.add(arrival.update, arrival.clients)
        except ReplyError:
            for place, client in enumerate(arrival.clients):
                try:
                    self.accumulator.add(arrival.update.row(place), (client,))
                except ReplyError as error:
                    self._exclude(client, error)
                else:
                    self.accepted.append(client)
        else:
            self.accepted.extend(arrival.clients)


class EvaluationIntake(Intake):
    """Adds up summed metrics."""

    def __init__(self, assignment: Assignment, cohort: Sequence[int]) -> None:
        super().__init__(assignment, cohort)
        self.sums: dict[str, float] = {}

    def accept(self, client: int, body: Done) -> None:
        """Add an evaluation's sums."""
        if not isinstance(body, Evaluation):
            raise ReplyError("kind", f"an evaluation was asked for, {_kind(body)} came")
        check_sums(body.sums)
        if not all(math.isfinite(value) for value in body.sums.values()):
            raise ReplyError("non-finite", "an evaluation's sums hold NaN or infinity")
        if body.sums.get("examples", 0) <= 0:
            raise ReplyError("weight", f"an evaluation must count examples > 0, got {body.sums.get('examples', 0)}")
        if self.sums and body.sums.keys() != self.sums.keys():
            raise ReplyError("metrics", f"metrics {sorted(body.sums)} are not the others' {sorted(self.sums)}")
        for name, value in body.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value


def averages(sums: Mapping[str, float]) -> dict[str, float]:
    """Return each sum divided by the number of examples, which stays as it is; empty if nothing was counted.

    Example:
        >>> averages({"examples": 4, "accuracy": 3})
        {'examples': 4, 'accuracy': 0.75}
    """
    examples = sums.get("examples", 0.0)
    if examples <= 0:
        return {}
    return {name: value if name == "examples" else value / examples for name, value in sums.items()}


def _kind(body: Done) -> str:
    return {Update: "an update", Evaluation: "an evaluation", SecureAnswer: "a secure answer"}[type(body)]


def _work_done(body: Body) -> Done:
    if isinstance(body, Refusal):
        raise ReplyError("refused", f"refused by its policy, rule {body.rule}: {body.reason}")
    if isinstance(body, Failure):
        raise ReplyError(body.rule, body.reason)
    return body


def shortfall(replies: int, minimum: int, excluded: Sequence[Exclusion]) -> str:
    """Return why a round with too few replies is void, with the first reason of those that did not count."""
    said = f"{replies} good replies arrived, the minimum is {minimum}"
    if not excluded:
        return said
    first = min(excluded, key=lambda row: (row.client, row.rule))
    return f"{said}; of {len(excluded)} that did not count, client {first.client}: {first.reason}"
