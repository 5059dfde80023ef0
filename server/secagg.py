"""The server's half of secure aggregation: the exchanges of a round over any channel. Its twin is `clients/secagg.py`.

docs/secure-aggregation.md says what is exchanged. Members whose messages break the protocol are excluded and named; the
round goes on as long as enough are left, and otherwise begins anew with fresh keys.

Trust: the server sees masked vectors and their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from fedml_core.binding import binding_of
from fedml_core.bulk import GatheredArrival
from fedml_core.errors import SecureAggregationError
from fedml_core.messages import Assignment, SecureAnswer
from fedml_core.ring import Encoding, RingSum, encoding_to_table, total_of
from fedml_core.secagg import transcript
from fedml_core.secagg.server import ServerSession
from fedml_core.secagg.unmasked import UnmaskedServerSession
from fedml_core.spans import span
from fedml_core.update import Total
from server.gathering import Order
from server.secure_exchange import Attempt, Exchanges, Handle, to_all
from server.secure_sums import SecureSums
from strategies.secure import SecAggPlus

__all__ = ["SecureGathering"]

_WORTH_OPENING = 32
"""How many secrets are opened at a time while others are waited for: each time goes through the whole sum."""


class SecureGathering(SecureSums[SecAggPlus]):
    """Takes a run's updates together as secure sums whose masks cancel; settings as `SecureSums`'."""

    looks_ahead = True
    counted = "survivors"
    kind = SecAggPlus
    _prepared: _Prepared | None = None

    def attempt(self, exchanges: Exchanges, order: Order, cohort: Sequence[int]) -> Attempt:
        """Return an attempt at the sum of a cohort."""
        return _Attempt(self, exchanges, order, cohort)

    def own(self, encoding: Encoding) -> Mapping[str, Any]:
        """Return the parameters that bound the graph of members."""
        return {
            "encoding": encoding_to_table(encoding),
            "dropout_share": self.protocol.dropout_share,
            "security_bits": self.protocol.security_bits,
        }

    def take_prepared(self, cohort: Sequence[int]) -> _Prepared | None:
        """Return the session that the last round prepared, if it is for exactly this cohort and all of it is ready."""
        prepared, self._prepared = self._prepared, None
        if prepared is None or set(prepared.session.ready_to_mask) != set(cohort):
            return None
        return prepared

    def begin(self, order: Order, round_number: int, cohort: Sequence[int]) -> _Prepared:
        """Return a fresh session."""
        agreed = self.agreed(order, round_number, cohort)
        witnesses = agreed.witnesses
        kind = ServerSession if self.strategy.draw_masks else UnmaskedServerSession
        session = kind(agreed.parameters, cohort, witnesses.keys, verify=witnesses.verify, threads=self.threads)
        return _Prepared(session, agreed.encoding)

    def keep(self, prepared: _Prepared | None) -> None:
        """Keep a session that is ready for the next round."""
        self._prepared = prepared


@dataclass(frozen=True)
class _Prepared:
    """A session and what its vectors mean."""

    session: ServerSession
    encoding: Encoding

    @property
    def context(self) -> bytes:
        return self.session.parameters.context

    def offer(self) -> dict[str, bytes]:
        return {"parameters": self.session.parameters.to_text().encode()}


class _Attempt:
    """One attempt: its exchanges in order."""

    final = False  # members refuse to unmask twice, and a new attempt has fresh keys

    def __init__(self, gathering: SecureGathering, exchanges: Exchanges, order: Order, cohort: Sequence[int]) -> None:
        self._gathering, self._exchanges, self._order, self._cohort = gathering, exchanges, order, cohort
        self.accepted: Sequence[int] = ()
        self.opened = False
        self._next: _Prepared | None = None
        self.session: ServerSession | None = None
        self.ring: NDArray[Any] | None = None

    def run(self) -> Total:
        """Return the decoded sum.

        Raises: SecureAggregationError: if the attempt cannot reach one.
        """
        prepared = self._gathering.take_prepared(self._cohort) or self._prepare()
        self.session = session = prepared.session
        sharers = session.close_shares(binding_of(self._order.assignment))
        self._begin_next()
        self._mask(prepared, sharers)
        survivors = session.close_masked()
        if session.parameters.active:
            self._exchange(
                prepared,
                "confirm",
                to_all(session.survivors, {"survivors": survivors}),
                lambda client, answer: session.receive_confirmation(client, answer.parts["confirmation"]),
            )
        self._unmask(prepared, survivors)
        with span("unmask"):
            self.ring = session.unmask()
        self._gathering.keep(self._next)
        self.accepted = session.survivors
        return total_of(prepared.encoding.decode(self.ring, len(session.survivors)))

    def facts(self, total: Total) -> dict[str, Any]:
        """Return what is told of the protocol, once it ran."""
        session = self.session
        assert session is not None
        bulletin = session.bulletin
        return {
            "members": len(bulletin.members),
            "survivors": len(session.survivors),
            "degree": bulletin.degree,
            "threshold": bulletin.threshold,
            "quorum": bulletin.quorum if session.parameters.active else None,
            "active": session.parameters.active,
            "session": bulletin.session.hex(),
            "clipped": int(total.facts.get("clipped", 0)),
            "liars": sorted(session.liars),
        }

    def at_fault(self) -> frozenset[int]:
        """Return who is left out of the next attempt."""
        return frozenset() if self.session is None else frozenset(self.session.at_fault())

    def transcript(self) -> Mapping[str, Any] | None:
        """Return what was recorded, as far as it came."""
        return None if self.session is None else transcript.record(self.session, self.ring)

    def _prepare(self) -> _Prepared:
        """Ask for adverts and shares in exchanges of their own."""
        prepared = self._gathering.begin(self._order, self._order.assignment.round, self._cohort)
        self.session = session = prepared.session
        self._exchange(
            prepared,
            "advertise",
            to_all(self._cohort, prepared.offer()),
            lambda client, answer: session.receive_advert(client, answer.parts["advert"]),
        )
        bulletin = session.close_adverts()
        self._exchange(
            prepared,
            "share",
            to_all(bulletin.members, {"bulletin": bulletin.to_bytes}),
            lambda client, answer: session.receive_shares(client, answer.parts["shares"]),
        )
        return prepared

    def _begin_next(self) -> None:
        """Offer the next round to those who will be in it, if all of them are in this one."""
        assert self.session is not None
        following = self._order.next_cohort
        if following and set(following) <= set(self.session.ready_to_mask):
            self._next = self._gathering.begin(self._order, self._order.assignment.round + 1, following)

    def _mask(self, prepared: _Prepared, sharers: Sequence[int]) -> None:
        session, coming = prepared.session, self._next
        offered = frozenset(self._order.next_cohort) if coming else frozenset()
        offer = {f"next-{name}": part for name, part in coming.offer().items()} if coming else {}

        def masked(client: int, answer: SecureAnswer) -> None:
            if "complaint" in answer.parts:
                session.receive_complaint(client, answer.parts["complaint"])
                raise SecureAggregationError("it could not open shares that it was sent, and dropped out")
            if answer.vector is None:
                raise SecureAggregationError("the answer lacks its masked vector")
            with span("accumulate"):
                session.receive_masked(client, answer.parts["masked"], answer.vector)
            if coming is not None and "next-advert" in answer.parts:
                coming.session.receive_advert(client, answer.parts["next-advert"])

        sent = {
            member: {"delivery": session.delivery(member), **(offer if member in offered else {})} for member in sharers
        }
        for arrival in self._exchange(prepared, "mask", sent, masked, self._order.assignment):
            assert isinstance(arrival.accumulator, RingSum)
            messages = {client: parts["masked"] for client, parts in arrival.parts.items()}
            session.receive_masked_sum(arrival.accepted, arrival.accumulator.ring, messages)
            for client, parts in arrival.parts.items():
                if coming is not None and "next-advert" in parts:
                    coming.session.receive_advert(client, parts["next-advert"])

    def _unmask(self, prepared: _Prepared, survivors: bytes) -> None:
        session, coming = prepared.session, self._next
        # Shares that arrive after this attempt was given up could still open its sum.
        self.opened = True
        asked = session.confirmed if session.parameters.active else session.survivors
        proof = {"quorum": session.quorum()} if session.parameters.active else {"survivors": survivors}
        extra, members = self._next_bulletin()

        def unmasking(client: int, answer: SecureAnswer) -> None:
            session.receive_unmasking(client, answer.parts["unmasking"])
            if coming is not None and "next-shares" in answer.parts:
                coming.session.receive_shares(client, answer.parts["next-shares"])

        def opened() -> bool:
            """Take masks off while replies arrive; whoever is slow is waited for only if it brings the next shares."""
            if session.ready or session.openable >= _WORTH_OPENING:
                with span("unmask"):
                    session.work_ahead()
            return session.opened and self._next is None

        parts = {member: {**proof, **(extra if member in members else {})} for member in asked}
        self._exchange(prepared, "unmask", parts, unmasking, enough=opened)

    def _next_bulletin(self) -> tuple[dict[str, bytes], frozenset[int]]:
        if self._next is None:
            return {}, frozenset()
        try:
            bulletin = self._next.session.close_adverts()
        except SecureAggregationError:
            self._next = None
            return {}, frozenset()
        context = {"next-context": self._next.context, "next-bulletin": bulletin.to_bytes}
        return context, frozenset(bulletin.members)

    def _exchange(
        self,
        prepared: _Prepared,
        stage: str,
        parts: Mapping[int, Mapping[str, bytes]],
        handle: Handle,
        training: Assignment | None = None,
        enough: Callable[[], bool] | None = None,
    ) -> Sequence[GatheredArrival]:
        """Send each member its parts, handle the answers, and return what a simulation gathered."""
        outcome = self._exchanges.ask(prepared.context, stage, parts, handle, training=training, enough=enough)
        self._exchanges.ledger.exclude(outcome.excluded)
        return outcome.gathered
