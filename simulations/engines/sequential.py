"""One client after the other in this process: the reference that every other engine must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from clients.client import Client
from fedml_core.errors import ConfigError, TaskError
from fedml_core.messages import Arrival, Assignment
from simulations.engines.engine import Engine, Session, Stage, arrival_of
from simulations.prefetch import announce


@dataclass(frozen=True)
class Sequential(Engine):
    """Trains clients one after the other."""

    name: ClassVar[str] = "sequential"

    def open(self, stage: Stage) -> Session:
        """Return a session that shares one trainer among all clients."""
        return OneByOne(stage, self.skip_failures)


class OneByOne(Session):
    """Does each client's work by itself."""

    def __init__(self, stage: Stage, skip_failures: bool) -> None:
        self._stage = stage
        self._fatal = () if skip_failures else (TaskError, ConfigError)

    def run(self, assignment: Assignment, cohort: Sequence[int]) -> Iterator[Arrival]:
        """Yield each client's reply, in the cohort's order."""
        stage = self._stage
        return stage.faults.disturb(self._replies(assignment, cohort), assignment.round, stage.seed)

    def _replies(self, assignment: Assignment, cohort: Sequence[int]) -> Iterator[Arrival]:
        stage = self._stage
        announce(stage.population, cohort)
        for number in cohort:
            client = Client(number, partial(stage.population.load, number), stage.trainer, stage.memory)
            yield arrival_of(client.answer(assignment, fatal=self._fatal))
