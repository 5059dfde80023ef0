"""Where a simulated run's time went, round by round, and how close it came to what this machine could do."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Self

from fedml_core.errors import ConfigError
from fedml_core.spans import MOST_EVENTS, Event, Recorded, Recorder, recording
from fedml_core.storage import write_atomically
from fedml_core.training import Training
from server.round import RoundReport

__all__ = ["Profile", "Profiler", "RoundProfile"]

PARTS = ("data", "compute", "transforms", "accumulate", "evaluate", "server step", "record", "idle", "other")
"""What a round's time is divided into: "record" is checkpoint and history, "idle" is what workers waited.

What a GPU was only told to do counts where somebody waits for it.
"""

_WAITING = "workers"
_SHOWN_ROUNDS = 20


@dataclass(frozen=True)
class RoundProfile:
    """One round: its seconds, its seconds by part (each counted once, so that they add up), examples visited."""

    round: int
    seconds: float
    parts: Mapping[str, float]
    visits: float

    @classmethod
    def of(
        cls, number: int, wall_ns: int, own_ns: Mapping[str, int], workers_ns: Mapping[str, float], visits: float
    ) -> RoundProfile:
        """Return a round's profile from what this process and, on average, its workers did.

        Workers' time is what this process waited for them, divided as they divided theirs; the rest of it is idle.
        """
        waited, busy = own_ns.get(_WAITING, 0), sum(workers_ns.values())
        scale = min(1.0, waited / busy) if busy else 0.0
        parts = {name: (own_ns.get(name, 0) + workers_ns.get(name, 0.0) * scale) / 1e9 for name in PARTS}
        parts["idle"] = (waited - busy * scale) / 1e9
        parts["other"] = wall_ns / 1e9 - sum(parts.values())
        return cls(number, wall_ns / 1e9, parts, visits)

    def shares(self) -> dict[str, float]:
        """Return each part's share of the round."""
        return {name: spent / self.seconds if self.seconds else 0.0 for name, spent in self.parts.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain values: seconds, and each part's seconds."""
        return {
            "round": self.round,
            "seconds": round(self.seconds, 6),
            "parts": {name: round(spent, 6) for name, spent in self.parts.items()},
        }


@dataclass(frozen=True)
class Profile:
    """A run's rounds, and `limit`: the examples a second that plain centralised SGD makes on this machine, if known."""

    rounds: Sequence[RoundProfile] = field(repr=False)
    limit: float | None = None

    @property
    def total(self) -> RoundProfile:
        """Return all rounds as one."""
        parts = {name: sum(row.parts[name] for row in self.rounds) for name in PARTS}
        seconds, visits = sum(row.seconds for row in self.rounds), sum(row.visits for row in self.rounds)
        return RoundProfile(len(self.rounds), seconds, parts, visits)

    @property
    def examples_per_s(self) -> float:
        """Return how many examples a second the run trained on, all of its time counted."""
        total = self.total
        return total.visits / total.seconds if total.seconds else 0.0

    def lines(self) -> list[str]:
        """Return what people read: the total, the share of the limit, and the last rounds."""
        total = self.total
        found = [f"profile of {len(self.rounds)} rounds, {total.seconds:.3f} s"]
        found += [
            f"  {name:<12}{total.parts[name]:>10.3f} s {share:>7.1%}" for name, share in total.shares().items() if share
        ]
        found.append(f"  {self.examples_per_s:,.0f} examples/s{self._of_limit()}")
        if len(self.rounds) > _SHOWN_ROUNDS:
            found.append(f"  the last {_SHOWN_ROUNDS} rounds:")
        for row in self.rounds[-_SHOWN_ROUNDS:]:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in row.shares().items() if share >= 0.005)
            found.append(f"  round {row.round}: {row.seconds:.3f} s: {shares}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain values: the total, each round, and the share of the limit."""
        total = self.total
        return {
            "seconds": round(total.seconds, 6),
            "parts": total.to_json()["parts"],
            "shares": {name: round(share, 6) for name, share in total.shares().items()},
            "examples_per_s": round(self.examples_per_s, 1),
            "limit_examples_per_s": None if self.limit is None else round(self.limit, 1),
            "share_of_limit": round(self.examples_per_s / self.limit, 6) if self.limit else None,
            "rounds": [row.to_json() for row in self.rounds],
        }

    def _of_limit(self) -> str:
        if not self.limit:
            return ""
        share = self.examples_per_s / self.limit
        return f", {share:.1%} of what plain centralised SGD at batch 500 makes here ({self.limit:,.0f})"


class Profiler:
    """Records where time goes while a `with` statement lasts; give it to the run as its last callback.

    Args: training: the run's, by which examples are counted. trace: also keep single spans, for `write_trace`.

    Example:
        with Profiler(simulation.training) as profiler:
            simulation.run(callbacks=[profiler])
        print("\\n".join(profiler.profile().lines()))
    """

    def __init__(self, training: Training, *, trace: bool = False) -> None:
        self.rounds: list[RoundProfile] = []
        self._training = training
        self._recorder = Recorder(keep_events=trace)
        self._recording = recording(self._recorder)
        self._events: list[Event] = []
        self._left_out = 0
        self._lap = 0

    def __enter__(self) -> Self:
        """Begin."""
        self._recording.__enter__()
        self._lap = perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, also in the middle of a round."""
        self._recording.__exit__(kind, error, trace)

    def __call__(self, report: RoundReport, state: object = None) -> None:
        """Close a round: its time reaches from the last one's end to here, other callbacks included."""
        now, recorded = perf_counter_ns(), self._recorder.drain()
        visits = _visits(report, self._training)
        workers = self._recorder.workers_ns
        self.rounds.append(RoundProfile.of(report.round, now - self._lap, recorded.own_ns, workers, visits))
        workers.clear()
        if self._recorder.keep_events:
            self._keep(recorded, (f"round {report.round}", self._lap, now - self._lap, os.getpid()))
        self._lap = now

    def profile(self, limit: float | None = None) -> Profile:
        """Return the rounds so far; `limit`: as `simulations.speed_limit.examples_per_s` measures it."""
        return Profile(tuple(self.rounds), limit)

    def write_trace(self, path: Path) -> None:
        """Write the spans as a Chrome trace, which chrome://tracing and ui.perfetto.dev show.

        Raises: ConfigError: if the file cannot be written.
        """
        body = {
            "traceEvents": [*_names(self._events), *(_trace_event(event) for event in self._events)],
            "displayTimeUnit": "ms",
            "otherData": {"spans_left_out": self._left_out},
        }
        try:
            write_atomically(path, json.dumps(body, separators=(",", ":")).encode())
        except OSError as error:
            raise ConfigError(f"cannot write the trace {path} ({error.strerror}); name another file") from None

    def _keep(self, recorded: Recorded, whole: Event) -> None:
        room = max(0, MOST_EVENTS - len(self._events))
        self._events += [whole, *recorded.events[:room]]
        self._left_out += recorded.left_out + max(0, len(recorded.events) - room)


def _visits(report: RoundReport, training: Training) -> float:
    examples = report.metrics.get("train", {}).get("examples", 0.0)
    if training.steps is None:
        return examples * training.epochs
    # A client with fewer examples than a batch holds visits all of them in each step; here all are as large.
    return training.steps * min(examples, training.batch_size * float(report.replies))


def _names(events: Sequence[Event]) -> list[dict[str, Any]]:
    ours = os.getpid()
    found = dict.fromkeys(process for *_, process in events)
    named = {process: "coordinator" if process == ours else f"worker {process}" for process in found}
    return [
        {"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": name}}
        for process, name in named.items()
    ]


def _trace_event(event: Event) -> dict[str, Any]:
    name, start, length, process = event
    return {"name": name, "ph": "X", "ts": start / 1e3, "dur": length / 1e3, "pid": process, "tid": 0}
