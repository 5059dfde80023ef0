"""The ledger: what was ever released about one holder's data, on the disk before it happens, in one SQLite file.

It holds events, not epsilons: what they cost is worked out anew with whatever accountant is best, over all runs and all
servers. Entries are keyed by the data set's name, which its holder chooses once: the same people in a newer file go on
paying. A digest of the data is kept beside it, and the same data under a second name are refused.

The file is used in rollback-journal mode with synchronous = EXTRA: a commit returns once the data and the journal's end
are on the disk. A write-ahead log would need shared memory, and two more files that a copy must not forget.

Guarantees: `reserve` returns only once its entry is on the disk; a kill or a power cut at any moment leaves every entry
    for which it returned.
    Nothing takes an entry back: a release that fails after `reserve` stays spent.
    Of processes that reserve at once, never two get the last bit of a budget.
    A ledger that was changed, cut short against its head, or cannot be read is an error, never a fresh start.
Trust: the data holder's own machine; entries hold no data, only names, numbers, times and a keyed digest.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedml_core.checks import require_whole
from fedml_core.errors import CheckpointError, PrivacyError, RefusalError
from fedml_core.privacy.budget import Accountant, Budget, relevant, total
from fedml_core.privacy.events import ADJACENCIES, UNITS, checked
from fedml_core.privacy.ledger_entries import Account, Entry, Link, Purpose, beginning, linked, read_chain
from fedml_core.privacy.ledger_head import Head
from fedml_core.private_files import sync_folder

if TYPE_CHECKING:
    from fedml_core.privacy.accounting import Claim

__all__ = ["Account", "Budget", "Entry", "Ledger", "Link", "Purpose"]

_FORMAT = 1
_WAIT_S = 120.0
"""How long to wait for another process that is at the ledger: it may be working out a cost."""
_LONGEST = 200
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS ledger (format INTEGER NOT NULL, identity TEXT NOT NULL, salt BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS entry (number INTEGER PRIMARY KEY, text TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE TRIGGER IF NOT EXISTS no_change BEFORE UPDATE ON entry "
    "BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END",
    "CREATE TRIGGER IF NOT EXISTS no_removal BEFORE DELETE ON entry "
    "BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END",
)


class Ledger:
    """The ledger in the file `path`; made, with its folder, by the first `reserve`. Holds nothing open between calls.

    Args: head: where to keep the head; by default beside the ledger. Best on another disk. cost: what events cost.
    Guarantees: every answer is about a chain that holds, up to the head at least.
    """

    def __init__(self, path: Path, *, head: Path | None = None, cost: Accountant | None = None) -> None:
        self.path = path
        self._head = Head(path.with_name(f"{path.name}.head") if head is None else head)
        self._cost = cost

    def reserve(
        self, event: Mapping[str, Any] | None, account: Account, purpose: Purpose, *, budget: Budget | None = None
    ) -> int:
        """Return the number of the new entry, once it is on the disk; only then may the release begin.

        Args: event: what is about to be done; None if no noise protects it, which is written down, too.
        Raises: RefusalError: if the budget does not allow it, or these data are known by another name; nothing was
            written. PrivacyError: if nothing accounts for the event. CheckpointError: if the ledger cannot be used.
        """
        event = None if event is None else checked(event)
        _require(account, purpose)
        with self._open(make=True) as connection:
            identity, entries, last = self._read(connection)
            self._decide(event, account, purpose, budget, entries)
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            entry = Entry(last.number + 1, now, event=event, **{**vars(account), **vars(purpose)})
            connection.execute("INSERT INTO entry VALUES (?, ?, ?)", linked(entry, last))
        self._move_head(identity)
        return entry.number

    def check(
        self, event: Mapping[str, Any] | None, account: Account, purpose: Purpose, budget: Budget | None = None
    ) -> None:
        """Raise what `reserve` would; nothing is written."""
        event = None if event is None else checked(event)
        _require(account, purpose)
        self._decide(event, account, purpose, budget, self.known())

    def spent(self, account: Account, delta: float, *, run: str | None = None) -> Claim:
        """Return the claim about everything that was begun with an account's data, in one run or in all.

        Raises: PrivacyError: if nothing accounts for it. CheckpointError: if the ledger cannot be used.
        """
        chosen = [entry for entry in relevant(self.known(), account) if run is None or entry.run == run]
        return total(chosen, account, delta, self._accountant())

    def known(self) -> list[Entry]:
        """Return every entry, in order; none where no ledger was begun yet.

        Raises: CheckpointError: if the ledger cannot be believed, or was removed.
        """
        try:
            return self.entries()
        except _NotBegunError:
            return []

    def entries(self) -> list[Entry]:
        """Return every entry, in order.

        Raises: CheckpointError: if the ledger is missing or cannot be believed.
        """
        with self._open(make=False) as connection:
            return self._read(connection)[1]

    def verify(self, noted: str | None = None) -> Link:
        """Return how far the ledger goes, once every hash is right. `noted`: a hash that it had at some time.

        Raises: CheckpointError: it names the first entry that is wrong.
        """
        with self._open(make=False) as connection:
            identity, _, last = self._read(connection)
            known = [beginning(identity).digest, *(row[2] for row in _rows(connection))]
        if noted is not None and noted not in known:
            raise CheckpointError(
                f"{self.path}: the hash {noted[:16]} that was noted is in none of its {last.number} entries; entries "
                "were changed or taken out since"
            )
        return last

    def lines(self) -> list[str]:
        """Return the entries as they are stored, as JSON lines with their hashes; the first line names the ledger.

        Raises: CheckpointError: if the ledger is missing or cannot be believed.
        """
        with self._open(make=False) as connection:
            identity, _, last = self._read(connection)
            rows = _rows(connection)
        first = f'{{"format":"fedveil-ledger/{_FORMAT}","ledger":"{identity}","entries":{last.number}}}'
        return [first, *(f'{text[:-1]},"hash":"{digest}"}}' for _, text, digest in rows)]

    def digest(self, parts: Sequence[bytes | memoryview]) -> str:
        """Return a digest of data with a key that only this ledger has, so that nobody can guess at the data with it.

        Raises: CheckpointError: if the ledger cannot be used.
        """
        with self._open(make=True) as connection:
            (salt,) = connection.execute("SELECT salt FROM ledger").fetchone()
        made = hashlib.blake2b(key=salt, digest_size=32)
        for part in parts:
            made.update(len(part).to_bytes(8, "big"))
            made.update(part)
        return made.hexdigest()

    def _decide(
        self,
        event: Mapping[str, Any] | None,
        account: Account,
        purpose: Purpose,
        budget: Budget | None,
        entries: Sequence[Entry],
    ) -> None:
        if purpose.content:
            others = {entry.dataset for entry in entries if entry.content == purpose.content} - {account.dataset}
            if others:
                raise RefusalError(
                    "dataset",
                    f"these data are in the ledger as {min(others)!r}, so they cannot begin anew as "
                    f"{account.dataset!r}; keep the name",
                )
        if budget is not None:
            budget.check(event, account, purpose.run, entries, self._accountant())

    def _accountant(self) -> Accountant:
        if self._cost is not None:
            return self._cost
        from fedml_core.privacy.accounting import epsilon_of  # loads what works out costs, which writing does without

        return epsilon_of

    def _read(self, connection: sqlite3.Connection) -> tuple[str, list[Entry], Link]:
        """Return the identity, the entries and the last place, after every check."""
        identity = str(connection.execute("SELECT identity FROM ledger").fetchone()[0])
        entries, digests = [], [beginning(identity).digest]
        last = beginning(identity)
        try:
            for entry, place in read_chain(_rows(connection), last):
                entries.append(entry)
                digests.append(place.digest)
                last = place
        except CheckpointError as error:
            raise self._damaged(str(error)) from error
        head = self._head.read(identity)
        if head.number > last.number:
            raise self._damaged(f"entry {last.number + 1} is missing, the head says that there are {head.number}")
        if digests[head.number] != head.digest:
            raise self._damaged(f"entry {head.number} is not the one that the head names")
        return identity, entries, last

    def _move_head(self, identity: str) -> None:
        # Under the lock again, so that the heads of two processes are written in the order of their entries.
        with self._open(make=False) as connection:
            row = connection.execute("SELECT number, hash FROM entry ORDER BY number DESC LIMIT 1").fetchone()
            self._head.write(identity, Link(*row) if row else beginning(identity))

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {what}; restore it and its head from one copy")

    @contextlib.contextmanager
    def _open(self, *, make: bool) -> Iterator[sqlite3.Connection]:
        """Hold the ledger alone, and commit at the end unless something is raised.

        Raises: CheckpointError: if it is missing, damaged or cannot be written.
        """
        begun = self._head.exists  # asked first: whoever makes a ledger makes the head last
        if not os.path.lexists(self.path) and begun:
            raise CheckpointError(
                f"{self.path} does not exist, and its head is there: it was removed; restore it from a copy"
            )
        if not os.path.lexists(self.path) and not make:
            raise _NotBegunError(f"{self.path} does not exist; name another ledger, or take part in a run first")
        connection = self._blaming(self._connect)
        try:
            self._blaming(lambda: self._prepare(connection, make=make))
            yield connection
            self._blaming(lambda: connection.execute("COMMIT"))
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        finally:
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        if not os.path.lexists(self.path):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            sync_folder(self.path.parent)
        return sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)

    def _prepare(self, connection: sqlite3.Connection, *, make: bool) -> None:
        run = connection.execute
        run("PRAGMA journal_mode = DELETE")
        run("PRAGMA synchronous = EXTRA")
        # Alone even to read, where the file can be written: the head must not move meanwhile.
        run("BEGIN IMMEDIATE" if os.access(self.path, os.W_OK) else "BEGIN")
        if not run("SELECT 1 FROM sqlite_master WHERE name = 'ledger'").fetchone():
            if self._head.exists:
                raise self._damaged("it is empty, and its head is not")
            if not make:
                raise _NotBegunError(f"{self.path} holds no ledger; name another file, or take part in a run first")
            for statement in _SCHEMA:
                run(statement)
            identity = secrets.token_hex(16)
            run("INSERT INTO ledger VALUES (?, ?, ?)", (_FORMAT, identity, secrets.token_bytes(32)))
            run("COMMIT")
            run("BEGIN IMMEDIATE")
        (form, identity), *more = run("SELECT format, identity FROM ledger").fetchall() or [(None, "")]
        if form != _FORMAT or more:
            raise self._damaged(f"it has format {form}, this version reads {_FORMAT}")
        if not self._head.exists and not run("SELECT 1 FROM entry LIMIT 1").fetchone():
            if not make:  # whoever only reads leaves no file behind
                raise _NotBegunError(
                    f"{self.path} has no entry, and its head {self._head.path} does not exist; name the head that "
                    "belongs to it, or take part in a run first"
                )
            self._head.write(identity, beginning(identity))

    def _blaming(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (sqlite3.Error, OSError, OverflowError, TypeError, ValueError) as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path} cannot be used: {error}; see to its disk, or restore it from a copy")


class _NotBegunError(CheckpointError):
    """There is no ledger yet."""


def _rows(connection: sqlite3.Connection) -> list[tuple[int, str, str]]:
    return connection.execute("SELECT number, text, hash FROM entry ORDER BY number").fetchall()


def _require(account: Account, purpose: Purpose) -> None:
    for name, known in (("unit", UNITS), ("adjacency", ADJACENCIES)):
        if getattr(account, name) not in known:
            raise PrivacyError(f"{name} must be one of {', '.join(known)}, got {str(getattr(account, name))[:40]!r}")
    for name, text in (("dataset", account.dataset), ("run", purpose.run)):
        if not isinstance(text, str) or not 1 <= len(text) <= _LONGEST:
            raise PrivacyError(f"{name} must be named by 1 to {_LONGEST} characters")
    require_whole("round", purpose.round, at_least=0, at_most=2**53)
