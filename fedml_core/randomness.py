"""Randomness that must reproduce: cohorts, partitions, shuffles, initial weights, dropout.

Every draw is keyed by purpose and place, `seeded(seed, "sample", round)`, never by worker or by order of calls, so that
every engine draws the same numbers. Nothing here may protect anybody: whoever knows the key knows the stream.
"""

from __future__ import annotations

import hashlib
import operator

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fedml_core.errors import StrategyError

__all__ = ["Key", "key_bytes", "keyed_coins", "keyed_words", "seed_of", "seeded", "torch_generator"]

Key = int | str
"""One part of a key: a seed, a round or a client as an integer, a purpose or a name as text."""

_STREAM_STEP = np.uint64(0xD1342543DE82EF95)
_WORD_STEP = np.uint64(0x9E3779B97F4A7C15)


def key_bytes(*key: Key, size: int = 16) -> bytes:
    """Return `size` (1 to 64) bytes that depend on every part of `key`, its type and its place.

    Guarantees: equal keys give equal bytes everywhere, and every integer type counts as `int`, so a client number
    taken from a NumPy array draws what the same Python number draws; `1` and `"1"` are different parts.
    Raises: StrategyError: if there is no part, a part is neither an integer nor text, or `size` is out of range.
    """
    if not key:
        raise StrategyError("a key must have at least one part, got none; name the seed and the purpose of the draw")
    if not 1 <= size <= 64:
        raise StrategyError(f"size must be between 1 and 64 bytes, got {size}")
    digest = hashlib.blake2b(digest_size=size, person=b"fedveil-seed")
    for part in key:
        encoded = _encoded(part)
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()


def seeded(*key: Key) -> np.random.Generator:
    """Return a reproducible generator for `key`, such as `seeded(seed, "sample", round)`.

    Guarantees: equal keys give equal streams on every platform; different keys give independent streams.
    Raises: StrategyError: as `key_bytes`.
    """
    words = np.frombuffer(key_bytes(*key), dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=words))


def seed_of(*key: Key) -> int:
    """Return a non-negative 63-bit integer for `key`, for libraries that want an integer seed.

    Raises: StrategyError: as `key_bytes`.
    """
    return int.from_bytes(key_bytes(*key, size=8), "little") >> 1


def torch_generator(*key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a reproducible torch generator for `key`; CPU and GPU draw different streams from one key.

    Raises: StrategyError: as `key_bytes`.
    """
    generator = torch.Generator(device=device)
    generator.manual_seed(seed_of(*key))
    return generator


def keyed_words(key: tuple[Key, ...], streams: ArrayLike, count: int) -> NDArray[np.uint64]:
    """Return `count` reproducible words for each of K streams of one key, such as clients: uint64 (K, count).

    A whole cohort costs a few passes over an array, where `seeded` would cost a generator for each client. Row k
    depends on the key and on `streams[k]` alone, and its first words do not depend on `count`.
    Source: SplitMix64, Steele, Lea and Flood (2014), doi:10.1145/2660193.2660195, started at a mixed stream number.
    Raises: StrategyError: as `key_bytes`.
    """
    base = np.uint64(int.from_bytes(key_bytes(*key, size=8), "little"))
    numbers = np.asarray(streams, dtype=np.int64).astype(np.uint64)[:, None] + np.uint64(1)
    starts = _mixed(base + numbers * _STREAM_STEP)
    return _mixed(starts + np.arange(1, count + 1, dtype=np.uint64) * _WORD_STEP)


def keyed_coins(key: tuple[Key, ...], streams: ArrayLike) -> NDArray[np.float64]:
    """Return a reproducible uniform number in [0, 1) for each of K streams of one key, of shape (K,)."""
    return (keyed_words(key, streams, 1)[:, 0] >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the words after SplitMix64's finalizer; products wrap modulo 2^64, as they are meant to."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _encoded(part: Key) -> bytes:
    if isinstance(part, str):
        # surrogatepass: a file name that is no valid UTF-8 is still a name, and must not stop a run.
        return b"s" + part.encode("utf-8", "surrogatepass")
    try:
        return b"i%d" % operator.index(part)
    except TypeError as error:
        raise StrategyError(f"a key's part must be an integer or text, got {type(part).__name__}") from error
