"""Sharing out over workers that die at the worst moments, with workers that live in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from torch import nn

from fedml_core.bulk import GatheredArrival
from fedml_core.errors import ConfigError, RunError, TaskError
from fedml_core.messages import Assignment
from fedml_core.spans import Recorder, recording
from simulations import Engine, Faults, Fused, Sequential, simulate
from simulations.engines.chunk_worker import Chunk, ChunkWorker, Done, Failed, Job
from simulations.engines.engine import Session, Stage
from simulations.engines.pool import Crew, Pool, Worker, WorkerLostError
from strategies import FedAvg, FedMedian, Scaffold, Strategy
from tests.simulations.engines import engine_cases
from tests.simulations.engines.engine_cases import NO_DISK, TASK, same, without_a_disk


class Desk(Worker):
    """A worker in this process, which is lost at the answers that `fate` names, counted over all desks."""

    def __init__(self, worker: ChunkWorker, fate: Fate) -> None:
        self._worker, self._fate = worker, fate
        self._answer: Done | Failed | GatheredArrival | None = None

    def begin(self, shared: object) -> None:
        assert isinstance(shared, Assignment)
        self._worker.begin(shared)

    def give(self, chunk: Chunk) -> None:
        self._answer = self._worker.do(chunk)

    def receive(self) -> Done | Failed:
        self._fate.strike("chunk")
        assert isinstance(self._answer, Done | Failed)
        if isinstance(self._answer, Done) and self._answer.gathered is not None:
            self._fate.strike("sum")
        return self._answer

    def ask_sum(self) -> None:
        self._answer = self._worker.gathered()

    def receive_sum(self) -> GatheredArrival:
        self._fate.strike("sum")
        assert isinstance(self._answer, GatheredArrival)
        return self._answer

    def end(self) -> None:
        self._worker.close()
        self._fate.ended += 1


@dataclass
class Fate:
    """Which answers never come, such as {"chunk": {0, 3}}: the first and the fourth answer to a chunk of all."""

    losses: Mapping[str, Collection[int]] = field(default_factory=dict)
    places: int = 1_000
    asked: dict[str, int] = field(default_factory=dict)
    started: int = 0
    ended: int = 0
    closed: int = 0

    def strike(self, kind: str) -> None:
        number = self.asked.get(kind, 0)
        self.asked[kind] = number + 1
        if number in self.losses.get(kind, ()):
            raise WorkerLostError("a stroke of fate")


class Desks(Crew):
    def __init__(self, job: Job, fate: Fate) -> None:
        self._job, self._fate = job, fate

    def start(self, count: int) -> list[Worker]:
        self._fate.started += count
        if self._fate.started > self._fate.places:
            raise ConfigError("there is no room for another worker; ask for fewer")
        return [Desk(ChunkWorker(self._job, "cpu", Recorder()), self._fate) for _ in range(count)]

    def share(self, assignment: Assignment) -> object:
        return assignment

    def heard(self, busy: Collection[Worker]) -> Sequence[Worker]:
        return list(busy)

    def close(self) -> None:
        self._fate.closed += 1


@dataclass(frozen=True, kw_only=True)
class Pooled(Engine):
    """A pool of three desks."""

    fate: Fate = field(default_factory=Fate, compare=False)
    inner: Engine = field(default_factory=Sequential)
    name: ClassVar[str] = "pooled"

    def open(self, stage: Stage) -> Session:
        inner = dataclasses.replace(self.inner, skip_failures=self.skip_failures)
        return Pool(Desks(Job.of(inner, stage), self.fate), stage, 3, inner)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Take the engine of these tests out of the list of those that a run.toml can name."""
    yield
    Engine.members.pop("Pooled", None)


