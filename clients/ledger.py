"""The site's books: whose data they are about, which ledger, what budget; filled before each training.

Guarantees: every training that is begun is in the ledger before its first step, with the event that protects it or
    with none.
Guarantees: a ledger that cannot be written or believed is a refusal, and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fedml_core.config import SiteConfig
from fedml_core.data import Data, Examples
from fedml_core.errors import CheckpointError, RefusalError
from fedml_core.privacy.budget import Accountant, Budget
from fedml_core.privacy.ledger import Account, Entry, Ledger, Purpose

if TYPE_CHECKING:
    from fedml_core.privacy.accounting import Claim

__all__ = ["LEDGER_FILE", "NOISE", "Books", "ledger_of"]

LEDGER_FILE = "ledger.sqlite"
NOISE = frozenset({"central", "distributed", "local", "example"})
"""The protections that an accountant can count."""


def ledger_of(config: SiteConfig, cost: Accountant | None = None) -> Ledger:
    """Return the ledger that a site.toml names; nothing is written yet."""
    table = config.ledger
    path = config.beside(config.memory) / LEDGER_FILE if table.path is None else config.beside(table.path)
    return Ledger(path, head=None if table.head is None else config.beside(table.head), cost=cost)


class Books:
    """One site's part in its holder's ledger. Messages may reach a server and hold no path; the causes do.

    Args: config: the site's. cost: what events cost, in the place of `epsilon_of`.
    """

    def __init__(self, config: SiteConfig, cost: Accountant | None = None) -> None:
        self.ledger = ledger_of(config, cost)
        self.dataset = config.ledger.dataset or f"client-{config.id}"
        self.table = config.budget
        self.budget = _budget(config)

    def account(self, unit: str) -> Account:
        """Return the account of this site's data for one unit."""
        return Account(self.dataset, unit, self.table.adjacency)

    def of_run(self, run: str) -> list[Entry]:
        """Return what this site's data took part in, in one run.

        Raises: RefusalError: with rule "ledger", if the ledger cannot be believed.
        """
        try:
            entries = self.ledger.known()
        except CheckpointError as error:
            raise _unusable(error) from error
        return [entry for entry in entries if entry.run == run and entry.dataset == self.dataset]

    def spent(self, unit: str, run: str) -> Claim:
        """Return what one run has cost this site's data, at its budget's delta.

        Raises: RefusalError: if the ledger cannot be used. PrivacyError: if nothing accounts for what it holds.
        """
        try:
            return self.ledger.spent(self.account(unit), self.table.delta, run=run)
        except CheckpointError as error:
            raise _unusable(error) from error

    def reserve(self, event: Mapping[str, Any] | None, unit: str, purpose: Purpose) -> None:
        """Return once the release is in the ledger.

        Raises: RefusalError: if the budget does not allow it, or the ledger cannot be used. PrivacyError: if nothing
            accounts for the event.
        """
        try:
            self.ledger.reserve(event, self.account(unit), purpose, budget=self._budget_for(unit, event))
        except CheckpointError as error:
            raise _unusable(error) from error

    def check(self, event: Mapping[str, Any] | None, unit: str, purpose: Purpose) -> None:
        """Raise what `reserve` would; nothing is written."""
        try:
            self.ledger.check(event, self.account(unit), purpose, self._budget_for(unit, event))
        except CheckpointError as error:
            raise _unusable(error) from error

    def check_unit(self, protections: frozenset[str]) -> None:
        """Check that what protects a training is something that the budget counts.

        Raises: RefusalError: with rule "unit", if it protects another unit.
        """
        noise = protections & NOISE
        units = {"example" if name == "example" else "client" for name in noise}
        if self.budget is not None and noise and self.budget.unit not in units:
            raise RefusalError(
                "unit",
                f"this site's budget counts the unit {self.budget.unit}, and this work protects the unit {min(units)} "
                f"({' and '.join(sorted(noise))}); both must agree",
            )

    def content(self, data: Data) -> str:
        """Return a keyed digest of the examples, or "" for a data set that is read piece by piece.

        Raises: RefusalError: if the ledger cannot be used.
        """
        if not isinstance(data, Examples):
            return ""
        tensors = [*data.inputs, data.targets, *([] if data.weights is None else [data.weights])]
        parts: list[bytes | memoryview] = []
        for tensor in tensors:
            parts.append(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            parts.append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        try:
            return self.ledger.digest(parts)
        except CheckpointError as error:
            raise _unusable(error) from error

    def _budget_for(self, unit: str, event: Mapping[str, Any] | None) -> Budget | None:
        # Protection of another unit on top is written down, but it is not what the budget counts.
        return self.budget if self.budget is not None and (event is None or unit == self.budget.unit) else None


def _budget(config: SiteConfig) -> Budget | None:
    return Budget(**config.budget.model_dump()) if config.budget.limited else None


def _unusable(error: CheckpointError) -> RefusalError:
    return RefusalError("ledger", "this site's privacy ledger cannot be used, so it trains nothing; its log says why")
