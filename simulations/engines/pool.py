"""Sharing a cohort out over workers, adding up what they added up, and doing again what a lost worker had done.

How messages reach a worker is a `Crew`'s business: pipes to processes, or actors of a Ray cluster.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from clients.memory import Remembered
from fedml_core.bulk import GatheredArrival
from fedml_core.errors import ConfigError, RunError
from fedml_core.messages import Arrived, Assignment, TrainWork
from fedml_core.spans import recorder, span
from simulations.engines.batched import Batched
from simulations.engines.chunk_worker import Chunk, Done, Failed
from simulations.engines.engine import Engine, Session, Stage

__all__ = ["MOST_DEATHS", "Crew", "Pool", "Worker", "WorkerLostError", "chunks"]

MOST_DEATHS = 3
"""A worker that dies this often in one round takes its clients' fault with it: something they do kills it."""

# Chunks of the cohort for each worker: more of them balance better, fewer cost less.
_CHUNKS_A_WORKER = 4


class WorkerLostError(Exception):
    """A worker is gone, with all that it did in this round; the message says what is known of its end."""


class Worker(ABC):
    """One worker as the pool sees it: messages go in order, and one answer is waited for at a time.

    What is sent to a worker that is lost is lost too; that is noticed when its answer is to be received.
    """

    @abstractmethod
    def begin(self, shared: object) -> None:
        """Begin a round; `shared` is what `Crew.share` made of its assignment."""

    @abstractmethod
    def give(self, chunk: Chunk) -> None:
        """Let it do a chunk."""

    @abstractmethod
    def receive(self) -> Done | Failed:
        """Return the answer to a chunk.

        Raises: WorkerLostError: if the worker is gone.
        """

    @abstractmethod
    def ask_sum(self) -> None:
        """Ask for what its chunks since the round's beginning, or since the last sum, come to."""

    @abstractmethod
    def receive_sum(self) -> GatheredArrival:
        """Return the sum that was asked for.

        Raises: WorkerLostError: if the worker is gone.
        """

    @abstractmethod
    def end(self) -> None:
        """End the worker, if it still works. Idempotent."""


class Crew(ABC):
    """Where workers come from."""

    @abstractmethod
    def start(self, count: int) -> list[Worker]:
        """Return new workers, ready for a round.

        Raises: ConfigError: if there can be none, or not for this task.
        """

    @abstractmethod
    def share(self, assignment: Assignment) -> object:
        """Return the assignment in the form in which all workers get it."""

    @abstractmethod
    def heard(self, busy: Collection[Worker]) -> Sequence[Worker]:
        """Wait, and return the workers whose answer, or whose end, can be received at once; at least one."""

    @abstractmethod
    def close(self) -> None:
        """Give back what was held for all workers, which have ended. Idempotent."""


class Pool(Session):
    """A number of workers for one run: who dies is replaced.

    `inner`: what each worker runs.
    Guarantees: each client of a cohort is in exactly one of the sums, whoever died meanwhile. A worker that cannot be
    replaced is done without, as long as there are others.
    Raises: as `Crew.start`.
    """

    def __init__(self, crew: Crew, stage: Stage, count: int, inner: Engine) -> None:
        self.crew, self.stage, self.inner = crew, stage, inner
        self._told: set[str] = set()
        self.workers: list[Worker] = []
        try:
            self.workers = crew.start(count)
        except BaseException:
            self.close()
            raise

    def run(self, assignment: Assignment, cohort: Sequence[int]) -> Iterator[Arrived]:
        """Yield what each worker gathered, or each evaluation."""
        try:
            yield from _Round(self, assignment, cohort).replies()
        except BaseException:
            self.close()
            raise

    def tell_once(self, text: str) -> None:
        """Tell the user what a worker has to say, if no other has said it."""
        if text not in self._told:
            self._told.add(text)
            self.stage.tell(text)

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.end()
        self.workers = []
        self.crew.close()


