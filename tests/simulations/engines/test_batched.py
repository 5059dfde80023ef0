"""The plumbing around trainers of K clients, with a trainer that does one after the other."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from clients.torch_trainer import TorchTrainer
from fedml_core import ClientData, Examples, Guide, Task, Update
from fedml_core.compression import StochasticQuantize
from fedml_core.errors import ConfigError, TaskError
from simulations import Faults, Iid, simulate
from simulations.engines.batch_trainer import BatchTrainer, BatchWork, Trained, UnsupportedError
from simulations.engines.batched import Batched
from simulations.engines.engine import Stage
from strategies import Compressed, FedAdam, FedAvg, FedMedian, FedProx, Scaffold, Strategy
from tests.simulations.engines import engine_cases
from tests.simulations.engines.engine_cases import NO_DISK, TrainedRows, points, same, without_a_disk


class Loop(BatchTrainer):
    """Trains K clients one after the other; `before` sees each work first, and may refuse it."""

    def __init__(self, trainer: TorchTrainer, before: Callable[[BatchWork], None]) -> None:
        self._trainer, self._before = trainer, before

    def descend(self, work: BatchWork) -> Trained:
        self._before(work)
        rows = []
        for place, client in enumerate(work.clients):
            first, last = work.packed.offsets[place], work.packed.offsets[place + 1]
            offset = work.guide.offset
            guide = Guide(work.guide.mu, offset[place] if isinstance(offset, Tensor) and offset.dim() == 2 else offset)
            rows.append(
                self._trainer.train(
                    work.parameters,
                    work.packed.examples.take(torch.arange(first, last)),
                    work.training,
                    round_number=work.round,
                    key=(*work.purpose, client),
                    guide=guide,
                )
            )
        return TrainedRows(
            Update(
                torch.stack([row.values for row in rows]),
                torch.stack([row.weight for row in rows]),
                {name: torch.stack([row.sums[name] for row in rows]) for name in rows[0].sums},
                {name: torch.stack([row.facts[name] for row in rows]) for name in rows[0].facts},
            )
        )


def accept(work: BatchWork) -> None:
    """Refuse nothing."""


@dataclass(frozen=True, kw_only=True)
class LoopEngine(Batched):
    """Chunks of clients, trained in a loop."""

    before: Callable[[BatchWork], None] = field(default=accept)
    name: ClassVar[str] = "loop"

    def trainer(self, stage: Stage) -> BatchTrainer:
        return Loop(stage.trainer, self.before)


TASK = Task.classification(
    model=lambda: nn.Linear(3, 3), classes=3, train_data=lambda: points(240, 1), test_data=lambda: points(60, 2)
)
SETTINGS: Mapping[str, Any] = {**engine_cases.SETTINGS, "faults": Faults(drop=0.1, nan=0.2)}
STRATEGIES = [
    FedAvg(),
    FedProx(mu=0.1),
    FedAdam(),
    FedMedian(),
    Scaffold(population=12),
    Compressed(strategy=FedAvg(), compression=StochasticQuantize(4)),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("at_once", [1, 5, None])
def test_chunks_of_any_size_give_the_answer_of_single_clients(strategy: Strategy, at_once: int | None) -> None:
    same(
        simulate(TASK, strategy, **SETTINGS),
        simulate(TASK, strategy, engine=LoopEngine(clients_at_once=at_once), **SETTINGS),
    )


def test_what_the_trainer_cannot_do_is_done_one_by_one_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(work: BatchWork) -> None:
        raise UnsupportedError("layer 0 (Odd) draws at random")

    with caplog.at_level(logging.WARNING):
        history = simulate(TASK, FedAvg(), engine=LoopEngine(before=refuse), **SETTINGS)
    same(simulate(TASK, FedAvg(), **SETTINGS), history)
    said = [record.message for record in caplog.records if "layer 0 (Odd) draws at random" in record.message]
    assert len(said) == 1 and "the loop engine cannot do this" in said[0]


def test_one_odd_chunk_is_done_one_by_one_and_the_others_together(caplog: pytest.LogCaptureFixture) -> None:
    chunks: list[int] = []

    def refuse_client_five(work: BatchWork) -> None:
        if 5 in work.clients:
            raise UnsupportedError("a client's examples all weigh 0")
        chunks.append(len(work.clients))

    settings = {**SETTINGS, "faults": Faults(), "partition": Iid()}
    with caplog.at_level(logging.WARNING):
        history = simulate(TASK, FedAvg(), engine=LoopEngine(before=refuse_client_five, clients_at_once=4), **settings)
    same(simulate(TASK, FedAvg(), **settings), history)
    assert chunks == [4, 4] * 3
    assert len([r for r in caplog.records if "so some clients train one by one" in r.message]) == 1


def test_out_of_memory_halves_the_chunk_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []

    def hold_at_most_three(work: BatchWork) -> None:
        sizes.append(len(work.clients))
        if len(work.clients) > 3:
            raise torch.OutOfMemoryError("too many")

    settings = {**SETTINGS, "faults": Faults()}
    with caplog.at_level(logging.WARNING):
        history = simulate(TASK, FedAvg(), engine=LoopEngine(before=hold_at_most_three), **settings)
    same(simulate(TASK, FedAvg(), **settings), history)
    assert sizes[:3] == [12, 6, 3] and max(sizes[2:]) == 3
    assert "out of memory with 12 clients at once; going on with 6" in caplog.text


def test_a_client_that_diverges_is_excluded_alone() -> None:
    def load(client: int) -> ClientData:
        examples = points(8, client)
        return ClientData(Examples.of(examples.inputs[0] * (float("nan") if client == 2 else 1), examples.targets))

    task = Task.classification(model=lambda: nn.Linear(3, 3), classes=3, client_data=load)
    one = simulate(task, Scaffold(population=6), clients=6, rounds=2)
    other = simulate(task, Scaffold(population=6), clients=6, rounds=2, engine=LoopEngine())
    assert [(row.client, row.rule) for row in other.reports[0].excluded] == [(2, "diverged")]
    same(one, other)


def test_a_client_whose_data_fails_is_named_or_skipped() -> None:
    task = without_a_disk()
    with pytest.raises(TaskError, match=NO_DISK):
        simulate(task, FedAvg(), clients=6, rounds=1, engine=LoopEngine())
    history = simulate(task, FedAvg(), clients=6, rounds=1, engine=LoopEngine(skip_failures=True))
    assert history.reports[0].replies == 5


def test_clients_at_once_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="clients_at_once must be >= 1, got 0"):
        LoopEngine(clients_at_once=0)
    assert dataclasses.replace(LoopEngine(), clients_at_once=3).clients_at_once == 3
