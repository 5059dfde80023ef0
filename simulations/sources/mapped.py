"""All clients in one file that is mapped, not read: a client costs the pages that its rows lie on."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fedml_core.data import ClientData
from fedml_core.errors import ConfigError, TaskError
from simulations.packing import Packed
from simulations.sources.columns import TEST, Array, Columns, refuse_unknown
from simulations.sources.source import Reader

# Linux maps so much around a byte that is touched, if the file is in its cache.
_AROUND_BYTES = 1 << 16
_RESIDENT_BYTES = 256 << 20


class MappedFile:
    """A file as read-only arrays; what was looked at is let go of again, so that memory stays bounded."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._touched = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the size in bytes."""
        return len(self._map)

    def array(self, start: int, dtype: DTypeLike, shape: Sequence[int]) -> Array:
        """Return the array that starts at byte `start`.

        Raises: ValueError: if it does not lie within the file.
        """
        kind, count = np.dtype(dtype), int(np.prod(shape, dtype=np.int64))
        if start < 0 or min(shape, default=0) < 0 or start + count * kind.itemsize > len(self._map):
            raise ValueError(f"an array of shape {tuple(shape)} does not fit the file; it was cut short")
        if count == 0:
            return np.empty(tuple(shape), dtype=kind)
        return np.frombuffer(self._map, dtype=kind, count=count, offset=start).reshape(tuple(shape))

    def touch(self, places: int, size_bytes: int) -> None:
        """Take note that `places` runs of `size_bytes` in all were read."""
        with self._lock:
            self._touched += size_bytes + places * _AROUND_BYTES
            if self._touched > _RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)
                self._touched = 0


def open_packed(path: Path, arrays_of: Callable[[MappedFile], Mapping[str, Array]]) -> PackedReader:
    """Return a reader of the packed file at `path`, whose arrays `arrays_of` finds.

    Raises: ConfigError: if it is missing, damaged, or not such a file.
    """
    try:
        file = MappedFile(path)
        arrays = arrays_of(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; name a file that write_packed could have written") from None
    refuse_unknown(arrays, str(path))
    train = Columns.of(arrays, str(path))
    test = Columns.of(arrays, str(path), TEST) if any(name.startswith(TEST) for name in arrays) else None
    for prefix, part in (("", train), (TEST, test)):
        if part is not None and part.offsets is None:
            raise ConfigError(
                f"{path} has no array '{prefix}offsets'; it says where each client's rows begin, and where the last end"
            )
    return PackedReader(path, file, train, test)


class PackedReader(Reader):
    """A reader of one packed file."""

    def __init__(self, path: Path, file: MappedFile, train: Columns, test: Columns | None) -> None:
        self._path, self._file, self._train, self._test = path, file, train, test
        if test is not None and len(_offsets(test)) != len(_offsets(train)):
            clients = [len(_offsets(part)) - 1 for part in (train, test)]
            raise ConfigError(f"{path}: offsets are of {clients[0]} clients, test_offsets of {clients[1]}")

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(_offsets(self._train)) - 1

    def read(self, client: int) -> ClientData:
        """Return one client's rows."""
        train = self._train.examples(self._slice(self._train, client))
        self._file.touch(self._train.count + 1, 0)
        if self._test is None:
            return ClientData(train)
        held = self._slice(self._test, client)
        return ClientData(train, self._test.examples(held) if held.start < held.stop else None)

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64]:
        """Return how many training examples each has."""
        starts, ends = self._bounds(clients)
        return ends - starts

    def pack(self, clients: Sequence[int]) -> Packed | None:
        """Return the clients' training examples as one, gathered in one go."""
        if not len(clients):
            return None
        starts, ends = self._bounds(clients)
        counts = ends - starts
        stops = np.cumsum(counts)
        rows = np.arange(int(stops[-1])) + np.repeat(starts - stops + counts, counts)
        examples = self._train.examples(rows)
        self._file.touch(self._train.count * len(clients), 0)
        return Packed(examples, np.concatenate(([0], stops)))

    def _slice(self, part: Columns, client: int) -> slice:
        offsets = _offsets(part)
        start, stop = int(offsets[client]), int(offsets[client + 1])
        if not 0 <= start <= stop <= len(part.targets):
            raise TaskError(f"{self._path}: client {client}'s rows go from {start} to {stop}; mend the offsets")
        return slice(start, stop)

    def _bounds(self, clients: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        places, offsets = np.asarray(clients, dtype=np.int64), _offsets(self._train)
        starts, ends = offsets[places].astype(np.int64), offsets[places + 1].astype(np.int64)
        self._file.touch(len(places), 0)
        wrong = np.flatnonzero((starts < 0) | (ends < starts) | (ends > len(self._train.targets)))
        if len(wrong):
            self._slice(self._train, int(places[wrong[0]]))
        return starts, ends


def _offsets(part: Columns) -> Array:
    assert part.offsets is not None
    return part.offsets


__all__ = ["MappedFile", "PackedReader", "open_packed"]
