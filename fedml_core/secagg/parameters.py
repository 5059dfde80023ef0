"""What is fixed, publicly, before anybody takes part in one secure sum.

Guarantees: two parties with different parameters have different contexts, so no key, signature or share of one is of
    any use to the other.
Trust: whoever proposes them chooses them; what is too weak for a site, its own floor refuses. That must cover `active`,
    `minimum`, `corrupt_share` and `security_bits`: a server that draws many graphs loses their logarithm of the bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg import graph
from fedml_core.secagg.codec import VERSION

__all__ = ["Parameters", "digest_of"]

_MAX_TEXT = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """One attempt at one secure sum.

    `run`, `round`, `attempt`: which it is; a client takes part in each triple once. `length`: ring elements in the
    masked vector. `bits`: of the ring, 16, 32 or 64. `encoding`: what the vector's elements mean, as plain values.
    `minimum`: the fewest members whose sum may be revealed. `corrupt_share`, `dropout_share`: the shares of members
    that may collude with the server, and that may be lost. `active`: whether the server may deviate from the protocol.
    `security_bits`: of the statistical security of a sparse graph. `roster`: its digest in hex, or "" without one.
    """

    run: str
    round: int
    attempt: int
    length: int
    bits: int
    encoding: Mapping[str, Any]
    minimum: int
    corrupt_share: float
    dropout_share: float
    active: bool = True
    security_bits: int = 60
    roster: str = ""

    def __post_init__(self) -> None:
        """Check each field's type and range: they may come from a stranger."""
        for name in ("round", "attempt", "length", "bits", "minimum", "security_bits"):
            _require(name, getattr(self, name), int)
        for name in ("run", "roster"):
            _require(name, getattr(self, name), str)
        _require("active", self.active, bool)
        for name in ("corrupt_share", "dropout_share"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise SecureAggregationError(f"{name} must be from 0 to below 1, got {value!r:.40}")
        if self.bits not in (16, 32, 64):
            raise SecureAggregationError(f"the ring must have 16, 32 or 64 bits, got {self.bits}")
        if not (self.round >= 0 and self.attempt >= 0 and self.length >= 1 and self.minimum >= 2):
            raise SecureAggregationError(
                "a secure sum needs a round and an attempt from 0, a length from 1 and a minimum of 2 members or more, "
                f"got round {self.round}, attempt {self.attempt}, length {self.length}, minimum {self.minimum}"
            )
        if not 20 <= self.security_bits <= 100:
            raise SecureAggregationError(f"security_bits must be from 20 to 100, got {self.security_bits}")
        if not isinstance(self.encoding, Mapping):
            raise SecureAggregationError(f"the encoding must be a table, got {type(self.encoding).__name__}")
        # A copy: whoever keeps the table cannot change what was agreed on.
        object.__setattr__(self, "encoding", _plain(self.encoding))

    @cached_property
    def context(self) -> bytes:
        """Return 32 bytes that differ wherever any field differs."""
        return digest_of("context", bytes([VERSION]), self.to_text().encode())

    def corrupt(self, members: int) -> int:
        """Return how many of `members` may collude with the server."""
        return graph.at_most(self.corrupt_share, members)

    def to_text(self) -> str:
        """Return the parameters in their one canonical form."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_text(cls, text: str) -> Parameters:
        """Return the parameters that `to_text` wrote.

        Raises: SecureAggregationError: if they are not all there, not alone there, or not written canonically.
        """
        if len(text) > _MAX_TEXT:
            raise SecureAggregationError(f"the parameters have {len(text)} characters, the most is {_MAX_TEXT}")
        try:
            table = json.loads(text)
            made = cls(**table) if set(table) == {one.name for one in fields(cls)} else None
            same = made is not None and made.to_text() == text
        except (ValueError, TypeError, RecursionError) as error:
            raise SecureAggregationError("the parameters are not those of a secure sum") from error
        if made is None or not same:
            raise SecureAggregationError("the parameters are not those of a secure sum of this version")
        return made


def digest_of(purpose: str, *parts: bytes) -> bytes:
    """Return the SHA-256 of the parts, each with its length, under a purpose that no other digest here has."""
    digest = hashlib.sha256(b"fedveil/secagg/")
    for part in (purpose.encode(), *parts):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def _plain(table: Mapping[str, Any]) -> dict[str, Any]:
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(table), allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise SecureAggregationError("the encoding must be a table of finite numbers and text by name") from error
    return copy


def _require(name: str, value: object, kind: type) -> None:
    if type(value) is not kind or (isinstance(value, str) and len(value) > 128):
        raise SecureAggregationError(f"{name} must be of type {kind.__name__}, got {value!r:.40}")
