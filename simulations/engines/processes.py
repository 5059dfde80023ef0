"""Worker processes that each train a share of the cohort and add it up, so that traffic is O(workers x d)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, ClassVar

import numpy as np
from torch import multiprocessing

from fedml_core.checks import require_whole
from fedml_core.errors import ConfigError, RunError
from fedml_core.messages import Arrived, Assignment, TrainWork
from fedml_core.spans import Recorder, recorder, span
from simulations.engines.batched import Batched
from simulations.engines.engine import Engine, Session, Stage
from simulations.engines.parcel import packed
from simulations.engines.sequential import Sequential
from simulations.engines.worker import Chunk, Done, Failed, Round, work

# Chunks of the cohort for each worker: more of them balance better, fewer cost less. What trains many clients at once
# takes as long as they have examples, and each chunk costs it something of its own.
_CHUNKS_A_WORKER, _BATCHED_CHUNKS_A_WORKER = 4, 1
# A worker that dies this often in one round takes its clients' fault with it: something they do kills it.
_MAX_DEATHS = 3


@dataclass(frozen=True, kw_only=True)
class Processes(Engine):
    """Trains in worker processes of one thread each.

    A worker that dies is replaced, and all that it did in this round is done again by the others. Workers are forked
    where that is safe (Linux, no GPU), so that any task will do; elsewhere they are started anew, and the task must be
    defined in a module that they can import.

    `workers`: how many, or None for one a processor. `inner`: what each worker runs.
    """

    workers: int | None = None
    inner: Engine = field(default_factory=Sequential)
    name: ClassVar[str] = "processes"

    def __post_init__(self) -> None:
        """Check the workers."""
        if self.workers is not None:
            require_whole("workers", self.workers, at_least=1)
        if isinstance(self.inner, Processes):
            raise ConfigError("processes cannot run processes inside; give another engine as inner")

    def open(self, stage: Stage) -> Session:
        """Return a session with its workers running."""
        inner = dataclasses.replace(self.inner, skip_failures=self.skip_failures)
        return Workers(inner, stage, self.workers or available_processors())


class Workers(Session):
    """A pool of workers for one run."""

    def __init__(self, inner: Engine, stage: Stage, count: int) -> None:
        self._inner, self._stage = inner, stage
        forks = "fork" in multiprocessing.get_all_start_methods() and stage.trainer.device.type == "cpu"
        self._context: Any = multiprocessing.get_context("fork" if forks else "spawn")
        self._workers = [self._start() for _ in range(count)]

    def run(self, assignment: Assignment, cohort: Sequence[int]) -> Iterator[Arrived]:
        """Yield what each worker gathered, or each evaluation."""
        waiting = deque(self._chunks(cohort))
        given: dict[_Worker, list[Chunk]] = {worker: [] for worker in self._workers}
        deaths, busy, adds_up = 0, set[_Worker](), isinstance(assignment.work, TrainWork)
        begun = packed(Round(assignment))
        for worker in self._workers:
            worker.send(begun)
        try:
            while waiting or busy:
                for worker in [w for w in self._workers if w not in busy][: len(waiting)]:
                    given[worker].append(waiting.popleft())
                    worker.send(packed(self._with_memories(given[worker][-1])))
                    busy.add(worker)
                for worker in self._heard(busy):
                    try:
                        yield from self._take(worker.receive())
                        if not adds_up:
                            given[worker].clear()
                    except EOFError:
                        deaths += 1
                        self._replace(worker, given, waiting, assignment, deaths)
                    busy.discard(worker)
            asked = [worker for worker in self._workers if given[worker]]
            for worker in asked:
                worker.ask_sum()
            for worker in asked:
                yield worker.receive_sum()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _chunks(self, cohort: Sequence[int]) -> list[Chunk]:
        """Return the cohort in chunks of like many clients and examples, the largest clients in the first."""
        counts = self._stage.population.counts(cohort)
        ordered = np.asarray(cohort, dtype=np.int64)
        batched = isinstance(self._inner, Batched) and counts is not None
        pieces = min(len(ordered), len(self._workers) * (_BATCHED_CHUNKS_A_WORKER if batched else _CHUNKS_A_WORKER))
        if not pieces:
            return []
        if counts is not None:
            ordered = ordered[np.argsort(-counts, kind="stable")]
        dealt = [ordered[first::pieces] for first in range(pieces)] if batched else np.array_split(ordered, pieces)
        return [Chunk(piece.tolist(), {}) for piece in dealt]

    def _with_memories(self, chunk: Chunk) -> Chunk:
        kept = {number: one for number in chunk.clients if (one := self._stage.memory.get(number)) is not None}
        return dataclasses.replace(chunk, memories=kept) if kept else chunk

    def _heard(self, busy: set[_Worker]) -> list[_Worker]:
        with span("workers"):
            ready = wait([worker.connection for worker in busy])
        return [worker for worker in busy if worker.connection in ready]

    def _take(self, message: Done | Failed) -> Iterator[Arrived]:
        if isinstance(message, Failed):
            raise message.error
        if isinstance(message, Done):
            if message.spans is not None and (ours := recorder()) is not None:
                ours.absorb(message.spans, len(self._workers))
            for number, remembered in message.memories.items():
                self._stage.memory.put(number, remembered)
            yield from message.arrivals
            for text in message.told:
                self._stage.tell(text)

    def _replace(
        self,
        dead: _Worker,
        given: dict[_Worker, list[Chunk]],
        waiting: deque[Chunk],
        assignment: Assignment,
        deaths: int,
    ) -> None:
        """Start another worker, and let the chunks of the dead one, whose sum is lost, be done again."""
        code = dead.end()
        if deaths >= _MAX_DEATHS:
            raise RunError(
                f"{deaths} workers died in round {assignment.round}, the last with exit code {code}; "
                "run it with engine = 'sequential' to see why"
            )
        self._stage.tell(f"a worker died in round {assignment.round} (exit code {code}); its clients are done again")
        waiting.extend(given.pop(dead))
        fresh = self._start()
        fresh.send(packed(Round(assignment)))
        given[fresh] = []
        self._workers[self._workers.index(dead)] = fresh

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        stage = self._stage
        shown = (stage.task, stage.strategy, stage.population, stage.faults, stage.seed)
        process = self._context.Process(
            target=work, args=(theirs, self._inner, *shown, str(stage.trainer.device), _like(recorder())), daemon=True
        )
        try:
            process.start()
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the task cannot be sent to worker processes ({error}); define it in a module, or use one process"
            ) from error
        theirs.close()
        return _Worker(process, ours)


@dataclass(frozen=True, eq=False)
class _Worker:
    """A worker process and the pipe to it."""

    process: Any
    connection: Connection

    def send(self, message: bytes) -> None:
        # A worker that is dead is noticed, and replaced, when it is listened to.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(message)

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (ConnectionResetError, BrokenPipeError) as error:
            raise EOFError from error

    def ask_sum(self) -> None:
        self.send(packed(None))

    def receive_sum(self) -> Arrived:
        try:
            gathered: Arrived = self.receive()
        except EOFError as error:
            raise RunError(
                "a worker died while it handed over its sum; go on with --resume, if there is a folder"
            ) from error
        return gathered

    def end(self) -> int | None:
        """End the process if it still runs, and return its exit code."""
        self.connection.close()
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()
        code: int | None = self.process.exitcode
        return code


def _like(ours: Recorder | None) -> Recorder | None:
    return None if ours is None else Recorder(keep_events=ours.keep_events)


def available_processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
