"""The client's half of one-shot sums with assistants: it contributes, and where it is asked to, it assists.

One client may do both in one attempt; the two know nothing of each other. Its twin: `server/secagg_assisted.py`.

Guarantees: nothing of an update leaves unmasked; what cannot be masked is not sent.
Guarantees: an attempt is taken part in once in each role, and contributors are signed once in a round, in whatever
    process and however often the round is tried: two lists would tell their difference.
Guarantees: a server that asks for less than the site's own floor is refused before any key is made, in both roles.
Trust: server sees only masked vectors, and the sum of their masks once a quorum of assistants signed whose they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from clients.asked import Sum
from clients.secure_entry import Attempts, check_noise, check_planned, read_parameters
from clients.standing import Standing
from fedml_core.errors import SecureAggregationError
from fedml_core.messages import Assignment, SecureAnswer
from fedml_core.ring import Encoding, encoding_from_table, ring_rows, summed
from fedml_core.secagg.assistance import Assistance
from fedml_core.secagg.assistant import AssistantSession
from fedml_core.secagg.assisted import Panel
from fedml_core.secagg.assisted_client import AssistedClient
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.secrets import Secret
from fedml_core.update import Update

__all__ = ["AssistedMember"]

Parts = Mapping[str, bytes]
Step = Callable[[Assignment, Parts], SecureAnswer]

_ASSISTANT = "/assistant"
_SIGNED = "/signed"
"""Behind a run's name: what the durable counter counts of an assistant, attempts and the rounds that it signed in."""

_BINDING_SIZE = 32


@dataclass
class _Contributing:
    """A contribution that waits for its vector, and what the vector means."""

    session: AssistedClient
    panel: Panel
    encoding: Encoding


@dataclass
class _Assisting:
    """An assistant's session, and the panel and the binding that it joined with."""

    session: AssistantSession
    joined: tuple[bytes, bytes] | None = None


