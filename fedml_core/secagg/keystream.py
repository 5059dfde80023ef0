"""The AES-256-CTR keystream (NIST SP 800-38A, 6.5) of a key: what masks and rounding draw from.

Guarantees: equal keys and blocks give equal bytes on every platform: those of AES-256-CTR from that counter on.
Guarantees: keystreams are written over the caller's buffer, and nothing as long as it is allocated.
Trust: to whoever does not know the key, the bytes are as good as random.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.secrets import Secret, SecretBytes

__all__ = ["CHUNK_SIZE", "Keystream"]

CHUNK_SIZE = 256 * 1024
"""Bytes that are drawn at a time: they stay in a core's cache until they are used."""

_ZEROS = memoryview(bytes(CHUNK_SIZE))
_BLOCK_SIZE = 16
_KEY_SIZE = 32


class Keystream:
    """The keystream of `key` (32 bytes) from block `block` of 16 bytes on; reading goes on where it ended."""

    __slots__ = ("_cipher",)

    def __init__(self, key: SecretBytes, block: int = 0) -> None:
        view = key.view() if isinstance(key, Secret) else memoryview(key)
        if view.nbytes != _KEY_SIZE:
            raise SecureAggregationError(f"a keystream's key must have {_KEY_SIZE} bytes, got {view.nbytes}")
        mode = modes.CTR(block.to_bytes(_BLOCK_SIZE, "big"))
        self._cipher = Cipher(algorithms.AES256(view), mode).encryptor()

    def into(self, words: NDArray[Any]) -> None:
        """Overwrite the contiguous one-dimensional array, of at most CHUNK_SIZE bytes, with the next of the stream."""
        self._cipher.update_into(_ZEROS[: words.nbytes], words.view(np.uint8).data)
