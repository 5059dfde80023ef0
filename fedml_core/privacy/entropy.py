"""Where noise comes from: the AES-256-CTR keystream of a key that the operating system drew and nobody keeps.

Guarantees: every stream of `fresh` has its own key of 32 bytes from the operating system, and no seed can choose it.
Guarantees: equal keys give equal words, those of AES-256-CTR, and a stream never gives the same word twice.
Trust: whoever knows a stream's key can take its noise off again, so a key is neither logged, sent nor printed.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import PrivacyError
from fedml_core.secagg.secrets import Secret, SecretBytes

__all__ = ["NoiseStream"]

_WORDS = 1 << 15  # what a keystream draws at once


class NoiseStream:
    """Uniform random words for noise; one stream serves one thread, and one release.

    Args: key: 32 bytes. Mechanisms take none: they call `fresh`; a key is for tests of samplers, and for noise that
        must be drawn a second time, such as a tree's.
    """

    __slots__ = ("_stream",)

    def __init__(self, key: SecretBytes) -> None:
        from fedml_core.secagg.keystream import Keystream  # loads cryptography, which nobody needs without noise

        self._stream = Keystream(key)

    @classmethod
    def fresh(cls) -> NoiseStream:
        """Return a stream with a key of its own, which is forgotten with the stream."""
        with Secret.fresh() as key:
            return cls(key)

    def into(self, words: NDArray[np.uint64]) -> None:
        """Overwrite the contiguous one-dimensional array with the next words."""
        for start in range(0, len(words), _WORDS):
            self._stream.into(words[start : start + _WORDS])

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return the next `count` words."""
        drawn = np.empty(count, dtype="<u8")
        self.into(drawn)
        return drawn

    def __repr__(self) -> str:
        """Return no more than the kind."""
        return "NoiseStream()"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled or copied: a second copy would draw the same noise again."""
        raise PrivacyError("a noise stream is neither copied nor stored; draw a fresh one where it is needed")
