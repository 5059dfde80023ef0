"""Masks: keystreams added to a vector modulo 2^16, 2^32 or 2^64, in chunks that stay in a core's cache.

The mask of a key is the AES-256-CTR keystream of zeros from counter 0 on, read as little-endian ring elements
(Bonawitz et al. 2017, doi:10.1145/3133956.3133982, with a cipher of 256 bits as the generator).

Guarantees: the result is the same, bit for bit, whatever the number of threads and the order of the masks.
Guarantees: a mask that is added once and subtracted once leaves the vector as it was.
Guarantees: memory beyond the vector is one chunk and one cipher per mask for each thread, whatever the vector's length.
Trust: a vector with at least one mask whose key an observer does not know is uniformly random to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.keystream import CHUNK_SIZE, Keystream
from fedml_core.secagg.secrets import Secret, SecretBytes

__all__ = ["RING_BITS", "Mask", "add_mask", "add_masks", "ring_type"]

RING_BITS = (16, 32, 64)
Mask = tuple[SecretBytes, int]
"""A key of 32 bytes, and 1 to add its mask or -1 to subtract it."""

_BLOCK_SIZE = 16
_GRAIN = 4096  # a multiple of the cipher's block and of a memory page, so that no two threads write to one
_WORTH_A_THREAD = 1024 * 1024


def ring_type(bits: int) -> np.dtype[Any]:
    """Return the type of the elements of the ring modulo 2^bits: little-endian and unsigned.

    Raises: SecureAggregationError: unless `bits` is 16, 32 or 64.
    """
    if bits not in RING_BITS:
        raise SecureAggregationError(f"the ring must have 16, 32 or 64 bits, got {bits}")
    return np.dtype(f"<u{bits // 8}")


def add_mask(total: NDArray[Any], key: SecretBytes, sign: int = 1) -> None:
    """Add (or, with sign -1, subtract) one key's mask to `total`, in place; see `add_masks`."""
    add_masks(total, [(key, sign)])


def add_masks(total: NDArray[Any], masks: Iterable[Mask], *, threads: int = 1) -> None:
    """Add many masks to `total`, in place; the ciphers let other threads run meanwhile.

    Each thread adds every mask to a slice of its own, chunk by chunk, so no second vector is needed. No key may mask
    two vectors: their difference would be the difference of what they hide.

    Guarantees: `total` is unchanged if anything is refused.
    Args: total: uint16, uint32 or uint64 of shape (d,), contiguous, little-endian. threads: >= 1; few masks on a short
        vector use fewer.
    Raises: SecureAggregationError: if the array, a key's size, a sign or `threads` is not as above.
    """
    listed = tuple(masks)
    _check(total, listed, threads)
    useful = max(1, total.nbytes * len(listed) // _WORTH_A_THREAD)
    slices = _slices(total, min(threads, useful))
    if len(slices) <= 1:
        for start, part in slices:
            _add_to_slice(part, start, listed)
        return
    with ThreadPoolExecutor(len(slices) - 1, thread_name_prefix="masks") as pool:
        waiting = [pool.submit(_add_to_slice, part, start, listed) for start, part in slices[1:]]
        _add_to_slice(slices[0][1], slices[0][0], listed)
        for future in waiting:
            future.result()


def _slices(total: NDArray[Any], count: int) -> list[tuple[int, NDArray[Any]]]:
    """Return up to `count` equal slices of the vector, each with the number of the keystream block it begins at."""
    grains = -(-total.nbytes // _GRAIN)
    step = max(1, -(-grains // count)) * _GRAIN // total.itemsize
    per_block = _BLOCK_SIZE // total.itemsize
    return [(start // per_block, total[start : start + step]) for start in range(0, len(total), step)]


def _add_to_slice(part: NDArray[Any], block: int, masks: Sequence[Mask]) -> None:
    """Add the masks to a slice whose first element lies at a keystream block's beginning."""
    streams = [(Keystream(key, block), np.add if sign > 0 else np.subtract) for key, sign in masks]
    step = CHUNK_SIZE // part.itemsize
    scratch = np.empty(min(step, len(part)), dtype=part.dtype)
    for start in range(0, len(part), step):
        chunk = part[start : start + step]
        words = scratch[: len(chunk)]
        for stream, combine in streams:
            stream.into(words)
            combine(chunk, words, out=chunk)
    scratch.fill(0)


def _check(total: NDArray[Any], masks: Sequence[Mask], threads: int) -> None:
    if total.dtype not in [ring_type(bits) for bits in RING_BITS] or total.ndim != 1:
        raise SecureAggregationError(
            f"masks are added to little-endian uint16, uint32 or uint64 of shape (d,), got {total.dtype} {total.shape}"
        )
    if not (total.flags.c_contiguous and total.flags.writeable):
        raise SecureAggregationError("masks are added in place, so the vector must be contiguous and writable; copy it")
    if threads < 1:
        raise SecureAggregationError(f"threads must be >= 1, got {threads}")
    for key, sign in masks:
        size = len(key.view() if isinstance(key, Secret) else key)
        if size != 32 or sign not in (1, -1):
            raise SecureAggregationError(f"a mask is a key of 32 bytes and a sign of 1 or -1, got {size} bytes, {sign}")
