"""The simulation's side of the one seam: a channel whose clients live in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedml_core.messages import Arrived, Assignment
from simulations.engines.engine import Session, Stage


class SimulationChannel:
    """Hands a cohort's work to an engine, with the faults that were asked for on the way."""

    def __init__(self, stage: Stage, session: Session) -> None:
        self._stage = stage
        self._session = session

    def clients(self, round_number: int) -> Sequence[int]:
        """Return the clients that can be asked in this round."""
        everyone = range(len(self._stage.population))
        return self._stage.faults.available(everyone, round_number, self._stage.seed)

    def exchange(self, assignment: Assignment, cohort: Sequence[int], timeout_s: float | None) -> Iterator[Arrived]:
        """Yield the replies of the clients that neither drop out nor are late; time is not simulated here."""
        reachable = self._stage.faults.reachable(cohort, assignment.round, self._stage.seed)
        yield from self._session.run(assignment, reachable)
