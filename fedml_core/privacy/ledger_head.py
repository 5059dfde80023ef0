"""The head of a ledger: how far it went and its last hash, in a file apart, so that a ledger cut short is seen.

Guarantees: the head is written after the entry that it names is on the disk, so a kill never makes a true ledger look
    cut short.
    A ledger with fewer entries than its head, or with others, is refused; so is one whose head is gone.
Trust: whoever can write both files, or puts both back from one older copy, is not seen; keep the head on another disk,
    or note it from time to time.
"""

from __future__ import annotations

import os
from pathlib import Path

from fedml_core import private_files
from fedml_core.errors import CheckpointError, ConfigError
from fedml_core.privacy.ledger_entries import Link

__all__ = ["Head"]

_FORMAT, _VERSION = "fedveil-ledger-head", 1


class Head:
    """The head of one ledger, in the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        """Return whether there is a file."""
        return os.path.lexists(self.path)

    def write(self, identity: str, link: Link) -> None:
        """Return once the head is on the disk; the old one is there until then.

        Raises: CheckpointError: if it cannot be written.
        """
        content = {"format": _FORMAT, "version": _VERSION, "ledger": identity, "entries": link.number}
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            private_files.replace(
                self.path, private_files.to_json({**content, "hash": link.digest}), private_files.SECRET
            )
            private_files.sync_folder(self.path.parent)
        except (ConfigError, OSError) as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}; see to its disk") from error

    def read(self, identity: str) -> Link:
        """Return the place that the head names.

        Raises: CheckpointError: if it is missing, damaged, or the head of another ledger.
        """
        try:
            content = private_files.read_json(self.path, "the ledger's head")
            if (content["format"], content["version"]) != (_FORMAT, _VERSION):
                raise ValueError("its format is another")
            if type(content["entries"]) is not int or content["entries"] < 0:
                raise ValueError("it counts no entries")
            link, owner = Link(content["entries"], str(content["hash"])), str(content["ledger"])
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}, which says how far the ledger went, is missing or damaged; restore it from a copy"
            ) from error
        if owner != identity:
            raise CheckpointError(f"{self.path} is the head of another ledger; restore both from one copy")
        return link
