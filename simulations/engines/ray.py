"""Workers on the machines and GPUs of a Ray cluster, each with an engine inside that adds up what it trained."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from fedml_core.bulk import GatheredArrival
from fedml_core.checks import require_number, require_whole
from fedml_core.errors import ConfigError, RunError
from fedml_core.messages import Assignment
from fedml_core.spans import Recorder, recorder
from simulations.engines.auto import Auto
from simulations.engines.chunk_worker import Chunk, Done, Failed, Job
from simulations.engines.engine import Engine, Session, Stage
from simulations.engines.pool import Crew, Pool, Worker, WorkerLostError
from simulations.engines.processes import Processes, available_processors
from simulations.engines.ray_cluster import some_cluster
from simulations.engines.ray_worker import RayWorker, loaded_task_files
from simulations.engines.sequential import Sequential

__all__ = ["Ray"]

# An actor that has not begun by then waits for what the cluster does not have.
_START_S, _REPLACE_S = 180.0, 60.0
# Ray counts in ten-thousandths; a sum of shares may miss a whole by a rounding of floats.
_STEPS, _ROUNDING = 10_000, 1e-9


@dataclass(frozen=True, kw_only=True)
class Ray(Engine):
    """Trains in the actors of a Ray cluster: several machines, several GPUs, several workers on one GPU.

    A worker that is lost is replaced, and all that it did in this round is done again by the others. Tasks and data are
    found as on the machine of the command: install the task's package everywhere, or use a folder that all share.
    Needs the extra: pip install 'fedveil[ray]'. A program that has called `ray.init` keeps its cluster, and it is used.

    `workers`: how many, or None for as many as the cluster has room for. `cpus_per_worker`: processors of each, a share
    if below 1; threads of torch, rounded down. `gpus_per_worker`: the share of one GPU that each has (0.25: four
    workers on a GPU), or None for an equal share of the cluster's GPUs if the run computes on one, else none.
    `address`: of a cluster that runs already ("auto": the one that this machine is part of), or None to start one on
    this machine for the time of the run. `inner`: what each worker runs.
    """

    workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None
    address: str | None = None
    inner: Engine = field(default_factory=Sequential)
    name: ClassVar[str] = "ray"
    protects_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.workers is not None:
            require_whole("workers", self.workers, at_least=1)
        require_number("cpus_per_worker", self.cpus_per_worker, above=0)
        if self.gpus_per_worker is not None:
            require_number("gpus_per_worker", self.gpus_per_worker, at_least=0, at_most=1)
        if self.cpus_per_worker > 1 and self.cpus_per_worker != int(self.cpus_per_worker):
            raise ConfigError(f"cpus_per_worker must be a whole number or below 1, got {self.cpus_per_worker:g}")
        if self.address is not None and (not self.address or "://" in self.address):
            raise ConfigError(
                f"address must be 'auto' or host:port of a cluster that this machine is part of, got {self.address!r}"
            )
        if isinstance(self.inner, Ray | Processes):
            raise ConfigError(f"ray cannot run {self.inner.name} inside; give another engine as inner")

    def open(self, stage: Stage) -> Session:
        """Return a session with its workers running.

        Raises: ConfigError: if ray is not installed, the cluster has no room for the workers, or the task cannot be
            sent to them.
        """
        if stage.trainer.device.type != "cpu" and self.gpus_per_worker == 0:
            raise ConfigError(
                f"the run computes on {stage.trainer.device} and gpus_per_worker is 0; give each worker a share of a "
                "GPU, such as 0.5, or say device = 'cpu'"
            )
        with ExitStack() as held:
            cpus = max(available_processors(), math.ceil((self.workers or 1) * self.cpus_per_worker))
            on_gpus = stage.trainer.device.type == "cuda" or bool(self.gpus_per_worker)
            ray = held.enter_context(some_cluster(self.address, cpus, torch.cuda.device_count() if on_gpus else 0))
            room = Room.of(self, stage.trainer.device, ray.cluster_resources())
            inner = dataclasses.replace(self.inner, skip_failures=self.skip_failures)
            if isinstance(inner, Auto):
                inner = dataclasses.replace(inner, workers=1)  # the processors are shared out already
            crew = _Actors(ray, Job.of(inner, stage), room)
            crew.held = held.pop_all()
        return Pool(crew, stage, room.workers, inner)


@dataclass(frozen=True)
class Room:
    """What each of `workers` workers gets, and on which device it computes."""

    workers: int
    cpus: float
    gpus: float
    device: str

    @classmethod
    def of(cls, engine: Ray, device: torch.device, resources: Mapping[str, float]) -> Self:
        """Return the workers that a cluster of `resources` has room for, or those that were asked for.

        Raises: ConfigError: if it has no room for them.
        """
        have_cpus, have_gpus = resources.get("CPU", 0.0), int(resources.get("GPU", 0.0))
        cpus, gpus = engine.cpus_per_worker, engine.gpus_per_worker
        if gpus is None:
            gpus = 0.0 if device.type != "cuda" else _equal_share(engine.workers or have_gpus, have_gpus)
        places = [int(have_cpus / cpus + _ROUNDING), *([have_gpus * int(1 / gpus + _ROUNDING)] if gpus else [])]
        workers = engine.workers or max(1, min(places))
        if workers > min(places):
            raise ConfigError(
                f"{workers} workers of {cpus:g} CPUs and {gpus:g} GPUs do not fit a ray cluster of {have_cpus:g} CPUs "
                f"and {have_gpus} GPUs; ask for fewer workers, or for smaller shares"
            )
        return cls(workers, cpus, gpus, "cuda" if gpus else "cpu" if device.type == "cuda" else device.type)


def _equal_share(workers: int, gpus: int) -> float:
    """Return the largest share of a GPU, in Ray's own steps, that lets all workers compute on `gpus` at once."""
    return math.floor(_STEPS / max(1, math.ceil(workers / max(1, gpus)))) / _STEPS


