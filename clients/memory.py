"""What a client remembers between rounds: control variates, error feedback, a personal head. Never sent to a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedml_core.errors import CheckpointError
from fedml_core.storage import load_tree, save_tree
from fedml_core.transform import State

__all__ = [
    "SPILLED",
    "STORE_NAME",
    "FileMemory",
    "InProcessMemory",
    "MemoryStore",
    "Remembered",
    "memory_from_tree",
    "memory_to_tree",
]

STORE_NAME = "memories.sqlite"
SPILLED = "spilled"  # no client number, so the two kinds of checkpoint tree cannot be confused


@dataclass(frozen=True)
class Remembered:
    """A client's memory around the last round that it answered."""

    round: int
    before: State
    after: State

    def entering(self, round_number: int) -> State:
        """Return the memory with which to enter a round; a round that is run again is entered as it was before."""
        return self.before if round_number <= self.round else self.after


class MemoryStore(Protocol):
    """Keeps the memories of the clients that live in this process."""

    def get(self, client: int) -> Remembered | None:
        """Return the client's memory, or None before its first round."""
        ...

    def put(self, client: int, remembered: Remembered) -> None:
        """Keep the client's memory."""
        ...


class InProcessMemory:
    """The memories of a simulation's clients; part of its checkpoint. Holds only clients that took part."""

    def __init__(self) -> None:
        self._kept: dict[int, Remembered] = {}

    def get(self, client: int) -> Remembered | None:
        """Return the client's memory, or None before its first round."""
        return self._kept.get(client)

    def put(self, client: int, remembered: Remembered) -> None:
        """Keep the client's memory."""
        self._kept[client] = remembered

    def to_tree(self) -> dict[str, Any]:
        """Return every memory, for a checkpoint."""
        return {str(client): memory_to_tree(kept) for client, kept in self._kept.items()}

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Replace every memory by a checkpoint's.

        Raises: CheckpointError: if the checkpoint left the memories in a `SpillingMemory`.
        """
        if SPILLED in tree:
            raise CheckpointError(
                f"this run's memories are in its {STORE_NAME}, not in its checkpoint; resume it with a SpillingMemory"
            )
        self._kept = {int(client): memory_from_tree(kept) for client, kept in tree.items()}

    def close(self) -> None:
        """Forget everything. Idempotent."""
        self._kept = {}


class FileMemory:
    """One real client's memory of one run, in a file that survives restarts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, client: int) -> Remembered | None:
        """Return the memory, or None before the first round."""
        return memory_from_tree(load_tree(self._path, "memory")) if self._path.exists() else None

    def put(self, client: int, remembered: Remembered) -> None:
        """Write the memory, atomically."""
        save_tree(self._path, "memory", memory_to_tree(remembered))


def memory_to_tree(kept: Remembered) -> dict[str, Any]:
    """Return a memory as it is stored."""
    return {"round": kept.round, "before": kept.before, "after": kept.after}


def memory_from_tree(tree: Mapping[str, Any]) -> Remembered:
    """Return the memory that was stored; KeyError, TypeError or ValueError if it is none."""
    return Remembered(int(tree["round"]), tree["before"], tree["after"])
