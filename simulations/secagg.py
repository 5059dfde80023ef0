"""Secure sums among virtual clients: every member is a real session, with an identity of its own, in this process.

The very client half of the fleet runs here; only training is done for the whole cohort by an engine, whose workers add
up ring vectors. A member's masks go onto that sum instead of onto its own vector, which comes to the same sum.
What one process may share among its clients, it computes once: see `virtual_sites`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set

import torch

from clients.secagg import SecureMember
from clients.secagg_assisted import AssistedMember
from clients.standing import Standing
from fedml_core.bulk import GatheredArrival
from fedml_core.errors import RefusalError, SecureAggregationError
from fedml_core.messages import Arrived, Assignment, Failure, Reply, SecureAnswer, SecureWork
from fedml_core.randomness import keyed_words
from fedml_core.ring import RingSum
from fedml_core.secagg.client import ClientSession
from fedml_core.secagg.unmasked import UnmaskedClientSession, believe
from fedml_core.spans import span
from fedml_core.update import Update
from server.secure_exchange import Witnesses
from server.validation import UpdateIntake
from simulations.engines.engine import Session, Stage, arrival_of
from simulations.virtual_sites import AnySite, VirtualRoster

__all__ = ["ASSISTED_STAGES", "STAGES", "SecureMembers", "VirtualMembers"]

STAGES = ("advertise", "share", "mask", "confirm", "unmask")
"""The exchanges of a secure sum, in order; a client that drops out does so at one of them."""

ASSISTED_STAGES = ("assist-advertise", "contribute", "assist-gather", "assist-witness", "assist-answer")
"""Those of a sum with assistants: an assistant drops out at one of them, everybody else has only one."""


class VirtualMembers:
    """Both sides of a simulation's secure sums: whose signatures its server believes, and its clients.

    Args: count: of clients. draw_masks: False leaves masks, keys and signatures out.
    """

    def __init__(self, count: int, *, draw_masks: bool = True) -> None:
        self._roster, self._draw_masks = VirtualRoster(count), draw_masks
        self._believed = Witnesses(
            self._roster, self._roster.digest, self._roster.shared.verify if draw_masks else believe
        )

    def witnesses(self) -> Witnesses:
        """Return whom the server believes."""
        return self._believed

    def members(self, stage: Stage, session: Session) -> SecureMembers:
        """Return the clients, trained by an engine's session."""
        threads = torch.get_num_threads()
        return SecureMembers(stage, session, self._roster, draw_masks=self._draw_masks, threads=threads)


