"""What runs in a worker process: an engine of its own, whose replies it checks and adds up before they travel."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch

from clients.memory import InProcessMemory, Remembered
from clients.torch_trainer import TorchTrainer
from fedml_core.bulk import GatheredArrival
from fedml_core.errors import FedveilError, RunError
from fedml_core.messages import Arrival, Assignment, TrainWork
from fedml_core.spans import Recorded, Recorder, recorder, recording
from fedml_core.task import Task
from server.validation import UpdateIntake
from simulations.engines.engine import Engine, Session, Stage
from simulations.engines.parcel import packed
from simulations.faults import Faults
from simulations.population import Population
from strategies.strategy import Strategy

_LOOK_S = 2.0  # between looks at whether the parent still lives


@dataclass(frozen=True)
class Round:
    """A new round: chunks that follow are of this assignment."""

    assignment: Assignment


@dataclass(frozen=True)
class Chunk:
    """Clients to do, with what they remember."""

    clients: Sequence[int]
    memories: Mapping[int, Remembered] = field(repr=False)


@dataclass(frozen=True)
class Done:
    """A chunk is done: evaluations, new memories, what the engine had to tell, and where the time went."""

    arrivals: Sequence[Arrival]
    memories: Mapping[int, Remembered] = field(repr=False)
    told: Sequence[str] = ()
    spans: Recorded | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Failed:
    """The run cannot go on."""

    error: FedveilError


class _Recorder(InProcessMemory):
    """Memories of one chunk that know which of them are new."""

    def __init__(self) -> None:
        super().__init__()
        self.new: dict[int, Remembered] = {}

    def put(self, client: int, remembered: Remembered) -> None:
        super().put(client, remembered)
        self.new[client] = remembered

    def take(self, memories: Mapping[int, Remembered]) -> None:
        for client, remembered in memories.items():
            super().put(client, remembered)


def work(
    connection: Connection,
    engine: Engine,
    task: Task,
    strategy: Strategy,
    population: Population,
    faults: Faults,
    seed: int,
    device: str,
    spans: Recorder | None,
) -> None:
    """Do chunks until the pipe closes; `spans`, a recorder that has recorded nothing, says where the time goes."""
    # Ctrl-C reaches the whole group; the parent decides what it means, and closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    memory, told = _Recorder(), list[str]()
    trainer = TorchTrainer(task, seed, device=device)
    stage = Stage(task, strategy, trainer, population, memory, faults, seed, told.append)
    session = engine.open(stage)
    # What is here now stays: no collection need look at it again, nor copy the pages that it shares with the parent.
    gc.freeze()
    try:
        with recording(spans):
            _serve(connection, session, stage, memory, told)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    finally:
        session.close()


def _serve(connection: Connection, session: Session, stage: Stage, memory: _Recorder, told: list[str]) -> None:
    assignment: Assignment | None = None
    intake: UpdateIntake | None = None
    parent = os.getppid()
    while True:
        # Workers forked after this one hold the parent's end of the pipe too, so its death alone does not close it.
        while not connection.poll(_LOOK_S):
            if os.getppid() != parent:
                return
        message = connection.recv()
        if isinstance(message, Round):
            assignment = message.assignment
            intake = None
        elif isinstance(message, Chunk):
            assert assignment is not None
            memory.take(message.memories)
            if intake is None and isinstance(assignment.work, TrainWork):
                intake = UpdateIntake(assignment, (), stage.accumulator(assignment))
            connection.send_bytes(packed(_done(session, assignment, intake, message, memory, told)))
        else:
            assert intake is not None
            rows = [(row.client, row.rule, row.reason) for row in intake.excluded]
            gathered = GatheredArrival(intake.accepted, rows, intake.accumulator, intake.bytes_up)
            connection.send_bytes(packed(gathered))


def _done(
    session: Session,
    assignment: Assignment,
    intake: UpdateIntake | None,
    chunk: Chunk,
    memory: _Recorder,
    told: list[str],
) -> Done | Failed:
    try:
        arrivals: list[Arrival] = []
        if intake is None:
            arrivals.extend(one for one in session.run(assignment, chunk.clients) if isinstance(one, Arrival))
        else:
            intake.expect(chunk.clients)
            intake.take(session.run(assignment, chunk.clients))
    except FedveilError as error:
        return Failed(error)
    except Exception as error:  # noqa: BLE001 - a bug of ours or a fault of torch must not pass for a dead worker
        return Failed(RunError(f"a worker failed: {type(error).__name__}: {error}"))
    spans = recorder()
    done = Done(arrivals, dict(memory.new), tuple(told), None if spans is None else spans.drain())
    memory.new.clear()
    told.clear()
    return done


__all__ = ["Chunk", "Done", "Failed", "Round", "work"]
