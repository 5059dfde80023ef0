"""The server's part in a one-shot sum with assistants: it carries messages, adds vectors, and subtracts sums of masks.

docs/secure-aggregation.md is the specification; its twins are `assisted_client.py` and `assistant.py`. What others send
is checked as it comes; whoever calls leaves out a member whose message raises, calls `lose` for an assistant whose
message raises or does not come, and the others go on.

Guarantees: the result is the sum of exactly the contributors' vectors modulo 2^bits if the assistants summed the right
    masks, or an error.
Guarantees: it expands no mask; it holds one vector, and those whose roots the assistants have not opened yet.
Trust: whoever runs it sees masked vectors, the sum of their masks, and who contributed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.adverts import Verify, verify
from fedml_core.secagg.assistance import Assistance
from fedml_core.secagg.assisted import Contribution, Panel, check_vector, contributors_digest
from fedml_core.secagg.assisted_desk import AdvertDesk, require
from fedml_core.secagg.assisted_masks import MaskDesk
from fedml_core.secagg.codec import Kind, Reader, Writer
from fedml_core.secagg.masks import ring_type
from fedml_core.secagg.parameters import Parameters

__all__ = ["AssistedServer"]


class AssistedServer:
    """One attempt at one assisted sum, from the assistants' adverts to the unmasked sum.

    Args: cohort: who was asked to contribute. roster: identity keys by number; unused in semi-honest mode. each: how
        many assistants are asked for the same masks; with 2, their answers are compared.
    """

    def __init__(
        self,
        parameters: Parameters,
        cohort: Iterable[int],
        roster: Mapping[int, bytes],
        *,
        each: int = 1,
        verify: Verify = verify,
    ) -> None:
        self.parameters, self.assistance = parameters, Assistance.of(parameters)
        self._cohort, self._roster, self._verify = frozenset(cohort), roster, verify
        self.desk = AdvertDesk(parameters, roster, verify)
        self._binding = self._bound = b""
        self._contributions: dict[int, Contribution] = {}
        self._waiting: dict[frozenset[int], NDArray[Any]] = {}
        self._gathering: dict[int, set[int]] = {}
        self._accepted: dict[int, set[int]] = {}
        self._live: set[int] = set()
        self._summed: list[int] = []
        self._contributors: tuple[int, ...] = ()
        self._witnesses: dict[int, bytes] = {}
        self._masks = MaskDesk(self.assistance, each)
        self._total = np.zeros(parameters.length, ring_type(parameters.bits))
        self.refusals: dict[int, tuple[int, ...]] = {}

    @property
    def panel(self) -> Panel:
        """Return the panel, once adverts are closed."""
        return self.desk.panel

    @property
    def cohort(self) -> frozenset[int]:
        """Return who was asked to contribute."""
        return self._cohort

    @property
    def binding(self) -> bytes:
        """Return the digest of the model and the work that contributions are bound to."""
        return self._binding

    @property
    def contributions(self) -> Mapping[int, Contribution]:
        """Return what members sent beside their vectors, also of those who are not summed."""
        return MappingProxyType(self._contributions)

    @property
    def contributors(self) -> tuple[int, ...]:
        """Return whose sum it is, once contributions are closed."""
        return self._contributors

    @property
    def witnesses(self) -> Mapping[int, bytes]:
        """Return the assistants' signatures under the contributors."""
        return MappingProxyType(self._witnesses)

    @property
    def answered(self) -> Mapping[int, int]:
        """Return which assistant's sum of masks was subtracted, by the place of the subset."""
        return self._masks.answered

    @property
    def compared(self) -> set[int]:
        """Return the places of the subsets whose masks two assistants agreed on."""
        return self._masks.compared

    @property
    def live(self) -> tuple[int, ...]:
        """Return the assistants that are there."""
        return tuple(sorted(self._live))

    def receive_advert(self, assistant: int, message: bytes) -> None:
        """Take an assistant's advert; see `AdvertDesk`."""
        self.desk.receive(assistant, message)

    def close_adverts(self, binding: bytes) -> Panel:
        """Return the panel that every client and assistant is to be sent, with the model and work of `binding`.

        Raises: ThresholdError: if too few assistants advertised.
        """
        panel = self.desk.close()
        self._binding, self._bound = binding, panel.bound(binding)
        self._live = set(panel.assistants)
        self._accepted = {one: set() for one in self._live}
        return panel

    def lose(self, assistant: int) -> None:
        """Go on without an assistant; nobody waits for it any more."""
        self._live.discard(assistant)
        self._masks.lose(assistant)
        self._add_accepted()

    def receive_contribution(self, member: int, message: bytes, vector: NDArray[Any]) -> None:
        """Take a member's message and its masked vector, which becomes the session's own.

        Raises: SecureAggregationError: if it is not this member's own, its first, signed by it, and for this work.
        """
        contribution = self._read(member, message)
        check_vector(self.parameters, vector, "the masked vector")
        self._contributions[member], self._waiting[frozenset({member})] = contribution, vector

    def receive_contribution_sum(self, messages: Mapping[int, bytes], vector: NDArray[Any]) -> None:
        """Take many members' messages and the sum of their masked vectors, which a simulation has taken already.

        It is in the sum if every assistant that is there accepts all of these members; otherwise none of them is.
        Raises: SecureAggregationError: as `receive_contribution`, for any of them; then nothing was taken.
        """
        contributions = {member: self._read(member, message) for member, message in messages.items()}
        check_vector(self.parameters, vector, "the sum of masked vectors")
        if contributions:
            self._contributions.update(contributions)
            self._waiting[frozenset(contributions)] = vector

    def _read(self, member: int, message: bytes) -> Contribution:
        """Return a member's contribution, checked."""
        panel = self.panel
        require(member in self._cohort, f"member {member} was not asked to contribute")
        require(member not in self._contributions, f"member {member} contributed before")
        require(not self._contributors, "a contribution came after the contributors were named")
        reader = Reader(message, Kind.CONTRIBUTION)
        bound = reader.fixed(32)
        require(bound == self._bound, f"member {member} masked for another model, other work or another session")
        contribution = Contribution.read(reader, self.assistance, panel.assistants)
        reader.finish()
        require(contribution.member == member, f"member {member} contributes as member {contribution.member}")
        if self.parameters.active:
            contribution.check(self._bound, self._roster, self._verify)
        return contribution

    def roundup(self, assistant: int) -> bytes:
        """Return the message with the contributions that an assistant was not sent yet, to be sent now.

        Raises: SecureAggregationError: if its reply to the last one did not come yet.
        """
        require(assistant in self._live, f"assistant {assistant} is not there")
        require(assistant not in self._gathering, f"assistant {assistant} did not reply to the last roundup yet")
        fresh = set(self._contributions) - self._accepted[assistant] - set(self.refusals.get(assistant, ()))
        self._gathering[assistant] = fresh
        writer = Writer(Kind.ROUNDUP).number(len(fresh))
        for member in sorted(fresh):
            self._contributions[member].to(assistant).write(writer)
        return writer.bytes()

    def receive_gathered(self, assistant: int, message: bytes) -> None:
        """Take an assistant's word which of the contributions that it was sent cannot be summed.

        A contribution that any assistant refuses is left out: `refusals` names who refused whom.
        """
        reader = Reader(message, Kind.REFUSALS)
        refused = set(reader.numbers())
        reader.finish()
        require(assistant in self._live, f"assistant {assistant} is not there")
        require(not self._contributors, "an assistant gathered after the contributors were named")
        fresh = self._gathering.get(assistant)
        if fresh is None or not refused <= fresh:
            raise SecureAggregationError(f"assistant {assistant} replies to contributions that it was not sent")
        del self._gathering[assistant]
        self._accepted[assistant].update(fresh - refused)
        if refused:
            self.refusals[assistant] = tuple(sorted({*self.refusals.get(assistant, ()), *refused}))
        self._add_accepted()

    def _add_accepted(self) -> None:
        """Add the vectors that every assistant which is there can unmask, and let go of them."""
        if not self._live or self._contributors:
            return
        accepted = set(self._contributions).intersection(*(self._accepted[one] for one in self._live))
        for members in [members for members in self._waiting if members <= accepted]:
            np.add(self._total, self._waiting.pop(members), out=self._total)
            self._summed.extend(members)

    def close_contributions(self) -> bytes:
        """Return the message that names the contributors: everybody whom all assistants that are there accepted.

        Raises: ThresholdError: if they, or the assistants, are too few. Nothing was revealed.
        """
        self._require_quorum(self._live)
        if len(self._summed) < self.parameters.minimum:
            counts = f"{len(self._summed)} contributions were accepted, {sum(map(len, self._waiting))} were not"
            raise ThresholdError(f"{counts}; the minimum is {self.parameters.minimum}")
        self._contributors = tuple(sorted(self._summed))
        self._waiting.clear()
        return Writer(Kind.CONTRIBUTORS).numbers(self._contributors).bytes()

    def _require_quorum(self, assistants: Collection[int]) -> None:
        needed = self.panel.quorum
        if len(assistants) < needed:
            raise ThresholdError(f"{len(assistants)} assistants are left, the quorum is {needed}")

    def contributors_digest(self) -> bytes:
        """Return what the assistants sign."""
        chosen = (self._contributions[member].digest(self._bound) for member in self._contributors)
        return contributors_digest(self._bound, chosen)

    def receive_witness(self, assistant: int, message: bytes) -> None:
        """Take an assistant's signature under the contributors."""
        require(bool(self._contributors), "an assistant signed before the contributors were named")
        require(assistant in self._live, f"assistant {assistant} is not there")
        require(assistant not in self._witnesses, f"assistant {assistant} signed before")
        reader = Reader(message, Kind.WITNESS)
        signature = reader.fixed(64)
        reader.finish()
        if self.parameters.active:
            valid = self._verify(self._roster.get(assistant, b""), signature, self.contributors_digest())
            require(valid, f"assistant {assistant} did not sign the contributors that it was sent")
        self._witnesses[assistant] = signature

    def requests(self) -> dict[int, tuple[bytes, ...]]:
        """Return the messages that assistants are to be sent now: for all masks that nobody answered or is asked for.

        Call it when all that are there signed, and again after `lose`.
        Raises: ThresholdError: if too few assistants signed, or none is left for a mask.
        """
        self._require_quorum(self._witnesses)
        asked = self._masks.ask([one for one in self._witnesses if one in self._live])
        return {one: tuple(self._request(subsets) for subsets in listed) for one, listed in asked.items()}

    def _request(self, subsets: tuple[int, ...]) -> bytes:
        writer = Writer(Kind.WITNESSES).number(len(self._witnesses))
        for assistant in sorted(self._witnesses):
            writer.number(assistant).fixed(self._witnesses[assistant], 64)
        return writer.numbers(subsets).bytes()

    def receive_answer(self, assistant: int, message: bytes, vector: NDArray[Any]) -> None:
        """Subtract an assistant's sum of masks, or compare it with another's for the same masks.

        Raises: SecureAggregationError: if it was not asked for, is no such vector, or differs from the other one: then
            one of both is wrong, nobody can say which, and the attempt is void.
        """
        reader = Reader(message, Kind.ANSWER)
        subsets = tuple(reader.numbers())
        reader.finish()
        self._masks.require_asked(assistant, subsets)
        check_vector(self.parameters, vector, "the sum of masks")
        try:
            self._masks.take(assistant, subsets, vector, self._total)
        except SecureAggregationError:
            self._live.clear()
            raise

    @property
    def ready(self) -> bool:
        """Return whether every mask is off the sum, and every comparison made that was asked for."""
        return self._masks.ready

    def total(self) -> NDArray[Any]:
        """Return the sum of the contributors' vectors modulo 2^bits, shape (length,).

        Raises: ThresholdError: if masks are still on it.
        """
        if not self.ready:
            raise ThresholdError(f"the masks of {len(self._masks.left)} subsets are still on the sum, or not compared")
        return self._total
