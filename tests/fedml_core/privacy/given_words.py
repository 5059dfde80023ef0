"""A stream of words that a test names, to see what becomes of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedml_core.privacy.entropy import NoiseStream


class Given(NoiseStream):
    """A stream that begins with words that a test names, and goes on with another's; without one, it ends there."""

    __slots__ = ("_given", "_rest")

    def __init__(self, words: Sequence[int] | NDArray[np.uint64], rest: NoiseStream | None = None) -> None:
        self._given, self._rest = np.asarray(words, dtype=np.uint64), rest

    def into(self, words: NDArray[np.uint64]) -> None:
        """Fill `words` with the next ones."""
        now, self._given = self._given[: len(words)], self._given[len(words) :]
        words[: len(now)] = now
        if len(now) < len(words):
            assert self._rest is not None, f"{len(words) - len(now)} more words were asked for than the test names"
            self._rest.into(words[len(now) :])
