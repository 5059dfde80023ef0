"""The memories of a huge population in one file, the most recent ones at hand: what a simulation of millions needs."""

from __future__ import annotations

import sqlite3
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import safetensors
import safetensors.numpy
from torch import Tensor

from clients.memory import SPILLED, STORE_NAME, Remembered, memory_from_tree, memory_to_tree
from fedml_core.checks import require_whole
from fedml_core.databases import blaming
from fedml_core.errors import CheckpointError
from fedml_core.wire import Frame, from_frame, to_frame

__all__ = ["SpillingMemory"]

_PAGE_BYTES = 16384
_FORMAT = 1


class SpillingMemory:
    """The memories of a simulation's clients in a file, the most recent ones also in memory; for huge populations.

    `folder`: the run's; the store is `memories.sqlite` in it, made when the first memory is kept. `memory_bytes`: of
    the memories kept at hand; what they refer to is counted, not Python's own objects.

    The checkpoint holds the number of the round that the store stands at, never the memories: a round writes what its
    cohort changed, and a resumed run undoes the one round by which the store may be ahead of the checkpoint.

    Guarantees: after a kill at any moment, `restore` of the last saved checkpoint gives exactly the memories that were
    kept when `to_tree` made it. Memory does not grow with the number of clients. For one thread.
    """

    def __init__(self, folder: Path, memory_bytes: int = 1 << 30) -> None:
        require_whole("memory_bytes", memory_bytes, at_least=0)
        self._path, self._bound = folder / STORE_NAME, memory_bytes
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._held_bytes = 0
        self._generation = 0
        self._table: _Table | None = None

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close."""
        self.close()

    def get(self, client: int) -> Remembered | None:
        """Return the client's memory, or None before its first round.

        Raises: CheckpointError: if the store is damaged.
        """
        if (held := self._held.get(client)) is not None:
            self._held.move_to_end(client)
            return held.kept
        kept = self._table.get(client) if self._table is not None else None
        if kept is not None:
            self._hold(client, _Held(kept, _size(kept), changed=False))
        return kept

    def put(self, client: int, remembered: Remembered) -> None:
        """Keep the client's memory.

        Raises: CheckpointError: if the store cannot be written.
        """
        self._generation = max(self._generation, remembered.round)
        self._hold(client, _Held(remembered, _size(remembered), changed=True))

    def to_tree(self) -> dict[str, Any]:
        """Write what changed since the last call, as one transaction, and return what a checkpoint needs to find it.

        Raises: CheckpointError: if the store cannot be written.
        """
        for client, held in self._held.items():
            if held.changed:
                self._opened().put(client, held.kept)
                self._held[client] = _Held(held.kept, held.size_bytes, changed=False)
        if self._table is None:
            return {}
        self._table.commit()
        return {SPILLED: {"store": self._table.identity, "generation": self._generation}}

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Replace every memory by those of a checkpoint: of this store, or of an `InProcessMemory`.

        Raises: CheckpointError: if the store is missing, damaged, of another run, or too far from the checkpoint.
        """
        self._forget()
        if SPILLED in tree:
            if not self._path.exists():
                raise CheckpointError(
                    f"{self._path} does not exist, and the checkpoint's memories are in it; restore it from a copy, "
                    "or start a new run"
                )
            self._generation = int(tree[SPILLED]["generation"])
            self._table = _Table(self._path)
            self._table.go_back(str(tree[SPILLED]["store"]), self._generation)
            return
        for suffix in ("", "-wal", "-shm", "-journal"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        for client, kept in tree.items():
            self.put(int(client), memory_from_tree(kept))

    def close(self) -> None:
        """Let go of the file; what changed since the last `to_tree` is in no checkpoint, and is lost. Idempotent."""
        self._forget()

    def _forget(self) -> None:
        self._held.clear()
        self._held_bytes = self._generation = 0
        if self._table is not None:
            self._table.close()
            self._table = None

    def _hold(self, client: int, held: _Held) -> None:
        old = self._held.pop(client, None)
        self._held_bytes += held.size_bytes - (old.size_bytes if old else 0)
        self._held[client] = held
        while self._held_bytes > self._bound:
            oldest, spilled = self._held.popitem(last=False)
            self._held_bytes -= spilled.size_bytes
            if spilled.changed:
                self._opened().put(oldest, spilled.kept)

    def _opened(self) -> _Table:
        if self._table is None:
            self._table = _Table(self._path)
        return self._table


@dataclass(frozen=True)
class _Held:
    kept: Remembered
    size_bytes: int
    changed: bool


class _Table:
    """A table of memories by client, changed in transactions that end with `commit`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with blaming(self._path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=1.0, isolation_level=None)
            try:
                self.identity = self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self) -> str:
        run = self._connection.execute
        run(f"PRAGMA page_size = {_PAGE_BYTES}")
        # One file beside the store while a round is open, none after; FULL, so that a power cut undoes nothing either.
        run("PRAGMA journal_mode = TRUNCATE")
        run("PRAGMA synchronous = FULL")
        run("PRAGMA cache_size = -16384")  # KiB
        run("BEGIN IMMEDIATE")
        run("CREATE TABLE IF NOT EXISTS store (format INTEGER, identity TEXT)")
        run(
            "CREATE TABLE IF NOT EXISTS memory "
            "(client INTEGER PRIMARY KEY, round INTEGER, header TEXT, arrays BLOB, checksum INTEGER)"
        )
        run("CREATE INDEX IF NOT EXISTS by_round ON memory (round)")
        row = run("SELECT format, identity FROM store").fetchone()
        if row is None:
            row = (_FORMAT, uuid.uuid4().hex)
            run("INSERT INTO store VALUES (?, ?)", row)
        run("COMMIT")
        if row[0] != _FORMAT:
            raise CheckpointError(f"{self._path} has format {row[0]}, this version reads {_FORMAT}; start a new run")
        run("BEGIN IMMEDIATE")
        return str(row[1])

    def get(self, client: int) -> Remembered | None:
        with blaming(self._path):
            asked = self._connection.execute("SELECT header, arrays, checksum FROM memory WHERE client = ?", (client,))
            row = asked.fetchone()
        return None if row is None else self._decoded(client, *row)

    def put(self, client: int, kept: Remembered) -> None:
        frame = to_frame("memory", memory_to_tree(kept))
        arrays = safetensors.numpy.save(dict(frame.arrays))
        row = (client, kept.round, frame.header, arrays, _checksum(frame.header, arrays))
        with blaming(self._path):
            self._connection.execute("INSERT OR REPLACE INTO memory VALUES (?, ?, ?, ?, ?)", row)

    def commit(self) -> None:
        with blaming(self._path):
            self._connection.execute("COMMIT")
            self._connection.execute("BEGIN IMMEDIATE")

    def go_back(self, identity: str, generation: int) -> None:
        """Undo the round after `generation`, if the store is ahead by that one."""
        if identity != self.identity:
            raise CheckpointError(
                f"{self._path} belongs to another run than the checkpoint; restore both from one copy, or start a new "
                "run"
            )
        with blaming(self._path):
            found = self._connection.execute(
                "SELECT DISTINCT round FROM memory WHERE round > ? ORDER BY round", (generation,)
            )
            ahead = [int(row[0]) for row in found]
            if len(ahead) > 1:
                raise CheckpointError(
                    f"{self._path} is {len(ahead)} rounds ahead of the checkpoint's round {generation}; restore both "
                    "from one copy, or start a new run"
                )
            late = self._connection.execute("SELECT client FROM memory WHERE round > ?", (generation,)).fetchall()
        for (client,) in late:
            kept = self.get(client)
            assert kept is not None
            self.put(client, Remembered(generation, kept.before, kept.before))
        self.commit()

    def close(self) -> None:
        with blaming(self._path):
            self._connection.close()

    def _decoded(self, client: int, header: str, arrays: bytes, checksum: int) -> Remembered:
        try:
            if _checksum(header, arrays) != checksum:
                raise ValueError("its checksum is wrong")
            return memory_from_tree(from_frame(Frame("memory", header, safetensors.numpy.load(arrays))))
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{self._path} is damaged: client {client}: {error}; restore it from a copy, or start a new run"
            ) from error


def _checksum(header: str, arrays: bytes) -> int:
    return zlib.crc32(arrays, zlib.crc32(header.encode()))


def _size(kept: Remembered) -> int:
    """Return the bytes of a memory's arrays; what `before` and `after` share counts twice."""
    waiting, total = [kept.before, kept.after], 0
    while waiting:
        for leaf in waiting.pop().values():
            if isinstance(leaf, Mapping):
                waiting.append(leaf)
            elif isinstance(leaf, Tensor):
                total += leaf.nbytes
    return total
