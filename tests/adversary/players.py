"""A secure sum among honest members in one process, exchange by exchange, for whoever wants to disturb it.

`World` carries the messages as an honest server does; a test that plays the server takes the sessions and does
otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedml_core.secagg import shamir
from fedml_core.secagg.bulletin import Bulletin, verify
from fedml_core.secagg.client import BOX_SIZE, SHARE_SIZE, ClientSession
from fedml_core.secagg.codec import Kind, Reader
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.party import Party
from fedml_core.secagg.server import ServerSession

BINDING = bytes(range(32))
NOBODY: tuple[frozenset[int], ...] = (frozenset(),) * 5

_FIELDS: Mapping[str, Any] = {
    "run": "r",
    "round": 1,
    "attempt": 0,
    "length": 8,
    "bits": 32,
    "encoding": {},
    "minimum": 2,
    "corrupt_share": 0.0,
    "dropout_share": 0.0,
    "roster": "ab",
}


def parameters_of(**changes: Any) -> Parameters:
    return Parameters(**{**_FIELDS, **changes})


@cache
def identity(member: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"identity %d" % member).digest())


@cache
def public(member: int) -> bytes:
    return identity(member).public_key().public_bytes_raw()


def roster_of(members: Iterable[int]) -> dict[int, bytes]:
    return {member: public(member) for member in members}


class Remembering:
    """`verify`, which checks each signature once."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, bytes, bytes], bool] = {}

    def __call__(self, key: bytes, signature: bytes, message: bytes) -> bool:
        asked = (key, signature, message)
        if asked not in self._known:
            self._known[asked] = verify(key, signature, message)
        return self._known[asked]


class World:
    """Members 0 to n - 1, their vectors and an honest server, which loses whom it is told to at each exchange."""

    def __init__(
        self,
        count: int,
        *,
        kind: Callable[..., ClientSession] = ClientSession,
        vectors: Mapping[int, NDArray[Any]] | None = None,
        seed: int = 0,
        **changes: Any,
    ) -> None:
        self.parameters = parameters_of(**changes)
        self.members = range(count)
        self.roster = roster_of(self.members)
        self.verify = Remembering()
        self.clients = {member: self.client(member, kind) for member in self.members}
        self.server = ServerSession(self.parameters, self.members, self.roster, verify=self.verify)
        self.vectors = dict(vectors or vectors_of(self.parameters, self.members, seed))

    def client(self, member: int, kind: Callable[..., ClientSession] = ClientSession) -> ClientSession:
        return kind(self.parameters, Party(member, self.roster, identity(member).sign, self.verify))

    @property
    def bulletin(self) -> Bulletin:
        return self.server.bulletin

    def advertise(self, lost: Collection[int] = ()) -> Bulletin:
        for member in self.members:
            if member not in lost:
                self.server.receive_advert(member, self.clients[member].advertise())
        return self.server.close_adverts()

    def share(self, lost: Collection[int] = (), binding: bytes = BINDING) -> tuple[int, ...]:
        for member in self.bulletin.members:
            if member not in lost:
                self.server.receive_shares(member, self.share_of(member))
        return self.server.close_shares(binding)

    def share_of(self, member: int) -> bytes:
        client = self.clients[member]
        # One bulletin for everybody, as in a simulation: the members pin the very same roster.
        return client.share(self.bulletin)

    def masked(self, member: int, binding: bytes = BINDING, delivery: bytes | None = None) -> tuple[bytes, Any]:
        client, vector = self.clients[member], self.vectors[member].copy()
        client.receive(self.server.delivery(member) if delivery is None else delivery, binding)
        return client.mask(vector), vector

    def mask(self, lost: Collection[int] = ()) -> bytes:
        for member in self.server.sharers:
            if member not in lost:
                self.server.receive_masked(member, *self.masked(member))
        return self.server.close_masked()

    def confirm(self, survivors: bytes, lost: Collection[int] = ()) -> bytes:
        for member in self.server.survivors:
            if member not in lost:
                self.server.receive_confirmation(member, self.clients[member].confirm(survivors))
        return self.server.quorum()

    def unmask(self, quorum: bytes, lost: Collection[int] = ()) -> NDArray[Any]:
        for member in self.server.confirmed:
            if member not in lost:
                self.server.receive_unmasking(member, self.clients[member].unmask(quorum))
        return self.server.unmask()

    def run(self, lost: Sequence[Collection[int]] = NOBODY) -> NDArray[Any]:
        self.advertise(lost[0])
        self.share(lost[1])
        return self.unmask(self.confirm(self.mask(lost[2]), lost[3]), lost[4])

    def until_masked(self, lost: Sequence[Collection[int]] = NOBODY) -> bytes:
        """Take the first exchanges; return the message that names the survivors."""
        self.advertise(lost[0])
        self.share(lost[1])
        return self.mask(lost[2])

    def sum_of(self, members: Iterable[int]) -> NDArray[Any]:
        total = np.zeros_like(self.vectors[0])
        for member in members:
            total += self.vectors[member]
        return total


def vectors_of(parameters: Parameters, members: Iterable[int], seed: int = 0) -> dict[int, NDArray[Any]]:
    random = np.random.default_rng(seed)
    bits = parameters.bits
    return {
        member: random.integers(0, 2**bits, parameters.length, np.uint64).astype(f"<u{bits // 8}") for member in members
    }


def opened_by(message: bytes) -> list[bytes]:
    """Return the shares in an unmasking message."""
    reader = Reader(message, Kind.UNMASKING)
    shares = [reader.fixed(SHARE_SIZE) for _ in range(reader.count(SHARE_SIZE))]
    reader.finish()
    return shares


def kinds_of(shares: Mapping[int, bytes], held: Mapping[int, bytes]) -> dict[int, str]:
    """Return, for each owner, whether the share given was that of its "seed" or of its "key"."""
    return {owner: "seed" if share == held[owner][:SHARE_SIZE] else "key" for owner, share in shares.items()}


def secrets_held(client: ClientSession) -> dict[int, bytes]:
    """Return the plain boxes that a member holds: a colluding member hands them to the server."""
    return {owner: bytes(secret.view()) for owner, secret in client._held.items()}


def opened(bulletin: Bulletin, owner: int, shares: Mapping[int, bytes]) -> bytes:
    """Return the secret that one kind of share of an owner, by holder, opens; at least a threshold of them."""
    holders = bulletin.holders(owner)
    chosen = sorted(shares)[: bulletin.threshold]
    rows = np.stack([shamir.from_bytes(shares[holder]) for holder in chosen])[:, None]
    return bytes(shamir.reconstruct([holders.index(holder) + 1 for holder in chosen], rows)[0])


def boxes_of(delivery: bytes) -> dict[int, bytes]:
    """Return the sealed boxes in a delivery, by sender."""
    reader = Reader(delivery, Kind.DELIVERY)
    return {reader.number(): reader.fixed(BOX_SIZE) for _ in range(reader.count(4 + BOX_SIZE))}
