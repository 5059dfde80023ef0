"""Where time goes: named spans around the few places that matter, recorded when somebody asks and else almost free.

`with span("compute"): ...` costs a quarter of a microsecond unless a `Recorder` is at work in this context. A span
inside another one counts for itself: each nanosecond belongs to the innermost span around it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter_ns

__all__ = ["MOST_EVENTS", "Event", "Recorded", "Recorder", "recorder", "recording", "span"]

MOST_EVENTS = 1_000_000
"""How many spans one recorder keeps one by one; the sums go on."""

Event = tuple[str, int, int, int]
"""A span's name, its start and its length in nanoseconds of `perf_counter_ns`, and the process that it was in."""

_NOTHING = nullcontext()


@dataclass(frozen=True)
class Recorded:
    """What a recorder gathered: nanoseconds by name, each counted once, and the spans themselves if they were kept."""

    own_ns: Mapping[str, int]
    events: Sequence[Event] = field(default=(), repr=False)
    left_out: int = 0


class Recorder:
    """Gathers the spans of one thread.

    `keep_events`: also keep each span, for a trace. `workers_ns`: what worker processes did meanwhile, by name, each
    divided by how many workers there are.
    """

    def __init__(self, *, keep_events: bool = False) -> None:
        self.keep_events = keep_events
        self.workers_ns: dict[str, float] = {}
        self._own_ns: dict[str, int] = {}
        self._events: list[Event] = []
        self._left_out = 0
        self._inner_ns: list[int] = []
        self._process = 0

    def begin(self) -> None:
        """Take this process for the one that is recorded; a recorder may have been made in another."""
        self._process = os.getpid()

    def enter(self) -> int:
        """Begin a span and return its start."""
        self._inner_ns.append(0)
        return perf_counter_ns()

    def leave(self, name: str, start: int) -> None:
        """End the innermost span, which began at `start`."""
        length = perf_counter_ns() - start
        self._own_ns[name] = self._own_ns.get(name, 0) + length - self._inner_ns.pop()
        if self._inner_ns:
            self._inner_ns[-1] += length
        if self.keep_events:
            self._keep([(name, start, length, self._process)])

    def absorb(self, recorded: Recorded, workers: int) -> None:
        """Add what one of `workers` worker processes recorded."""
        for name, spent in recorded.own_ns.items():
            self.workers_ns[name] = self.workers_ns.get(name, 0.0) + spent / workers
        self._left_out += recorded.left_out
        if self.keep_events:
            self._keep(recorded.events)

    def drain(self) -> Recorded:
        """Return what was gathered since the last call, and begin anew; what workers did is left where it is."""
        found = Recorded(self._own_ns, tuple(self._events), self._left_out)
        self._own_ns, self._events, self._left_out = {}, [], 0
        return found

    def _keep(self, events: Sequence[Event]) -> None:
        room = max(0, MOST_EVENTS - len(self._events))
        self._events.extend(events[:room])
        self._left_out += max(0, len(events) - room)


class _Span:
    """One span that is being recorded."""

    __slots__ = ("_name", "_recorder", "_start")

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder, self._name = recorder, name

    def __enter__(self) -> None:
        self._start = self._recorder.enter()

    def __exit__(self, *_: object) -> None:
        self._recorder.leave(self._name, self._start)


_RECORDER: ContextVar[Recorder | None] = ContextVar("fedveil_spans", default=None)


def span(name: str) -> AbstractContextManager[None]:
    """Return what records its body under `name`, if a recorder is at work here."""
    at_work = _RECORDER.get()
    return _NOTHING if at_work is None else _Span(at_work, name)


def recorder() -> Recorder | None:
    """Return the recorder that is at work here, or None."""
    return _RECORDER.get()


@contextmanager
def recording(chosen: Recorder | None) -> Iterator[None]:
    """Let `chosen` record the body's spans; None records none, also where another recorder is at work."""
    if chosen is not None:
        chosen.begin()
    token = _RECORDER.set(chosen)
    try:
        yield
    finally:
        _RECORDER.reset(token)
