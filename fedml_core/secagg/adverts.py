"""A member's advertisement of its keys for one secure sum, signed by the identity that every site has pinned.

Guarantees: a signature is over the parameters and over everything that the advertisement says.
Trust: whoever holds a member's identity key is that member.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.codec import Kind, Reader, Writer
from fedml_core.secagg.parameters import Parameters, digest_of

__all__ = ["ADVERT_SIZE", "Advert", "Verify", "check_keys", "check_signature", "verify"]

Verify = Callable[[bytes, bytes, bytes], bool]
"""Says whether a signature (64 bytes) by a public key (32 bytes) over a message holds: `verify`, or with a memory."""

# No secret: whether a point is of low order is the same for every private key.
_PROBE = X25519PrivateKey.from_private_bytes(bytes(range(32)))

ADVERT_SIZE = 4 + 4 * 32 + 64


def verify(key: bytes, signature: bytes, message: bytes) -> bool:
    """Return whether an Ed25519 signature holds; a key that is none holds for nothing."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Advert:
    """What a member publishes about itself for one secure sum.

    `sealing_key`, `mask_key`: fresh X25519 public keys. `nonce`: 32 random bytes, its part in drawing the graph.
    `commitment`: to its self-mask's seed. `signature`: by its identity key over all of it; zeros in semi-honest mode.
    """

    member: int
    sealing_key: bytes
    mask_key: bytes
    nonce: bytes
    commitment: bytes
    signature: bytes = bytes(64)

    def signed_bytes(self, context: bytes) -> bytes:
        """Return what the signature is over."""
        return digest_of("advert", context, self.member.to_bytes(4, "big"), *self.values)

    @property
    def values(self) -> tuple[bytes, bytes, bytes, bytes]:
        """Return what no two members may have in common."""
        return self.sealing_key, self.mask_key, self.nonce, self.commitment

    def write(self, writer: Writer) -> Writer:
        """Add the advert to a message."""
        writer.number(self.member)
        for part in self.values:
            writer.fixed(part, 32)
        return writer.fixed(self.signature, 64)

    @classmethod
    def read(cls, reader: Reader) -> Advert:
        """Take an advert from a message."""
        member, values = reader.number(), [reader.fixed(32) for _ in range(4)]
        return cls(member, values[0], values[1], values[2], values[3], reader.fixed(64))

    def to_bytes(self) -> bytes:
        """Return the advert as a message of its own."""
        return self.write(Writer(Kind.ADVERT)).bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Advert:
        """Return the advert in a message.

        Raises: SecureAggregationError: if it is none.
        """
        reader = Reader(data, Kind.ADVERT)
        advert = cls.read(reader)
        reader.finish()
        return advert


def check_signature(parameters: Parameters, advert: Advert, roster: Mapping[int, bytes], verify: Verify) -> None:
    """Raise SecureAggregationError unless the advert's member is on the roster and signed it."""
    key = roster.get(advert.member)
    if key is None:
        raise SecureAggregationError(f"member {advert.member} is not on the pinned roster, or was revoked")
    if not verify(key, advert.signature, advert.signed_bytes(parameters.context)):
        raise SecureAggregationError(f"the advertisement of member {advert.member} is not signed by its identity key")


def check_keys(advert: Advert) -> None:
    """Raise SecureAggregationError if a key of the advert agrees on no secret: each neighbour would have to stop."""
    for key in (advert.sealing_key, advert.mask_key):
        try:
            _PROBE.exchange(X25519PublicKey.from_public_bytes(key))
        except ValueError as error:
            raise SecureAggregationError(
                f"member {advert.member} advertises a public key that keeps no secret, because of which all would stop"
            ) from error
