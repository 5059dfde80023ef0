"""What an engine is: opened once for a run, it takes a cohort's work whole and yields replies in any order."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from clients.memory import MemoryStore
from clients.torch_trainer import TorchTrainer
from fedml_core.accumulate import Accumulator
from fedml_core.errors import ConfigError
from fedml_core.message_frames import reply_to_frame
from fedml_core.messages import Arrival, Arrived, Assignment, Reply, TrainWork
from fedml_core.named import Named
from fedml_core.task import Task
from simulations.faults import Faults
from simulations.population import Population
from simulations.private_clients import PrivateClients
from strategies.strategy import Strategy

_ABLE = "sequential, tuned, vectorised, processes, ray, auto or suited"
_log = logging.getLogger(__name__)


def _unheard(clients: Sequence[int], round_number: int) -> None:
    """Do nothing: where nobody counts trainings, one more of them is nobody's business."""


@dataclass(frozen=True)
class Stage:
    """What an engine works on for a whole run.

    `trainer`: trains one client, in this process. `memory`: what clients remember. `seed`: the run's, which decides
    which replies `faults` spoil. `tell`: says something to the user. `private`: how clients protect their examples, or
    None where they do not. `again`: told, before it happens, which clients of a round are trained once more since what
    they were trained to was lost.
    """

    task: Task = field(repr=False)
    strategy: Strategy
    trainer: TorchTrainer = field(repr=False)
    population: Population = field(repr=False)
    memory: MemoryStore = field(repr=False)
    faults: Faults = field(default_factory=Faults)
    seed: int = 0
    tell: Callable[[str], None] = _log.warning
    private: PrivateClients | None = None
    again: Callable[[Sequence[int], int], None] = field(default=_unheard, repr=False)

    def accumulator(self, assignment: Assignment) -> Accumulator:
        """Return the empty accumulator of one round's training."""
        work, spec = assignment.work, self.trainer.spec
        ring = work.ring if isinstance(work, TrainWork) else None
        if ring is None:
            return self.strategy.accumulator(spec)
        from fedml_core.ring import RingSum  # loads cryptography, which sums in the clear do without

        size = self.strategy.pipeline().encoded_size(spec.size)
        return RingSum(ring, size, (self.seed, "rounding", assignment.round))


class Session(ABC):
    """An engine at work on one run; closed at its end, whatever ends it."""

    @abstractmethod
    def run(self, assignment: Assignment, cohort: Sequence[int]) -> Iterator[Arrived]:
        """Yield each client's reply as it is ready, alone or in bulk.

        Guarantees: replies depend on the assignment and the client alone, not on the order of work.
        """

    def close(self) -> None:  # noqa: B027 - most engines hold nothing that must be given back
        """Give back workers, memory and files. Idempotent."""


@dataclass(frozen=True, kw_only=True)
class Engine(Named, ABC):
    """How a cohort's work is done on this machine; subclasses are frozen dataclasses.

    `skip_failures`: a client whose data or training fails is excluded from the round with its reason; otherwise the
    first such error ends the run, naming the client. `name`: what reports call the engine. `protects_examples`: whether
    it can train as `Stage.private` says.
    """

    skip_failures: bool = False
    name: ClassVar[str]
    protects_examples: ClassVar[bool] = False

    def require_private(self) -> None:
        """Refuse to train privately where this engine, or one inside it, cannot.

        Raises: ConfigError: with those that can.
        """
        if not self.protects_examples:
            raise ConfigError(f"the {self.name} engine cannot protect examples; use {_ABLE}")
        inner = getattr(self, "inner", None)
        if isinstance(inner, Engine):
            inner.require_private()

    @abstractmethod
    def open(self, stage: Stage) -> Session:
        """Return a session for one run."""


def arrival_of(reply: Reply) -> Arrival:
    """Return a reply as it would have arrived over a wire, with the size of its message."""
    return Arrival(reply.client, reply, reply_to_frame(reply).size_bytes)
