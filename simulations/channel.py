"""The simulation's side of the one seam: a channel whose clients live in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from clients.client import Trainer
from clients.memory import MemoryStore
from fedml_core.messages import Arrival, Assignment
from simulations.engines.engine import Engine
from simulations.faults import Faults
from simulations.population import Population


class SimulationChannel:
    """Hands a cohort's work to an engine, with the faults that were asked for on the way."""

    def __init__(
        self,
        population: Population,
        trainer: Trainer,
        memory: MemoryStore,
        *,
        engine: Engine,
        faults: Faults,
        seed: int,
    ) -> None:
        self._population = population
        self._trainer = trainer
        self._memory = memory
        self._engine = engine
        self._faults = faults
        self._seed = seed

    def clients(self, round_number: int) -> Sequence[int]:
        """Return the clients that can be asked in this round."""
        return self._faults.available(range(len(self._population)), round_number, self._seed)

    def exchange(self, assignment: Assignment, cohort: Sequence[int], timeout_s: float | None) -> Iterator[Arrival]:
        """Yield the replies of the clients that neither drop out nor are late; time is not simulated here."""
        reachable = self._faults.reachable(cohort, assignment.round, self._seed)
        arrivals = self._engine.run(assignment, reachable, self._population, self._trainer, self._memory)
        yield from self._faults.disturb(arrivals, assignment.round, self._seed)
