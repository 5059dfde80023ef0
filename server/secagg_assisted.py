"""The server's half of one-shot sums with assistants: one exchange with the cohort, four with a few assistants.

docs/secure-aggregation.md says what is exchanged. Clients whose contributions break the protocol, or that an assistant
cannot use, are excluded and named; an assistant that does not answer well, or refuses more than half of the
contributions, is lost, and the others go on. Its twin: `clients/secagg_assisted.py`.

Guarantees: a round is tried again only as long as no assistant was asked to sign its contributors.
Trust: the server sees masked vectors, the sum of their masks, and who contributed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from fedml_core.binding import binding_of
from fedml_core.errors import ConfigError, SecureAggregationError, ThresholdError
from fedml_core.messages import SecureAnswer
from fedml_core.model import ModelSpec
from fedml_core.ring import Encoding, RingSum, encoding_to_table, total_of
from fedml_core.secagg import transcript
from fedml_core.secagg.assistance import Assistance
from fedml_core.secagg.assisted_server import AssistedServer
from fedml_core.spans import span
from fedml_core.update import Total
from server.gathering import Order
from server.secure_exchange import Attempt, Exchanges, Handle, Witnesses, to_all
from server.secure_sums import SecureSums
from server.validation import Exclusion
from strategies.secure import AssistedOneShot, SecureAggregation

__all__ = ["AssistedGathering"]

_NO_GRAPH_BITS = 100
"""Of the statistical security of a sparse graph, in the parameters: there is none, so nothing of it can be lost."""


class AssistedGathering(SecureSums[AssistedOneShot]):
    """Takes a run's updates together as secure sums whose masks assistants take off; settings as `SecureSums`'.

    Raises: ConfigError: if an assistant is not on the roster.
    """

    looks_ahead = False
    counted = "contributors"
    kind = AssistedOneShot

    def __init__(
        self,
        strategy: SecureAggregation,
        spec: ModelSpec,
        metrics: Sequence[str],
        witnesses: Callable[[], Witnesses],
        **settings: Any,
    ) -> None:
        super().__init__(strategy, spec, metrics, witnesses, **settings)
        known = witnesses().keys
        strangers = [one for one in self.protocol.assistants if one not in known]
        if strangers and (known or self.protocol.active):
            raise ConfigError(
                f"the roster has no client {', '.join(map(str, strangers))}, which should assist in secure sums; name "
                "clients that are on it as assistants"
            )

    def attempt(self, exchanges: Exchanges, order: Order, cohort: Sequence[int]) -> Attempt:
        """Return an attempt at the sum of a cohort."""
        return _Attempt(self, exchanges, order, cohort)

    def own(self, encoding: Encoding) -> Mapping[str, Any]:
        """Return the parameters that name the assistants; there is no graph to bound."""
        p = self.protocol
        assistance = Assistance(p.assistants, p.threshold, p.lying)
        return {
            "encoding": assistance.within(encoding_to_table(encoding)),
            "dropout_share": 0.0,
            "security_bits": _NO_GRAPH_BITS,
        }

    def begin(self, order: Order, cohort: Sequence[int]) -> tuple[AssistedServer, Encoding]:
        """Return a fresh session, and what its vectors mean."""
        agreed = self.agreed(order, order.assignment.round, cohort)
        witnesses, each = agreed.witnesses, self.protocol.each
        session = AssistedServer(agreed.parameters, cohort, witnesses.keys, each=each, verify=witnesses.verify)
        return session, agreed.encoding


class _Attempt:
    """One attempt: its exchanges in order."""

    def __init__(self, gathering: AssistedGathering, exchanges: Exchanges, order: Order, cohort: Sequence[int]) -> None:
        self._gathering, self._exchanges, self._order, self._cohort = gathering, exchanges, order, cohort
        self._session: AssistedServer | None = None
        self._ring: NDArray[Any] | None = None
        self._lost: dict[int, str] = {}
        self.accepted: Sequence[int] = ()
        self.final = False

    def run(self) -> Total:
        """Return the decoded sum.

        Raises: SecureAggregationError: if the attempt cannot reach one.
        """
        self._session, encoding = self._gathering.begin(self._order, self._cohort)
        try:
            self._advertise(self._session)
            self._contribute(self._session)
            self._gather(self._session)
            self._witness(self._session)
            self._answer(self._session)
        except ThresholdError as error:
            lost = "; ".join(f"assistant {one}: {reason}" for one, reason in sorted(self._lost.items()))
            raise ThresholdError(f"{error} ({lost})" if lost else str(error)) from error
        self._ring, self.accepted = self._session.total(), self._session.contributors
        return total_of(encoding.decode(self._ring, len(self.accepted)))

    @property
    def opened(self) -> bool:
        """Return whether assistants were asked to sign, after which masks can be taken off."""
        return self.final

    def facts(self, total: Total) -> dict[str, Any]:
        """Return what is told of the protocol, once it ran."""
        session = self._session
        assert session is not None
        return {
            "contributors": len(session.contributors),
            "assistants": list(session.panel.assistants),
            "threshold": session.assistance.threshold,
            "quorum": session.panel.quorum,
            "active": session.parameters.active,
            "session": session.panel.session.hex(),
            "clipped": int(total.facts.get("clipped", 0)),
            "lost": [{"assistant": one, "reason": reason} for one, reason in sorted(self._lost.items())],
        }

    def at_fault(self) -> frozenset[int]:
        """Return whom an assistant refused that did not refuse nearly everybody."""
        refusals = {} if self._session is None else self._refusals(self._session)
        return frozenset(member for refused in refusals.values() for member in refused)

    def transcript(self) -> Mapping[str, Any] | None:
        """Return what was recorded, as far as it came."""
        return None if self._session is None else transcript.record(self._session, self._ring)

    def _advertise(self, session: AssistedServer) -> None:
        self._ask(
            session,
            "assist-advertise",
            to_all(session.assistance.assistants, {"parameters": session.parameters.to_text().encode()}),
            lambda one, answer: session.receive_advert(one, answer.parts["advert"]),
        )
        session.close_adverts(binding_of(self._order.assignment))

    def _contribute(self, session: AssistedServer) -> None:
        """Let the cohort train; each client's one message brings all that it has to say."""

        def contributed(client: int, answer: SecureAnswer) -> None:
            if answer.vector is None:
                raise SecureAggregationError("the answer lacks its masked vector")
            session.receive_contribution(client, answer.parts["contribution"], answer.vector)

        offer = {"parameters": session.parameters.to_text().encode(), "panel": session.panel.to_bytes}
        outcome = self._exchanges.ask(
            session.parameters.context,
            "contribute",
            to_all(self._cohort, offer),
            contributed,
            training=self._order.assignment,
        )
        self._exchanges.ledger.exclude(outcome.excluded)
        for arrival in outcome.gathered:
            assert isinstance(arrival.accumulator, RingSum)
            messages = {client: arrival.parts[client]["contribution"] for client in arrival.accepted}
            session.receive_contribution_sum(messages, arrival.accumulator.ring)

    def _gather(self, session: AssistedServer) -> None:
        given = {"panel": session.panel.to_bytes, "binding": session.binding}
        self._ask(
            session,
            "assist-gather",
            {one: {**given, "roundup": session.roundup(one)} for one in session.live},
            lambda one, answer: session.receive_gathered(one, answer.parts["gathered"]),
        )
        for one, refused in self._refusals(session).items():
            if 2 * len(refused) > len(session.contributions):
                self._lose(session, one, f"it refused {len(refused)} of {len(session.contributions)} contributions")
                continue
            reason = f"assistant {one} could not open its contribution, or it is not the signed one"
            self._exchanges.ledger.exclude(Exclusion(member, "secure-sum", reason) for member in refused)

    def _refusals(self, session: AssistedServer) -> dict[int, tuple[int, ...]]:
        return {one: refused for one, refused in session.refusals.items() if one not in self._lost}

    def _witness(self, session: AssistedServer) -> None:
        contributors = session.close_contributions()
        # Whoever signed in this round signs no other list in it.
        self.final = True
        self._ask(
            session,
            "assist-witness",
            to_all(session.live, {"contributors": contributors}),
            lambda one, answer: session.receive_witness(one, answer.parts["witness"]),
        )

    def _answer(self, session: AssistedServer) -> None:
        """Ask for the sums of masks until none is left; for those of an assistant that is lost, another one."""
        void: list[SecureAggregationError] = []

        def answered(one: int, answer: SecureAnswer) -> None:
            if answer.vector is None:
                raise SecureAggregationError("the answer lacks its sum of masks")
            try:
                with span("unmask"):
                    session.receive_answer(one, answer.parts["answer"], answer.vector)
            except SecureAggregationError as error:
                if not session.live:  # nobody can say which of two answers is wrong
                    void.append(error)
                raise

        while not session.ready:
            asked = session.requests()
            while asked:
                self._ask(session, "assist-answer", {one: {"request": due[0]} for one, due in asked.items()}, answered)
                if void:
                    raise void[0]
                asked = {one: due[1:] for one, due in asked.items() if due[1:] and one in session.live}

    def _ask(
        self, session: AssistedServer, stage: str, parts: Mapping[int, Mapping[str, bytes]], handle: Handle
    ) -> None:
        """Ask assistants; whoever does not answer well is lost for this attempt."""
        outcome = self._exchanges.ask(session.parameters.context, stage, parts, handle)
        reasons = {row.client: row.reason for row in outcome.excluded}
        for one in set(parts).difference(outcome.accepted):
            self._lose(session, one, reasons.get(one, "it did not answer"))

    def _lose(self, session: AssistedServer, assistant: int, reason: str) -> None:
        self._lost[assistant] = reason
        if session.desk.closed:
            session.lose(assistant)
