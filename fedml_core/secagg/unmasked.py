"""Secure sums without secrets, for simulations that ask what everything but the masks does.

Messages have their sizes, sets and thresholds are checked by the very same server session, and vectors are rounded and
added in the ring; keys, shares and masks are not made.

Guarantees: the sum, and what stops it, are those of the masked protocol with the same members and dropouts.
Trust: whoever runs it sees every vector. It protects nobody.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.bulletin import Advert, Bulletin
from fedml_core.secagg.client import BOX_SIZE, SHARE_SIZE, bound_id
from fedml_core.secagg.codec import Kind, Reader, Writer
from fedml_core.secagg.keys import fresh_bytes
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.party import Party
from fedml_core.secagg.server import ServerSession

__all__ = ["UnmaskedClientSession", "UnmaskedServerSession", "believe"]


def believe(key: bytes, signature: bytes, message: bytes) -> bool:
    """Return True: where nothing is signed, nothing is verified."""
    return True


class UnmaskedClientSession:
    """Takes the steps of a `ClientSession` and sends what has their sizes."""

    def __init__(self, parameters: Parameters, party: Party) -> None:
        self.parameters, self.member = parameters, party.number
        self._bulletin: Bulletin | None = None
        self._held: frozenset[int] = frozenset()
        self._bound = b""

    def advertise(self) -> bytes:
        """Return an advert of random bytes."""
        values = fresh_bytes(4 * 32)
        return Advert(self.member, values[:32], values[32:64], values[64:96], values[96:]).to_bytes()

    def share(self, bulletin: Bulletin) -> bytes:
        """Return boxes with nothing in them."""
        self._bulletin = bulletin
        count = len(bulletin.neighbours(self.member))
        return Writer(Kind.SHARES).number(count).fixed(bytes(count * BOX_SIZE), count * BOX_SIZE).bytes()

    def receive(self, delivery: bytes, binding: bytes) -> None:
        """Note whose boxes came.

        Raises: ThresholdError: if too few did.
        """
        bulletin = self._known()
        reader = Reader(delivery, Kind.DELIVERY)
        senders = []
        for _ in range(reader.count(4 + BOX_SIZE)):
            senders.append(reader.number())
            reader.fixed(BOX_SIZE)
        reader.finish()
        self._held = frozenset(senders) | ({self.member} if bulletin.complete else set())
        if len(self._held) < bulletin.threshold:
            raise ThresholdError(f"{len(self._held)} holders are left, the threshold is {bulletin.threshold}")
        self._bound = bound_id(bulletin, binding)

    def mask(self, vector: NDArray[Any]) -> bytes:
        """Leave the vector as it is."""
        return Writer(Kind.MASKED).fixed(self._bound, 32).bytes()

    def confirm(self, message: bytes) -> bytes:
        """Return a signature's worth of zeros."""
        return Writer(Kind.CONFIRMATION).fixed(bytes(64), 64).bytes()

    def unmask(self, quorum: bytes = b"") -> bytes:
        """Return shares of nothing."""
        count = len(self._held)
        return Writer(Kind.UNMASKING).number(count).fixed(bytes(count * SHARE_SIZE), count * SHARE_SIZE).bytes()

    def wipe(self) -> None:
        """There is nothing to wipe."""

    def _known(self) -> Bulletin:
        if self._bulletin is None:
            raise SecureAggregationError("the session has no bulletin yet")
        return self._bulletin


class UnmaskedServerSession(ServerSession):
    """A server session whose total has no masks on it."""

    @property
    def opened(self) -> bool:
        """Return whether enough shares would have come: there are no masks."""
        return self.ready

    def work_ahead(self) -> None:
        """There is nothing to take off."""

    def unmask(self) -> NDArray[Any]:
        """Return the total, once enough shares to open the masks would have come.

        Raises: ThresholdError: if they have not.
        """
        if not self.ready:
            raise ThresholdError("too few members unmasked to open every mask")
        return self.masked_total
