"""The least that masks cost: one keystream and one addition in the ring each, with nothing around them.

Written without anything of ours, so that it stays the same whatever is done to the code that is measured against it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

__all__ = ["Roofline", "cpu_of", "taking_turns"]

_CHUNK = 256 * 1024  # bytes: of 64, 256 and 4096 KiB the fastest
_ZEROS = memoryview(bytes(_CHUNK))


class Roofline:
    """Expands AES-256-CTR keystreams and adds them to one vector of `parameters` 32-bit elements."""

    def __init__(self, parameters: int) -> None:
        self._total = np.zeros(parameters, np.uint32)
        self._words = np.empty(min(parameters, _CHUNK // 4), np.uint32)

    def expand(self, masks: int) -> None:
        """Add `masks` masks, one after the other on each piece of the vector that fits the cache."""
        ciphers = [Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor() for _ in range(masks)]
        step = len(self._words)
        for start in range(0, len(self._total), step):
            part = self._total[start : start + step]
            words = self._words[: len(part)]
            self._add(part, words, [cipher.update_into for cipher in ciphers])

    def _add(
        self, part: NDArray[np.uint32], words: NDArray[np.uint32], ciphers: Sequence[Callable[..., object]]
    ) -> None:
        zeros, out = _ZEROS[: words.nbytes], words.view(np.uint8).data
        for update_into in ciphers:
            update_into(zeros, out)
            np.add(part, words, out=part)

    def seconds(self, masks: int) -> float:
        """Return the CPU seconds of one mask, as a mean of `masks`."""
        return cpu_of(lambda: self.expand(masks)) / masks


def cpu_of(work: Callable[[], object]) -> float:
    """Return the CPU seconds that the work took, in all threads of this process."""
    before = time.process_time()
    work()
    return time.process_time() - before


def taking_turns(works: Sequence[Callable[[], object]], repeat: int) -> list[float]:
    """Return the median CPU seconds of each of the works, which take turns `repeat` times after a first for nothing."""
    taken: list[list[float]] = [[] for _ in works]
    for turn in range(repeat + 1):
        for work, seconds in zip(works, taken, strict=True):
            spent = cpu_of(work)
            if turn:
                seconds.append(spent)
    return [statistics.median(seconds) for seconds in taken]
