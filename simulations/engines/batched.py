"""Chunks of K clients trained in one go: what the vectorised and the fused engine share around their trainers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from clients.memory import Remembered
from fedml_core.bulk import BulkArrival, GatheredArrival
from fedml_core.checks import require_whole
from fedml_core.errors import ConfigError, ReplyError, RunError, TaskError
from fedml_core.message_frames import reply_to_frame
from fedml_core.messages import Arrived, Assignment, Failure, Reply, TrainWork
from fedml_core.randomness import keyed_coins
from fedml_core.spans import span
from fedml_core.transform import Draws, State
from fedml_core.update import Update
from fedml_core.weighting import scaled_reports, scales_only
from simulations.engines.ahead import Ahead, pays_ahead
from simulations.engines.batch_trainer import BatchTrainer, BatchWork, Trained, UnsupportedError
from simulations.engines.engine import Engine, Session, Stage, arrival_of
from simulations.engines.sequential import OneByOne
from simulations.packing import Packed
from simulations.prefetch import announce

# Parameters of the clients of one chunk that fit a CPU's caches, alone or beside the gradients of single examples; a
# GPU wants as many clients as it can hold.
_CACHE_BYTES, _CACHE_BYTES_PRIVATE = 16 << 20, 4 << 20
_DEVICE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Batched(Engine):
    """Trains K clients at once; what its trainer cannot do is done one by one, and said aloud once.

    `clients_at_once`: K, or None to choose it by the model's and the clients' sizes.
    """

    clients_at_once: int | None = None
    name: ClassVar[str] = "batched"

    def __post_init__(self) -> None:
        """Check K."""
        if self.clients_at_once is not None:
            require_whole("clients_at_once", self.clients_at_once, at_least=1)

    @abstractmethod
    def trainer(self, stage: Stage) -> BatchTrainer:
        """Return the trainer for one run.

        Raises: UnsupportedError: if the task is not one for this engine.
        """

    def one_by_one(self, stage: Stage) -> OneByOne:
        """Return what does the clients that the trainer cannot do together."""
        return OneByOne(stage, self.skip_failures)

    def fitting(self, stage: Stage, cohort: Sequence[int]) -> int:
        """Return how many clients of a cohort at once are fastest where nobody says, at least 1."""
        return clients_that_fit(stage)

    def open(self, stage: Stage) -> Session:
        """Return a session with a trainer of its own."""
        return Chunks(self, stage)


class Chunks(Session):
    """Loads, trains and encodes a cohort K clients at a time."""

    def __init__(self, engine: Batched, stage: Stage) -> None:
        if stage.private is not None and not engine.protects_examples:
            raise ConfigError(f"the {engine.name} engine cannot protect examples, and would train without")
        self._engine, self._stage = engine, stage
        self._single = engine.one_by_one(stage)
        self._at_once = engine.clients_at_once or clients_that_fit(stage)
        self._most_added: int | None = engine.clients_at_once
        self._works, self._told = False, set[str]()
        self._ahead = Ahead(self._pack, stage.trainer.device) if pays_ahead(stage) else None
        self._trainer: BatchTrainer | None = None
        try:
            self._trainer = engine.trainer(stage)
        except UnsupportedError as error:
            self._refuse(error)

    def run(self, assignment: Assignment, cohort: Sequence[int]) -> Iterator[Arrived]:
        """Yield the replies of one chunk after the other."""
        work = assignment.work
        ours = assignment.fingerprint == self._stage.trainer.spec.fingerprint
        if self._trainer is None or not isinstance(work, TrainWork) or not ours:
            yield from self._single.run(assignment, cohort)
            return
        adds = self._adds(assignment, work)
        most = self._at_once
        if adds:
            fits = self._engine.clients_at_once or self._engine.fitting(self._stage, cohort)
            most = fits if self._most_added is None else min(fits, self._most_added)
        waiting = list(self._by_size(cohort, most))
        if self._engine.clients_at_once is None and waiting:
            most = -(-len(waiting) // -(-len(waiting) // most))  # as few chunks as must be, of one size
        announce(self._stage.population, waiting)
        while waiting:
            chunk, waiting = waiting[:most], waiting[most:]
            try:
                yield from self._chunk(assignment, work, chunk, waiting[:most], adds=adds)
            except UnsupportedError as error:
                self._refuse(error)
                if self._trainer is None:
                    chunk, waiting = [*chunk, *waiting], []
                yield from self._single.run(assignment, chunk)
            except torch.OutOfMemoryError as error:
                if len(chunk) == 1:
                    raise RunError(
                        f"client {chunk[0]} alone does not fit the memory ({error}); use a smaller batch_size or model"
                    ) from error
                most = len(chunk) // 2
                self._at_once, self._most_added = min(most, self._at_once), most
                self._stage.tell(f"out of memory with {len(chunk)} clients at once; going on with {most}")
                waiting = [*chunk, *waiting]
                if self._ahead is not None:
                    self._ahead.forget()

    def _adds(self, assignment: Assignment, work: TrainWork) -> bool:
        """Return whether nobody needs an update by itself, so that the trainer may add them up unmade."""
        whole = scales_only(work.pipeline) and not self._stage.faults.nan
        return whole and self._stage.accumulator(assignment).takes_totals

    def _by_size(self, cohort: Sequence[int], most: int) -> Sequence[int]:
        """Return the cohort with clients of like size together, where sizes are known before loading."""
        counts = self._stage.population.counts(cohort)
        if counts is None or len(cohort) <= most:
            return cohort
        return [cohort[place] for place in np.argsort(-counts, kind="stable")]

    def _chunk(
        self, assignment: Assignment, work: TrainWork, chunk: Sequence[int], following: Sequence[int], *, adds: bool
    ) -> Iterator[Arrived]:
        with span("data"):
            packed = self._pack(chunk) if self._ahead is None else self._ahead.take(chunk)
        if packed is None:
            # A faulty client is named, or skipped, by doing these one by one.
            yield from self._single.run(assignment, chunk)
            return
        assert self._trainer is not None
        spec, memories = self._stage.trainer.spec, self._memories(assignment, work, chunk)
        memory = _stacked(memories)
        purpose = (work.seed, "client", assignment.round)
        guide = work.pipeline.guide(work.told, memory)
        batch = BatchWork(assignment.parameters, packed, work.training, assignment.round, chunk, purpose, guide)
        with span("compute"):
            trained = self._trainer.descend(batch)
        self._works = True
        if self._ahead is not None:
            with span("data"):
                self._ahead.begin(following)
        if adds and (gathered := self._gathered(assignment, work, chunk, trained)) is not None:
            yield gathered
            return
        with span("compute"):
            update = trained.rows()
        draws = Draws.each([(*purpose, number, "encode") for number in chunk])
        with span("transforms"):
            encoded, after = work.pipeline.encode(update, work.told, memory, draws)
        finite = _finite_rows(update.values)
        if finite.all():
            self._remember(assignment.round, chunk, memories, after)
            yield self._bulk(assignment, chunk, encoded.outgoing())
            return
        for place, number in enumerate(chunk):
            row = encoded.row(place).outgoing()
            body: Update | Failure = row
            if finite[place]:
                self._remember(assignment.round, [number], [memories[place]], _tree_row(after, place, expand=True))
            else:
                body = Failure("diverged", "local training diverged to NaN or infinity; lower the learning rate")
            yield from self._single_arrival(assignment, number, body, spec.fingerprint)

    def _pack(self, chunk: Sequence[int]) -> Packed | None:
        stage = self._stage
        try:
            packed = stage.population.pack(chunk)
            if packed is None or not packed.counts.all():
                return None
            stage.task.check(packed.examples, "the clients' data")
        except TaskError:
            return None
        return packed

    def _memories(self, assignment: Assignment, work: TrainWork, chunk: Sequence[int]) -> list[State]:
        fresh = work.pipeline.memory(self._stage.trainer.spec)
        if not fresh:
            return [fresh] * len(chunk)
        kept = (self._stage.memory.get(number) for number in chunk)
        return [one.entering(assignment.round) if one else fresh for one in kept]

    def _remember(self, number: int, chunk: Sequence[int], before: Sequence[State], after: State) -> None:
        if not after:
            return
        for place, client in enumerate(chunk):
            self._stage.memory.put(client, Remembered(number, before[place], _tree_row(after, place)))

    def _bulk(self, assignment: Assignment, chunk: Sequence[int], update: Update) -> BulkArrival:
        faults = self._stage.faults
        if faults.nan:
            coins = keyed_coins((self._stage.seed, "fault", assignment.round), chunk)
            spoilt = torch.from_numpy(coins < faults.drop + faults.late + faults.nan)
            update = update.replace(values=update.values.masked_fill(spoilt[:, None], float("nan")))
        one = Reply(assignment.run, assignment.round, int(chunk[0]), assignment.fingerprint, update.row(0))
        return BulkArrival(chunk, update, reply_to_frame(one).size_bytes * len(chunk))

    def _gathered(
        self, assignment: Assignment, work: TrainWork, chunk: Sequence[int], trained: Trained
    ) -> GatheredArrival | None:
        """Return the chunk added up, or None where its updates must say whose of them is faulty."""
        accumulator = self._stage.accumulator(assignment)
        try:
            with span("transforms"):
                factors, reports = scaled_reports(work.pipeline, trained.reports)
            with span("compute"):
                values = trained.total(factors)
            with span("accumulate"):
                accumulator.add_total(values, reports.outgoing())
        except ReplyError:
            return None
        first = reports.outgoing().row(0).replace(values=values)
        one = Reply(assignment.run, assignment.round, int(chunk[0]), assignment.fingerprint, first)
        return GatheredArrival(chunk, (), accumulator, reply_to_frame(one).size_bytes * len(chunk))

    def _single_arrival(
        self, assignment: Assignment, number: int, body: Update | Failure, fingerprint: str
    ) -> Iterator[Arrived]:
        arrival = arrival_of(Reply(assignment.run, assignment.round, number, fingerprint, body))
        return self._stage.faults.disturb(iter([arrival]), assignment.round, self._stage.seed)

    def _refuse(self, error: UnsupportedError) -> None:
        """Say once what cannot be done: for the whole run, unless other clients of it could be trained together."""
        whose = "some clients train" if self._works else "clients train"
        if not self._works:
            self._trainer = None
        if (line := f"the {self._engine.name} engine cannot do this, so {whose} one by one: {error}") not in self._told:
            self._told.add(line)
            self._stage.tell(line)


def clients_that_fit(stage: Stage) -> int:
    """Return how many clients' parameters fit where training them at once is fastest, at least 1."""
    on_cpu = _CACHE_BYTES if stage.private is None else _CACHE_BYTES_PRIVATE
    budget = on_cpu if stage.trainer.device.type == "cpu" else _DEVICE_BYTES
    return max(1, budget // (4 * stage.trainer.spec.size))


def _finite_rows(values: Tensor) -> Tensor:
    if bool(torch.isfinite(values.sum())):
        return torch.ones(len(values), dtype=torch.bool)
    return torch.isfinite(values).all(dim=1)


def _stacked(trees: Sequence[State]) -> State:
    first = trees[0]
    return {key: _stacked_leaves([tree[key] for tree in trees]) for key in first}


def _stacked_leaves(leaves: Sequence[Any]) -> Any:
    if isinstance(leaves[0], Mapping):
        return _stacked(leaves)
    return torch.stack(list(leaves)) if isinstance(leaves[0], Tensor) else leaves[0]


def _tree_row(tree: State, place: int, *, expand: bool = False) -> State:
    at = slice(place, place + 1) if expand else place
    return {
        key: _tree_row(leaf, place, expand=expand) if isinstance(leaf, Mapping) else _leaf_row(leaf, at)
        for key, leaf in tree.items()
    }


def _leaf_row(leaf: Any, at: int | slice) -> Any:
    return leaf[at].clone() if isinstance(leaf, Tensor) else leaf


__all__ = ["Batched", "Chunks", "clients_that_fit"]
