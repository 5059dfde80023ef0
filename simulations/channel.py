"""The simulation's side of the one seam: a channel whose clients live in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fedml_core.errors import StrategyError
from fedml_core.messages import Arrived, Assignment, SecureWork, TrainWork
from simulations.engines.engine import Session, Stage
from simulations.virtual_time import VirtualClock

if TYPE_CHECKING:
    from fedml_core.privacy.accounting import Claim
    from simulations.private_accounts import Accounts
    from simulations.secagg import SecureMembers


class SimulationChannel:
    """Hands a cohort's work to an engine, with the faults that were asked for on the way.

    `clock`: of the fleet that the run is pretended to be on; without, everybody can be asked and nothing takes time.
    `members`: the clients' halves of secure sums, or None. `accounts`: what is charged where clients protect their
    examples: everybody who is asked to train, since a client whose reply is lost or late may have trained, too.
    """

    def __init__(
        self,
        stage: Stage,
        session: Session,
        clock: VirtualClock | None = None,
        members: SecureMembers | None = None,
        *,
        accounts: Accounts | None = None,
    ) -> None:
        self._stage = stage
        self._session = session
        self._clock = clock
        self._members = members
        self._accounts = accounts

    def clients(self, round_number: int) -> Sequence[int]:
        """Return the clients that can be asked in this round; with a fleet, in no order."""
        everyone = range(len(self._stage.population)) if self._clock is None else self._clock.begin_round()
        return self._stage.faults.available(everyone, round_number, self._stage.seed)

    def exchange(self, assignment: Assignment, cohort: Sequence[int], timeout_s: float | None) -> Iterator[Arrived]:
        """Yield the replies of the clients that neither drop out nor are late, by their faults or by the fleet's clock.

        The timeout is one of virtual time: without a fleet there is none.
        Raises: RunError: before anybody is asked, if the budget for their examples does not allow it.
        """
        if self._accounts is not None and isinstance(assignment.work, TrainWork):
            self._accounts.charge(cohort, assignment.round)
        reachable = self._stage.faults.reachable(sorted(cohort), assignment.round, self._stage.seed)
        if self._clock is not None:
            reachable = self._clock.wait(assignment, cohort, reachable, timeout_s)
        yield from self._session.run(assignment, reachable)

    def deliver(self, assignments: Mapping[int, Assignment], timeout_s: float | None) -> Iterator[Arrived]:
        """Yield the answers to one exchange of a secure sum; on the fleet's clock, only the training takes time."""
        if self._members is None:
            raise StrategyError("this simulation's strategy takes no secure sums")
        first = next(iter(assignments.values()))
        reachable = self._stage.faults.reachable(sorted(assignments), first.round, self._stage.seed)
        work = first.work
        trains = isinstance(work, SecureWork) and work.train is not None
        if self._accounts is not None and trains:
            self._accounts.charge(list(assignments), first.round)
        if self._clock is not None and isinstance(work, SecureWork) and work.train is not None:
            training = dataclasses.replace(first, work=work.train)
            reachable = self._clock.wait(training, list(assignments), reachable, timeout_s)
        yield from self._members.deliver(assignments, reachable)

    def virtual_time(self) -> tuple[float | None, float | None]:
        """Return the round's and the run's virtual seconds, if there is a fleet."""
        return (None, None) if self._clock is None else (self._clock.round_s, self._clock.now_s)

    def example_privacy(self) -> tuple[str, Claim] | None:
        """Return what protects examples, and what those of the client that trained most often have cost, if any are."""
        if self._accounts is None or self._stage.private is None:
            return None
        return self._stage.private.protection(), self._accounts.claim()
