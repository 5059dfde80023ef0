"""What a worker does, whatever carries its messages: chunks of clients by an engine of its own, added up at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from clients.memory import InProcessMemory, Remembered
from clients.torch_trainer import TorchTrainer
from fedml_core.bulk import GatheredArrival
from fedml_core.errors import FedveilError, RunError
from fedml_core.messages import Arrival, Assignment, TrainWork
from fedml_core.spans import Recorded, Recorder, recording
from fedml_core.task import Task
from server.validation import UpdateIntake
from simulations.engines.engine import Engine, Stage
from simulations.faults import Faults
from simulations.population import Population
from simulations.private_clients import PrivateClients
from strategies.strategy import Strategy

__all__ = ["Chunk", "ChunkWorker", "Done", "Failed", "Job"]


@dataclass(frozen=True)
class Chunk:
    """Clients to do, with what they remember. `last`: no other chunk waits, so the answer brings the sum along."""

    clients: Sequence[int]
    memories: Mapping[int, Remembered] = field(repr=False)
    last: bool = False


@dataclass(frozen=True)
class Done:
    """A chunk is done: evaluations, new memories, what the engine had to tell, and where the time went.

    `gathered`: what this round's chunks of training came to, after the last of them.
    """

    arrivals: Sequence[Arrival]
    memories: Mapping[int, Remembered] = field(repr=False)
    told: Sequence[str] = ()
    spans: Recorded | None = field(default=None, repr=False)
    gathered: GatheredArrival | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Failed:
    """The run cannot go on."""

    error: FedveilError


@dataclass(frozen=True)
class Job:
    """What a worker must know for a whole run; it is sent to each once."""

    engine: Engine
    task: Task = field(repr=False)
    strategy: Strategy
    population: Population = field(repr=False)
    faults: Faults
    seed: int
    private: PrivateClients | None = None

    @classmethod
    def of(cls, engine: Engine, stage: Stage) -> Self:
        """Return the job of doing a stage's work with `engine`."""
        return cls(engine, stage.task, stage.strategy, stage.population, stage.faults, stage.seed, stage.private)


class ChunkWorker:
    """Does chunks of one round after the other; what a round's chunks of training come to is asked for at its end.

    Nothing raises but a bug: what the run must hear of is returned.

    Args: spans: a recorder that has recorded nothing, which then says where the time goes, or None.
    Raises: ConfigError: if there is no such device. TaskError: if the model cannot be built.
    """

    def __init__(self, job: Job, device: str, spans: Recorder | None = None) -> None:
        self._memory, self._told, self._spans = _NewMemories(), list[str](), spans
        trainer = TorchTrainer(job.task, job.seed, device=device)
        shown = (job.task, job.strategy, trainer, job.population, self._memory, job.faults, job.seed)
        self._stage = Stage(*shown, self._told.append, job.private)
        self._session = job.engine.open(self._stage)
        self._assignment: Assignment | None = None
        self._intake: UpdateIntake | None = None

    def begin(self, assignment: Assignment) -> None:
        """Take the chunks that follow for chunks of this assignment."""
        self._assignment, self._intake = assignment, None

    def do(self, chunk: Chunk) -> Done | Failed:
        """Do a chunk; updates stay here up to the last chunk, evaluations are returned."""
        try:
            with recording(self._spans):
                arrivals = self._arrivals(chunk)
        except FedveilError as error:
            return Failed(error)
        except Exception as error:  # noqa: BLE001 - a bug of ours or a fault of torch must not pass for a dead worker
            return Failed(RunError(f"a worker failed: {type(error).__name__}: {error}"))
        spans = None if self._spans is None else self._spans.drain()
        gathered = self.gathered() if chunk.last else None
        return Done(arrivals, self._memory.drain(), self._drain_told(), spans, gathered)

    def gathered(self) -> GatheredArrival:
        """Return what this round's chunks since the last call came to, and begin anew.

        There must have been a chunk of training.
        """
        intake = self._intake
        assert intake is not None
        self._intake = None
        rows = [(row.client, row.rule, row.reason) for row in intake.excluded]
        return GatheredArrival(intake.accepted, rows, intake.accumulator, intake.bytes_up)

    def close(self) -> None:
        """Give back what the engine holds. Idempotent."""
        self._session.close()

    def _arrivals(self, chunk: Chunk) -> list[Arrival]:
        assignment = self._assignment
        assert assignment is not None
        self._memory.take(chunk.memories)
        if not isinstance(assignment.work, TrainWork):
            return [one for one in self._session.run(assignment, chunk.clients) if isinstance(one, Arrival)]
        if self._intake is None:
            self._intake = UpdateIntake(assignment, (), self._stage.accumulator(assignment))
        self._intake.expect(chunk.clients)
        self._intake.take(self._session.run(assignment, chunk.clients))
        return []

    def _drain_told(self) -> tuple[str, ...]:
        told = tuple(self._told)
        self._told.clear()
        return told


class _NewMemories(InProcessMemory):
    """Memories that know which of them are new."""

    def __init__(self) -> None:
        super().__init__()
        self._new: dict[int, Remembered] = {}

    def put(self, client: int, remembered: Remembered) -> None:
        super().put(client, remembered)
        self._new[client] = remembered

    def take(self, memories: Mapping[int, Remembered]) -> None:
        for client, remembered in memories.items():
            super().put(client, remembered)

    def drain(self) -> dict[int, Remembered]:
        new, self._new = self._new, {}
        return new
