"""Measures the engines on the run's own first clients and goes on with the fastest."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedml_core.bulk import BulkArrival, GatheredArrival
from fedml_core.checks import require_whole
from fedml_core.errors import ConfigError
from fedml_core.messages import Arrived, Assignment, TrainWork
from fedml_core.update import Update
from simulations.engines.batched import clients_that_fit
from simulations.engines.choices import key_of, recall, remember
from simulations.engines.engine import Engine, Session, Stage
from simulations.engines.fused import Fused
from simulations.engines.processes import Processes, available_processors
from simulations.engines.sequential import Sequential
from simulations.engines.vectorised import Vectorised

__all__ = ["Auto", "Timing", "Trial", "tournament"]

# Processes must be worth their memory.
_MARGIN = 1.1
# Clients that are trained one by one to measure that, and before, so that nothing is measured on its first touch.
_ONE_BY_ONE, _TOUCH = 8, 2
# The other number of clients at once that is tried, as a multiple of how many fit the caches.
_FURTHER = 4


@dataclass(frozen=True, kw_only=True)
class Auto(Engine):
    """Times the engines on the first rounds' clients and goes on with the fastest; its answer is theirs.

    It says what it chose and why, and remembers it for this model and machine. All engines agree up to the order of
    float additions, so the choice never matters for a result beyond that; whoever needs equal bits names an engine.

    `workers`: the most processes that it may use, or None for one a processor.
    """

    workers: int | None = None
    name: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        """Check the workers."""
        if self.workers is not None:
            require_whole("workers", self.workers, at_least=1)

    def open(self, stage: Stage) -> Session:
        """Return a session that has not chosen yet."""
        return Choosing(self, stage)


@dataclass(frozen=True)
class Trial:
    """What to measure next: `engine` on the next `size` clients, or on a whole round if that is None."""

    engine: Engine
    size: int | None


@dataclass(frozen=True)
class Timing:
    """How fast `engine` was, in examples a second (in clients, where none were counted); `able`: it did not give up."""

    engine: Engine
    rate: float
    able: bool = True


class Choosing(Session):
    """Lets one engine after the other do parts of the cohorts, then leaves everything to the fastest.

    First the engines of this process, on chunks; then worker processes with the winner inside, on whole rounds, which
    is the only way to see what they cost. All replies count, whoever makes them.
    """

    def __init__(self, engine: Auto, stage: Stage) -> None:
        self._engine, self._real, self._told = engine, stage, list[str]()
        self._stage = dataclasses.replace(stage, tell=self._hear)
        self._sessions: dict[Engine, Session] = {}
        self._trials: Generator[Trial, Timing, Engine] | None = None
        self._trial: Trial | None = None
        self._timings: list[Timing] = []
        self._chosen: Engine | None = None
        self._key = ""
        # A worker process may not have workers of its own.
        self._workers = 1 if multiprocessing.current_process().daemon else engine.workers or available_processors()

    def run(self, assignment: Assignment, cohort: Sequence[int]) -> Iterator[Arrived]:
        """Yield the cohort's replies."""
        left = list(cohort)
        if isinstance(assignment.work, TrainWork) and left:
            if self._chosen is None and self._trials is None:
                self._begin(assignment, len(left))
            while left and self._chosen is None and self._trial is not None:
                size = len(cohort) if self._trial.size is None else min(self._trial.size, len(cohort))
                if size > len(left):
                    break  # the next round has enough of them
                part, left = left[:size], left[size:]
                yield from self._measured(assignment, part, self._trial.engine)
        if left:
            yield from self._session(self._for_now).run(assignment, left)

    def close(self) -> None:
        """Close every session that was opened."""
        for session in self._sessions.values():
            session.close()
        self._sessions = {}

    @property
    def _plain(self) -> Engine:
        return Sequential(skip_failures=self._engine.skip_failures)

    @property
    def _for_now(self) -> Engine:
        return self._chosen or _fastest(self._timings, self._plain)

    def _session(self, engine: Engine) -> Session:
        if engine not in self._sessions:
            self._sessions[engine] = engine.open(self._stage)
        return self._sessions[engine]

    def _hear(self, text: str) -> None:
        # While engines are tried, what one cannot do is a reason to choose another and no news for the user.
        if self._chosen is None:
            self._told.append(text)
        else:
            self._real.tell(text)

    def _begin(self, assignment: Assignment, cohort: int) -> None:
        self._key = key_of(self._real, assignment, cohort, self._workers)
        known = recall(self._key)
        if known is not None and not isinstance(known, Auto):
            self._choose(dataclasses.replace(known, skip_failures=self._engine.skip_failures))
            self._real.tell(f"engine: {_described(known)}, the fastest for this model and machine before")
            return
        self._trials = tournament(
            self._candidates(cohort),
            self._workers if self._stage.trainer.device.type == "cpu" else 1,
            self._plain,
            skip_failures=self._engine.skip_failures,
        )
        self._go_on(None)

    def _measured(self, assignment: Assignment, part: Sequence[int], engine: Engine) -> Iterator[Arrived]:
        """Let `engine` do `part`, and take note of how long it took."""
        told, started = len(self._told), time.perf_counter()
        try:
            session = self._session(engine)
        except ConfigError:
            # Only a task that cannot be sent to other processes; the user did not ask for any.
            self._go_on(Timing(engine, 0.0, able=False))
            yield from self._session(self._for_now).run(assignment, part)
            return
        arrivals = list(session.run(assignment, part))
        seconds = time.perf_counter() - started
        self._go_on(Timing(engine, _examples(arrivals, len(part)) / seconds, able=len(self._told) == told))
        yield from arrivals

    def _go_on(self, timing: Timing | None) -> None:
        assert self._trials is not None
        if timing is not None and timing.able:
            # An engine's last timing is the one that counted.
            self._timings = [one for one in self._timings if one.engine != timing.engine] + [timing]
        try:
            self._trial = next(self._trials) if timing is None else self._trials.send(timing)
        except StopIteration as end:
            self._choose(end.value)
            ranked = sorted(self._timings, key=lambda one: -one.rate)
            rates = ", ".join(f"{_described(one.engine)} {one.rate:,.0f}/s" for one in ranked)
            self._real.tell(
                f"engine: {_described(end.value)}, the fastest here (examples: {rates or 'one engine only'})"
            )
            remember(self._key, dataclasses.replace(end.value, skip_failures=False))

    def _measurements(self) -> str:
        ranked = sorted(self._timings, key=lambda one: -one.rate)
        rates = ", ".join(f"{_described(one.engine)} {one.rate:,.0f}" for one in ranked)
        return f"examples a second: {rates}" if rates else "there was no other to measure"

    def _candidates(self, cohort: int) -> list[tuple[Engine, int]]:
        """Return the engines of this process and how many clients each is tried on."""
        skip, stage = self._engine.skip_failures, self._stage
        engines: list[tuple[Engine, int]] = []
        fit = min(clients_that_fit(stage), cohort)
        convolves = any(isinstance(part, nn.modules.conv._ConvNd) for part in stage.task.build(0).modules())
        # Convolutions of several clients at once only tie with one by one on a CPU, and take gigabytes.
        if stage.trainer.device.type != "cpu" or not convolves:
            sizes = sorted({fit, min(_FURTHER * fit, cohort)})
            for kind in (Fused, Vectorised):
                engines += [(kind(clients_at_once=size, skip_failures=skip), size) for size in sizes]
        return [*engines, (self._plain, min(_ONE_BY_ONE, cohort))]

    def _choose(self, engine: Engine) -> None:
        self._chosen, self._trial = engine, None
        for other in [other for other in self._sessions if other != engine]:
            self._sessions.pop(other).close()


