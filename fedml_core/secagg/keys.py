"""Keys of one secure sum: X25519 agreement (RFC 7748), HKDF-SHA256 (RFC 5869) and sealed boxes (AES-256-GCM).

Guarantees: keys that differ in purpose, session or any member, or in the members' order, are derived from different
    inputs: every part that is hashed carries its type and its length.
Guarantees: what was sealed opens only under the same agreed secret, session, sender and receiver.
Trust: whoever knows an agreed secret and the session knows the keys; the server knows neither member's.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import struct
from typing import NoReturn, Self, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.secrets import Secret, SecretBytes

__all__ = ["KEY_SIZE", "TAG_SIZE", "KeyPair", "commitment", "derive", "encoded", "fresh_bytes", "open_sealed", "seal"]

KEY_SIZE = 32
TAG_SIZE = 16
_NUMBER = struct.Struct(">cQQ")
_DOMAIN = "fedveil/secagg/1"
# Fixed: every sealing key is derived for one session and one direction, and a sender seals once to each receiver.
_NONCE = bytes(12)


@final
class KeyPair:
    """An X25519 key pair for one session, which owns `secret`; as a context manager it wipes it at the end.

    Guarantees: neither the `repr` of a pair nor pickling it gives away the secret half.
    """

    __slots__ = ("_private", "_secret", "public")

    def __init__(self, secret: Secret) -> None:
        if len(secret) != KEY_SIZE:
            raise SecureAggregationError(f"a secret key must have {KEY_SIZE} bytes, got {len(secret)}")
        self._secret = secret
        # Kept as long as the secret: to make it anew costs as much as an agreement. The library wipes what it frees.
        self._private: X25519PrivateKey | None = X25519PrivateKey.from_private_bytes(secret.view())
        self.public = self._private.public_key().public_bytes_raw()

    @classmethod
    def fresh(cls) -> Self:
        """Return a new pair from the operating system's randomness."""
        return cls(Secret.fresh(KEY_SIZE))

    @classmethod
    def of(cls, secret: SecretBytes) -> Self:
        """Return the pair of a secret half, which is copied."""
        return cls(Secret(_view(secret)))

    @classmethod
    def from_secret(cls, secret: SecretBytes, advertised: bytes, owner: int) -> Self:
        """Return the pair of a lost member, from its reconstructed secret, which is copied.

        Guarantees: the returned pair's public key is the advertised one.
        Raises: SecureAggregationError: naming the owner, if it is not.
        """
        pair = cls.of(secret)
        if not hmac.compare_digest(pair.public, advertised):
            pair.wipe()
            raise SecureAggregationError(
                f"the reconstructed key of member {owner} does not belong to the public key that it advertised"
            )
        return pair

    def agree(self, public: bytes, peer: int) -> Secret:
        """Return the secret that this pair shares with `peer`'s public key.

        Guarantees: a public key that would make the secret known to everybody (a point of low order) is refused.
        Raises: SecureAggregationError: naming the peer, if its public key is refused.
        """
        self._secret.view()  # raises once the secret was wiped, by whoever
        try:
            known = X25519PublicKey.from_public_bytes(public)
            private = self._private or X25519PrivateKey.from_private_bytes(self._secret.view())
            shared = private.exchange(known)
        except ValueError as error:
            raise SecureAggregationError(
                f"the public key of member {peer} is refused: it is not a point that keeps a secret"
            ) from error
        return Secret(shared)

    def secret(self) -> Secret:
        """Return a copy of the secret half, for making shares of it; wipe it after use."""
        return Secret(self._secret.view())

    def wipe(self) -> None:
        """Overwrite the secret half; the public one stays."""
        self._private = None
        self._secret.wipe()

    def __enter__(self) -> Self:
        """Return the pair, whose secret half is wiped at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wipe the secret half."""
        self.wipe()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied."""
        raise SecureAggregationError("a key pair holds a secret and is neither copied nor stored")

    def __repr__(self) -> str:
        """Return the public half."""
        return f"KeyPair(public={self.public.hex()})"


def derive(secret: SecretBytes, purpose: str, session: bytes, *members: int) -> Secret:
    """Return 32 bytes for one purpose, session and ordered list of members, by HKDF-SHA256.

    Args: members: `sender, receiver` where the direction counts, `low, high` where it does not.
    Raises: SecureAggregationError: if a member's number is not one.
    """
    key = bytearray(KEY_SIZE)
    info = _beginning(3 + len(members), _DOMAIN, purpose, session) + b"".join(map(_encoded_part, members))
    HKDF(algorithm=hashes.SHA256(), length=KEY_SIZE, salt=None, info=info).derive_into(_view(secret), key)
    return Secret.taking(key)


def seal(agreed: SecretBytes, plain: SecretBytes, session: bytes, sender: int, receiver: int) -> bytes:
    """Return `plain` sealed from sender to receiver: as many bytes and a tag of 16.

    The nonce is fixed, so a sender must seal at most once per agreed secret, session and receiver; what it sealed it
    may send again, byte for byte.
    """
    with derive(agreed, "share", session, sender, receiver) as key:
        return AESGCM(key.view()).encrypt(_NONCE, _view(plain), _box(session, sender, receiver))


def open_sealed(agreed: SecretBytes, box: bytes, session: bytes, sender: int, receiver: int) -> Secret:
    """Return what `sender` sealed.

    Raises: SecureAggregationError: naming the sender, if the box was changed, cut, or sealed for another place.
    """
    size = len(box) - TAG_SIZE
    if size < 1:
        raise SecureAggregationError(f"the box of member {sender} has {len(box)} bytes, too few to hold anything")
    plain = bytearray(size)
    with derive(agreed, "share", session, sender, receiver) as key:
        try:
            AESGCM(key.view()).decrypt_into(_NONCE, box, _box(session, sender, receiver), plain)
        except InvalidTag:
            raise SecureAggregationError(
                f"the box of member {sender} does not open: it was changed, or sealed for another session or member"
            ) from None
    return Secret.taking(plain)


def _box(session: bytes, sender: int, receiver: int) -> bytes:
    return _beginning(4, "box", session) + _encoded_part(sender) + _encoded_part(receiver)


def commitment(secret: SecretBytes, purpose: str = "seed") -> bytes:
    """Return the SHA-256 commitment to a secret of at least 32 random bytes, under a purpose that keys do not share.

    Guarantees: it hides the secret because the secret is random; it is no commitment to a value that can be guessed.
    """
    view = _view(secret)
    if len(view) < KEY_SIZE:
        raise SecureAggregationError(f"a commitment hides {KEY_SIZE} random bytes or more, got {len(view)}")
    digest = hashlib.sha256(encoded(_DOMAIN, "commitment", purpose, len(view)))
    digest.update(view)
    return digest.digest()


def fresh_bytes(size: int) -> bytes:
    """Return public random bytes (a nonce) from the operating system."""
    return os.urandom(size)


def encoded(*parts: bytes | str | int) -> bytes:
    """Return the parts as bytes that no other list of parts has: each with its type and its length.

    Raises: SecureAggregationError: if a number is negative or needs more than 8 bytes, or a part is of another type.
    """
    return len(parts).to_bytes(4, "big") + b"".join(map(_encoded_part, parts))


@functools.lru_cache(maxsize=64)
def _beginning(count: int, *parts: bytes | str) -> bytes:
    """Return how a list of `count` parts begins, for lists of which only the numbers at the end are new."""
    return count.to_bytes(4, "big") + b"".join(map(_encoded_part, parts))


def _encoded_part(part: bytes | str | int) -> bytes:
    if type(part) is int and 0 <= part < 1 << 64:
        return _NUMBER.pack(b"i", 8, part)
    if isinstance(part, bytes):
        kind, data = b"b", part
    elif isinstance(part, str):
        kind, data = b"s", part.encode("utf-8", "surrogatepass")
    elif isinstance(part, int) and not isinstance(part, bool) and 0 <= part < 1 << 64:
        kind, data = b"i", part.to_bytes(8, "big")
    else:
        raise SecureAggregationError(f"a number from 0 to below 2^64, text or bytes was expected, got {part!r:.40}")
    return kind + len(data).to_bytes(8, "big") + data


def _view(secret: SecretBytes) -> memoryview:
    return secret.view() if isinstance(secret, Secret) else memoryview(secret)
