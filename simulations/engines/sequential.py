"""One client after the other in this process: the reference that every other engine must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

from clients.client import Client, Trainer
from fedml_core.errors import ConfigError, TaskError
from fedml_core.memory_layout import MemoryLayout, require_layout
from fedml_core.messages import Arrival, Assignment, TrainWork
from simulations.engines.engine import Engine, Session, Stage, arrival_of
from simulations.prefetch import announce
from simulations.private_clients import NOISE_IS_FRESH


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
    protects_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the layout."""
        require_layout(self.memory_layout)

    def open(self, stage: Stage) -> Session:
        """Return a session that shares one trainer among all clients."""
        if stage.private is not None and self.deterministic:
            raise ConfigError(NOISE_IS_FRESH)
        return OneByOne(stage, self.skip_failures, self.memory_layout, deterministic=self.deterministic)


class OneByOne(Session):
    """Does each client's work by itself, with the stage's trainer, which sessions that take turns set up anew."""

    def __init__(
        self, stage: Stage, skip_failures: bool, memory_layout: MemoryLayout = "auto", *, deterministic: bool = False
    ) -> None:
        self._stage, self._layout, self._deterministic = stage, memory_layout, deterministic
        self._fatal = () if skip_failures else (TaskError, ConfigError)

    def run(self, assignment: Assignment, cohort: Sequence[int]) -> Iterator[Arrival]:
        """Yield each client's reply, in the cohort's order."""
        stage = self._stage
        return stage.faults.disturb(self._replies(assignment, cohort), assignment.round, stage.seed)

    @cached_property
    def _trainer(self) -> Trainer:
        """What trains; made when it is first needed, as most sessions of other engines never need theirs."""
        stage = self._stage
        if stage.private is None:
            return stage.trainer
        device = str(stage.trainer.device)
        return stage.private.trainer(stage.task, stage.seed, device=device, memory_layout=self._layout)

    def _replies(self, assignment: Assignment, cohort: Sequence[int]) -> Iterator[Arrival]:
        stage = self._stage
        announce(stage.population, cohort)
        stage.trainer.configure(self._layout, deterministic=self._deterministic, tell=stage.tell)
        trainer = self._trainer if isinstance(assignment.work, TrainWork) else stage.trainer
        for number in cohort:
            client = Client(number, partial(stage.population.load, number), trainer, stage.memory)
            yield arrival_of(client.answer(assignment, fatal=self._fatal))