class _Round:
    """One exchange with all workers."""

    def __init__(self, pool: Pool, assignment: Assignment, cohort: Sequence[int]) -> None:
        self._pool, self._assignment = pool, assignment
        work, spec = assignment.work, pool.stage.trainer.spec
        self._adds_up = isinstance(work, TrainWork)
        self._remembers = isinstance(work, TrainWork) and bool(work.pipeline.memory(spec))
        self._waiting = deque(chunks(pool.stage, cohort, len(pool.workers), pool.inner))
        self._given: dict[Worker, list[Chunk]] = {worker: [] for worker in pool.workers}
        self._busy: set[Worker] = set()
        self._deaths, self._shared = 0, object()

    def replies(self) -> Iterator[Arrived]:
        if not self._waiting:
            return
        self._shared = self._pool.crew.share(self._assignment)
        for worker in self._pool.workers:
            worker.begin(self._shared)
        # What a worker had done that is lost while it hands over its sum is done again too.
        while self._waiting:
            yield from self._work()
            if self._adds_up:
                yield from self._sums()

    def _work(self) -> Iterator[Arrived]:
        while self._waiting or self._busy:
            idle = [worker for worker in self._pool.workers if worker not in self._busy]
            last = self._adds_up and len(self._waiting) <= len(idle)
            for worker in idle[: len(self._waiting)]:
                chunk = self._waiting.popleft()
                self._given[worker].append(chunk)
                worker.give(dataclasses.replace(chunk, memories=self._memories(chunk), last=last))
                self._busy.add(worker)
            with span("workers"):
                heard = self._pool.crew.heard(self._busy)
            for worker in heard:
                self._busy.discard(worker)
                try:
                    answer = worker.receive()
                except WorkerLostError as error:
                    self._replace(worker, error)
                    continue
                yield from self._take(answer)
                if not self._adds_up or (isinstance(answer, Done) and answer.gathered is not None):
                    self._given[worker].clear()

    def _sums(self) -> Iterator[Arrived]:
        asked = [worker for worker, done in self._given.items() if done]
        for worker in asked:
            worker.ask_sum()
        for worker in asked:
            try:
                gathered = worker.receive_sum()
            except WorkerLostError as error:
                self._replace(worker, error)
                continue
            self._given[worker].clear()
            yield gathered

    def _memories(self, chunk: Chunk) -> Mapping[int, Remembered]:
        """Return what the chunk's clients remember, if the work asks for it: of thousands, each look counts."""
        if not self._remembers:
            return {}
        memory = self._pool.stage.memory
        return {number: one for number in chunk.clients if (one := memory.get(number)) is not None}

    def _take(self, answer: Done | Failed) -> Iterator[Arrived]:
        if isinstance(answer, Failed):
            raise answer.error
        if answer.spans is not None and (ours := recorder()) is not None:
            ours.absorb(answer.spans, len(self._pool.workers))
        for number, remembered in answer.memories.items():
            self._pool.stage.memory.put(number, remembered)
        yield from answer.arrivals
        if answer.gathered is not None:
            yield answer.gathered
        for text in answer.told:
            self._pool.tell_once(text)

    def _replace(self, lost: Worker, error: WorkerLostError) -> None:
        """Start another worker, and let the chunks of the lost one, whose sum is gone, be done again."""
        lost.end()
        self._deaths += 1
        number, pool = self._assignment.round, self._pool
        if self._deaths >= MOST_DEATHS:
            raise RunError(
                f"{self._deaths} workers died in round {number}, the last with {error}; "
                "run it with engine = 'sequential' to see why"
            )
        pool.stage.tell(f"a worker died in round {number} ({error}); its clients are done again")
        again = self._given.pop(lost)
        self._waiting.extend(again)
        if self._adds_up:
            pool.stage.again([client for chunk in again for client in chunk.clients], number)
        pool.workers.remove(lost)
        try:
            fresh = pool.crew.start(1)
        except ConfigError as why:
            if not pool.workers:
                raise
            pool.stage.tell(f"going on with {len(pool.workers)} workers: {why}")
            return
        for worker in fresh:
            worker.begin(self._shared)
            self._given[worker] = []
        pool.workers.extend(fresh)


def chunks(stage: Stage, cohort: Sequence[int], workers: int, inner: Engine) -> list[Chunk]:
    """Return the cohort in a few chunks for each worker, the largest clients in the first; memories are not in them."""
    counts = stage.population.counts(cohort)
    ordered = np.asarray(cohort, dtype=np.int64)
    # What trains many clients at once takes as long as they have examples, and each chunk costs it something.
    batched = isinstance(inner, Batched) and counts is not None
    pieces = min(len(ordered), workers * (1 if batched else _CHUNKS_A_WORKER))
    if not pieces:
        return []
    if counts is not None:
        ordered = ordered[np.argsort(-counts, kind="stable")]
    dealt = [ordered[first::pieces] for first in range(pieces)] if batched else np.array_split(ordered, pieces)
    return [Chunk(piece.tolist(), {}) for piece in dealt]
