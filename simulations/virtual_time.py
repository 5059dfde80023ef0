"""Virtual time: how long a simulated round would have taken on a described fleet, and who would have been too late.

A round lasts as long as the slowest client that the server waits for: it downloads, trains and uploads. With a deadline
(`round_timeout_s`) whoever needs longer is late and does not count, and a round in which anybody is missing lasts until
the deadline. Nothing here waits, and nothing depends on this machine: the same seed gives the same times everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedml_core.checks import require_number
from fedml_core.errors import CheckpointError, ConfigError, TaskError
from fedml_core.message_frames import assignment_to_frame, reply_to_frame
from fedml_core.messages import Assignment, Reply, TrainWork
from fedml_core.training import Training
from fedml_core.transform import State
from fedml_core.update import Update
from server.plan import EarlyStopping
from server.round import RoundReport
from simulations.fleet_availability import Always, Availability
from simulations.fleet_spread import Constant, Spread
from simulations.population import Population

__all__ = ["Fleet", "VirtualClock", "reached", "require_same"]

_SPEEDS = ("examples_per_s", "download_bytes_per_s", "upload_bytes_per_s")
_REMEMBERED_COUNTS = 1 << 18
_DIGITS = 6  # of a second: reports shall not end in rounding errors


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The devices that a simulation pretends to run on.

    `examples_per_s`: how fast a client trains, counting an example once for each time it is visited.
    `download_bytes_per_s`, `upload_bytes_per_s`: bandwidths. `latency_s`: of one message, so twice a round.
    Each is a number for all, or a `Spread` over the clients; what is left out costs no time.
    `availability`: who can be asked when; where nobody can, the server waits. Whoever was asked stays to the end.
    `targets`: metrics, such as {"server.accuracy": 0.9}, of which the summary says when they were reached.
    Evaluations by clients take no virtual time: they measure the run.
    """

    examples_per_s: Spread | float | None = None
    download_bytes_per_s: Spread | float | None = None
    upload_bytes_per_s: Spread | float | None = None
    latency_s: Spread | float = 0.0
    availability: Availability = field(default_factory=Always)
    targets: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every speed is above 0 and every target a metric's."""
        for name in _SPEEDS:
            _require_spread(name, getattr(self, name), above=0)
        _require_spread("latency_s", self.latency_s, at_least=0)
        if not isinstance(self.availability, Availability):
            raise ConfigError(f"availability must be an Availability such as Daily(), got {self.availability!r:.80}")
        if not isinstance(self.targets, Mapping):
            raise ConfigError(f'targets must be a table such as {{"server.accuracy" = 0.9}}, got {self.targets!r:.80}')
        for metric, target in self.targets.items():
            if isinstance(target, Mapping):
                raise ConfigError(f'targets: {metric} is a table; put the whole name in quotes, "{metric}.NAME"')
            require_number(f"targets: {metric}", target)
            EarlyStopping(metric=metric)  # refuses what is no metric's name

    def seconds(
        self, clients: Sequence[int], visits: NDArray[np.int64] | None, down: int, up: int, seed: int
    ) -> NDArray[np.float64]:
        """Return how long each client takes from being asked to its reply's arrival, (K,).

        Args: visits: how many examples each visits, or None for none. down, up: bytes of the messages.
        """
        total = 2 * self._numbers("latency_s", clients, seed)
        works = (("download_bytes_per_s", down), ("upload_bytes_per_s", up), ("examples_per_s", visits))
        for name, amount in works:
            if amount is not None and getattr(self, name) is not None:
                total = total + amount / self._numbers(name, clients, seed)
        return total

    def identity(self) -> str:
        """Return what must be equal for a run to go on where it stopped."""
        return repr(dataclasses.replace(self, targets={}, availability=Always())) + self.availability.identity()

    def _numbers(self, name: str, clients: Sequence[int], seed: int) -> NDArray[np.float64]:
        spread = getattr(self, name)
        chosen = spread if isinstance(spread, Spread) else Constant(float(spread))
        return chosen.draw(seed, name, np.asarray(clients, dtype=np.int64))


