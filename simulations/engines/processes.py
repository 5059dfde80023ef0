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
from simulations.engines.parcel import packed
from simulations.engines.pool import Crew, Pool, Worker, WorkerLostError
from simulations.engines.sequential import Sequential
from simulations.engines.worker import Round, work


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
        return Pool(_Processes(Job.of(inner, stage), devices), stage, count, inner)


class _Processes(Crew):
    """Worker processes and the pipes to them; worker i computes on device i, of as many as there are, in turn.

    Torch's threads here wait for work by spinning, on the workers' processors: where the model is small, there is one
    until the crew is closed.
    """

    def __init__(self, job: Job, devices: Sequence[str]) -> None:
        self._job, self._devices, self._started = job, devices, 0
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
        """Return the round as bytes, made once."""
        return packed(Round(assignment))

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
        device = self._devices[self._started % len(self._devices)]
        self._started += 1
        process = self._context.Process(target=work, args=(theirs, self._job, device, _like(recorder())), daemon=True)
        try:
            process.start()
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the task cannot be sent to worker processes ({error}); define it in a module, or use one process"
            ) from error
        theirs.close()
        return _ProcessWorker(process, ours)


class _ProcessWorker(Worker):
    """A worker process and the pipe to it."""

    def __init__(self, process: Any, connection: Connection) -> None:
        self._process, self.connection = process, connection

    def begin(self, shared: object) -> None:
        """Send the round."""
        assert isinstance(shared, bytes)
        self._send(shared)

    def give(self, chunk: Chunk) -> None:
        """Send a chunk."""
        self._send(packed(chunk))

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
            return self.connection.recv()
        except (EOFError, ConnectionResetError, BrokenPipeError) as error:
            self.end()
            raise WorkerLostError(f"exit code {self._process.exitcode}") from error


def _like(ours: Recorder | None) -> Recorder | None:
    return None if ours is None else Recorder(keep_events=ours.keep_events)


def available_processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
