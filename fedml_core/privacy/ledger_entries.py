"""What a ledger says: entries, each bound by a hash to all that were before it.

Guarantees: an entry that was changed, exchanged, taken out or put in between breaks the chain at its own number.
    An entry is read back exactly as it was written, or not at all.
Trust: whoever can write every file of a ledger, its head included, can make a new chain that holds; only a head that
    was noted elsewhere shows that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedml_core.errors import CheckpointError
from fedml_core.privacy.events import checked

__all__ = ["Account", "Entry", "Link", "Purpose", "beginning", "linked", "read_chain"]


@dataclass(frozen=True)
class Account:
    """Whose privacy is spent: the data set by its stable name, the unit, and how neighbours differ."""

    dataset: str
    unit: str
    adjacency: str


@dataclass(frozen=True)
class Entry:
    """One release that was begun.

    `number`: from 1. `time`: UTC, to the second. `content`: a digest of the data, or "". `protection`: who saw what.
    `participation`: how often these data took part in the run so far, 0 where nobody counts.
    `event`: what was done, in the words of `fedml_core.privacy.events`; None where no noise protected it.
    """

    number: int
    time: str
    dataset: str
    content: str
    unit: str
    adjacency: str
    run: str
    server: str
    round: int
    participation: int
    protection: str
    event: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    @classmethod
    def unwritten(cls, event: Mapping[str, Any], account: Account, run: str) -> Entry:
        """Return a release that is in no ledger, for what a budget says of it."""
        return cls(0, "", account.dataset, "", account.unit, account.adjacency, run, "", 0, 0, "", event)


@dataclass(frozen=True)
class Purpose:
    """What a release is for: the run, its server, the round. `protection`: in words. `content`: `Ledger.digest`.

    `participation`: how often these data took part in the run, this time included; 0 where nobody counts.
    """

    run: str
    server: str
    round: int
    protection: str = ""
    content: str = ""
    participation: int = 0


@dataclass(frozen=True)
class Link:
    """A place in a chain: how many entries there are, and the hash of the last one."""

    number: int
    digest: str


Row = tuple[int, str, str]
"""An entry as it is stored: its number, its text and its hash."""


def beginning(identity: str) -> Link:
    """Return the place before the first entry of the ledger with this identity."""
    return Link(0, hashlib.sha256(f"fedveil-ledger/1|{identity}".encode()).hexdigest())


def linked(entry: Entry, before: Link) -> Row:
    """Return an entry as the one after `before`."""
    text = json.dumps({**entry.to_json(), "previous": before.digest}, sort_keys=True, separators=(",", ":"))
    return entry.number, text, hashlib.sha256(text.encode()).hexdigest()


def read_chain(rows: Iterable[Row], start: Link) -> Iterator[tuple[Entry, Link]]:
    """Yield every entry and its place, in order.

    Raises: CheckpointError: at the first row that is not the one that was written after the row before it; it names it.
    """
    last = start
    for number, text, digest in rows:
        wanted = last.number + 1
        if number != wanted:
            raise _broken(wanted, f"is missing, the next one is entry {number}")
        if not isinstance(text, str) or hashlib.sha256(text.encode()).hexdigest() != digest:
            raise _broken(number, "was changed: its hash is not that of its text")
        entry, previous = _read(number, text)
        if entry.number != number or previous != last.digest:
            raise _broken(number, "was exchanged: it does not follow from the entries before it")
        last = Link(number, digest)
        yield entry, last


def _read(number: int, text: str) -> tuple[Entry, str]:
    try:
        table = json.loads(text)
        previous = table.pop("previous")
        if table["event"] is not None:
            table["event"] = checked(table["event"])
        if table.keys() != {field.name for field in fields(Entry)}:
            raise ValueError("its fields are others")
        return Entry(**table), previous
    except Exception as error:  # whatever is wrong with it, it is no entry
        raise _broken(number, f"cannot be read ({type(error).__name__})") from error


def _broken(number: int, fact: str) -> CheckpointError:
    return CheckpointError(f"entry {number} {fact}")
