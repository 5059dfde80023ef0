"""One client after the other in this process: the reference that every other engine must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from clients.client import Client, Trainer
from clients.memory import MemoryStore
from fedml_core.errors import ConfigError, TaskError
from fedml_core.messages import Arrival, Assignment
from simulations.engines.engine import arrival_of
from simulations.population import Population


@dataclass(frozen=True)
class Sequential:
    """Trains clients one after the other.

    `skip_failures`: a client whose data or training fails is excluded from the round with its reason; otherwise the
    first such error ends the run, naming the client.
    """

    skip_failures: bool = False
    name: ClassVar[str] = "sequential"

    def run(
        self,
        assignment: Assignment,
        cohort: Sequence[int],
        population: Population,
        trainer: Trainer,
        memory: MemoryStore,
    ) -> Iterator[Arrival]:
        """Yield each client's reply, in the cohort's order."""
        for number in cohort:
            client = Client(number, partial(population.load, number), trainer, memory)
            yield arrival_of(client.answer(assignment, fatal=() if self.skip_failures else (TaskError, ConfigError)))
