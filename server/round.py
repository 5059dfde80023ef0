"""What a round came to, as one report: what a user reads, a script parses and a checkpoint keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from server.numbers import LISTED, ClientNumbers
from server.validation import Exclusion

__all__ = ["LISTED", "Clocked", "RoundReport", "virtual_time"]


@runtime_checkable
class Clocked(Protocol):
    """A channel whose time is not that of this machine, such as a simulation's on a described fleet."""

    def virtual_time(self) -> tuple[float | None, float | None]:
        """Return how long the round has taken so far and how long the whole run, in virtual seconds, or None, None."""
        ...


def virtual_time(channel: object) -> tuple[float | None, float | None]:
    """Return a channel's virtual time, or None and None where it has none."""
    return channel.virtual_time() if isinstance(channel, Clocked) else (None, None)


@dataclass(frozen=True)
class RoundReport:
    """One round. A `status` of "void" means that the model is unchanged, and `why` says for what reason.

    `participants`, `missing`: client numbers (the first 1,000 of each). `metrics`: averages by place: "train" (over the
    participants' own training), "server", "clients". Bytes are message bodies, without the transport's framing.
    `virtual_seconds`, `virtual_clock`: what the round, and the run up to its end, would take on a simulated fleet.
    `secure`: how a secure sum went, or None. `privacy`: `epsilon` with its delta, unit, adjacency, sampling and
    accountant, after all rounds begun so far, and `uncovered`, the exact metrics of this round that it says nothing of;
    None without differential privacy. `example_privacy`: the same about the examples of the client that trained most
    often, where clients are known to protect them; `epsilon` and `privacy` are about them, too, unless the strategy
    protects clients.

    Guarantees: what a report keeps of the clients that took part does not grow with the cohort beyond 16,000 bytes.
    """

    round: int
    status: str
    why: str
    cohort: int
    replies: int
    participants: Sequence[int]
    missing: Sequence[int]
    excluded: Sequence[Exclusion]
    metrics: Mapping[str, Mapping[str, float]]
    bytes_up: int
    bytes_down: int
    seconds: float
    protection: str
    epsilon: float | None = None
    notes: Sequence[str] = field(default_factory=tuple)
    virtual_seconds: float | None = None
    virtual_clock: float | None = None
    secure: Mapping[str, Any] | None = None
    privacy: Mapping[str, Any] | None = None
    example_privacy: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Keep client numbers packed: a run holds all of its reports until it ends."""
        for name in ("participants", "missing"):
            object.__setattr__(self, name, ClientNumbers(getattr(self, name)))

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values, one line of the history."""
        # Not dataclasses.asdict: it copies a cohort's thousands of numbers one by one in every round.
        return {
            **{part.name: getattr(self, part.name) for part in dataclasses.fields(self)},
            "participants": list(self.participants),
            "missing": list(self.missing),
            "excluded": tuple(dataclasses.asdict(row) for row in self.excluded),
            "metrics": {place: dict(values) for place, values in self.metrics.items()},
            "notes": tuple(self.notes),
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> RoundReport:
        """Return the report that `to_json` described."""
        excluded = tuple(Exclusion(**row) for row in body["excluded"])
        return cls(**{**body, "excluded": excluded})

    def metric(self, path: str) -> float | None:
        """Return a metric by path, such as "server.accuracy", or None if this round has none."""
        place, _, name = path.partition(".")
        return self.metrics.get(place, {}).get(name)
