"""The bytes of secure aggregation's messages: fixed sizes, big-endian numbers, nothing optional, nothing left over.

Every message begins with the protocol's tag, its version and its kind, so that none passes for another.

Guarantees: whatever bytes are read, the outcome is the message's fields or a SecureAggregationError.
Trust: it checks the form of a message only; who sent it, and whether it may say that, others check.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Self

from fedml_core.errors import SecureAggregationError

__all__ = ["VERSION", "Kind", "Reader", "Writer", "packed"]

VERSION = 1
_TAG = b"fvsa"


class Kind(IntEnum):
    """What a message is."""

    ADVERT = 1
    BULLETIN = 2
    SHARES = 3
    DELIVERY = 4
    MASKED = 5
    SURVIVORS = 6
    CONFIRMATION = 7
    QUORUM = 8
    UNMASKING = 9
    COMPLAINT = 10
    ASSISTANT = 11
    ASSISTANTS = 12
    CONTRIBUTION = 13
    ROUNDUP = 14
    WITNESS = 15
    WITNESSES = 16
    ANSWER = 17
    CONTRIBUTORS = 18
    REFUSALS = 19


def packed(numbers: Iterable[int]) -> bytes:
    """Return whole numbers below 2^32 as 4 bytes each.

    Raises: SecureAggregationError: if one is none.
    """
    listed = list(numbers)
    try:
        return struct.pack(f">{len(listed)}I", *listed)
    except struct.error as error:
        raise SecureAggregationError("a message's numbers must be from 0 to below 2^32") from error


class Writer:
    """Puts one message together."""

    def __init__(self, kind: Kind) -> None:
        self._parts = [_TAG, bytes([VERSION, kind])]

    def number(self, value: int) -> Self:
        """Add a whole number below 2^32."""
        self._parts.append(packed([value]))
        return self

    def fixed(self, value: bytes, size: int) -> Self:
        """Add exactly `size` bytes."""
        if len(value) != size:
            raise SecureAggregationError(f"a field of {size} bytes was given {len(value)}")
        self._parts.append(value)
        return self

    def numbers(self, values: Iterable[int]) -> Self:
        """Add a list of numbers, its length first."""
        data = packed(values)
        self._parts += [packed([len(data) // 4]), data]
        return self

    def bytes(self) -> bytes:
        """Return the message."""
        return b"".join(self._parts)


class Reader:
    """Takes one message apart, in the order in which it was put together; `finish` at the end."""

    def __init__(self, data: bytes, kind: Kind) -> None:
        self._data, self._at = bytes(data), 0
        self._name = kind.name.lower()
        if self.fixed(4) != _TAG:
            raise SecureAggregationError("the message is not one of secure aggregation")
        version, got = self.fixed(2)
        if version != VERSION:
            raise SecureAggregationError(
                f"the message has version {version} and this side speaks {VERSION}; install the same version of fedveil"
            )
        if got != kind:
            raise SecureAggregationError(f"a message of kind {self._name} was expected, got kind {got}")

    def fixed(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        part = self._data[self._at : self._at + size]
        if len(part) != size:
            raise SecureAggregationError(f"the {self._name} message ends after {len(self._data)} bytes, too early")
        self._at += size
        return part

    def number(self) -> int:
        """Return the next number."""
        return int.from_bytes(self.fixed(4), "big")

    def count(self, size: int) -> int:
        """Return the length of a list of entries of `size` bytes each, all of which must be there."""
        count = self.number()
        if count * size > len(self._data) - self._at:
            raise SecureAggregationError(f"the {self._name} message announces {count} entries, more than it holds")
        return count

    def numbers(self) -> list[int]:
        """Return a list of numbers."""
        count = self.count(4)
        return list(struct.unpack(f">{count}I", self.fixed(4 * count)))

    def finish(self) -> None:
        """Check that nothing is left over."""
        if left := len(self._data) - self._at:
            raise SecureAggregationError(f"the {self._name} message has {left} bytes too many")
