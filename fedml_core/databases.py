"""SQLite files that a run keeps: what goes wrong with one is said in the same words, with its file and the remedy."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from fedml_core.errors import CheckpointError

__all__ = ["blaming"]


@contextlib.contextmanager
def blaming(file: Path | str) -> Iterator[None]:
    """Blame `file`, by its path or by what it is, for what SQLite or the disk cannot do within.

    Raises: CheckpointError: in place of an error of SQLite or the system; others pass.
    """
    try:
        yield
    except (sqlite3.Error, OSError, OverflowError) as error:
        raise CheckpointError(
            f"{file} cannot be used: {error}; see to its disk, restore it from a copy, or start a new run"
        ) from error
