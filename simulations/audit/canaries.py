"""Canary clients in the live run: each sends a random direction, if its coin says so, through the real client half."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.data import ClientData
from fedml_core.errors import ConfigError
from fedml_core.messages import Arrived, Assignment, Reply, TrainWork
from fedml_core.randomness import keyed_coins, seeded
from fedml_core.transform import Draws
from fedml_core.update import Update
from simulations.engines.engine import Engine, Session, Stage, arrival_of
from simulations.packing import Packed
from simulations.population import Population

__all__ = ["Canaries", "FirstClients", "Scores", "Watched", "with_canaries"]

_KEPT_BYTES = 1 << 28  # of directions; more are drawn again each time


@dataclass(frozen=True)
class Canaries:
    """The canaries of one audit.

    `count`: of coins. `dimension`: the parameters that directions have. `length`: of the updates that canaries hand to
    the client half. `template`: an honest client's update, whose reports canaries copy. `seed`: of directions and
    coins, fresh for every audit: whoever knew it could treat canaries as canaries.
    """

    count: int
    dimension: int
    length: float
    template: Update = field(repr=False)
    seed: int = field(repr=False)

    @cached_property
    def included(self) -> NDArray[np.bool_]:
        """Return who takes part, (count,): a fair coin each, all of them tossed again if fewer than two fall alike."""
        for toss in itertools.count():
            coins = keyed_coins((self.seed, "canary coin", toss), np.arange(self.count)) < 0.5
            if 2 <= int(coins.sum()) <= self.count - 2:
                break
        return coins

    @cached_property
    def members(self) -> list[int]:
        """Return the numbers, among the canaries, of those that take part."""
        return [int(place) for place in np.flatnonzero(self.included)]

    def direction(self, place: int) -> NDArray[np.float32]:
        """Return a canary's direction, of norm 1."""
        drawn = seeded(self.seed, "canary", place).standard_normal(self.dimension, dtype=np.float32)
        return np.asarray(drawn / np.linalg.norm(drawn))

    def update(self, place: int) -> Update:
        """Return what a canary would send without any protection."""
        values = torch.zeros_like(self.template.values)
        values[: self.dimension] = torch.from_numpy(self.direction(place)) * self.length
        return self.template.replace(values=values)

    def cosines(self, released: Tensor) -> NDArray[np.float64]:
        """Return the cosine of each canary's direction with what was released, (count,); zeros where nothing was."""
        vector = released[: self.dimension].double().numpy()
        norm = float(np.linalg.norm(vector))
        if norm == 0:
            return np.zeros(self.count)
        if self._kept is not None:
            return np.asarray(self._kept @ (vector / norm).astype(np.float32), dtype=np.float64)
        return np.array([float(self.direction(place) @ vector) / norm for place in range(self.count)])

    @cached_property
    def _kept(self) -> NDArray[np.float32] | None:
        if 4 * self.count * self.dimension > _KEPT_BYTES:
            return None
        return np.stack([self.direction(place) for place in range(self.count)])


@dataclass(frozen=True)
class Watched:
    """A population with canaries behind the real clients."""

    real: Population = field(repr=False)
    canaries: Canaries

    def __len__(self) -> int:
        """Return how many take part in all."""
        return len(self.real) + len(self.canaries.members)

    def load(self, client: int) -> ClientData:
        """Return a real client's data."""
        if client >= len(self.real):
            raise ConfigError(f"client {client} is a canary and holds no data")
        return self.real.load(client)

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64] | None:
        """Return how many examples each has; canaries none."""
        real = [client for client in clients if client < len(self.real)]
        counted = self.real.counts(real)
        return None if counted is None else np.concatenate([counted, np.zeros(len(clients) - len(real), np.int64)])

    def pack(self, clients: Sequence[int]) -> Packed | None:
        """Return nothing: only the real clients' own population packs."""
        return None


@dataclass(frozen=True)
class FirstClients:
    """The first `size` clients of a population, where more would not fit beside the canaries."""

    whole: Population = field(repr=False)
    size: int

    def __len__(self) -> int:
        """Return the size."""
        return self.size

    def load(self, client: int) -> ClientData:
        """Return one client's data."""
        return self.whole.load(client)

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64] | None:
        """Return how many examples each has."""
        return self.whole.counts(clients)

    def pack(self, clients: Sequence[int]) -> Packed | None:
        """Return the clients' examples as one, where that is possible."""
        return self.whole.pack(clients)


def with_canaries(inner: Engine, watched: Watched) -> Engine:
    """Return the run's own engine for the real clients, and canaries beside them."""
    return _CanaryEngine(inner=inner, watched=watched, skip_failures=inner.skip_failures)


@dataclass(frozen=True, kw_only=True)
class _CanaryEngine(Engine):
    """Made by the audit, not by name."""

    inner: Engine
    watched: Watched
    name: ClassVar[str] = "audit"
    protects_examples: ClassVar[bool] = True  # as far as the inner one does, which is asked, too

    def open(self, stage: Stage) -> Session:
        """Return a session of the inner engine that sees no canary."""
        return _CanarySession(self.inner.open(replace(stage, population=self.watched.real)), stage, self.watched)


class _CanarySession(Session):
    """Asks the inner session for the real clients, and answers for the canaries."""

    def __init__(self, inner: Session, stage: Stage, watched: Watched) -> None:
        self._inner, self._stage, self._watched = inner, stage, watched

    def run(self, assignment: Assignment, cohort: Sequence[int]) -> Iterator[Arrived]:
        """Yield the real clients' replies, and then the canaries'."""
        first = len(self._watched.real)
        real = [client for client in cohort if client < first]
        if real:
            yield from self._inner.run(assignment, real)
        work = assignment.work
        if isinstance(work, TrainWork):
            for client in cohort:
                if client >= first:
                    yield arrival_of(self._reply(assignment, work, client))

    def close(self) -> None:
        """Close the inner session."""
        self._inner.close()

    def _reply(self, assignment: Assignment, work: TrainWork, client: int) -> Reply:
        canaries = self._watched.canaries
        update = canaries.update(canaries.members[client - len(self._watched.real)])
        memory = work.pipeline.memory(self._stage.trainer.spec)
        draws = Draws.of(work.seed, "client", assignment.round, client, "encode")
        encoded, _ = work.pipeline.encode(update, work.told, memory, draws)
        return Reply(assignment.run, assignment.round, client, assignment.fingerprint, encoded.outgoing())


@dataclass(frozen=True)
class Scores:
    """What canaries' directions had in common with releases, as standard normals where a canary took no part.

    `rounds`: (T, count), of each round's step. `every`: (count,), of the sum of all steps, each scaled to norm 1:
    steps that have a direction in common would not leave a sum of scores standard normal. `final`: (count,), of the
    last model less the first.
    """

    rounds: NDArray[np.float64] = field(repr=False)
    every: NDArray[np.float64] = field(repr=False)
    final: NDArray[np.float64] = field(repr=False)

    def likelihood(self, shift: float, rate: float) -> NDArray[np.float64]:
        """Return log-likelihood ratios for canaries that come to a round with probability `rate` and then shift it."""
        held = self.rounds[(self.rounds != 0).any(axis=1)]
        gain = shift * held - shift**2 / 2
        if rate >= 1:
            return np.asarray(gain.sum(axis=0))
        return np.asarray(np.logaddexp(np.log1p(-rate), np.log(rate) + gain).sum(axis=0))
