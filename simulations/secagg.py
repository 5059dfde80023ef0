"""Secure sums among virtual clients: every member is a real session, with an identity of its own, in this process.

The very client half of the fleet runs here; only training is done for the whole cohort by an engine, whose workers add
up ring vectors. A member's masks go onto that sum instead of onto its own vector, which comes to the same sum.
What one process may share among its clients, it computes once: a bulletin read, a signature checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from clients.secagg import SecureMember
from clients.secagg_assisted import AssistedMember
from clients.standing import Standing
from fedml_core.binding import binding_of
from fedml_core.bulk import GatheredArrival
from fedml_core.errors import RefusalError, SecureAggregationError
from fedml_core.messages import Arrived, Assignment, Failure, Reply, SecureAnswer, SecureWork, TrainWork
from fedml_core.randomness import keyed_words
from fedml_core.ring import RingSum
from fedml_core.secagg.assisted import Panel
from fedml_core.secagg.bulletin import Bulletin, Verify, verify
from fedml_core.secagg.client import ClientSession
from fedml_core.secagg.keys import derive
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.secrets import Secret
from fedml_core.secagg.unmasked import UnmaskedClientSession, believe
from fedml_core.spans import span
from fedml_core.update import Update
from server.secagg import Witnesses
from server.validation import UpdateIntake
from simulations.engines.engine import Session, Stage, arrival_of

__all__ = ["ASSISTED_STAGES", "STAGES", "SecureMembers", "VirtualMembers", "VirtualRoster"]

STAGES = ("advertise", "share", "mask", "confirm", "unmask")
"""The exchanges of a secure sum, in order; a client that drops out does so at one of them."""

ASSISTED_STAGES = ("assist-advertise", "contribute", "assist-gather", "assist-witness", "assist-answer")
"""Those of a sum with assistants: an assistant drops out at one of them, everybody else has only one."""


class VirtualRoster(Mapping[int, bytes]):
    """Identities of virtual clients, made when they are asked for, from one fresh secret for the whole run."""

    digest = "virtual"

    def __init__(self, count: int) -> None:
        self._count, self._root = count, Secret.fresh(32)
        self._keys: dict[int, tuple[Ed25519PrivateKey, bytes]] = {}
        self._valid: set[tuple[bytes, bytes, bytes]] = set()

    def __getitem__(self, member: int) -> bytes:
        """Return a member's public identity key."""
        return self._pair(member)[1]

    def __iter__(self) -> Iterator[int]:
        """Return the members."""
        return iter(range(self._count))

    def __len__(self) -> int:
        """Return how many members there are."""
        return self._count

    def sign_as(self, member: int) -> Any:
        """Return what signs as a member."""
        return self._pair(member)[0].sign

    def verify(self, key: bytes, signature: bytes, message: bytes) -> bool:
        """Return whether a signature holds; one that did is remembered for this process's other members."""
        triple = (key, signature, message)
        if triple in self._valid:
            return True
        if held := verify(key, signature, message):
            self._valid.add(triple)
        return held

    def forget(self) -> None:
        """Let go of what belongs to one round."""
        self._keys.clear()
        self._valid.clear()

    def _pair(self, member: int) -> tuple[Ed25519PrivateKey, bytes]:
        if member not in self._keys:
            if not 0 <= member < self._count:
                raise KeyError(member)
            with derive(self._root, "identity", b"", member) as seed:
                private = Ed25519PrivateKey.from_private_bytes(bytes(seed.view()))
            self._keys[member] = (private, private.public_key().public_bytes_raw())
        return self._keys[member]


class VirtualMembers:
    """Both sides of a simulation's secure sums: whose signatures its server believes, and its clients.

    Args: count: of clients. draw_masks: False leaves masks, keys and signatures out.
    """

    def __init__(self, count: int, *, draw_masks: bool = True) -> None:
        self._roster, self._draw_masks = VirtualRoster(count), draw_masks
        self._believed = Witnesses(self._roster, self._roster.digest, self._roster.verify if draw_masks else believe)

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
        self._bulletins: dict[tuple[bytes, bytes], Bulletin] = {}
        self._panels: dict[tuple[bytes, bytes], Panel] = {}
        self._bound: tuple[Tensor, TrainWork | None, bytes] | None = None

    def deliver(self, assignments: Mapping[int, Assignment], reachable: Sequence[int]) -> Iterator[Arrived]:
        """Yield the answers of those that are reached and have not dropped out."""
        first = next(iter(assignments.values()))
        work = first.work
        assert isinstance(work, SecureWork)
        if first.round != self._round:
            self._round = first.round
            self._lost.clear()
            self._bulletins.clear()
            self._panels.clear()
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
                _NoCounter(),
                _NoFloor(),
                verify=self._roster.verify if self._kind is ClientSession else believe,
                threads=self._threads,
                read_bulletin=self._read_bulletin,
                read_panel=self._read_panel,
                bind=self._bind,
                open_session=self._kind,
            )
            self._members[member] = SecureMember(standing, _untrained)
        return self._members[member]

    def _read_bulletin(
        self, parameters: Parameters, message: bytes, roster: Mapping[int, bytes], check: Verify
    ) -> Bulletin:
        key = (parameters.context, message)
        if key not in self._bulletins:
            self._bulletins[key] = Bulletin.read(parameters, message, roster, check)
        return self._bulletins[key]

    def _read_panel(self, parameters: Parameters, message: bytes, roster: Mapping[int, bytes], check: Verify) -> Panel:
        key = (parameters.context, message)
        if key not in self._panels:
            self._panels[key] = Panel.read(parameters, message, roster, check)
        return self._panels[key]

    def _bind(self, assignment: Assignment) -> bytes:
        """Return the binding, computed once for members that were given the very same model and work."""
        work = assignment.work
        assert isinstance(work, SecureWork)
        parameters, train, binding = self._bound or (None, None, b"")
        if parameters is not assignment.parameters or train is not work.train:
            binding = binding_of(assignment)
            self._bound = (assignment.parameters, work.train, binding)
        return binding


class _NoCounter:
    """Virtual clients live and die with their process, which uses no number twice."""

    def advance(self, run: str, round_number: int, attempt: int) -> None:
        """Accept."""


class _NoFloor:
    """Virtual clients have no policy of their own."""

    def check(self, parameters: Parameters) -> None:
        """Accept."""

    def check_attempts(self, round_number: int, attempts: int) -> None:
        """Accept."""

    def check_members(self, members: int, threshold: int) -> None:
        """Accept."""


def _parts(assignment: Assignment) -> Mapping[str, bytes]:
    assert isinstance(assignment.work, SecureWork)
    return assignment.work.parts


def _untrained(assignment: Assignment) -> Update:
    raise SecureAggregationError("virtual clients are trained by their engine")
