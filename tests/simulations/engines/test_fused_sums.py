"""Updates added up without being made: the sum of what each client would have sent, and as strict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clients.memory import InProcessMemory
from clients.torch_trainer import TorchTrainer
from fedml_core import Assignment, ClientData, Examples, Guide, Task, Training, TrainWork, Update
from fedml_core.bulk import BulkArrival, GatheredArrival
from fedml_core.messages import Arrived
from fedml_core.weighting import ByMetric, Uniform, Weighting
from server import History
from server.validation import UpdateIntake
from simulations import Faults, Fused, Processes, QuantitySkew, Sequential, simulate
from simulations.engines.batch_trainer import BatchWork
from simulations.engines.engine import Engine, Stage
from simulations.engines.fused_trainer import FusedTrainer
from simulations.packing import Packed
from simulations.sources import Generated
from strategies import FedAdam, FedAvg, FedMedian, FedProx, Scaffold, Strategy

FEATURES, CLASSES = 6, 3
PURPOSE = (7, "train")


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def classes(sizes: Sequence[int], *, weigh: bool = False) -> list[Examples]:
    draws = torch.Generator().manual_seed(1)
    return [
        Examples.of(
            torch.randn(n, FEATURES, generator=draws),
            torch.randint(0, CLASSES, (n,), generator=draws),
            weights=torch.rand(n, generator=draws) + 0.1 if weigh else None,
        )
        for n in sizes
    ]


def work_of(task: Task, parts: list[Examples], training: Training, guide: Guide) -> BatchWork:
    start = TorchTrainer(task, device="cpu").initial()
    return BatchWork(start, Packed.of(parts), training, 2, range(len(parts)), PURPOSE, guide)


def assert_adds_up(
    make: Callable[[], nn.Module],
    parts: list[Examples],
    training: Training,
    together: int | None,
    guide: Guide | None = None,
) -> None:
    task = Task.classification(model=make, classes=CLASSES)
    work = work_of(task, parts, training, guide or Guide())
    factors = torch.linspace(0.5, 40.0, len(parts), dtype=torch.float64)
    rows = FusedTrainer(task, together=together).train(work)
    trained = FusedTrainer(task, together=together).descend(work)
    expected = (rows.values.double() * factors[:, None]).sum(dim=0)
    # What is added up may cancel: float32 rounding is relative to the terms.
    scale = float((rows.values.double().abs() * factors[:, None]).sum(dim=0).max() + work.parameters.abs().max())
    torch.testing.assert_close(trained.total(factors).double(), expected, rtol=0, atol=1e-5 * scale)
    assert trained.reports.values.shape == (len(parts), 0)
    for name, value in rows.sums.items():
        assert torch.equal(trained.reports.sums[name], value)
    # Whoever looks for the client at fault asks for the rows after the sum.
    assert torch.equal(trained.rows().values, rows.values)


@st.composite
def stacks(draw: st.DrawFn) -> Callable[[], nn.Module]:
    widths = [FEATURES, *draw(st.lists(st.integers(1, 9), max_size=2)), CLASSES]
    biases = draw(st.lists(st.booleans(), min_size=len(widths) - 1, max_size=len(widths) - 1))
    activation = draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU]))

    def make() -> nn.Module:
        parts: list[nn.Module] = []
        for place, bias in enumerate(biases):
            parts += [nn.Linear(widths[place], widths[place + 1], bias=bias), activation()]
        return nn.Sequential(*parts[:-1])

    return make


@settings(max_examples=60)
@given(
    make=stacks(),
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=12),
    batch_size=st.integers(1, 9),
    length=st.sampled_from([{"epochs": 1}, {"epochs": 3}, {"steps": 1}, {"steps": 7}]),
    together=st.sampled_from([None, 0, 1, 3]),
    weigh=st.booleans(),
    clip=st.sampled_from([None, 0.3]),
)
def test_a_total_is_the_sum_of_the_weighed_rows(
    make: Callable[[], nn.Module],
    sizes: list[int],
    batch_size: int,
    length: dict[str, int],
    together: int | None,
    weigh: bool,
    clip: float | None,
) -> None:
    training = Training.model_validate({"batch_size": batch_size, "max_gradient_norm": clip, **length})
    assert_adds_up(make, classes(sizes, weigh=weigh), training, together)


@pytest.mark.parametrize("together", [0, 1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("mu", [0.0, 0.2])
@pytest.mark.parametrize("offset", ["none", "for all", "for each"])
def test_a_steered_total_is_the_sum_of_the_weighed_rows(offset: str, mu: float, decay: float, together: int) -> None:
    size = sum(parameter.numel() for parameter in dense().parameters())
    shape = {"none": None, "for all": (size,), "for each": (5, size)}[offset]
    held = None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(2))
    training = Training(batch_size=4, epochs=2, optimizer_arguments={"weight_decay": decay})
    assert_adds_up(dense, classes([9, 1, 17, 4, 10]), training, together, Guide(mu, held))


@pytest.mark.parametrize("together", [0, 1, 3])
def test_a_total_with_a_client_that_diverged_is_not_finite_and_its_row_says_whose(together: int) -> None:
    parts = classes([9, 9, 4])
    spoiled = parts[1].inputs[0].clone()
    spoiled[0] = torch.inf
    parts[1] = Examples.of(spoiled, parts[1].targets)
    task = Task.classification(model=dense, classes=CLASSES)
    trained = FusedTrainer(task, together=together).descend(work_of(task, parts, Training(batch_size=4), Guide()))
    assert not trained.total(torch.ones(3, dtype=torch.float64)).isfinite().all()
    assert trained.rows().values.isfinite().all(dim=1).tolist() == [True, False, True]


def points(client: int) -> ClientData:
    draws = torch.Generator().manual_seed(client)
    inputs = torch.randn(4 + 3 * client, FEATURES, generator=draws)
    return ClientData(Examples.of(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()))


@dataclass(frozen=True)
class BySize(Weighting):
    """Weighs by the size of the values: an engine must make them."""

    def weight(self, update: Update) -> Tensor:
        return update.values.square().sum(dim=-1).double()


def replies(strategy: Strategy, faults: Faults | None = None, load: Callable[[int], ClientData] = points) -> Any:
    """Return the replies of one round of eight clients, and the intake that took them."""
    task = Task.classification(model=dense, classes=CLASSES, client_data=load)
    trainer, told = TorchTrainer(task, 0, device="cpu"), list[str]()
    population, memory = Generated(8, load), InProcessMemory()
    stage = Stage(task, strategy, trainer, population, memory, faults or Faults(), 0, told.append)
    state = strategy.init(trainer.spec)
    work = TrainWork(Training(batch_size=4), strategy.client_half(), strategy.told(state), 3)
    assignment = Assignment("run", 1, trainer.spec.fingerprint, trainer.initial(), work)
    session = Fused(clients_at_once=4).open(stage)
    arrivals: list[Arrived] = list(session.run(assignment, range(8)))
    intake = UpdateIntake(assignment, range(8), stage.accumulator(assignment))
    intake.take(arrivals)
    assert told == []
    return [type(arrival) for arrival in arrivals], intake


@pytest.mark.parametrize(
    "strategy",
    [FedAvg(), FedAvg(weighting=Uniform()), FedAvg(weighting=ByMetric("loss")), FedAdam(), FedProx(mu=0.1)],
    ids=repr,
)
def test_a_strategy_that_only_weighs_gets_chunks_added_up(strategy: Strategy) -> None:
    kinds, intake = replies(strategy)
    assert kinds == [GatheredArrival] * 2
    assert (sorted(intake.accepted), intake.missing, intake.excluded) == (list(range(8)), [], [])
    assert intake.accumulator.count == 8


@pytest.mark.parametrize(
    "strategy", [FedMedian(), Scaffold(population=8), FedAvg(weighting=BySize())], ids=lambda one: type(one).__name__
)
def test_a_strategy_that_reads_updates_gets_each(strategy: Strategy) -> None:
    assert replies(strategy)[0] == [BulkArrival] * 2


def test_faults_that_spoil_an_update_spoil_one_and_not_a_sum() -> None:
    kinds, intake = replies(FedAvg(), Faults(nan=0.4))
    assert kinds == [BulkArrival] * 2
    assert 0 < len(intake.excluded) < 8 and {row.rule for row in intake.excluded} == {"non-finite"}


def test_bytes_are_those_of_single_replies() -> None:
    added, made = replies(FedAvg())[1].bytes_up, replies(FedAvg(), Faults(nan=1e-12))[1].bytes_up
    assert added == pytest.approx(made, rel=0.02)


def diverging(client: int) -> ClientData:
    train = points(client).train
    assert isinstance(train, Examples)
    return ClientData(Examples.of(train.inputs[0] * (float("inf") if client == 5 else 1), train.targets))


def test_a_client_that_diverged_is_named_and_the_others_count() -> None:
    kinds, intake = replies(FedAvg(), load=diverging)
    assert kinds.count(GatheredArrival) == 1
    assert [(row.client, row.rule) for row in intake.excluded] == [(5, "diverged")]
    assert sorted(intake.accepted) == [0, 1, 2, 3, 4, 6, 7] and intake.accumulator.count == 7


def is_zero(outputs: Tensor, targets: Tensor) -> Tensor:
    return (targets == 0).double()


def test_a_client_whose_weight_is_no_weight_is_named_and_the_others_count() -> None:
    def load(client: int) -> ClientData:
        train = points(client).train
        assert isinstance(train, Examples)
        return ClientData(Examples.of(train.inputs[0], train.targets.clamp_min(1) if client == 2 else train.targets))

    task = Task.classification(model=dense, classes=CLASSES, client_data=load, metrics={"zeros": is_zero})
    run: dict[str, Any] = {"clients": 8, "rounds": 2, "training": Training(batch_size=4)}
    strategy = FedAvg(weighting=ByMetric("zeros"))
    expected = simulate(task, strategy, engine=Sequential(), **run)
    assert {row.client for row in expected.reports[0].excluded} >= {2}
    assert_same(expected, simulate(task, strategy, engine=Fused(), **run))


def assert_same(one: History, other: History) -> None:
    largest = float(one.parameters.abs().max())
    torch.testing.assert_close(other.parameters, one.parameters, rtol=1e-5, atol=1e-5 * largest)
    for a, b in zip(one.reports, other.reports, strict=True):
        assert (a.participants, a.missing, a.replies) == (b.participants, b.missing, b.replies)
        assert [(row.client, row.rule) for row in a.excluded] == [(row.client, row.rule) for row in b.excluded]
        assert b.bytes_up == pytest.approx(a.bytes_up, rel=0.02) and b.bytes_down == a.bytes_down
        for place in a.metrics:
            assert dict(b.metrics[place]) == pytest.approx(dict(a.metrics[place]), rel=1e-4)


SUMS = [FedAvg(weighting=Uniform()), FedAvg(weighting=ByMetric("loss", 0.5)), FedProx(mu=0.1), FedAdam()]


@pytest.mark.parametrize("engine", [Fused(), Fused(clients_at_once=3), Processes(workers=2, inner=Fused())], ids=repr)
@pytest.mark.parametrize("strategy", SUMS, ids=repr)
def test_sums_on_ragged_weighed_clients_give_the_answer_of_one_after_the_other(
    strategy: Strategy, engine: Engine
) -> None:
    def pool() -> Examples:
        draws = torch.Generator().manual_seed(4)
        inputs = torch.randn(150, FEATURES, generator=draws)
        return Examples.of(inputs, (inputs[:, 0] > 0).long(), weights=torch.rand(150, generator=draws) + 0.1)

    task = Task.classification(model=dense, classes=CLASSES, train_data=pool)
    run: dict[str, Any] = {
        "clients": 9,
        "rounds": 3,
        "partition": QuantitySkew(0.7),
        "training": Training(batch_size=7, epochs=2),
        "seed": 3,
    }
    assert_same(simulate(task, strategy, engine=Sequential(), **run), simulate(task, strategy, engine=engine, **run))


@dataclass(frozen=True)
class Counted:
    """A population that knows how many examples each client has, and nothing else."""

    examples: int
    size: ClassVar[int] = 1000

    def __len__(self) -> int:
        return self.size

    def load(self, client: int) -> ClientData:
        raise AssertionError("nobody needs to be loaded to choose how many are trained at once")

    def counts(self, clients: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.full(len(clients), self.examples, dtype=np.int64)

    def pack(self, clients: Sequence[int]) -> Packed | None:
        return None


def test_as_many_clients_at_once_as_a_cache_holds_examples_of() -> None:
    task = Task.classification(
        model=lambda: nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)), classes=10
    )
    trainer = TorchTrainer(task, 0, device="cpu")

    def fitting(examples: int) -> int:
        return Fused().fitting(Stage(task, FedAvg(), trainer, Counted(examples), InProcessMemory()), range(100))

    assert fitting(60) == (24 << 20) // (4 * 784 * 60)
    # Large clients: as many as have room for their parameters.
    assert fitting(100_000) == (16 << 20) // (4 * trainer.spec.size)