class _Actors(Crew):
    """Workers that are actors of the cluster to which `ray` is connected; `held` is closed with it."""

    def __init__(self, ray: Any, job: Job, room: Room) -> None:
        self.held = ExitStack()
        self._ray, self._room, self._start_s = ray, room, _START_S
        self._kind = ray.remote(RayWorker).options(
            num_cpus=room.cpus, num_gpus=room.gpus, max_restarts=0, max_task_retries=0
        )
        try:
            self._job = ray.put(job)
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the task cannot be sent to ray workers ({_line(error.__cause__ or error)}); define it in a "
                "module, or use one process"
            ) from error

    def start(self, count: int) -> list[Worker]:
        """Return actors that have the job."""
        actors = [self._kind.remote() for _ in range(count)]
        try:
            self._open(actors)
        except BaseException:
            for actor in actors:
                self._ray.kill(actor)
            raise
        self._start_s = _REPLACE_S
        return [_Actor(self._ray, actor) for actor in actors]

    def share(self, assignment: Assignment) -> object:
        """Put the assignment where all actors of a machine read the same copy."""
        rest = dataclasses.replace(assignment, parameters=torch.empty(0))
        return self._ray.put(rest), self._ray.put(assignment.parameters.numpy())

    def heard(self, busy: Collection[Worker]) -> Sequence[Worker]:
        """Return who has answered."""
        waiting = {worker.answer: worker for worker in busy if isinstance(worker, _Actor)}
        ready, _ = self._ray.wait(list(waiting), num_returns=1)
        return [waiting[one] for one in ready]

    def close(self) -> None:
        """Leave the cluster, and end it if it was started for this run."""
        self._job = None
        self.held.close()

    def _open(self, actors: Sequence[Any]) -> None:
        errors, ours = self._ray.exceptions, recorder()
        paths = [str(Path(path).resolve()) for path in sys.path if Path(path).exists()]
        known = (paths, loaded_task_files(), max(1, int(self._room.cpus)))
        begun = [actor.prepare.remote(*known) for actor in actors]
        late = self._ray.wait(begun, num_returns=len(begun), timeout=self._start_s)[1]
        if late:
            raise ConfigError(
                f"{len(late)} of {len(actors)} ray workers did not start within {self._start_s:g} s, perhaps because "
                "others use the cluster; ask for fewer workers, or for smaller shares"
            )
        try:
            wrong = self._ray.get(begun)
            spans = [None if ours is None else Recorder(keep_events=ours.keep_events) for _ in actors]
            opened = zip(actors, spans, strict=True)
            if not any(wrong):
                wrong = self._ray.get([actor.open.remote(self._job, self._room.device, one) for actor, one in opened])
        except errors.RayError as error:
            raise ConfigError(
                f"a ray worker could not start ({_line(getattr(error, 'cause', None) or error)}); install fedveil and "
                "the task's package on every machine of the cluster"
            ) from error
        for first in filter(None, wrong):
            raise first


class _Actor(Worker):
    """One actor, and the references to its answers."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._begun: Any = None
        self.answer: Any = None

    def begin(self, shared: object) -> None:
        self._begun = self._actor.begin.remote(*shared)  # type: ignore[misc]  # what `_Actors.share` returned

    def give(self, chunk: Chunk) -> None:
        self.answer = self._actor.do.remote(chunk)

    def receive(self) -> Done | Failed:
        found: Done | Failed = self._answer()
        return found

    def ask_sum(self) -> None:
        self.answer = self._actor.gathered.remote()

    def receive_sum(self) -> GatheredArrival:
        found: GatheredArrival = self._answer()
        return found

    def end(self) -> None:
        self._ray.kill(self._actor)

    def _answer(self) -> Any:
        """Return the answer, once it is certain that the round had begun: what follows a failed beginning is void."""
        errors = self._ray.exceptions
        try:
            _, found = self._ray.get([self._begun, self.answer])
        except errors.RayTaskError as error:
            raise RunError(f"a ray worker failed: {_line(error.cause or error)}; run it with one process") from error
        except errors.RayError as error:
            raise WorkerLostError(_line(error)) from error
        return found


def _line(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + said[0][:200] if said else ''}"
