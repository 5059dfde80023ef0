"""The server's own books: every round that it begins under client-level privacy, on the disk before anybody is asked.

Guarantees: a round is in the ledger before its cohort is drawn, and stays there if the round is void, or the server
    dies and begins it again.
Guarantees: a round that would exceed the budget is not begun; the run ends with the numbers.
"""

from __future__ import annotations

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

    Args: started: the rounds that were done when this process took the run up. protection: as reports name it.
    """

    def __init__(
        self, ledger: Ledger, account: Account, run: str, *, started: int, protection: str, budget: Budget | None
    ) -> None:
        self._ledger, self._account, self._run = ledger, account, run
        self._round, self._protection, self._budget = started, protection, budget

    def __call__(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Write down one more round.

        Raises: RunError: if the budget does not allow it. CheckpointError: if the ledger cannot be used.
        """
        self._round += 1
        purpose = Purpose(self._run, "", self._round, self._protection)
        for event in events:
            try:
                self._ledger.reserve(event, self._account, purpose, budget=self._budget)
            except RefusalError as error:
                raise RunError(f"round {self._round} is not begun, by the run's own budget: {error}") from error


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
    adjacency = terms.adjacency or plan.sampling.adjacency
    account = Account(config.ledger.dataset or "clients", terms.unit, adjacency)
    budget = Budget(**config.budget.model_dump()) if config.budget.limited else None
    ledger = Ledger(ledger_path(config, folder), head=head, cost=cost)
    protection = plan.strategy.protection()
    return RoundBooks(ledger, account, state.run, started=state.round, protection=protection, budget=budget)
