"""Measures the engines on the run's own first clients and goes on with the fastest."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fedml_core.bulk import BulkArrival, GatheredArrival
from fedml_core.checks import require_whole
from fedml_core.errors import ConfigError
from fedml_core.freed_memory import why_not_kept
from fedml_core.memory_layout import in_channels_last
from fedml_core.messages import Arrived, Assignment, TrainWork
from fedml_core.update import Update
from simulations.engines.batched import clients_that_fit
from simulations.engines.choices import key_of, recall, remember
from simulations.engines.engine import Engine, Session, Stage
from simulations.engines.fused import Fused
from simulations.engines.processes import available_processors
from simulations.engines.sequential import Sequential
from simulations.engines.tournament import Match, Timing, Trial, described, fastest, tournament
from simulations.engines.tuned import Tuned
from simulations.engines.vectorised import Vectorised

__all__ = ["Auto"]

_OUT_OF_MEMORY = "out of memory"  # how the sentence begins that a batched engine says when it halves K
# How many clients at once are tried, as multiples of how many fit the caches.
_STEPS = (1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class Auto(Engine):
    """Times the engines on the first rounds' clients and goes on with the fastest; its answer is theirs.

    It says what it chose and why, and remembers it for this model and machine. All engines agree up to the order of
    float additions, so the choice never matters for a result beyond that; whoever needs equal bits names an engine.

    `workers`: the most processes that it may use, or None for one a processor.
    """

    workers: int | None = None
    name: ClassVar[str] = "auto"
    protects_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the workers."""
        if self.workers is not None:
            require_whole("workers", self.workers, at_least=1)

    def open(self, stage: Stage) -> Session:
        """Return a session that has not chosen yet."""
        return Choosing(self, stage)


class Choosing(Session):
    """Lets one engine after the other do parts of the cohorts, then leaves everything to the fastest.

    `tournament` says what is tried. All replies count, whoever makes them.
    """

    def __init__(self, engine: Auto, stage: Stage) -> None:
        self._engine, self._real, self._told = engine, stage, list[str]()
        self._stage = dataclasses.replace(stage, tell=self._hear)
        self._sessions: dict[Engine, Session] = {}
        self._trials: Generator[Trial, Timing, Engine] | None = None
        self._trial: Trial | None = None
        self._timings: dict[Engine, Timing] = {}
        self._chosen: Engine | None = None
        self._key = ""
        # A worker process may not have workers of its own, and keeps freed memory anyway.
        self._inside = multiprocessing.current_process().daemon
        self._workers = 1 if self._inside else engine.workers or available_processors()

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
        self._close(self._sessions)

    @property
    def _plain(self) -> Sequential:
        return Sequential(skip_failures=self._engine.skip_failures)

    @property
    def _for_now(self) -> Engine:
        return self._chosen or fastest(list(self._timings.values()), self._plain)

    def _session(self, engine: Engine) -> Session:
        # One that keeps freed memory does so for the whole process, and so for whoever is compared with it.
        self._close(other for other in self._sessions if _keeps(other) and other != engine)
        if engine not in self._sessions:
            # What trains one by one is left where nothing else is able: what it has to say is for the user.
            self._sessions[engine] = engine.open(self._real if engine == self._plain else self._stage)
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
            self._real.tell(f"engine: {described(known)}, the fastest for this model and machine before")
            return
        self._trials = tournament(self._match(cohort))
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
        new = self._told[told:]
        crowded = any(line.startswith(_OUT_OF_MEMORY) for line in new)
        self._go_on(Timing(engine, _examples(arrivals, len(part)) / seconds, seconds, able=not new, crowded=crowded))
        yield from arrivals

    def _go_on(self, timing: Timing | None) -> None:
        assert self._trials is not None
        if timing is not None and timing.able:
            known = self._timings.get(timing.engine, timing)
            self._timings[timing.engine] = timing if timing.rate > known.rate else known
        try:
            self._trial = next(self._trials) if timing is None else self._trials.send(timing)
        except StopIteration as end:
            self._choose(end.value)
            ranked = sorted(self._timings.values(), key=lambda one: -one.rate)
            rates = ", ".join(f"{described(one.engine)} {one.rate:,.0f}/s" for one in ranked)
            self._real.tell(
                f"engine: {described(end.value)}, the fastest here (examples at best: {rates or 'one engine only'})"
            )
            remember(self._key, dataclasses.replace(end.value, skip_failures=False))

    def _match(self, cohort: int) -> Match:
        """Return who takes part."""
        skip, stage = self._engine.skip_failures, self._stage
        on_cpu = stage.trainer.device.type == "cpu"
        fit = min(clients_that_fit(stage), cohort)
        sizes = sorted({min(fit * step, cohort) for step in _STEPS})
        module = stage.task.build(0)
        convolves = any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules())
        # Convolutions of several clients at once only tie with one by one on a CPU, and take gigabytes.
        plain = on_cpu and stage.private is None
        kinds = () if plain and convolves else (Fused, Vectorised) if plain else (Vectorised,)
        return Match(
            [[kind(clients_at_once=size, skip_failures=skip) for size in sizes] for kind in kinds],
            self._plain,
            cohort,
            torch.get_num_threads() if on_cpu else 1,
            self._workers if on_cpu else 1,
            ("contiguous",) if in_channels_last("auto", module, stage.trainer.device) else (),
            on_cpu and not self._inside and why_not_kept() is None,
        )

    def _choose(self, engine: Engine) -> None:
        self._chosen, self._trial = engine, None
        self._close(other for other in self._sessions if other != engine)

    def _close(self, engines: Iterable[Engine]) -> None:
        for engine in list(engines):
            self._sessions.pop(engine).close()


def _keeps(engine: Engine) -> bool:
    return isinstance(engine, Tuned) and engine.keep_freed_memory


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
