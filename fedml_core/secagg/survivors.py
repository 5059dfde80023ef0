"""What members confirm and prove to each other before anything is unmasked: whose vectors are in the sum.

Guarantees: survivors are members in ascending order, at least as many as may be revealed, and connected by masks.
Guarantees: a quorum is counted by members, each once, who signed the very same survivors.
Trust: the lists are the server's word; a quorum of signatures makes them everybody's.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.bulletin import Bulletin, Verify
from fedml_core.secagg.codec import Kind, Reader, Writer, packed
from fedml_core.secagg.parameters import digest_of

__all__ = [
    "SIGNATURE_SIZE",
    "Survivors",
    "confirmed_by",
    "read_survivors",
    "survivors_digest",
    "write_quorum",
    "write_survivors",
]

SIGNATURE_SIZE = 64


@dataclass(frozen=True, eq=False)
class Survivors:
    """A list that passed the checks which do not depend on who looks."""

    members: tuple[int, ...]
    alive: frozenset[int]
    message: bytes = field(repr=False)
    _proofs: dict[tuple[bytes, bytes, Verify], int] = field(default_factory=dict, repr=False)
    _digests: dict[bytes, bytes] = field(default_factory=dict, repr=False)

    def digest(self, bound: bytes) -> bytes:
        """Return what a confirmation of this list is signed over."""
        if (known := self._digests.get(bound)) is None:
            known = self._digests[bound] = survivors_digest(bound, self.members)
        return known

    def count(self, quorum: bytes, digest: bytes, verify: Callable[[], int], key: Verify) -> int:
        """Return what `verify` returns, asked once for the same quorum, digest and way to verify."""
        known = (quorum, digest, key)
        if known not in self._proofs:
            self._proofs.clear()
            self._proofs[known] = verify()
        return self._proofs[known]


_latest: weakref.WeakKeyDictionary[Bulletin, Survivors] = weakref.WeakKeyDictionary()
"""What was read last: virtual clients of one process hold one bulletin, and are all sent the same list."""


def write_survivors(survivors: Sequence[int]) -> bytes:
    """Return the message that names the survivors, in ascending order."""
    return Writer(Kind.SURVIVORS).numbers(survivors).bytes()


def read_survivors(bulletin: Bulletin, message: bytes) -> Survivors:
    """Return the survivors in a message.

    Raises: SecureAggregationError: if they are no members, out of order or not connected. ThresholdError: if they are
        too few.
    """
    known = _latest.get(bulletin)
    if known is not None and known.message == message:
        return known
    reader = Reader(message, Kind.SURVIVORS)
    members = reader.numbers()
    reader.finish()
    if any(after <= before for before, after in itertools.pairwise(members)):
        raise SecureAggregationError("the survivors are not in ascending order, each once")
    if strangers := [member for member in members if member not in bulletin.places]:
        raise SecureAggregationError(f"survivor {strangers[0]} is no member of this session")
    if len(members) < bulletin.fewest:
        raise ThresholdError(f"{len(members)} members survived, at least {bulletin.fewest} must")
    if not bulletin.connects(members):
        raise SecureAggregationError("the survivors fall apart into groups that share no masks")
    found = Survivors(tuple(members), frozenset(members), bytes(message))
    _latest[bulletin] = found
    return found


def survivors_digest(bound: bytes, survivors: Sequence[int]) -> bytes:
    """Return what a confirmation is signed over."""
    return digest_of("survivors", bound, packed(survivors))


def write_quorum(confirmations: Mapping[int, bytes]) -> bytes:
    """Return the message that proves who confirmed: each member's signature, in the order of the mapping."""
    writer = Writer(Kind.QUORUM).number(len(confirmations))
    for member, signature in confirmations.items():
        writer.number(member).fixed(signature, SIGNATURE_SIZE)
    return writer.bytes()


def confirmed_by(survivors: Survivors, quorum: bytes, digest: bytes, bulletin: Bulletin, verify: Verify) -> int:
    """Return how many survivors signed `digest`, by the message that says so.

    Raises: SecureAggregationError: if the message is none, or names a member twice or one that did not survive.
    """

    def counted() -> int:
        reader, last, valid = Reader(quorum, Kind.QUORUM), -1, 0
        signed = [(reader.number(), reader.fixed(SIGNATURE_SIZE)) for _ in range(reader.count(4 + SIGNATURE_SIZE))]
        reader.finish()
        for member, signature in signed:
            if member <= last or member not in survivors.alive:
                raise SecureAggregationError(f"member {member} is in the quorum twice, or did not survive")
            valid, last = valid + verify(bulletin.roster.get(member, b""), signature, digest), member
        return valid

    return survivors.count(quorum, digest, counted, verify)
