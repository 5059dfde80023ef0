"""Bytes that must not leak by accident: they do not print, copy, pickle or compare, and they can be overwritten.

Guarantees: no `repr`, text or format of a secret shows more than its length.
Guarantees: a secret is never pickled, copied, hashed or compared with `==`: each of these raises.
Guarantees: after `wipe` the secret's own memory holds zeros, and every further use but another `wipe` raises.
Trust: wiping is hygiene, not proof: Python and the libraries below may have made copies (a `bytes` handed out, a block
    that was swapped to disk, registers, a library's key schedule), and those are out of reach.
"""

from __future__ import annotations

import contextlib
import hmac
import os
from typing import Any, NoReturn, Self, final

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError

__all__ = ["Secret", "SecretBytes"]


@final
class Secret:
    """A copy of `value` (at least one byte) that only code that asks for it by name gets to see.

    It has no finaliser: a view must never turn to zeros, and so into a known key, because nobody kept the secret.
    """

    __slots__ = ("_bytes", "_view")

    def __init__(self, value: bytes | bytearray | memoryview) -> None:
        self._hold(bytearray(value))

    @classmethod
    def fresh(cls, size: int = 32) -> Self:
        """Return `size` random bytes from the operating system."""
        if size < 1:
            raise SecureAggregationError(f"a secret must have at least one byte, got {size}")
        return cls.taking(bytearray(os.urandom(size)))

    @classmethod
    def taking(cls, buffer: bytearray) -> Self:
        """Return a secret that owns `buffer` itself, without a copy: the caller lets go of it."""
        made = cls.__new__(cls)
        made._hold(buffer)
        return made

    def _hold(self, buffer: bytearray) -> None:
        if not buffer:
            raise SecureAggregationError("a secret must have at least one byte, got none")
        self._bytes = buffer
        self._view = memoryview(buffer).toreadonly()

    @property
    def wiped(self) -> bool:
        """Whether the bytes are gone."""
        return not self._bytes

    def view(self) -> memoryview:
        """Return the bytes, read-only and without a copy, for a library that reads them before it returns.

        Guarantees: a view that is kept beyond `wipe` raises ValueError when it is used, and never shows the bytes.
        Raises: SecureAggregationError: if the secret was wiped, as every method that gives access.
        """
        if not self._bytes:
            raise SecureAggregationError("the secret was wiped and cannot be used again; make a new one")
        return self._view

    def array(self) -> NDArray[np.uint8]:
        """Return the bytes as a read-only array, without a copy; one that is kept beyond `wipe` reads zeros."""
        return np.frombuffer(self.view(), dtype=np.uint8)

    def bytes(self) -> bytes:
        """Return a copy that nobody can wipe; prefer `view`."""
        return bytes(self.view())

    def same_as(self, other: SecretBytes) -> bool:
        """Return whether both hold equal bytes, in a time that depends on their lengths only."""
        return hmac.compare_digest(self.view(), other.view() if isinstance(other, Secret) else other)

    def wipe(self) -> None:
        """Overwrite the bytes with zeros; idempotent, and never an error."""
        self._bytes[:] = bytes(len(self._bytes))
        with contextlib.suppress(BufferError):  # an array of it is still held: it reads zeros from here on
            self._view.release()
        self._bytes = bytearray()

    def __enter__(self) -> Self:
        """Return the secret, to be wiped at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wipe it."""
        self.wipe()

    def __len__(self) -> int:
        """Return the number of bytes; 0 once wiped."""
        return len(self._bytes)

    def __bool__(self) -> bool:
        """Refuse: an empty secret is a wiped one, and code that forgets that must not go on."""
        raise SecureAggregationError("a secret is neither true nor false; ask `wiped`, or compare with None")

    def __repr__(self) -> str:
        """Return the length, or that it was wiped."""
        return "Secret(wiped)" if self.wiped else f"Secret({len(self._bytes)} bytes)"

    def __format__(self, spec: str) -> str:
        """Return the `repr`, whatever is asked for."""
        return repr(self)

    def __eq__(self, other: object) -> bool:
        """Refuse: `==` takes a time that tells where two values differ."""
        raise SecureAggregationError("secrets are not compared with ==; use same_as")

    def __hash__(self) -> int:
        """Refuse: a hash tells the value."""
        raise SecureAggregationError("a secret has no hash, so it is no key of a dict; use its owner's number")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled or copied."""
        raise SecureAggregationError("a secret is neither copied nor stored; pass on the object itself")


SecretBytes = Secret | bytes | bytearray | memoryview
"""What key arguments take; anything but a `Secret` is the caller's to protect."""
