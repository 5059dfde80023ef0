"""The server's half of one secure sum: it carries messages, adds up masked vectors, and takes the masks off their sum.

Bonawitz et al. (2017), doi:10.1145/3133956.3133982, with the graph of Bell et al. (2020), doi:10.1145/3372297.3417885;
docs/secure-aggregation.md is the specification, and its twin is `client.py`. Messages of members are checked as they
come; whoever calls leaves out a member whose message raises, and the others go on.

Guarantees: the result is the sum of exactly the survivors' vectors modulo 2^bits, or an error; a wrong share never
    enters the sum.
Guarantees: it holds one vector, however many members there are.
Trust: whoever runs it sees masked vectors and their sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg import faults
from fedml_core.secagg.adverts import Advert, Verify, verify
from fedml_core.secagg.bulletin import Bulletin
from fedml_core.secagg.codec import Kind, Reader
from fedml_core.secagg.enrolment import Enrolment, require
from fedml_core.secagg.masks import ring_type
from fedml_core.secagg.opening import Opening
from fedml_core.secagg.pairing import SHARE_SIZE, bound_id
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.survivors import survivors_digest, write_quorum, write_survivors

__all__ = ["ServerSession"]


class ServerSession:
    """One attempt at one secure sum, from adverts to the unmasked sum.

    Args: cohort: who was asked. roster: identity keys by member; unused in semi-honest mode. threads: to expand masks.
    """

    def __init__(
        self,
        parameters: Parameters,
        cohort: Iterable[int],
        roster: Mapping[int, bytes],
        *,
        verify: Verify = verify,
        threads: int = 1,
    ) -> None:
        self.parameters = parameters
        self._roster, self._verify, self._threads = roster, verify, threads
        self._enrolment = Enrolment(parameters, cohort, roster, verify)
        self.sharers: tuple[int, ...] = ()
        self.binding = self.bound = b""
        self._masked: set[int] = set()
        self._total = np.zeros(parameters.length, ring_type(parameters.bits))
        self._survivors: tuple[int, ...] = ()
        self._to_confirm = b""
        self.confirmations: dict[int, bytes] = {}
        self._opening: Opening | None = None
        self._answered: set[int] = set()
        self.complaints: dict[int, tuple[int, ...]] = {}

    @property
    def cohort(self) -> frozenset[int]:
        """Return who was asked."""
        return self._enrolment.cohort

    @property
    def adverts(self) -> tuple[Advert, ...]:
        """Return the adverts that came, by ascending member."""
        return self._enrolment.adverts

    @property
    def closed(self) -> bool:
        """Return whether there is a bulletin."""
        return self._enrolment.closed

    @property
    def bulletin(self) -> Bulletin:
        """Return the bulletin, once adverts are closed."""
        return self._enrolment.bulletin

    @property
    def ready_to_mask(self) -> frozenset[int]:
        """Return who has sent shares so far."""
        return frozenset(self._enrolment.boxes)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Return whose sum it is, once masked vectors are closed."""
        return self._survivors

    @property
    def liars(self) -> set[int]:
        """Return who certainly sent wrong shares."""
        return set() if self._opening is None else self._opening.liars

    def receive_advert(self, member: int, message: bytes) -> None:
        """Take a member's advert; see `Enrolment`."""
        self._enrolment.receive_advert(member, message)

    def close_adverts(self) -> Bulletin:
        """Return the bulletin that every member is to be sent; see `Enrolment`."""
        return self._enrolment.close_adverts()

    def receive_shares(self, member: int, message: bytes) -> None:
        """Take a member's sealed shares."""
        require(not self.sharers, "shares came after they were closed")
        self._enrolment.receive_shares(member, message)

    def close_shares(self, binding: bytes) -> tuple[int, ...]:
        """Return who sent shares and is to be sent its delivery, now that model and work are known by `binding`.

        Raises: ThresholdError: if too few did.
        """
        bulletin = self.bulletin
        require(not self.sharers, "the shares are closed already")
        sharers = tuple(member for member in bulletin.members if member in self._enrolment.boxes)
        if len(sharers) < bulletin.fewest:
            raise ThresholdError(f"{len(sharers)} members sent shares, at least {bulletin.fewest} must")
        self.bound, self.binding, self.sharers = bound_id(bulletin, binding), binding, sharers
        return sharers

    def delivery(self, member: int) -> bytes:
        """Return the sealed shares for one member."""
        return self._enrolment.delivery(member)

    def receive_masked(self, member: int, message: bytes, vector: NDArray[Any]) -> None:
        """Add a member's masked vector to the total.

        Raises: SecureAggregationError: if it is masked for another model, work or session, or is no such vector.
        """
        self._require_due([member])
        self._check_bound(member, message)
        self._check_vector(vector)
        np.add(self._total, vector, out=self._total)
        self._masked.add(member)

    def receive_masked_sum(
        self, members: Sequence[int], total: NDArray[Any], messages: Mapping[int, bytes] | None = None
    ) -> None:
        """Add the sum of several members' masked vectors, which a simulation has taken already.

        Args: messages: what came with each member's vector, to be checked as `receive_masked` does.
        """
        self._require_due(members)
        for member in members if messages is not None else ():
            self._check_bound(member, (messages or {}).get(member, b""))
        self._check_vector(total)
        np.add(self._total, total, out=self._total)
        self._masked.update(members)

    def _check_bound(self, member: int, message: bytes) -> None:
        reader = Reader(message, Kind.MASKED)
        bound = reader.fixed(32)
        reader.finish()
        require(bound == self.bound, f"member {member} masked for another model, other work or another session")

    def _require_due(self, members: Sequence[int]) -> None:
        require(not self._survivors, "a masked vector came after the survivors were named")
        due = all(member in self._enrolment.boxes and member not in self._masked for member in members)
        require(bool(self.sharers) and due, "the member sent a vector before, or none is due")
        require(self.complaints.keys().isdisjoint(members), "a member that complained has dropped out")
        require(len(set(members)) == len(members), "a member is in the sum twice")

    def _check_vector(self, vector: NDArray[Any]) -> None:
        if vector.shape != self._total.shape or vector.dtype != self._total.dtype:
            raise SecureAggregationError(
                f"the masked vector must be {self._total.dtype} of shape {self._total.shape}, "
                f"got {vector.dtype} {vector.shape}"
            )

    def receive_complaint(self, member: int, message: bytes) -> None:
        """Take a member's word that it cannot open the shares of others; it drops out of this attempt."""
        waiting = bool(self.sharers) and member in self._enrolment.boxes and not self._survivors
        require(
            waiting and member not in self._masked and member not in self.complaints, "the complaint comes too late"
        )
        self.complaints[member] = faults.read_complaint(message, self._enrolment.senders_to(member))

    def at_fault(self) -> frozenset[int]:
        """Return who is to be left out of the next attempt because of complaints and wrong shares; see `faults`."""
        most = self.parameters.corrupt(len(self.bulletin.adverts)) if self.closed else 0
        opening = set() if self._opening is None else self._opening.at_fault
        return faults.judged(self.complaints, most) | opening

    def close_masked(self) -> bytes:
        """Return the message that names the survivors.

        Raises: ThresholdError: if they are too few. Nothing was revealed.
        """
        bulletin = self.bulletin
        survivors = tuple(sorted(self._masked))
        if len(survivors) < bulletin.fewest:
            raise ThresholdError(f"{len(survivors)} members sent masked vectors, at least {bulletin.fewest} must")
        alive = frozenset(survivors)
        for member in self.sharers:
            left = len(alive.intersection(bulletin.holders(member)))
            if left < bulletin.threshold:
                raise ThresholdError(
                    f"{left} holders of member {member}'s shares survived, the threshold is {bulletin.threshold}"
                )
        if not bulletin.connects(survivors):
            raise ThresholdError("the survivors fall apart into groups that share no masks")
        self._survivors, self._opening = survivors, Opening(bulletin, self.sharers, alive)
        self._to_confirm = survivors_digest(self.bound, survivors)
        return write_survivors(survivors)

    def receive_confirmation(self, member: int, message: bytes) -> None:
        """Take a member's signature under the survivors."""
        asked = bool(self._survivors) and member in self._masked
        require(asked and member not in self.confirmations, "the member confirmed before, or is gone")
        reader = Reader(message, Kind.CONFIRMATION)
        signature = reader.fixed(64)
        reader.finish()
        if self.parameters.active:
            valid = self._verify(self._roster.get(member, b""), signature, self._to_confirm)
            require(valid, f"member {member} did not sign the survivors that it was sent")
        self.confirmations[member] = signature

    def quorum(self) -> bytes:
        """Return the message that proves to each member that a quorum confirmed the same survivors.

        Raises: ThresholdError: if too few did.
        """
        needed = self.bulletin.quorum if self.parameters.active else 1
        if len(self.confirmations) < needed:
            raise ThresholdError(f"{len(self.confirmations)} members confirmed the survivors, the quorum is {needed}")
        return write_quorum({member: self.confirmations[member] for member in sorted(self.confirmations)[:needed]})

    @property
    def confirmed(self) -> tuple[int, ...]:
        """Return who confirmed and is to be sent the quorum."""
        return tuple(sorted(self.confirmations))

    def receive_unmasking(self, member: int, message: bytes) -> None:
        """Take a member's shares, one for each member whose box it had."""
        require(self._opening is not None, "the survivors are not named yet")
        due = self.confirmations if self.parameters.active else self._masked
        require(member in due and member not in self._answered, "the member unmasked before, or is gone")
        own = [member] if self.bulletin.complete else []
        owners = sorted(self._enrolment.senders_to(member) + own)
        reader = Reader(message, Kind.UNMASKING)
        require(reader.count(SHARE_SIZE) == len(owners), f"member {member} must send {len(owners)} shares")
        shares = [reader.fixed(SHARE_SIZE) for _ in owners]
        reader.finish()
        self._answered.add(member)
        if self._opening is not None:
            self._opening.add(member, owners, shares)

    @property
    def unmasked(self) -> tuple[int, ...]:
        """Return who sent its shares, ascending."""
        return tuple(sorted(self._answered))

    @property
    def masked_total(self) -> NDArray[Any]:
        """Return the sum as it is, with the masks that are still on it."""
        return self._total

    @property
    def ready(self) -> bool:
        """Return whether enough shares of every secret that is needed have come.

        Those are every survivor's seed, and the mask key of whoever sent shares and is gone.
        """
        return self._opening is not None and self._opening.ready

    @property
    def opened(self) -> bool:
        """Return whether no mask is left on the total, so that further shares are of no use."""
        return self._opening is not None and self._opening.finished

    @property
    def openable(self) -> int:
        """Return how many secrets can be opened that could not be when work was last done ahead."""
        return 0 if self._opening is None else self._opening.waiting

    def work_ahead(self) -> None:
        """Take those masks off the total whose secrets can be opened already."""
        if self._opening is not None:
            self._opening.take_off(self._total, self._opening.ripe(), self.bound, threads=self._threads)

    def unmask(self) -> NDArray[Any]:
        """Return the sum of the survivors' vectors modulo 2^bits, shape (length,).

        Raises: ThresholdError: if a secret has too few shares. SecureAggregationError: if one cannot be opened because
            shares of it are wrong.
        """
        if self._opening is None or not self.ready:
            raise ThresholdError(f"{len(self._answered)} members unmasked, the threshold is {self.bulletin.threshold}")
        self.work_ahead()
        while secrets := self._opening.stubborn():
            self._opening.take_off(self._total, secrets, self.bound, threads=self._threads)
        return self._total
