"""What every simulated client's examples have cost so far: one account a client, charged before anybody trains.

An account is a count of trainings, since all trainings of a run are the same event: 100,000 clients are a file of a
megabyte. It is a file of its own, neither in the checkpoint, which is written after a round and so would give back a
round that a crash cut off, nor among the clients' memories, which a resumed run takes back by that round on purpose.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedml_core.databases import blaming
from fedml_core.errors import CheckpointError, RefusalError, RunError
from fedml_core.policy_tables import BudgetTable
from fedml_core.privacy.budget import Budget
from fedml_core.privacy.ledger_entries import Account, Entry
from fedml_core.privacy.terms import Terms
from server.books import claim_of
from server.sampling import EveryClient
from simulations.private_clients import EXAMPLES_DIFFER, PrivateClients

if TYPE_CHECKING:
    from fedml_core.privacy.accounting import Claim

__all__ = ["ACCOUNTS_FILE", "Accounts", "forget_accounts"]

ACCOUNTS_FILE = "examples.sqlite"
_FORMAT = 1


class Accounts:
    """The accounts of one run's clients, in its folder; without a folder, in memory, for as long as the run.

    Guarantees: a training is counted before it begins, on the disk where there is a folder. Nothing takes it back:
        not a failure, a reply that was lost, a crash, or a resumed run that does the round again.
    Guarantees: a round that would bring one of its clients beyond the budget is not begun.

    Args: clients: how all of them train. budget: its delta is every claim's. run: the run's id. reported: of a run that
        goes on, so that the accounts must be there, the claim that its checkpoint holds; it may be empty.
    Raises: CheckpointError: if they are not, are damaged or older than the checkpoint, or those of another run or of
        other settings.
    """

    def __init__(
        self,
        clients: PrivateClients,
        budget: BudgetTable,
        *,
        folder: Path | None,
        run: str,
        reported: Mapping[str, Any] | None = None,
    ) -> None:
        resumed = reported is not None
        self._clients, self._run = clients, run
        self._terms = Terms(
            delta=budget.delta, unit="example", adjacency=EXAMPLES_DIFFER, secret_cohort=False, server_noise=False
        )
        self._budget = Budget(**budget.model_dump()) if budget.limited else None
        self._path = None if folder is None else folder / ACCOUNTS_FILE
        self._name = self._path or "the accounts of examples"
        self._claim = cache(self._claim_of)
        self._check = cache(self._checked)
        if self._path is not None and resumed and not self._path.exists():
            raise CheckpointError(
                f"{self._path} does not exist, and it says what this run's clients have spent; restore it from a copy, "
                "or start a new run"
            )
        with blaming(self._name):
            self._connection = sqlite3.connect(self._path or ":memory:", timeout=1.0, isolation_level=None)
        try:
            with blaming(self._name):
                self._prepare(resumed)
                self._worst = int(self._one("SELECT coalesce(max(trainings), 0) FROM account"))
            self._require(reported or {})
        except BaseException:
            self._connection.close()
            raise

    @property
    def worst(self) -> int:
        """How often the client that trained most often has trained."""
        return self._worst

    def charge(self, clients: Sequence[int], round_number: int) -> None:
        """Count one more training of each client; only then may they be asked.

        Raises: RunError: if the budget does not allow it for one of them; nobody is charged. CheckpointError: if the
            accounts cannot be written.
        """
        if not clients:
            return
        asked = json.dumps([int(client) for client in clients])
        # Nobody else charges between what is looked up and what is written.
        with blaming(self._name), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            most = int(
                self._one(
                    "SELECT coalesce(max(trainings), 0) FROM account WHERE client IN (SELECT value FROM json_each(?))",
                    asked,
                )
            )
            try:
                self._check(most)
            except RefusalError as error:
                raise RunError(f"round {round_number} is not begun, by the clients' own budget: {error}") from error
            self._connection.execute(
                "INSERT INTO account SELECT value, 1 FROM json_each(?) WHERE true "
                "ON CONFLICT (client) DO UPDATE SET trainings = trainings + 1",
                (asked,),
            )
        self._worst = max(self._worst, most + 1)

    def trainings(self) -> dict[int, int]:
        """Return how often each client that ever trained has trained."""
        with blaming(self._name):
            return dict(self._connection.execute("SELECT client, trainings FROM account ORDER BY client"))

    def claim(self) -> Claim:
        """Return what the trainings so far cost an example of the client that trained most often.

        Raises: PrivacyError: if nothing accounts for them.
        """
        return self._claim(self._worst)

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        self._connection.close()

    def _claim_of(self, trainings: int) -> Claim:
        return claim_of(self._events(trainings), self._terms, EveryClient())

    def _events(self, trainings: int) -> list[Mapping[str, Any]]:
        return [{"name": "repeated", "count": trainings, "event": self._clients.event}] if trainings else []

    def _checked(self, trainings: int) -> None:
        """Raise RefusalError if a client that has trained so often may not train again."""
        if self._budget is None:
            return
        from fedml_core.privacy.accounting import epsilon_of

        account = Account("client", "example", self._budget.adjacency)
        past = [Entry.unwritten(event, account, self._run) for event in self._events(trainings)]
        self._budget.check(self._clients.event, account, self._run, past, epsilon_of)

    def _prepare(self, resumed: bool) -> None:
        run = self._connection.execute
        # FULL, so that a power cut undoes nothing either.
        run("PRAGMA journal_mode = TRUNCATE")
        run("PRAGMA synchronous = FULL")
        run("BEGIN IMMEDIATE")
        run("CREATE TABLE IF NOT EXISTS about (format INTEGER, run TEXT, settings TEXT, event TEXT)")
        run("CREATE TABLE IF NOT EXISTS account (client INTEGER PRIMARY KEY, trainings INTEGER NOT NULL)")
        settings, event = json.dumps(self._clients.settings()), json.dumps(dict(self._clients.event), sort_keys=True)
        mine = (_FORMAT, self._run, settings, event)
        kept = run("SELECT format, run, settings, event FROM about").fetchone()
        if kept is None and resumed:
            raise CheckpointError(
                f"{self._path} is empty, and it should say what this run's clients have spent; restore it from a copy, "
                "or start a new run"
            )
        if kept is None:
            run("INSERT INTO about VALUES (?, ?, ?, ?)", mine)
        run("COMMIT")
        if kept is not None and tuple(kept) != mine:
            name = next(
                name
                for name, old, new in zip(("format", "run", "[clients.examples]", "training"), kept, mine, strict=True)
                if old != new
            )
            raise CheckpointError(
                f"{self._path} holds accounts of another {name} than this run's; restore the old value, or start a new "
                "run in another folder"
            )

    def _require(self, reported: Mapping[str, Any]) -> None:
        """Refuse accounts that say less than was reported: a copy that is older than the checkpoint."""
        least = reported.get("epsilon")
        if least is None or reported.get("delta") != self._terms.delta:
            return
        found = self.claim().epsilon
        if found < least * (1 - 1e-9):
            raise CheckpointError(
                f"{self._path} accounts for epsilon {found:.2f}, and {least:.2f} was reported already; restore a newer "
                "copy, or start a new run"
            )

    def _one(self, query: str, *values: str) -> Any:
        return self._connection.execute(query, values).fetchone()[0]


def forget_accounts(folder: Path) -> None:
    """Remove the accounts of the run that another one replaces."""
    for suffix in ("", "-journal"):
        (folder / f"{ACCOUNTS_FILE}{suffix}").unlink(missing_ok=True)
