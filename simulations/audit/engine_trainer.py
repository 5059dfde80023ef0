"""A run's own engine as a site's trainer, so that what an audit looks at is what the run computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clients.memory import InProcessMemory
from clients.private_trainer import Reserve
from clients.private_training import PrivateTraining
from clients.torch_trainer import TorchTrainer
from fedml_core.bulk import BulkArrival, GatheredArrival
from fedml_core.data import ClientData, Data, Examples
from fedml_core.errors import StrategyError, TaskError
from fedml_core.messages import Arrived, Assignment, Failure, TrainWork
from fedml_core.randomness import Key
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.transform import Chain, Guide
from fedml_core.update import Update
from simulations.engines.engine import Engine, Stage
from simulations.engines.suited import Suited, suitable
from simulations.engines.vectorised import Vectorised
from simulations.packing import Packed
from simulations.private_clients import PrivateClients
from simulations.simulate import Simulation
from strategies import FedMedian

__all__ = ["EngineTrainer", "own_engine"]

_NO_GUIDE = Guide()
_TOGETHER = 4


class EngineTrainer:
    """Trains one client by an engine that has a private step of its own, as one of several that it trains at once.

    The others do the same training on the same data, and answer when that is asked for again: whatever clients share
    that each should have for itself shows as soon as two of their updates are compared. The account is charged here,
    as a simulation's channel does before its engine is asked.
    """

    def __init__(
        self, task: Task, private: PrivateTraining, reserve: Reserve, engine: Engine, *, seed: int, device: str
    ) -> None:
        self._plain = TorchTrainer(task, seed, device=device)
        self._task, self._private, self._reserve, self._engine, self._seed = task, private, reserve, engine, seed
        self._asked: tuple[Tensor, Data, Training] | None = None
        self._waiting: list[Update] = []
        self.spec = self._plain.spec

    def initial(self) -> Tensor:
        """Return the built model as a new vector."""
        return self._plain.initial()

    def evaluate(self, parameters: Tensor, data: Data, batch_size: int = 256) -> dict[str, float]:
        """Return summed metrics, exact and without protection."""
        return self._plain.evaluate(parameters, data, batch_size)

    def train(
        self,
        parameters: Tensor,
        data: Data,
        training: Training,
        *,
        round_number: int,
        key: tuple[Key, ...],
        guide: Guide = _NO_GUIDE,
    ) -> Update:
        """Return what the engine's training on `data` adds to `parameters`; by draws of its own, whatever the `key`.

        Raises: TaskError: if the engine's client fails, with its reason. StrategyError: for a guide, which is another
            strategy's than the one that is attacked.
        """
        if guide.mu or guide.offset is not None:
            raise StrategyError("an engine is attacked by what it trains without a guide; leave the guide out")
        clients = PrivateClients.of(self._private, training)
        self._reserve(clients.event)
        same = self._asked is not None and self._asked[0] is parameters and self._asked[1] is data
        if not (self._waiting and same and self._asked is not None and self._asked[2] == training):
            self._asked = (parameters, data, training)
            self._waiting = self._trained(parameters, data, training, round_number, clients)
        return self._waiting.pop()

    def _trained(
        self, parameters: Tensor, data: Data, training: Training, number: int, clients: PrivateClients
    ) -> list[Update]:
        stage = Stage(
            task=self._task,
            strategy=FedMedian(),  # looks at each update by itself, so none is added up unmade
            trainer=self._plain,
            population=_Alike(data),
            memory=InProcessMemory(),
            seed=self._seed,
            private=clients,
        )
        work = TrainWork(training, Chain(), {}, self._seed)
        assignment = Assignment("audit", number, self.spec.fingerprint, parameters, work)
        session = self._engine.open(stage)
        try:
            return list(_updates(session.run(assignment, range(_TOGETHER))))
        finally:
            session.close()


@dataclass(frozen=True)
class _Alike:
    """A population of a few clients that hold the same data."""

    data: Data = field(repr=False)

    def __len__(self) -> int:
        """Return how many."""
        return _TOGETHER

    def load(self, client: int) -> ClientData:
        """Return one client's data."""
        return ClientData(self.data)

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64] | None:
        """Return how many examples each has."""
        return np.full(len(clients), len(self.data), dtype=np.int64)

    def pack(self, clients: Sequence[int]) -> Packed | None:
        """Return the clients' examples as one, unless they are read one by one."""
        return Packed.of([self.data] * len(clients)) if isinstance(self.data, Examples) else None


def own_engine(simulation: Simulation) -> Engine | None:
    """Return the run's engine if it has a private step of its own, or may take one that has; else None."""
    engine = simulation.engine
    while (inner := getattr(engine, "inner", None)) is not None:
        engine = inner
    if isinstance(engine, Vectorised):
        return engine
    if isinstance(engine, Suited) or engine.name == "auto":
        chosen = suitable(simulation.stage(InProcessMemory())) if isinstance(engine, Suited) else Vectorised()
        return chosen if isinstance(chosen, Vectorised) else None
    return None


def _updates(arrived: Iterable[Arrived]) -> Iterator[Update]:
    """Yield each client's update.

    Raises: TaskError: for a client that failed, or clients that were added up and cannot be told apart.
    """
    for each in arrived:
        if isinstance(each, GatheredArrival):
            raise TaskError("the engine adds its clients up, so none can be looked at; name another engine")
        if isinstance(each, BulkArrival):
            yield from (each.update.row(place) for place in range(len(each.clients)))
        elif isinstance(each.reply.body, Update):
            yield each.reply.body
        else:
            body = each.reply.body
            raise TaskError(f"the engine's client failed: {body.reason if isinstance(body, Failure) else body}")
