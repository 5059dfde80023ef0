"""The beginning of a server's session: adverts become a bulletin, and sealed shares are passed on.

Guarantees: what a member sends in its own name alone cannot stop the others: what each of them would refuse is refused
    as it arrives, and named.
Trust: it carries sealed boxes, and can open none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.adverts import Advert, Verify, check_keys, check_signature
from fedml_core.secagg.bulletin import Bulletin
from fedml_core.secagg.codec import Kind, Reader, Writer
from fedml_core.secagg.pairing import BOX_SIZE
from fedml_core.secagg.parameters import Parameters

__all__ = ["Enrolment", "require"]


def require(held: bool, message: str) -> None:
    """Raise SecureAggregationError with the message unless something holds."""
    if not held:
        raise SecureAggregationError(message)


class Enrolment:
    """Whom the server asked, who advertised, and the boxes of those who sent shares."""

    def __init__(
        self, parameters: Parameters, cohort: Iterable[int], roster: Mapping[int, bytes], verify: Verify
    ) -> None:
        self.parameters, self.cohort = parameters, frozenset(cohort)
        self._roster, self._verify = roster, verify
        self._adverts: dict[int, Advert] = {}
        self._values: set[bytes] = set()
        self._bulletin: Bulletin | None = None
        self.boxes: dict[int, bytes] = {}

    @property
    def closed(self) -> bool:
        """Return whether there is a bulletin."""
        return self._bulletin is not None

    @property
    def bulletin(self) -> Bulletin:
        """Return the bulletin, once adverts are closed."""
        if self._bulletin is None:
            raise SecureAggregationError("the adverts are still being collected")
        return self._bulletin

    @property
    def adverts(self) -> tuple[Advert, ...]:
        """Return the adverts that came, by ascending member."""
        return tuple(self._adverts[member] for member in sorted(self._adverts))

    def receive_advert(self, member: int, message: bytes) -> None:
        """Take a member's advert.

        Raises: SecureAggregationError: if it is not this member's own, its first, or signed by it.
        """
        advert = Advert.from_bytes(message)
        require(not self.closed, "an advert came after the bulletin")
        require(member in self.cohort and member not in self._adverts, "the member was not asked, or advertised twice")
        require(advert.member == member, f"member {member} advertises as member {advert.member}")
        if self.parameters.active:
            check_signature(self.parameters, advert, self._roster, self._verify)
        check_keys(advert)
        values = set(advert.values)
        if len(values) < len(advert.values) or not values.isdisjoint(self._values):
            raise SecureAggregationError(f"member {member} advertises a key, nonce or commitment that is there already")
        self._values |= values
        self._adverts[member] = advert

    def close_adverts(self) -> Bulletin:
        """Return the bulletin that every member is to be sent.

        Raises: ThresholdError: if too few advertised.
        """
        require(not self.closed, "the adverts are closed already")
        # Each signature was verified when its advert came, over these parameters and by this roster.
        self._bulletin = Bulletin.checked(self.parameters, self.adverts, self._roster, lambda *_: True)
        return self._bulletin

    def receive_shares(self, member: int, message: bytes) -> None:
        """Take a member's sealed shares."""
        places = self.bulletin.places
        require(member in places and member not in self.boxes, "the member sent shares before, or none are due")
        reader = Reader(message, Kind.SHARES)
        receivers = len(self.bulletin.neighbours(member))
        require(reader.count(BOX_SIZE) == receivers, f"member {member} must send {receivers} sealed shares")
        boxes = reader.fixed(receivers * BOX_SIZE)
        reader.finish()
        self.boxes[member] = boxes

    def senders_to(self, member: int) -> list[int]:
        """Return whose boxes a member is sent, ascending."""
        return [other for other in self.bulletin.neighbours(member) if other in self.boxes]

    def delivery(self, member: int) -> bytes:
        """Return the sealed shares for one member."""
        senders = self.senders_to(member)
        writer = Writer(Kind.DELIVERY).number(len(senders))
        for sender in senders:
            start = self.bulletin.place_beside(sender, member) * BOX_SIZE
            writer.number(sender).fixed(self.boxes[sender][start : start + BOX_SIZE], BOX_SIZE)
        return writer.bytes()
