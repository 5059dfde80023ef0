"""The gate that all work for a server passes: policy, then ledger, then training, then what may be said about it.

Guarantees: nothing is trained that the policy refuses or that is not in the ledger; what fails later stays there.
Guarantees: where the site's own noise protects the update, no metric leaves beside it unless the site.toml names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clients.asked import AT_SERVER, Asked, Event, Sum, mechanisms
from clients.ledger import NOISE, Books
from clients.policy import Policy
from fedml_core.config import SiteConfig
from fedml_core.data import Data
from fedml_core.errors import PrivacyError, RefusalError
from fedml_core.messages import Assignment, TrainWork
from fedml_core.privacy.budget import Accountant
from fedml_core.privacy.ledger import Purpose
from fedml_core.update import Update

if TYPE_CHECKING:
    from fedml_core.privacy.accounting import Claim

__all__ = ["Gate", "due"]

_OWN_NOISE = frozenset({"distributed", "local", "example"})
_WHOLE_RUN = ("tree", "matrix")


@dataclass
class _Begun:
    """The training that was let through last."""

    asked: Asked
    protections: frozenset[str]
    purpose: Purpose
    reserved: bool = False


class Gate:
    """What one site lets through, by its site.toml; for one training at a time.

    Args: server: HOST:PORT, as the site's own operator gave it. example: whether the trainer protects examples, and
        will call `reserve` before its first step. cost: what events cost, in the place of `epsilon_of`.
    """

    def __init__(
        self, config: SiteConfig, *, server: str = "", example: bool = False, cost: Accountant | None = None
    ) -> None:
        self._policy, self._books = Policy(config.policy), Books(config, cost)
        self._metrics = config.policy.metrics
        self._uniform = config.policy.uniform_weights
        self._server, self._example = server, example
        self._begun: _Begun | None = None
        self._released: frozenset[str] = frozenset()
        """What protected the update that was released last."""
        self._content: tuple[Data, str] | None = None
        # Rounds that an earlier one's event covers leave no entry of their own to count.
        self._participations: dict[str, int] = {}

    @property
    def protection(self) -> str:
        """Return what protected the last update that left, joined by +."""
        return _shown(self._released)

    def admit(self, assignment: Assignment, work: TrainWork, secure: Sum | None) -> None:
        """Check a training against the policy and the budget, before any data is read.

        Raises: RefusalError: with the rule and the numbers. PrivacyError: if nothing accounts for what is asked.
        """
        self._begun = None
        earlier = max((entry.participation for entry in self._books.of_run(assignment.run)), default=0)
        asked = Asked(
            run=assignment.run,
            server=self._server,
            round=assignment.round,
            training=work.training,
            pipeline=work.pipeline,
            told=work.told,
            secure=secure,
            promised=work.promised,
            example=self._example,
            participation=max(earlier, self._participations.get(assignment.run, 0)) + 1,
        )
        protections = self._policy.check(asked)
        shown = _shown(protections)
        purpose = Purpose(asked.run, self._server, asked.round, shown, participation=asked.participation)
        self._begun = _Begun(asked, protections, purpose)
        self._books.check_unit(protections)
        for event, unit in self._due(self._begun):
            self._books.check(event, unit, purpose)

    def begin(self, data: Data) -> None:
        """Write down the training that was admitted last; only then may it begin.

        Raises: as `admit`, if the ledger has changed meanwhile.
        """
        begun = self._admitted()
        if self._content is None or self._content[0] is not data:
            self._content = (data, self._books.content(data))
        begun.purpose = Purpose(**{**vars(begun.purpose), "content": self._content[1]})
        for event, unit in self._due(begun):
            self._books.reserve(event, unit, begun.purpose)
        begun.reserved = not self._example
        self._participations[begun.asked.run] = begun.asked.participation

    def reserve(self, event: Event) -> None:
        """Write down what the trainer is about to do to examples; it calls this once, before its first step.

        Raises: RefusalError: if that is less than the policy asks for, or more than the budget allows. PrivacyError: if
            nothing accounts for it.
        """
        begun = self._admitted()
        self._policy.check_example(event)
        self._books.reserve(event, "example", begun.purpose)
        begun.reserved = True

    def released(self, update: Update) -> Update:
        """Return what of an encoded update leaves the site: its metrics as the policy allows.

        Raises: PrivacyError: if it claims protection that was never written down. RefusalError: if it weighs other
            than every site must.
        """
        begun = self._admitted()
        self._begun = None
        self._released = begun.protections
        if not begun.reserved:
            raise PrivacyError("the trainer claims to protect examples and reserved nothing; its update stays here")
        if self._uniform and not bool((update.weight == 1).all()):
            raise RefusalError(
                "uniform_weights", "the update is weighted, and this site's uniform_weights is true; count sites alike"
            )
        names = self._metrics.names
        if names is None and begun.protections & _OWN_NOISE:
            names = []
        kept = self._coarse({name: float(value) for name, value in update.sums.items()}, names)
        if begun.asked.secure is not None and names is not None:
            kept = _all_or_zeros(kept, begun.asked.secure.metrics)
        return update.replace(sums={name: _like(value, update) for name, value in kept.items()})

    def admit_evaluation(self, assignment: Assignment) -> None:
        """Check an evaluation against the policy.

        Raises: RefusalError: with the rule and the numbers.
        """
        self._policy.check_evaluation(assignment.run, self._server, assignment.round)
        if self._metrics.names is None and (self._books.budget is not None or self._example):
            raise RefusalError(
                "metrics.names",
                "this site counts its privacy, and what it measured would leave uncounted; metrics.names names nothing",
            )

    def evaluated(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return what of an evaluation's sums leaves the site."""
        return self._coarse(sums, self._metrics.names)

    def spent(self, run: str) -> Claim | None:
        """Return what a run has cost this site's data so far, or None where no noise that can be counted protects them.

        Raises: RefusalError: if the ledger cannot be believed. PrivacyError: if nothing accounts for what it holds.
        """
        if not self._released & NOISE:
            return None
        return self._books.spent("example" if "example" in self._released else "client", run)

    def _due(self, begun: _Begun) -> list[tuple[Event | None, str]]:
        return due(begun.asked, begun.protections, covered=self._covered(begun.asked))

    def _covered(self, asked: Asked) -> bool:
        """Return whether the promise is about the whole run, and was written down in an earlier round of it."""
        names = {part.name for _, part in mechanisms(asked.promised) if part.name in AT_SERVER}
        if not names or not names.issubset(_WHOLE_RUN):
            return False
        return any(entry.event is not None for entry in self._books.of_run(asked.run))

    def _admitted(self) -> _Begun:
        if self._begun is None:
            raise PrivacyError("nothing was admitted that could be trained, written down or released")
        return self._begun

    def _coarse(self, sums: Mapping[str, float], names: list[str] | None) -> dict[str, float]:
        """Return sums of the metrics in `names`, or of all, whose means and count are as coarse as the policy asks."""
        kept = {name: value for name, value in sums.items() if names is None or name in names}
        examples = sums.get("examples", 0.0)
        if not kept or not examples > 0:
            return kept
        step, whole = self._metrics.step, self._metrics.examples_step
        count = examples if whole is None else max(whole, math.floor(examples / whole) * whole)
        means = {name: value / examples for name, value in kept.items() if name != "examples"}
        if step is not None:
            means = {name: round(mean / step) * step for name, mean in means.items()}
        return {**{name: mean * count for name, mean in means.items()}, "examples": float(count)}


