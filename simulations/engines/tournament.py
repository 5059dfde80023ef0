"""Which engine to measure next, and which has won: the rules of the engine that measures, without a clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from fedml_core.memory_layout import MemoryLayout
from simulations.engines.batched import Batched
from simulations.engines.engine import Engine
from simulations.engines.fused import Fused
from simulations.engines.processes import Processes
from simulations.engines.sequential import Sequential
from simulations.engines.tuned import Tuned
from simulations.engines.vectorised import Vectorised

__all__ = ["Match", "Timing", "Trial", "Trials", "described", "fastest", "tournament"]

# Processes must be worth their memory, and so must memory that is kept; one thread is preferred where all of them are
# hardly faster.
_MARGIN, _KEPT_MARGIN, _FEWER_THREADS = 1.1, 1.03, 0.97
# On how many clients what trains one by one is measured, and on how many before: the first touch of anything is slow.
_ONE_BY_ONE, _TOUCH = 8, 2
# What is over sooner is measured again, so often at most.
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
    processes that may share the work. `layouts`: memory layouts in which `plain` may be faster. `keeps`: this process
    can keep the memory that it frees.
    """

    ladders: Sequence[Sequence[Batched]]
    plain: Sequential
    cohort: int
    threads: int = 1
    workers: int = 1
    layouts: Sequence[MemoryLayout] = ()
    keeps: bool = False


def tournament(match: Match) -> Generator[Trial, Timing, Engine]:
    """Yield what to measure, be sent how fast it was, and return the winner.

    First the engines of one process on parts of a cohort, up each ladder as long as more clients at once are faster,
    and one by one in each memory layout; then the best of them with one thread, and with freed memory kept; then worker
    processes with the best inside, on whole rounds, which is the only way to see what they cost.
    """
    best = Timing(match.plain, 0.0)
    by_hand = False
    for ladder in match.ladders:
        if by_hand and isinstance(ladder[0], Vectorised):
            continue  # what is written by hand for such a model beats what is not
        top = yield from _climbed(ladder, match.cohort)
        by_hand |= top.able and isinstance(top.engine, Fused)
        best = max(best, top, key=_rate)
    if match.ladders or match.layouts or match.keeps or match.threads > 1 or match.workers > 1:
        best = max(best, (yield from _alone(match)), key=_rate)
    if match.threads > 1:
        best = yield from _duel(best, _tuned(best.engine, threads=1), match.cohort, margin=_FEWER_THREADS)
    if match.keeps:
        best = yield from _duel(best, _tuned(best.engine, keep_freed_memory=True), match.cohort, margin=_KEPT_MARGIN)
    if match.workers > 1:
        best = yield from _shared(best, match)
    return best.engine


def fastest(timings: Sequence[Timing], otherwise: Engine) -> Engine:
    """Return the engine with the best rate, or `otherwise`."""
    best = max(timings, key=_rate, default=None)
    return otherwise if best is None else best.engine


def described(engine: Engine) -> str:
    """Return what people call an engine and its numbers."""
    if isinstance(engine, Processes):
        return f"{engine.workers} processes of {described(engine.inner)}"
    if isinstance(engine, Tuned):
        few = "" if engine.threads is None else f" in {engine.threads} thread{'s' * (engine.threads > 1)}"
        return f"{described(engine.inner)}{few}{' with freed memory kept' * engine.keep_freed_memory}"
    if isinstance(engine, Sequential) and engine.memory_layout != "auto":
        return f"{engine.name} in {engine.memory_layout.replace('_', '-')} layout"
    if isinstance(engine, Batched):
        return f"{engine.name} with {engine.clients_at_once} clients at once"
    return engine.name


def _climbed(ladder: Sequence[Batched], cohort: int) -> Trials:
    """Return the timing of the fastest rung, or of the first if that is not able."""
    best = yield from _measured(ladder[0], _size(ladder[0], cohort))
    if best.crowded:
        return (yield from _halved(ladder[0], cohort))
    for engine in ladder[1:] if best.able else ():
        best = yield from _duel(best, engine, cohort)
        if best.engine != engine:
            break
    return best


def _halved(engine: Batched, cohort: int) -> Trials:
    """Return the timing of the first rung below `engine` that fits the memory."""
    while True:
        engine = dataclasses.replace(engine, clients_at_once=max(1, (engine.clients_at_once or cohort) // 2))
        timing = yield from _measured(engine, _size(engine, cohort))
        if not timing.crowded or engine.clients_at_once == 1:
            return timing


def _alone(match: Match) -> Trials:
    """Return the timing of one by one, in the memory layout in which it is fastest."""
    best = yield from _measured(match.plain, _size(match.plain, match.cohort))
    for layout in match.layouts:
        best = yield from _duel(best, dataclasses.replace(match.plain, memory_layout=layout), match.cohort)
    return best


def _shared(best: Timing, match: Match) -> Trials:
    inner = dataclasses.replace(_bare(best.engine), skip_failures=False)
    shared = Processes(workers=match.workers, inner=inner, skip_failures=match.plain.skip_failures)
    return (yield from _duel((yield from _timed(best.engine, None)), shared, None, margin=_MARGIN))


def _duel(best: Timing, challenger: Engine, cohort: int | None, *, margin: float = 1.0) -> Trials:
    """Return the winner of `best` and a challenger that must be faster by `margin`; `cohort`: None for whole rounds.

    They take turns, and the better time of each counts: others use the machine too, and more at one time than another.
    """
    sizes = [None if cohort is None else _size(engine, cohort) for engine in (best.engine, challenger)]
    other = yield from _measured(challenger, sizes[1])
    if not other.able:
        return best
    best = max(best, (yield from _timed(best.engine, sizes[0])), key=_rate)
    other = max(other, (yield from _timed(challenger, sizes[1])), key=_rate)
    return other if _rate(other) > margin * _rate(best) else best


def _measured(engine: Engine, size: int | None) -> Trials:
    """Return a timing after one that does not count."""
    touch = min(size, _TOUCH) if size is not None and isinstance(_bare(engine), Sequential) else size
    first = yield Trial(engine, touch)
    return (yield from _timed(engine, size)) if first.able else first


def _timed(engine: Engine, size: int | None) -> Trials:
    """Return the mean of a few short timings: rounds of worker processes differ by a factor of two."""
    work, seconds = 0.0, 0.0
    for _ in range(_MOST_TIMES):
        timing = yield Trial(engine, size)
        if not timing.able:
            return timing
        work, seconds = work + timing.rate * timing.seconds, seconds + timing.seconds
        if seconds >= _SHORT_S:
            break
    return Timing(engine, work / seconds, seconds)


def _size(engine: Engine, cohort: int) -> int:
    inner = _bare(engine)
    at_once = inner.clients_at_once if isinstance(inner, Batched) else None
    return min(_ONE_BY_ONE if at_once is None else at_once, cohort)


def _bare(engine: Engine) -> Engine:
    return engine.inner if isinstance(engine, Tuned) else engine


def _tuned(engine: Engine, **settings: Any) -> Tuned:
    """Return `engine` in a process that is set up so, too."""
    if isinstance(engine, Tuned):
        return dataclasses.replace(engine, **settings)
    inner = dataclasses.replace(engine, skip_failures=False)
    return Tuned(inner=inner, skip_failures=engine.skip_failures, **settings)


def _rate(timing: Timing) -> float:
    return timing.rate if timing.able else 0.0
