"""The server's own books: every round that it begins under client-level privacy, on the disk before anybody is asked.

Guarantees: a round is in the ledger before its cohort is drawn, and stays there if the round is void, or the server
    dies and begins it again; a resumed run's epsilon counts it, too.
Guarantees: a round that would exceed the budget is not begun; the run ends with the numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedml_core.config import RunConfig
from fedml_core.errors import RefusalError, RunError
from fedml_core.privacy.budget import Accountant, Budget
from fedml_core.privacy.ledger import Account, Ledger, Purpose
from server.checkpoint import RunState
from server.plan import Plan

__all__ = ["LEDGER_FILE", "RoundBooks", "ledger_path", "round_books"]

LEDGER_FILE = "ledger.sqlite"


class RoundBooks:
    """Takes down the events of one run's rounds; a coordinator calls it when a round begins.

    Args: protection: as reports name it.
    """

    def __init__(
        self, ledger: Ledger, account: Account, run: str, *, protection: str, budget: Budget | None = None
    ) -> None:
        self._ledger, self._account, self._run = ledger, account, run
        self._protection, self._budget = protection, budget

    def __call__(self, events: Sequence[Mapping[str, Any]], round_number: int) -> None:
        """Write down one more release of a round.

        Raises: RunError: if the budget does not allow it. CheckpointError: if the ledger cannot be used.
        """
        purpose = Purpose(self._run, "", round_number, self._protection)
        for event in events:
            try:
                self._ledger.reserve(event, self._account, purpose, budget=self._budget)
            except RefusalError as error:
                raise RunError(f"round {round_number} is not begun, by the run's own budget: {error}") from error

    def resumed(self, state: RunState) -> RunState:
        """Return a checkpoint's state with everything that the ledger holds of its run.

        A round that a crash cut off is in the ledger and in no checkpoint; its sum may have been seen.
        Raises: CheckpointError: if the ledger cannot be used.
        """
        from server.books import counted  # loads the accountant, which runs without privacy do without

        here = self._run, self._account.dataset
        mine = [entry for entry in self._ledger.known() if (entry.run, entry.dataset) == here]
        events = [entry.event for entry in mine if entry.event is not None]
        if len(events) <= sum(int(each["count"]) for each in state.events):
            return state
        spent: Sequence[Mapping[str, Any]] = ()
        for event in events:
            spent = counted(spent, event)
        return dataclasses.replace(state, events=spent)


def ledger_path(config: RunConfig, folder: Path) -> Path:
    """Return where a run's ledger is. `folder`: where the run writes."""
    return folder / LEDGER_FILE if config.ledger.path is None else config.beside(config.ledger.path)


def round_books(
    config: RunConfig, folder: Path, plan: Plan, state: RunState, *, cost: Accountant | None = None
) -> RoundBooks | None:
    """Return the books of a run, or None where its strategy claims no privacy."""
    terms = plan.strategy.privacy()
    if terms is None:
        return None
    head = None if config.ledger.head is None else config.beside(config.ledger.head)
    adjacency = terms.adjacent(plan.sampling.adjacency)
    account = Account(config.ledger.dataset or "clients", terms.unit, adjacency)
    budget = Budget(**config.budget.model_dump()) if config.budget.limited else None
    ledger = Ledger(ledger_path(config, folder), head=head, cost=cost)
    return RoundBooks(ledger, account, state.run, protection=plan.strategy.protection(), budget=budget)