class AssistedMember:
    """Answers the exchanges of assisted sums for one client; holds one session of each role at most.

    Args: train: returns the client's encoded update for an assignment with training. attempts: counts contributions.
    """

    def __init__(self, standing: Standing, train: Callable[[Assignment], Update], attempts: Attempts) -> None:
        self._standing, self._train = standing, train
        self._attempts, self._assists = attempts, Attempts(standing, _ASSISTANT)
        self._contributing: dict[bytes, _Contributing] = {}
        self._assisting: dict[bytes, _Assisting] = {}

    def steps(self) -> dict[str, Step]:
        """Return what answers each exchange."""
        return {
            "contribute": self._contribute,
            "assist-advertise": self._advertise,
            "assist-gather": self._gather,
            "assist-witness": self._witness,
            "assist-answer": self._answer,
        }

    def wipe(self) -> None:
        """End every session."""
        for contributing in self._contributing.values():
            contributing.session.wipe()
        self._contributing.clear()
        self._end_assisting()

    @property
    def busy(self) -> bool:
        """Return whether a session is waiting to go on."""
        return bool(self._contributing or self._assisting)

    def contributes(self, context: bytes) -> bool:
        """Return whether a contribution to this session waits for its vector."""
        return context in self._contributing

    def encoding(self, context: bytes) -> Encoding:
        """Return what the vector of a session means."""
        return self._find(context).encoding

    def sum(self, context: bytes) -> Sum:
        """Return what a site's policy asks about the sum: the fewest honest members that it may hold.

        Who contributes is not known yet: as many as there is room for may, and the stated share of them collude.
        """
        held = self._find(context)
        parameters = held.session.parameters
        honest = parameters.minimum - parameters.corrupt(held.encoding.clients)
        return Sum(max(0, honest), summed(held.encoding))

    def open(self, assignment: Assignment, parts: Parts) -> SecureAnswer | None:
        """Begin a contribution, after everything that can be checked before training; there is no complaint here."""
        for earlier in self._contributing.values():
            earlier.session.wipe()
        self._contributing.clear()
        parameters, assistance = self._admitted(assignment, parts)
        self._standing.floor.check_assistants(assistance.assistants)
        standing, reserved = self._standing, assistance.within({})
        table = {name: value for name, value in parameters.encoding.items() if name not in reserved}
        encoding = encoding_from_table(table, parameters.bits)
        check_noise(encoding, parameters, encoding.clients)
        check_planned(encoding, assignment)
        self._attempts.begin(parameters)
        panel = standing.read_panel(parameters, parts["panel"], standing.roster, standing.verify)
        session = AssistedClient(parameters, standing.party)
        self._contributing[parameters.context] = _Contributing(session, panel, encoding)
        return None

    def close(self, assignment: Assignment, parts: Parts, vector: NDArray[Any]) -> SecureAnswer:
        """Mask the vector, in place, and return the contribution; this client is done then."""
        held = self._find(parts["context"])
        del self._contributing[parts["context"]]
        message = held.session.contribute(held.panel, self._standing.bind(assignment), vector)
        return SecureAnswer({"contribution": message}, vector)

    def _contribute(self, assignment: Assignment, parts: Parts) -> SecureAnswer:
        self.open(assignment, parts)
        try:
            update = self._train(assignment)
            with Secret.fresh(32) as rounding:
                vector = ring_rows(self.encoding(parts["context"]), update, [rounding])[0]
        except BaseException:
            self._contributing.pop(parts["context"]).session.wipe()
            raise
        return self.close(assignment, parts, vector)

    def _admitted(self, assignment: Assignment, parts: Parts) -> tuple[Parameters, Assistance]:
        """Return what is asked for, once the site's own rules let it."""
        parameters = read_parameters(self._standing, assignment, parts["parameters"])
        assistance = Assistance.of(parameters)
        if parameters.context != parts["context"] or parameters.round != assignment.round:
            raise SecureAggregationError("the parameters are those of another session or another round")
        # Whoever sums masks up to open them are `threshold` + 1 assistants at least.
        self._standing.floor.check_members(parameters.minimum, assistance.threshold + 1)
        return parameters, assistance

    def _advertise(self, assignment: Assignment, parts: Parts) -> SecureAnswer:
        # A new attempt: whatever went before is over.
        self._end_assisting()
        parameters, assistance = self._admitted(assignment, parts)
        standing = self._standing
        if standing.member not in assistance.assistants:
            raise SecureAggregationError(f"client {standing.member} is no assistant of this sum")
        self._assists.begin(parameters)
        session = AssistantSession(parameters, standing.party)
        self._assisting[parameters.context] = _Assisting(session)
        return SecureAnswer({"advert": session.advertise()})

    def _gather(self, assignment: Assignment, parts: Parts) -> SecureAnswer:
        held = self._helping(assignment, parts["context"])
        try:
            self._join(held, parts["panel"], parts["binding"])
            return SecureAnswer({"gathered": held.session.gather(parts["roundup"])})
        except BaseException:
            held.session.wipe()
            raise

    def _join(self, held: _Assisting, panel: bytes, binding: bytes) -> None:
        if held.joined is None:
            if len(binding) != _BINDING_SIZE:
                raise SecureAggregationError(f"the work's digest must have {_BINDING_SIZE} bytes, got {len(binding)}")
            session, standing = held.session, self._standing
            read = standing.read_panel(session.parameters, panel, standing.roster, standing.verify)
            session.join(read, binding)
            held.joined = panel, binding
        elif held.joined != (panel, binding):
            raise SecureAggregationError("the panel or the work is another one than this assistant gathered for")

    def _witness(self, assignment: Assignment, parts: Parts) -> SecureAnswer:
        held = self._helping(assignment, parts["context"])
        session, parameters = held.session, held.session.parameters
        try:
            witness = session.witness(parts["contributors"])
            # Counted by rounds, not by attempts, and on the disk before the signature leaves.
            self._standing.counter.advance(parameters.run + _SIGNED, parameters.round, parameters.round)
        except BaseException:
            session.wipe()
            raise
        return SecureAnswer({"witness": witness})

    def _answer(self, assignment: Assignment, parts: Parts) -> SecureAnswer:
        held = self._helping(assignment, parts["context"])
        message, vector = held.session.answer(parts["request"])
        return SecureAnswer({"answer": message}, vector)

    def _end_assisting(self) -> None:
        for assisting in self._assisting.values():
            assisting.session.wipe()
        self._assisting.clear()

    def _helping(self, assignment: Assignment, context: bytes) -> _Assisting:
        held = self._assisting.get(context)
        if held is None:
            raise SecureAggregationError("this client assists in no such session; it may have begun anew")
        if held.session.parameters.round != assignment.round:
            held.session.wipe()
            raise SecureAggregationError("the exchange is of another round than the session")
        return held

    def _find(self, context: bytes) -> _Contributing:
        held = self._contributing.get(context)
        if held is None:
            raise SecureAggregationError("this client contributes to no such session; it may have begun anew")
        return held
