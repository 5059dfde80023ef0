"""One client after the other in this process: the reference that every other engine must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from clients.client import Client
from fedml_core.errors import ConfigError, TaskError
from fedml_core.memory_layout import MemoryLayout
from fedml_core.messages import Arrival, Assignment
from simulations.engines.engine import Engine, Session, Stage, arrival_of
from simulations.prefetch import announce


@dataclass(frozen=True, kw_only=True)
class Sequential(Engine):
    """Trains clients one after the other.

    `memory_layout`: of the model and of batches of images: "auto", which is channels-last for 2-d convolutions (the
    same in every run of a model on a kind of device), "channels_last" or "contiguous". `deterministic`: only algorithms
    of torch that give the same bits each time, which matters on a GPU; one that it lacks ends the run, named.
    """

    memory_layout: MemoryLayout = "auto"
    deterministic: bool = False
    name: ClassVar[str] = "sequential"

    def open(self, stage: Stage) -> Session:
        """Return a session that shares one trainer among all clients."""
        stage.trainer.configure(self.memory_layout, deterministic=self.deterministic, tell=stage.tell)
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
