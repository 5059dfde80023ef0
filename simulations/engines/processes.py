"""Worker processes that each train a share of the cohort and add it up, so that traffic is O(workers x d)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, ClassVar

import torch
from torch import multiprocessing

from fedml_core.bulk import GatheredArrival
from fedml_core.checks import require_whole
from fedml_core.devices import choose_device, fitting_threads
from fedml_core.errors import ConfigError
from fedml_core.messages import Assignment
from fedml_core.spans import Recorder, recorder
from simulations.engines.chunk_worker import Chunk, Done, Failed, Job
from simulations.engines.engine import Engine, Session, Stage
from simulations.engines.parcel import Shelf, packed, unpacked
from simulations.engines.pool import Crew, Pool, Worker, WorkerLostError
from simulations.engines.sequential import Sequential
from simulations.engines.worker import Round, Shelves, work


@dataclass(frozen=True, kw_only=True)
class Processes(Engine):
    """Trains in worker processes of one thread each, and for a small dense model keeps this process to one, too.

    A worker that dies is replaced, and all that it did in this round is done again by the others. Workers are forked
    where that is safe (Linux, no GPU), so that any task will do; elsewhere they are started anew, and the task must be
    defined in a module that they can import.

    `workers`: how many, or None for one a processor, or one a device. `inner`: what each worker runs. `devices`: such
    as `("cuda:0", "cuda:1")`, shared out over the workers in turn; none for the run's own device.
    """

    workers: int | None = None
    inner: Engine = field(default_factory=Sequential)
    devices: tuple[str, ...] = ()
    name: ClassVar[str] = "processes"
    protects_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the workers."""
        if self.workers is not None:
            require_whole("workers", self.workers, at_least=1)
        if isinstance(self.inner, Processes):
            raise ConfigError("processes cannot run processes inside; give another engine as inner")

    def open(self, stage: Stage) -> Session:
        """Return a session with its workers running."""
        inner = dataclasses.replace(self.inner, skip_failures=self.skip_failures)
        devices = [str(choose_device(device)) for device in self.devices] or [str(stage.trainer.device)]
        count = self.workers or len(self.devices) or available_processors()
        model_bytes = 4 * stage.trainer.spec.size
        return Pool(_Processes(Job.of(inner, stage), devices, model_bytes), stage, count, inner)


class _Processes(Crew):
    """Worker processes and the pipes to them; each computes on the device that the fewest others compute on.

    Torch's threads here wait for work by spinning, on the workers' processors: where the model is small, there is one
    until the crew is closed. A large model's parameters and sums, of `model_bytes` each, lie in memory that is shared.
    """

    def __init__(self, job: Job, devices: Sequence[str], model_bytes: int) -> None:
        self._job, self._devices, self._workers = job, devices, list[_ProcessWorker]()
        self._model_bytes, self._down = model_bytes, Shelf.of(model_bytes)
        self._threads: int | None = None
        on_cpu = all(device == "cpu" for device in devices)
        forks = "fork" in multiprocessing.get_all_start_methods() and on_cpu
        self._context: Any = multiprocessing.get_context("fork" if forks else "spawn")

    def start(self, count: int) -> list[Worker]:
        """Return new workers."""
        if self._threads is None and (fitting := fitting_threads(self._job.task.build(self._job.seed))) is not None:
            self._threads = torch.get_num_threads()
            torch.set_num_threads(min(fitting, self._threads))
        return [self._start() for _ in range(count)]

    def share(self, assignment: Assignment) -> object:
        """Return the round as bytes, made once; of the last exchange's, nobody waits for any more."""
        return packed(Round(assignment), self._down)

    def heard(self, busy: Collection[Worker]) -> Sequence[Worker]:
        """Wait for pipes that can be read."""
        workers = {worker.connection: worker for worker in busy if isinstance(worker, _ProcessWorker)}
        return [workers[connection] for connection in wait(list(workers)) if isinstance(connection, Connection)]

    def close(self) -> None:
        """Give this process its threads back."""
        if self._threads is not None:
            torch.set_num_threads(self._threads)
            self._threads = None

    def _start(self) -> Worker:
        ours, theirs = self._context.Pipe()
        self._workers = [worker for worker in self._workers if not worker.ended]
        taken = [worker.place for worker in self._workers]
        place = min(range(len(self._devices)), key=taken.count)
        shelves = Shelves(self._down, Shelf.of(self._model_bytes))
        given = (theirs, self._job, self._devices[place], _like(recorder()), shelves)
        process = self._context.Process(target=work, args=given, daemon=True)
        try:
            process.start()
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the task cannot be sent to worker processes ({error}); define it in a module, or use one process"
            ) from error
        theirs.close()
        self._workers.append(_ProcessWorker(process, ours, shelves.up, place))
        return self._workers[-1]


class _ProcessWorker(Worker):
    """A worker process and the pipe to it.

    `up`: where its answers' large tensors lie. `place`: of its device among the crew's.
    """

    def __init__(self, process: Any, connection: Connection, up: Shelf | None, place: int) -> None:
        self._process, self.connection, self._up, self.place = process, connection, up, place
        self.ended = False
        self._round: bytes | None = None

    def begin(self, shared: object) -> None:
        """Keep the round for the first chunk: a worker that is woken for it alone only takes time from this process."""
        assert isinstance(shared, bytes)
        self._round = shared

    def give(self, chunk: Chunk) -> None:
        """Send a chunk, and before the first of a round what the round is."""
        message = packed(chunk)
        if self._round is not None:
            self._send(self._round)
            self._round = None
        self._send(message)

    def receive(self) -> Done | Failed:
        """Return the answer to a chunk."""
        answer: Done | Failed = self._receive()
        return answer

    def ask_sum(self) -> None:
        """Ask for the sum."""
        self._send(packed(None))

    def receive_sum(self) -> GatheredArrival:
        """Return the sum."""
        gathered: GatheredArrival = self._receive()
        return gathered

    def end(self) -> None:
        """End the process if it still runs."""
        self.ended = True
        self.connection.close()
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()

    def _send(self, message: bytes) -> None:
        # A worker that is dead is noticed, and replaced, when it is listened to.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(message)

    def _receive(self) -> Any:
        try:
            return unpacked(self.connection.recv_bytes(), self._up)
        except (EOFError, ConnectionResetError, BrokenPipeError) as error:
            self.end()
            raise WorkerLostError(f"exit code {self._process.exitcode}") from error


def _like(ours: Recorder | None) -> Recorder | None:
    return None if ours is None else Recorder(keep_events=ours.keep_events)


def available_processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
