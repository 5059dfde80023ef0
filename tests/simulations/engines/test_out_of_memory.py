"""Memory that runs out halves how many clients train at once, on every engine that trains many, and the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedml_core import Examples, Task, Training
from server import EvaluationPlan, History
from simulations import Engine, Faults, Fused, Processes, QuantitySkew, Sequential, Tuned, Vectorised, simulate
from simulations.engines.batch_trainer import BatchWork
from simulations.engines.fused_trainer import FusedTrainer
from simulations.engines.memory_errors import memory_named
from simulations.engines.vmap_trainer import VmapTrainer
from strategies import FedAvg

CLIENTS = 9


def points(count: int) -> Examples:
    drawn = torch.randn(count, 3, generator=torch.Generator().manual_seed(1))
    return Examples.of(drawn, (drawn[:, 0] > 0).long())


TASK = Task.classification(model=lambda: nn.Linear(3, 2), classes=2, train_data=lambda: points(120))


def run(engine: Engine, faults: Faults) -> History:
    return simulate(
        TASK,
        FedAvg(),
        clients=CLIENTS,
        rounds=2,
        partition=QuantitySkew(1.0),
        training=Training(batch_size=8),
        evaluation=EvaluationPlan(every=0),
        faults=faults,
        engine=engine,
        device="cpu",
    )


def torch_says() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def the_cpu_says() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def numpy_says() -> None:
    np.empty(1 << 60, dtype=np.uint8)


Fails = Callable[[], None]


def hold_at_most(kind: type[Any], name: str, most: int, fail: Fails, patch: pytest.MonkeyPatch) -> list[int]:
    """Let a trainer's method fail in its own ways with more than `most` clients; return with how many it was tried."""
    real, sizes = getattr(kind, name), list[int]()

    def limited(self: Any, work: BatchWork, *rest: Any) -> Any:
        sizes.append(len(work.clients))
        if len(work.clients) > most:
            fail()
        return real(self, work, *rest)

    patch.setattr(kind, name, limited)
    return sizes


# Without faults the fused engine never makes an update; with those that need one, it must.
BOTH_WAYS = [Faults(), Faults(nan=0.2)]


@pytest.mark.parametrize("fail", [torch_says, the_cpu_says, numpy_says])
@pytest.mark.parametrize("faults", BOTH_WAYS, ids=["sums", "updates"])
def test_fused_goes_on_with_half_as_many_whoever_noticed(
    faults: Faults, fail: Fails, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(Sequential(), faults)
    sizes = hold_at_most(FusedTrainer, "_descend", 2, fail, monkeypatch)
    with caplog.at_level(logging.WARNING):
        found = run(Fused(clients_at_once=CLIENTS), faults)
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=1e-5, atol=1e-6)
    assert sizes[:3] == [9, 4, 2]
    assert [one.getMessage() for one in caplog.records if "memory" in one.getMessage()][:2] == [
        "out of memory with 9 clients at once; going on with 4",
        "out of memory with 4 clients at once; going on with 2",
    ]


@pytest.mark.parametrize("faults", BOTH_WAYS, ids=["sums", "updates"])
def test_what_is_known_to_fit_is_remembered_for_the_next_round(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = hold_at_most(FusedTrainer, "_descend", 4, torch_says, monkeypatch)
    run(Fused(), faults)
    assert sizes.count(9) == 1 and max(sizes[1:]) == 4


@pytest.mark.parametrize(
    "engine",
    [
        Vectorised(clients_at_once=CLIENTS),
        Tuned(threads=1, inner=Vectorised(clients_at_once=CLIENTS)),
        Tuned(threads=1, inner=Fused(clients_at_once=CLIENTS)),
        Processes(workers=2, inner=Vectorised(clients_at_once=CLIENTS)),
        Processes(workers=2, inner=Fused(clients_at_once=CLIENTS)),
    ],
    ids=str,
)
def test_every_engine_around_them_goes_on_too(
    engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(Sequential(), Faults())
    hold_at_most(VmapTrainer, "_descend", 2, torch_says, monkeypatch)
    hold_at_most(FusedTrainer, "_descend", 2, torch_says, monkeypatch)
    with caplog.at_level(logging.WARNING):
        found = run(engine, Faults())
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=1e-5, atol=1e-6)
    assert "; going on with 2" in caplog.text


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="size of tensor") as caught, memory_named():
        torch.ones(2) + torch.ones(3)
    assert not isinstance(caught.value, torch.OutOfMemoryError)
