"""Which engine to measure next, and which has won: the rules of the engine that measures, without a clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from simulations.engines.batched import Batched
from simulations.engines.engine import Engine
from simulations.engines.fused import Fused
from simulations.engines.processes import Processes
from simulations.engines.sequential import Sequential
from simulations.engines.threaded import Threaded
from simulations.engines.vectorised import Vectorised

__all__ = ["Match", "Timing", "Trial", "Trials", "described", "fastest", "tournament"]

# Processes must be worth their memory; one thread is preferred where all of them are hardly faster.
_MARGIN, _FEWER_THREADS = 1.1, 0.97
# On how many clients what trains one by one is measured, and on how many before: the first touch of anything is slow.
_ONE_BY_ONE, _TOUCH = 8, 2
# What is over sooner is measured again, so often at most, and the fastest time counts: others use the machine too.
_SHORT_S, _MOST_TIMES = 0.1, 3


@dataclass(frozen=True)
class Trial:
    """What to measure next: `engine` on the next `size` clients, or on a whole round if that is None."""

    engine: Engine
    size: int | None


@dataclass(frozen=True)
class Timing:
    """How fast `engine` was, in examples a second (in clients, where none were counted).

    `seconds`: how long it took. `able`: it did not give up. `crowded`: so many clients at once did not fit the memory.
    """

    engine: Engine
    rate: float
    seconds: float = float("inf")
    able: bool = True
    crowded: bool = False


Trials = Generator[Trial, Timing, Timing]


@dataclass(frozen=True)
class Match:
    """Who may take part. `ladders`: engines of one process, each with ever more clients at once. `plain`: what is left
    where no other is able. `cohort`: clients of a round. `threads`: of torch in this process. `workers`: the most
    processes that may share the work.
    """

    ladders: Sequence[Sequence[Batched]]
    plain: Sequential
    cohort: int
    threads: int = 1
    workers: int = 1


def tournament(match: Match) -> Generator[Trial, Timing, Engine]:
    """Yield what to measure, be sent how fast it was, and return the winner.

    First the engines of one process on parts of a cohort, up each ladder as long as more clients at once are faster;
    then the best of them with one thread; then worker processes with the best inside, on whole rounds, which is the
    only way to see what they cost.
    """
    best = Timing(match.plain, 0.0)
    alone = min(_ONE_BY_ONE, match.cohort)
    by_hand = False
    for ladder in match.ladders:
        if by_hand and isinstance(ladder[0], Vectorised):
            continue  # what is written by hand for such a model beats what is not
        top = yield from _climbed(ladder, match.cohort)
        by_hand |= top.able and isinstance(top.engine, Fused)
        best = max(best, top, key=_rate)
    others = match.threads > 1 or match.workers > 1
    if match.ladders or others:
        best = max(best, (yield from _measured(match.plain, alone)), key=_rate)
    if match.threads > 1:
        skip = match.plain.skip_failures
        narrow = Threaded(threads=1, inner=dataclasses.replace(best.engine, skip_failures=False), skip_failures=skip)
        fewer = yield from _measured(narrow, _size(best.engine, match.cohort))
        if _rate(fewer) > _FEWER_THREADS * _rate(best):
            best = fewer
    if match.workers > 1:
        return (yield from _shared(best, match))
    return best.engine


def fastest(timings: Sequence[Timing], otherwise: Engine) -> Engine:
    """Return the engine with the best rate, or `otherwise`."""
    best = max(timings, key=_rate, default=None)
    return otherwise if best is None else best.engine


def described(engine: Engine) -> str:
    """Return what people call an engine and its numbers."""
    if isinstance(engine, Processes):
        return f"{engine.workers} processes of {described(engine.inner)}"
    if isinstance(engine, Threaded):
        return f"{described(engine.inner)} in {engine.threads} thread{'s' * (engine.threads > 1)}"
    if isinstance(engine, Batched):
        return f"{engine.name} with {engine.clients_at_once} clients at once"
    return engine.name


def _climbed(ladder: Sequence[Batched], cohort: int) -> Trials:
    """Return the timing of the fastest rung, or of the first if that is not able."""
    best: Timing | None = None
    for engine in ladder:
        timing = yield from _measured(engine, _size(engine, cohort))
        if timing.crowded and best is None:
            return (yield from _halved(engine, cohort))
        if best is not None and (not timing.able or timing.rate <= best.rate):
            break
        best = timing
        if not timing.able:
            break
    assert best is not None
    return best


def _halved(engine: Batched, cohort: int) -> Trials:
    """Return the timing of the first rung below `engine` that fits the memory."""
    while True:
        engine = dataclasses.replace(engine, clients_at_once=max(1, (engine.clients_at_once or cohort) // 2))
        timing = yield from _measured(engine, _size(engine, cohort))
        if not timing.crowded or engine.clients_at_once == 1:
            return timing


def _shared(best: Timing, match: Match) -> Generator[Trial, Timing, Engine]:
    inner = dataclasses.replace(_bare(best.engine), skip_failures=False)
    shared = Processes(workers=match.workers, inner=inner, skip_failures=match.plain.skip_failures)
    alone = yield from _timed(best.engine, None)
    together = yield from _measured(shared, None)
    return shared if _rate(together) > _MARGIN * _rate(alone) else best.engine


def _measured(engine: Engine, size: int | None) -> Trials:
    """Return the best of a few timings after one that does not count."""
    touch = min(size, _TOUCH) if size is not None and isinstance(_bare(engine), Sequential) else size
    first = yield Trial(engine, touch)
    return (yield from _timed(engine, size)) if first.able else first


def _timed(engine: Engine, size: int | None) -> Trials:
    best, seconds = Timing(engine, 0.0), 0.0
    for _ in range(_MOST_TIMES):
        timing = yield Trial(engine, size)
        if not timing.able:
            return timing
        best = max(best, timing, key=_rate)
        seconds += timing.seconds
        if seconds >= _SHORT_S:
            break
    return best


def _size(engine: Engine, cohort: int) -> int:
    inner = _bare(engine)
    at_once = inner.clients_at_once if isinstance(inner, Batched) else None
    return min(_ONE_BY_ONE if at_once is None else at_once, cohort)


def _bare(engine: Engine) -> Engine:
    return engine.inner if isinstance(engine, Threaded) else engine


def _rate(timing: Timing) -> float:
    return timing.rate if timing.able else 0.0
