"""A run's budget for the privacy of its clients, which a simulation keeps as a server does, but for a ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedml_core.errors import RefusalError, RunError
from fedml_core.policy_tables import BudgetTable
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.budget import Budget
from fedml_core.privacy.ledger_entries import Account, Entry
from fedml_core.privacy.terms import Terms
from server.checkpoint import RunState

__all__ = ["ClientBudget"]


class ClientBudget:
    """Refuses the next round if it would bring what a client has spent above a limit; a coordinator's `reserve`.

    Args: table: with a limit. terms: the strategy's. adjacency: of its claims. state: with what was spent so far.
    """

    def __init__(self, table: BudgetTable, terms: Terms, adjacency: str, state: RunState) -> None:
        self._budget = Budget(**table.model_dump())
        self._account, self._run = Account("clients", terms.unit, adjacency), state.run
        self._past = [Entry.unwritten(event, self._account, self._run) for event in state.events]

    def __call__(self, events: Sequence[Mapping[str, Any]], round_number: int) -> None:
        """Take note of one more release of a round.

        Raises: RunError: if the budget does not allow it.
        """
        for event in events:
            try:
                self._budget.check(event, self._account, self._run, self._past, epsilon_of)
            except RefusalError as error:
                raise RunError(f"round {round_number} is not begun, by the run's own budget: {error}") from error
            self._past.append(Entry.unwritten(event, self._account, self._run))