class SecureMembers:
    """The virtual clients' halves of secure sums; they are there from their advert to the end of their session."""

    def __init__(
        self, stage: Stage, session: Session, roster: VirtualRoster, *, draw_masks: bool = True, threads: int = 1
    ) -> None:
        self._stage, self._session, self._roster, self._threads = stage, session, roster, threads
        self._kind = ClientSession if draw_masks else UnmaskedClientSession
        self._members: dict[int, SecureMember] = {}
        self._lost: set[int] = set()
        self._assistants: frozenset[int] = frozenset()
        self._round = -1
        self._site = AnySite()

    def deliver(self, assignments: Mapping[int, Assignment], reachable: Sequence[int]) -> Iterator[Arrived]:
        """Yield the answers of those that are reached and have not dropped out."""
        first = next(iter(assignments.values()))
        work = first.work
        assert isinstance(work, SecureWork)
        if first.round != self._round:
            self._round = first.round
            self._lost.clear()
            self._roster.forget()
        if work.stage == "assist-advertise":
            self._assistants = frozenset(assignments)
        answering = self._answering(list(assignments), frozenset(reachable), first.round, work.stage)
        if work.stage in ("mask", "contribute"):
            yield from self._mask({member: assignments[member] for member in answering})
            if work.stage == "contribute":
                self._end(self._assistants)
            return
        try:
            for member in answering:
                yield self._answer(member, assignments[member])
        finally:  # also when the server has heard enough
            if work.stage == "unmask":
                self._end({member for member in answering if "next-context" in _parts(assignments[member])})

    def _end(self, staying: Set[int]) -> None:
        """End the sessions of this round; those who stay have one for the next."""
        for number in [number for number, one in self._members.items() if number not in staying or not one.busy]:
            self._members.pop(number).wipe()

    def _answering(self, asked: Sequence[int], reachable: frozenset[int], round_number: int, stage: str) -> list[int]:
        """Return who answers: a client whose reply would be lost is lost from one of the exchanges on."""
        doomed = [member for member in asked if member not in reachable and member not in self._lost]
        if doomed:
            words = keyed_words((self._stage.seed, "lost at", round_number), doomed, 1)[:, 0]
            stages = STAGES if stage in STAGES else ASSISTED_STAGES
            places = dict(zip(doomed, (words % len(stages)).tolist(), strict=True))
            if stage == "contribute":
                places.update((member, 0) for member in doomed if member not in self._assistants)
            now = stages.index(stage)
            self._lost.update(member for member, place in places.items() if place <= now)
        return [member for member in asked if member not in self._lost]

    def _answer(self, member: int, assignment: Assignment) -> Arrived:
        work = assignment.work
        assert isinstance(work, SecureWork)
        try:
            body: SecureAnswer | Failure = self._member(member).answer(assignment, work)
        except (SecureAggregationError, RefusalError) as error:
            body = Failure("secure-sum", str(error))
        return arrival_of(Reply(assignment.run, assignment.round, member, assignment.fingerprint, body))

    def _mask(self, assignments: Mapping[int, Assignment]) -> Iterator[Arrived]:
        """Train those who are ready to mask, add up their ring vectors, and put their masks onto the sum."""
        opened: list[int] = []
        for member, assignment in assignments.items():
            if (told := self._opened(member, assignment)) is None:
                opened.append(member)
            else:
                yield arrival_of(self._reply(member, assignment, told))
        if not opened:
            return
        intake = self._train(assignments[opened[0]], opened)
        ring = intake.accumulator
        assert isinstance(ring, RingSum)
        parts: dict[int, Mapping[str, bytes]] = {}
        with span("masks"):
            for member in intake.accepted:
                half = self._half(member, assignments[member])
                answer = half.close(assignments[member], _parts(assignments[member]), ring.ring)
                parts[member] = answer.parts
        rows = [(row.client, row.rule, row.reason) for row in intake.excluded]
        own = SecureAnswer(parts[intake.accepted[0]], ring.ring) if intake.accepted else SecureAnswer({})
        size = arrival_of(self._reply(opened[0], assignments[opened[0]], own)).size_bytes
        yield GatheredArrival(intake.accepted, rows, ring, size * len(intake.accepted), parts)

    def _opened(self, member: int, assignment: Assignment) -> SecureAnswer | Failure | None:
        """Return a member's complaint or failure, or None if it is ready to mask."""
        try:
            return self._half(member, assignment).open(assignment, _parts(assignment))
        except (SecureAggregationError, RefusalError) as error:
            return Failure("secure-sum", str(error))

    def _train(self, assignment: Assignment, members: Sequence[int]) -> UpdateIntake:
        work = assignment.work
        assert isinstance(work, SecureWork) and work.train is not None
        encoding = self._half(members[0], assignment).encoding(work.parts["context"])
        train = dataclasses.replace(assignment, work=dataclasses.replace(work.train, ring=encoding))
        intake = UpdateIntake(train, members, self._stage.accumulator(train))
        intake.take(self._session.run(train, list(members)))
        return intake

    def _reply(self, member: int, assignment: Assignment, body: SecureAnswer | Failure) -> Reply:
        return Reply(assignment.run, assignment.round, member, assignment.fingerprint, body)

    def _half(self, member: int, assignment: Assignment) -> SecureMember | AssistedMember:
        """Return what masks for a member in this exchange."""
        assert isinstance(assignment.work, SecureWork)
        own = self._member(member)
        return own.assisted if assignment.work.stage == "contribute" else own

    def _member(self, member: int) -> SecureMember:
        if member not in self._members:
            standing = Standing(
                member,
                self._roster,
                self._roster.digest,
                self._roster.sign_as(member),
                self._site,
                self._site,
                verify=self._roster.shared.verify if self._kind is ClientSession else believe,
                threads=self._threads,
                read_bulletin=self._roster.shared.read_bulletin,
                read_panel=self._roster.shared.read_panel,
                bind=self._roster.shared.bind,
                open_session=self._kind,
            )
            self._members[member] = SecureMember(standing, _untrained)
        return self._members[member]


def _parts(assignment: Assignment) -> Mapping[str, bytes]:
    assert isinstance(assignment.work, SecureWork)
    return assignment.work.parts


def _untrained(assignment: Assignment) -> Update:
    raise SecureAggregationError("virtual clients are trained by their engine")
