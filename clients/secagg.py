"""The client's half of secure aggregation: sessions, checks and masks around training. Its twin: `server/secagg.py`.

Guarantees: nothing of an update leaves unmasked; what cannot be masked is not sent.
Guarantees: an attempt that this client took part in before, in whatever process, is refused.
Guarantees: a server that asks for less than the site's own floor is refused before any key is made.
Trust: server sees only masked vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from clients.asked import Sum
from clients.secagg_assisted import AssistedMember
from clients.secure_entry import Attempts, check_noise, check_planned, read_parameters
from clients.standing import Session, Standing
from fedml_core.errors import SecureAggregationError
from fedml_core.messages import Assignment, SecureAnswer, SecureWork
from fedml_core.ring import Encoding, encoding_from_table, ring_rows, summed
from fedml_core.secagg.client import ComplaintError
from fedml_core.secagg.secrets import Secret
from fedml_core.update import Update

__all__ = ["SecureMember"]


@dataclass
class _Held:
    """A session in progress and what its vector means."""

    session: Session
    encoding: Encoding
    members: int = 0


class SecureMember:
    """Answers the exchanges of secure sums for one client; holds the current session, and the next one at most.

    Args: train: returns the client's encoded update for an assignment with training.
    """

    def __init__(self, standing: Standing, train: Callable[[Assignment], Update]) -> None:
        self._standing, self._train = standing, train
        self._held: dict[bytes, _Held] = {}
        self._attempts = Attempts(standing)
        self._assisted = AssistedMember(standing, train, self._attempts)

    def answer(self, assignment: Assignment, work: SecureWork) -> SecureAnswer:
        """Return the answer to one exchange.

        Raises: RefusalError: if the site's own rules say no. SecureAggregationError: if the protocol is broken; the
            session is over then. What training raises is raised; the session is over then, too.
        """
        steps = {
            "advertise": self._advertise,
            "share": self._share,
            "mask": self._mask,
            "confirm": self._confirm,
            "unmask": self._unmask,
            **self._assisted.steps(),
        }
        if work.stage not in steps:
            raise SecureAggregationError(f"there is no exchange called {work.stage!r:.40}")
        try:
            return steps[work.stage](assignment, work.parts)
        except KeyError as error:
            self.wipe()
            raise SecureAggregationError(f"the exchange lacks its {error.args[0]!r:.80}") from error

    def wipe(self) -> None:
        """End every session."""
        for held in self._held.values():
            held.session.wipe()
        self._held.clear()
        self._assisted.wipe()

    def _advertise(self, assignment: Assignment, parts: Mapping[str, bytes]) -> SecureAnswer:
        # A new attempt by itself: whatever went before is over.
        self.wipe()
        return SecureAnswer({"advert": self._begin(assignment, parts["parameters"])})

    def _begin(self, assignment: Assignment, text: bytes) -> bytes:
        """Return the advert of a new session, after everything that can be checked before one."""
        standing, parameters = self._standing, read_parameters(self._standing, assignment, text)
        encoding = encoding_from_table(parameters.encoding, parameters.bits)
        self._attempts.begin(parameters)
        session = standing.open_session(parameters, standing.party)
        self._held[parameters.context] = _Held(session, encoding)
        return session.advertise()

    def _share(self, assignment: Assignment, parts: Mapping[str, bytes]) -> SecureAnswer:
        return SecureAnswer({"shares": self._shares_for(parts["context"], parts["bulletin"])})

    def _shares_for(self, context: bytes, message: bytes) -> bytes:
        session = self._find(context).session
        try:
            standing = self._standing
            bulletin = standing.read_bulletin(session.parameters, message, standing.roster, standing.verify)
            standing.floor.check_members(len(bulletin.members), bulletin.threshold)
            check_noise(self._find(context).encoding, session.parameters, len(bulletin.members))
            self._find(context).members = len(bulletin.members)
        except BaseException:
            session.wipe()
            raise
        return session.share(bulletin)

    def _mask(self, assignment: Assignment, parts: Mapping[str, bytes]) -> SecureAnswer:
        complaint = self.open(assignment, parts)
        if complaint is not None:
            return complaint
        held = self._find(parts["context"])
        try:
            update = self._train(assignment)
            with Secret.fresh(32) as rounding:
                vector = ring_rows(held.encoding, update, [rounding])[0]
        except BaseException:
            held.session.wipe()
            raise
        return self.close(assignment, parts, vector)

    def open(self, assignment: Assignment, parts: Mapping[str, bytes]) -> SecureAnswer | None:
        """Open the shares that were delivered; return a complaint if that is not possible."""
        session = self._find(parts["context"]).session
        if session.parameters.round != assignment.round:
            session.wipe()
            raise SecureAggregationError("the model is that of another round than the masks")
        try:
            check_planned(self._find(parts["context"]).encoding, assignment)
        except BaseException:
            session.wipe()
            raise
        try:
            session.receive(parts["delivery"], self._standing.bind(assignment))
        except ComplaintError as complaint:
            return SecureAnswer({"complaint": complaint.message})
        return None

    def close(self, assignment: Assignment, parts: Mapping[str, bytes], vector: NDArray[Any]) -> SecureAnswer:
        """Mask the vector, in place, and return the answer; it brings an advert for the next round if one is due."""
        answer = {"masked": self._find(parts["context"]).session.mask(vector)}
        if "next-parameters" in parts:
            # Only one session may be waiting for its round: the newest.
            for context in [context for context in self._held if context != parts["context"]]:
                self._held.pop(context).session.wipe()
            answer["next-advert"] = self._begin(assignment, parts["next-parameters"])
        return SecureAnswer(answer, vector)

    def encoding(self, context: bytes) -> Encoding:
        """Return what the vector of a session means."""
        return self._find(context).encoding

    def sum(self, context: bytes) -> Sum:
        """Return what a site's policy asks about the sum of a session: the fewest honest members that it may hold."""
        if self._assisted.contributes(context):
            return self._assisted.sum(context)
        held = self._find(context)
        parameters = held.session.parameters
        honest = parameters.minimum - parameters.corrupt(held.members)
        return Sum(max(0, honest), summed(held.encoding))

    @property
    def busy(self) -> bool:
        """Return whether a session is waiting to go on."""
        return bool(self._held) or self._assisted.busy

    @property
    def assisted(self) -> AssistedMember:
        """Return what answers the exchanges of assisted sums."""
        return self._assisted

    def _confirm(self, assignment: Assignment, parts: Mapping[str, bytes]) -> SecureAnswer:
        return SecureAnswer({"confirmation": self._find(parts["context"]).session.confirm(parts["survivors"])})

    def _unmask(self, assignment: Assignment, parts: Mapping[str, bytes]) -> SecureAnswer:
        session = self._find(parts["context"]).session
        if session.parameters.active:
            answer = {"unmasking": session.unmask(parts["quorum"])}
        else:
            session.confirm(parts["survivors"])
            answer = {"unmasking": session.unmask()}
        self._held.pop(parts["context"])
        if "next-bulletin" in parts:
            answer["next-shares"] = self._shares_for(parts["next-context"], parts["next-bulletin"])
        return SecureAnswer(answer)

    def _find(self, context: bytes) -> _Held:
        held = self._held.get(context)
        if held is None:
            raise SecureAggregationError("this client is in no such session; it may have begun anew")
        return held
