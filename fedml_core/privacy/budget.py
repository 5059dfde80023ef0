"""What may be spent on one data set, and the no that comes before the release that would spend more.

Guarantees: an event is refused if it would bring what is spent above any of the budget's limits.
    A release without noise, or one of another unit, is refused under a budget: nothing could account for it.
    An earlier release without noise leaves nothing to spend.
Trust: the site's own files; nothing that a server sends changes a budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fedml_core.checks import require_number
from fedml_core.errors import ConfigError, RefusalError
from fedml_core.privacy.events import ADJACENCIES, UNITS
from fedml_core.privacy.ledger_entries import Account, Entry

if TYPE_CHECKING:
    from fedml_core.privacy.accounting import Claim

__all__ = ["Accountant", "Budget", "accounted", "relevant", "total"]

Event = Mapping[str, Any]


class Accountant(Protocol):
    """What says what events cost; `fedml_core.privacy.accounting.epsilon_of` is one."""

    def __call__(self, events: Sequence[Event], *, delta: float, unit: str, adjacency: str) -> Claim:
        """Return the claim about all of `events` together."""
        ...


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that may be spent on a data set: for ever, in one run, in one release; None sets no limit there.

    `epsilon`s are at `delta`, about one `unit`, under `adjacency`.
    """

    epsilon: float | None
    delta: float
    unit: str
    adjacency: str
    epsilon_per_run: float | None = None
    epsilon_per_round: float | None = None

    def __post_init__(self) -> None:
        """Check every number and name."""
        limits = [getattr(self, name) for name in _LIMITS]
        for name, limit in zip(_LIMITS, limits, strict=True):
            if limit is not None:
                require_number(name, limit, above=0)
        if all(limit is None for limit in limits):
            raise ConfigError(f"a budget must set one of {', '.join(_LIMITS)}")
        require_number("delta", self.delta, above=0, below=1)
        for name, known in (("unit", UNITS), ("adjacency", ADJACENCIES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def check(self, event: Event | None, account: Account, run: str, past: Sequence[Entry], cost: Accountant) -> None:
        """Check one release before it is begun. `past`: every entry of the ledger.

        Raises: RefusalError: with the limit's name as its rule, if it would exceed it; "unprotected" or "unit", if
            nothing could account for it. PrivacyError: if nothing accounts for the event.
        """
        if event is None:
            raise RefusalError(
                "unprotected",
                "there is a privacy budget, and this work would release what no noise protects; ask for it under "
                "differential privacy",
            )
        if account.unit != self.unit:
            raise RefusalError(
                "unit",
                f"the budget counts the unit {self.unit}, and this work protects the unit {account.unit}; "
                "both must agree",
            )
        mine = relevant(past, account)
        scopes: tuple[list[Entry], ...] = (mine, [entry for entry in mine if entry.run == run], [])
        for name, entries in zip(_LIMITS, scopes, strict=True):
            limit = getattr(self, name)
            if limit is not None:
                self._check_one(name, limit, event, entries, cost)

    def _check_one(self, name: str, limit: float, event: Event, past: Sequence[Entry], cost: Accountant) -> None:
        before, bare = accounted(past)
        if bare:
            raise RefusalError(
                name, f"{len(bare)} earlier releases of these data carried no noise, so no {name} is left to spend"
            )
        after = self.claim([*before, event], cost).epsilon
        if not after <= limit:
            spent = self.claim(before, cost).epsilon if before else 0.0
            raise RefusalError(
                name,
                f"{spent:.4f} of the {name} {limit:g} is spent (delta {self.delta:g}, unit {self.unit}, "
                f"{self.adjacency}), and this round would make it {math.ceil(after * 1e4) / 1e4:.4f}; ask for more "
                "noise or fewer rounds",
            )

    def claim(self, events: Sequence[Event], cost: Accountant) -> Claim:
        """Return what events cost in this budget's terms."""
        return cost(events, delta=self.delta, unit=self.unit, adjacency=self.adjacency)


_LIMITS = ("epsilon", "epsilon_per_run", "epsilon_per_round")


def relevant(entries: Sequence[Entry], account: Account) -> list[Entry]:
    """Return what was released about an account's data: its unit's entries, and those without noise, of any unit.

    An entry counts whatever adjacency it was made for: how neighbours differ is the accountant's question, not the
    mechanism's.
    """
    return [
        entry
        for entry in entries
        if entry.dataset == account.dataset and (entry.event is None or entry.unit == account.unit)
    ]


def accounted(entries: Sequence[Entry]) -> tuple[list[Event], list[Entry]]:
    """Return the events of entries, and the entries that have none."""
    return (
        [entry.event for entry in entries if entry.event is not None],
        [entry for entry in entries if entry.event is None],
    )


def total(entries: Sequence[Entry], account: Account, delta: float, cost: Accountant) -> Claim:
    """Return what entries cost together; infinite, with accountant "none", if one of them carried no noise.

    Raises: PrivacyError: if nothing accounts for them.
    """
    from fedml_core.privacy.accounting import Claim

    events, bare = accounted(entries)
    if bare:
        note = f"{len(bare)} of {len(entries)} releases carried no noise."
        return Claim(math.inf, delta, account.unit, account.adjacency, "none", "none", (note,))
    if not events:
        return Claim(0.0, delta, account.unit, account.adjacency, "none", "none", ("Nothing was released.",))
    return cost(events, delta=delta, unit=account.unit, adjacency=account.adjacency)