def tournament(
    candidates: Sequence[tuple[Engine, int]], workers: int, plain: Engine, *, skip_failures: bool
) -> Generator[Trial, Timing, Engine]:
    """Yield what to measure, be sent how fast it was, and return the winner.

    Args: candidates: engines of one process, each with how many clients to try it on. workers: how many processes may
        share the work; with 1, none do. plain: what is left where no other engine is able.
    """
    timings: list[Timing] = []
    for engine, size in candidates if len(candidates) > 1 else ():
        if isinstance(engine, Vectorised) and any(isinstance(one.engine, Fused) for one in timings):
            continue  # what is written by hand for such a model beats what is not
        # What is measured is the second time: the first touch of anything is slow.
        first = yield Trial(engine, min(size, _TOUCH) if isinstance(engine, Sequential) else size)
        timing = (yield Trial(engine, size)) if first.able else first
        if timing.able:
            timings.append(timing)
    best = _fastest(timings, plain)
    if workers == 1:
        return best
    inner = dataclasses.replace(best, skip_failures=False)
    shared = Processes(workers=workers, inner=inner, skip_failures=skip_failures)
    rates = []
    for engine in (best, shared):
        first = yield Trial(engine, None)
        timing = (yield Trial(engine, None)) if first.able else first
        rates.append(timing.rate if timing.able else 0.0)
    return shared if rates[1] > _MARGIN * rates[0] else best


def _fastest(timings: Sequence[Timing], otherwise: Engine) -> Engine:
    best = max(timings, key=lambda timing: timing.rate, default=None)
    return otherwise if best is None else best.engine


def _described(engine: Engine) -> str:
    if isinstance(engine, Processes):
        return f"{engine.workers} processes of {_described(engine.inner)}"
    if isinstance(engine, Fused | Vectorised):
        return f"{engine.name} with {engine.clients_at_once} clients at once"
    return engine.name


def _examples(arrivals: Sequence[Arrived], clients: int) -> float:
    total = 0.0
    for arrival in arrivals:
        if isinstance(arrival, GatheredArrival):
            total += arrival.accumulator.sums.get("examples", 0.0)
            continue
        body = arrival.update if isinstance(arrival, BulkArrival) else arrival.reply.body
        if isinstance(body, Update) and "examples" in body.sums:
            total += float(body.sums["examples"].sum())
    return total or float(clients)
