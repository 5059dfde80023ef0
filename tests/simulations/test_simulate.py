"""Whole simulated runs through `simulate`: results, faults, populations, resuming."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedml_core import ClientData, Examples, Task, Training
from fedml_core.errors import ConfigError, RunError, TaskError
from server import EarlyStopping, EvaluationPlan, EveryClient, FixedSampling, PoissonSampling
from simulations import Dirichlet, Faults, Iid, Sequential, Simulation, simulate
from strategies import FedAdam, FedAvg, FedMedian, FedProx, Scaffold, Strategy


def clusters(count: int, seed: int) -> Examples:
    """Return points around three corners of a square, labelled by corner."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    corners = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]])
    return Examples.of(corners[labels] + 0.3 * torch.randn(count, 2, generator=generator), labels)


TASK = Task.classification(
    model=lambda: nn.Linear(2, 3), classes=3, train_data=lambda: clusters(300, 1), test_data=lambda: clusters(90, 2)
)
STRATEGIES = [FedAvg(), FedProx(mu=0.1), FedAdam(learning_rate=0.05), FedMedian(), Scaffold(population=10)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_every_strategy_learns(strategy: Strategy) -> None:
    history = simulate(TASK, strategy, clients=10, rounds=15, partition=Dirichlet(0.5), training=Training(batch_size=8))
    assert history.metric("server.accuracy")[-1] > 0.9
    assert history.metric("server.loss")[-1] < history.metric("server.loss")[0]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_a_resumed_simulation_is_equal_bit_for_bit(tmp_path: Path, strategy: Strategy) -> None:
    settings: dict[str, Any] = {
        "clients": 10,
        "partition": Dirichlet(0.5),
        "sampling": FixedSampling(4),
        "faults": Faults(drop=0.2, nan=0.1),
        "seed": 5,
    }
    straight = simulate(TASK, strategy, rounds=6, **settings)
    simulate(TASK, strategy, rounds=3, out=tmp_path / "run", **settings)
    resumed = simulate(TASK, strategy, rounds=6, out=tmp_path / "run", resume=True, **settings)
    assert torch.equal(straight.parameters, resumed.parameters)
    assert [report.round for report in resumed.reports] == [1, 2, 3, 4, 5, 6]
    assert straight.metric("server.loss") == resumed.metric("server.loss")


def test_the_seed_decides_the_result_and_nothing_else_does() -> None:
    torch.manual_seed(1)
    one = simulate(TASK, FedAvg(), clients=5, rounds=2, seed=3).parameters
    torch.manual_seed(2)
    assert torch.equal(one, simulate(TASK, FedAvg(), clients=5, rounds=2, seed=3).parameters)
    assert not torch.equal(one, simulate(TASK, FedAvg(), clients=5, rounds=2, seed=4).parameters)


def test_faults_cost_replies_and_are_reported_but_do_not_touch_the_model() -> None:
    faults = Faults(unavailable=0.3, drop=0.2, late=0.1, nan=0.2)
    history = simulate(TASK, FedAvg(), clients=100, rounds=20, faults=faults, evaluation=EvaluationPlan(every=0))
    cohort = sum(report.cohort for report in history.reports)
    missing = sum(len(report.missing) for report in history.reports)
    nan = [row for report in history.reports for row in report.excluded]
    # Shares of 2000 coins, or of some 1400: within 5 standard deviations.
    assert abs(cohort / 2000 - 0.7) < 0.052 and abs(missing / cohort - 0.3) < 0.062
    assert abs(len(nan) / cohort - 0.2) < 0.054 and {row.rule for row in nan} == {"non-finite"}
    assert bool(torch.isfinite(history.parameters).all())
    assert history.summary["missing_replies"] == missing and history.summary["excluded_replies"] == len(nan)


def test_a_fleet_that_never_replies_is_a_failed_run() -> None:
    with pytest.raises(RunError, match="all 2 rounds were void"):
        simulate(TASK, FedAvg(), clients=5, rounds=2, faults=Faults(drop=1.0))


def test_poisson_sampling_may_ask_nobody_and_the_round_is_void() -> None:
    history = simulate(TASK, FedAvg(), clients=5, rounds=12, sampling=PoissonSampling(0.1))
    void = [report for report in history.reports if report.cohort == 0]
    assert void and all(report.status == "void" for report in void)


def test_a_million_virtual_clients_cost_nothing_until_they_are_sampled() -> None:
    loaded = []

    def make(client: int) -> ClientData:
        loaded.append(client)
        return ClientData(clusters(6, client))

    task = Task.classification(model=lambda: nn.Linear(2, 3), classes=3, client_data=make)
    simulation = Simulation(task, FedAvg(), clients=1_000_000, rounds=2, sampling=FixedSampling(10))
    tracemalloc.start()
    simulation.run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(loaded) == 20 and max(loaded) > 100_000
    # A byte for each client would be a megabyte.
    assert peak < 1_000_000


def test_held_out_examples_are_evaluated_by_the_clients_that_hold_them() -> None:
    by_clients = EvaluationPlan(clients=EveryClient(), server=False)
    history = simulate(TASK, FedAvg(), clients=10, rounds=3, holdout=0.2, evaluation=by_clients)
    last = history.reports[-1].metrics
    assert last["clients"]["examples"] == 60 and last["train"]["examples"] == 240 and "server" not in last


def test_early_stopping_and_callbacks() -> None:
    seen: list[int] = []
    history = simulate(
        TASK,
        FedAvg(),
        clients=5,
        rounds=500,
        early_stopping=EarlyStopping("server.loss", patience=2, minimum_change=0.01),
        callbacks=[lambda report, state: seen.append(state.round)],
    )
    assert 2 < len(history.reports) < 100 and seen == [report.round for report in history.reports]


def test_a_failing_client_ends_the_run_or_is_skipped_as_asked() -> None:
    def make(client: int) -> ClientData:
        if client == 3:
            raise OSError("disk 3 is gone")
        return ClientData(clusters(6, client))

    task = Task.classification(model=lambda: nn.Linear(2, 3), classes=3, client_data=make)
    with pytest.raises(TaskError, match=r"client 3: client_data\(3\) failed: OSError: disk 3 is gone"):
        simulate(task, FedAvg(), clients=5, rounds=1)
    history = simulate(task, FedAvg(), clients=5, rounds=1, engine=Sequential(skip_failures=True))
    assert [(row.client, row.rule) for row in history.reports[0].excluded] == [(3, "task")]
    assert history.reports[0].replies == 4


def test_the_final_model_can_be_used() -> None:
    history = simulate(TASK, FedAvg(), clients=5, rounds=10)
    module = history.load_into(nn.Linear(2, 3))
    test = clusters(90, 2)
    correct = (module(test.inputs[0]).argmax(dim=1) == test.targets).float().mean()
    assert float(correct) == pytest.approx(history.metric("server.accuracy")[-1], abs=1e-6)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="simulate has no setting 'client'; did you mean 'clients'"):
        simulate(TASK, FedAvg(), client=5)
    with pytest.raises(ConfigError, match="rounds must be >= 1, got 0"):
        simulate(TASK, FedAvg(), rounds=0)
    with pytest.raises(ConfigError, match="a cohort of 20 was asked for and there are 5 clients"):
        simulate(TASK, FedAvg(), clients=5, sampling=FixedSampling(20))
    with pytest.raises(ConfigError, match=r"faults.drop must be a share from 0 to 1, got 1.5"):
        Faults(drop=1.5)
    with pytest.raises(ConfigError, match="<= 1, got 1.2"):
        Faults(drop=0.6, nan=0.6)
    with pytest.raises(ConfigError, match="resume needs the folder"):
        simulate(TASK, FedAvg(), resume=True)


def test_faulty_data_is_refused_with_whose_and_what() -> None:
    wrong = Task.classification(
        model=lambda: nn.Linear(2, 3),
        classes=3,
        train_data=lambda: Examples.of(torch.zeros(4, 2), torch.tensor([0, 1, 3, 2])),
    )
    with pytest.raises(TaskError, match="train_data: label 3 of example 2 is out of range; labels must be 0 to 2"):
        simulate(wrong, FedAvg(), clients=2, partition=Iid())
    none = Examples.of(torch.zeros(0, 2), torch.zeros(0).long())
    empty = Task.classification(model=lambda: nn.Linear(2, 3), classes=3, train_data=lambda: none)
    with pytest.raises(TaskError, match="the task's train_data: no examples; give it data"):
        simulate(empty, FedAvg(), clients=2)
    nothing = Task.classification(model=lambda: nn.Linear(2, 3), classes=3)
    with pytest.raises(TaskError, match="neither train_data nor client_data"):
        simulate(nothing, FedAvg(), clients=2)