class VirtualClock:
    """The clock of one run on a fleet.

    Args: population: whose examples are counted. seed: the run's.
    Raises: ConfigError: if the fleet's trace cannot be read.
    """

    def __init__(self, fleet: Fleet, population: Population, seed: int) -> None:
        self._fleet, self._population, self._seed = fleet, population, seed
        self._identity = fleet.identity()
        self._counts: dict[int, int] = {}
        self._started_s = 0.0
        self.now_s = 0.0

    @property
    def round_s(self) -> float:
        """Return how long the current round has lasted, its wait for somebody to ask included."""
        return round(self.now_s - self._started_s, _DIGITS)

    def begin_round(self) -> Sequence[int]:
        """Start a round and return who can be asked; where nobody can, wait until somebody can, if ever."""
        self._started_s = self.now_s
        count, there = len(self._population), self._fleet.availability
        everyone = there.available(count, self.now_s, self._seed)
        if len(everyone) == 0 and (later := there.next_s(count, self.now_s, self._seed)) is not None:
            # A start one rounding error ahead would otherwise not move the clock at all.
            self.now_s = max(later, math.nextafter(self.now_s, math.inf))
            everyone = there.available(count, self.now_s, self._seed)
        return everyone

    def wait(
        self, assignment: Assignment, cohort: Sequence[int], reachable: Sequence[int], timeout_s: float | None
    ) -> list[int]:
        """Let the time pass that training by `cohort` takes; return the clients whose reply arrives in time.

        Args: reachable: those of the cohort that reply at all.
        """
        work = assignment.work
        if not isinstance(work, TrainWork):
            return list(reachable)
        counts = self._visits(work.training, reachable) if self._fleet.examples_per_s is not None else None
        down, up = assignment_to_frame(assignment).size_bytes, _reply_bytes(assignment, work)
        took = self._fleet.seconds(reachable, counts, down, up, self._seed)
        limit = math.inf if timeout_s is None else timeout_s
        in_time = took <= limit
        complete = len(reachable) == len(cohort) and bool(in_time.all())
        waited = float(took[in_time].max(initial=0.0)) if complete or timeout_s is None else timeout_s
        self.now_s = round(self.now_s + waited, _DIGITS)
        return [client for client, ok in zip(reachable, in_time, strict=True) if ok]

    def to_tree(self) -> dict[str, Any]:
        """Return the time, for a checkpoint."""
        return {"now_s": self.now_s, "fleet": self._identity}

    def restore(self, tree: State) -> None:
        """Go on at a checkpoint's time.

        Raises: CheckpointError: if the checkpoint is of a run on another fleet, or on none.
        """
        require_same(tree.get("fleet"), self._identity)
        self.now_s = self._started_s = float(tree["now_s"])

    def _visits(self, training: Training, clients: Sequence[int]) -> NDArray[np.int64]:
        counts = self._population.counts(clients)
        if counts is None:
            counts = np.array([self._count(client) for client in clients], dtype=np.int64)
        if training.steps is None:
            return counts * training.epochs
        return training.steps * np.minimum(counts, training.batch_size)

    def _count(self, client: int) -> int:
        """Return how many examples a client has that only loading tells; 0 where that fails, as engines report."""
        if client not in self._counts:
            if len(self._counts) >= _REMEMBERED_COUNTS:
                self._counts.clear()
            try:
                self._counts[client] = len(self._population.load(client).train)
            except TaskError:
                return 0
        return self._counts[client]


def require_same(before: str | None, now: str | None) -> None:
    """Raise CheckpointError unless a run is resumed on the fleet that it was on, or on none as before."""
    if before != now:
        raise CheckpointError(
            f"the run to resume was on fleet {before or 'none'}, now it is on {now or 'none'}; "
            "restore the old one, or start a new run in another folder"
        )


def reached(reports: Sequence[RoundReport], targets: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return for each target the first round that reached it and the virtual time at its end, or null for never.

    What is called loss, error, mae, rmse or perplexity is reached from above, everything else from below.
    """
    found: dict[str, dict[str, Any]] = {}
    for metric, target in targets.items():
        rule = EarlyStopping(metric=metric)
        first = next(
            (r for r in reports if (value := r.metric(metric)) is not None and not rule.better(target, value)), None
        )
        found[metric] = {
            "target": target,
            "round": first.round if first else None,
            "virtual_seconds": first.virtual_clock if first else None,
        }
    return found


def _reply_bytes(assignment: Assignment, work: TrainWork) -> int:
    """Return the size of a client's reply, which does not depend on what it learnt up to a few digits."""
    size = work.pipeline.encoded_size(len(assignment.parameters))
    update = Update.of(torch.zeros(size), 1.0, examples=1.0, loss=0.0)
    return reply_to_frame(Reply(assignment.run, assignment.round, 0, assignment.fingerprint, update)).size_bytes


def _require_spread(name: str, value: object, *, at_least: float = -math.inf, above: float = -math.inf) -> None:
    if value is None and name in _SPEEDS:
        return
    least = value.least() if isinstance(value, Spread) else value
    try:
        require_number(name, least, at_least=at_least, above=above)
    except ConfigError as error:
        if isinstance(value, Spread):
            raise ConfigError(f"{name}: no client's number may lie so low: {error}") from None
        raise