SETTINGS: Mapping[str, Any] = {**engine_cases.SETTINGS, "clients": 14, "rounds": 2}
AGAIN = "clients are done again"
STRATEGIES = [FedAvg(), FedMedian(), Scaffold(population=14)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("inner", [Sequential(), Fused()], ids=lambda one: one.name)
@pytest.mark.parametrize(
    "losses",
    [{}, {"chunk": {0}}, {"chunk": {5, 6}}, {"sum": {0}}, {"sum": {0, 2}}, {"chunk": {4}, "sum": {1}}, {"chunk": {14}}],
    ids=str,
)
def test_whoever_is_lost_each_client_counts_once(
    strategy: Strategy, inner: Engine, losses: Mapping[str, Collection[int]], caplog: pytest.LogCaptureFixture
) -> None:
    fate = Fate(losses)
    engine = Pooled(fate=fate, inner=inner)
    same(simulate(TASK, strategy, **SETTINGS), simulate(TASK, strategy, engine=engine, **SETTINGS))
    lost = sum(number < fate.asked[kind] for kind, numbers in losses.items() for number in numbers)
    assert lost or losses in ({}, {"chunk": {14}}, {"chunk": {5, 6}})
    assert (fate.started, fate.ended, fate.closed) == (3 + lost, 3 + lost, 1)
    assert (
        len([one for one in caplog.records if "(a stroke of fate); its clients are done again" in one.message]) == lost
    )


def test_three_losses_in_one_round_are_the_clients_fault() -> None:
    fate = Fate({"chunk": {1, 2}, "sum": {0}})
    with pytest.raises(RunError, match="3 workers died in round 1, the last with a stroke of fate"):
        simulate(TASK, FedAvg(), engine=Pooled(fate=fate), **SETTINGS)
    assert fate.ended >= fate.started and fate.closed >= 1


def test_a_worker_that_cannot_be_replaced_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    fate = Fate({"chunk": {1}, "sum": {1}}, places=3)
    same(simulate(TASK, FedAvg(), **SETTINGS), simulate(TASK, FedAvg(), engine=Pooled(fate=fate), **SETTINGS))
    said = [one.message for one in caplog.records if "there is no room" in one.message]
    assert [line.split(":")[0] for line in said] == ["going on with 2 workers", "going on with 1 workers"]


def test_the_last_worker_must_be_replaced() -> None:
    fate = Fate({"chunk": {0, 1, 20}}, places=3)  # two in the first round, the third in the second
    with pytest.raises(ConfigError, match="there is no room for another worker"):
        simulate(TASK, FedAvg(), engine=Pooled(fate=fate), **SETTINGS)


def test_a_failing_client_is_named_or_skipped() -> None:
    task = without_a_disk()
    with pytest.raises(TaskError, match=NO_DISK):
        simulate(task, FedAvg(), clients=6, rounds=1, engine=Pooled())
    history = simulate(task, FedAvg(), clients=6, rounds=1, engine=Pooled(skip_failures=True))
    assert [(row.client, row.rule) for row in history.reports[0].excluded] == [(3, "task")]


def test_a_bug_in_a_worker_is_no_dead_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("simulations.engines.sequential.announce", broken)
    with pytest.raises(RunError, match="a worker failed: ZeroDivisionError: of ours"):
        simulate(TASK, FedAvg(), engine=Pooled(), **SETTINGS)


def test_what_every_worker_says_is_heard_once(caplog: pytest.LogCaptureFixture) -> None:
    task = dataclasses.replace(TASK, model=lambda: nn.Sequential(nn.Linear(3, 3), nn.Softplus()))
    same(simulate(task, FedAvg(), **SETTINGS), simulate(task, FedAvg(), engine=Pooled(inner=Fused()), **SETTINGS))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the fused engine cannot do this, so clients train one by one" in line and "Softplus" in line


def test_where_workers_spent_their_time_is_told() -> None:
    ours = Recorder()
    with recording(ours):
        simulate(TASK, FedAvg(), engine=Pooled(), **{**SETTINGS, "faults": Faults()})
    assert ours.workers_ns["compute"] > 0 and "workers" in ours.drain().own_ns