def due(asked: Asked, found: frozenset[str], *, covered: bool = False) -> list[tuple[Event | None, str]]:
    """Return what is to be written down before a training, with its unit, but for what the trainer will say itself.

    `found`: what protects it. `covered`: whether the server's promise is in the ledger already, for the whole run.
    """
    rows: list[tuple[Event | None, str]] = []
    if found & {"distributed", "local"}:
        rows.append((asked.own_event, "client"))
    if "central" in found and not covered:
        rows.append((asked.promised, "client"))
    return rows if found & NOISE else [(None, "client")]


def _all_or_zeros(kept: dict[str, float], wanted: Iterable[str]) -> dict[str, float]:
    """Return what a secure sum wants, which is a number for every name: what is kept if that is all, zeros otherwise.

    A metric that is withheld beside a number of examples that is not would lower the mean of everybody's.
    Unknown names stay, so that the sum refuses another task's.
    """
    zeros = dict.fromkeys(wanted, 0.0)
    return kept if kept.keys() >= zeros.keys() else {**dict.fromkeys(kept, 0.0), **zeros}


def _shown(protections: frozenset[str]) -> str:
    return "+".join(sorted(protections)) or "none"


def _like(value: float, update: Update) -> Tensor:
    return torch.full(tuple(update.lead), value, dtype=torch.float64)
