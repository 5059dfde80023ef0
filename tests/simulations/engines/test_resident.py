"""Examples on a device: the same examples, wherever they are gathered; what needs a GPU is skipped without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedml_core import ClientData, Examples, Task, Training
from server import EvaluationPlan
from simulations import Sequential, Vectorised, simulate
from simulations.engines.resident import Resident, resident, uploaded
from simulations.population import Partitioned, Virtual
from strategies import FedAvg

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none")


def pool(weighted: bool = True) -> Examples:
    drawn = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    return Examples.of(drawn, (drawn[:, 0] > 0).long(), weights=torch.linspace(0.5, 2, 40) if weighted else None)


def shared_out(weighted: bool = True) -> Partitioned:
    parts = [np.arange(first, 40, 4) for first in range(4)]
    return Partitioned(pool(weighted), parts, holdout=0.2, seed=3)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_resident_population_gives_what_the_one_behind_it_gives(weighted: bool) -> None:
    clients = shared_out(weighted)
    there = Resident(clients, CPU)
    assert len(there) == 4 and there.counts([2, 0]).tolist() == clients.counts([2, 0]).tolist()  # type: ignore[union-attr]
    found, expected = there.pack([3, 1]), clients.pack([3, 1])
    assert found is not None and expected is not None and found.offsets.tolist() == expected.offsets.tolist()
    for one, other in zip(found.examples.inputs, expected.examples.inputs, strict=True):
        assert torch.equal(one, other)
    one_client: Any = there.load(2)
    other_client: Any = clients.load(2)
    assert torch.equal(one_client.train.targets, other_client.train.targets)
    assert torch.equal(one_client.test.targets, other_client.test.targets)


def test_only_a_pool_that_fits_a_gpu_is_moved_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clients, free, moved = shared_out(), [0], list[torch.device]()

    def stay(self: Examples, device: torch.device) -> Examples:
        moved.append(device)
        return self

    monkeypatch.setattr(Examples, "to", stay)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 1 << 40))
    size = 40 * (3 * 4 + 8 + 4)
    free[0] = 4 * size - 1
    assert resident(clients, GPU) is clients and moved == []
    free[0] = 4 * size
    there = resident(clients, GPU)
    assert isinstance(there, Resident) and moved == [GPU]
    assert resident(clients, GPU) is there and moved == [GPU]
    del there
    resident(clients, GPU)
    assert moved == [GPU, GPU]


def test_what_has_no_pool_in_memory_or_no_gpu_stays_as_it_is() -> None:
    alone = Virtual(4, lambda client: ClientData(pool()))
    files = Partitioned([(torch.zeros(3), 0)] * 40, [np.arange(40)])
    for population, device in ((shared_out(), CPU), (alone, GPU), (files, GPU)):
        assert resident(population, device) is population


def test_examples_for_the_cpu_are_not_copied() -> None:
    examples = pool()
    assert uploaded(examples, CPU).inputs[0] is examples.inputs[0]


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("weighted", [True, False])
def test_on_a_gpu_uploaded_examples_are_equal_and_nobody_waited(weighted: bool) -> None:
    examples, before = pool(weighted), torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = uploaded(examples, GPU)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert there.targets.device == GPU and torch.equal(there.inputs[0].cpu(), examples.inputs[0])
    assert (there.weights is None) == (not weighted)


@pytest.mark.gpu
@NO_GPU
def test_on_a_gpu_a_run_over_a_resident_pool_gives_the_answer_of_the_cpu() -> None:
    task = Task.classification(model=lambda: nn.Linear(3, 2), classes=2, train_data=pool)
    settings: dict[str, Any] = {
        "clients": 4,
        "rounds": 3,
        "training": Training(batch_size=4),
        "evaluation": EvaluationPlan(every=0),
    }
    expected = simulate(task, FedAvg(), engine=Sequential(), device="cpu", **settings)
    found = simulate(task, FedAvg(), engine=Vectorised(), device="cuda:0", **settings)
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=1e-4, atol=1e-5)
