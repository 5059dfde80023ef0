"""The simulation's side of the one seam: a channel whose clients live in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedml_core.messages import Arrived, Assignment
from simulations.engines.engine import Session, Stage
from simulations.virtual_time import VirtualClock


class SimulationChannel:
    """Hands a cohort's work to an engine, with the faults that were asked for on the way.

    `clock`: of the fleet that the run is pretended to be on; without, everybody can be asked and nothing takes time.
    """

    def __init__(self, stage: Stage, session: Session, clock: VirtualClock | None = None) -> None:
        self._stage = stage
        self._session = session
        self._clock = clock

    def clients(self, round_number: int) -> Sequence[int]:
        """Return the clients that can be asked in this round; with a fleet, in no order."""
        everyone = range(len(self._stage.population)) if self._clock is None else self._clock.begin_round()
        return self._stage.faults.available(everyone, round_number, self._stage.seed)

    def exchange(self, assignment: Assignment, cohort: Sequence[int], timeout_s: float | None) -> Iterator[Arrived]:
        """Yield the replies of the clients that neither drop out nor are late, by their faults or by the fleet's clock.

        The timeout is one of virtual time: without a fleet there is none.
        """
        reachable = self._stage.faults.reachable(sorted(cohort), assignment.round, self._stage.seed)
        if self._clock is not None:
            reachable = self._clock.wait(assignment, cohort, reachable, timeout_s)
        yield from self._session.run(assignment, reachable)

    def virtual_time(self) -> tuple[float | None, float | None]:
        """Return the round's and the run's virtual seconds, if there is a fleet."""
        return (None, None) if self._clock is None else (self._clock.round_s, self._clock.now_s)
