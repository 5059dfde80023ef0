"""What tests of engines with workers share: one small task, a run of it that goes through everything, and doubles."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedml_core import ClientData, Examples, Task, Training
from fedml_core.update import Update
from server import EvaluationPlan, EveryClient, History
from simulations import Faults, QuantitySkew


class TrainedRows:
    """Clients of whom somebody else made the updates; see `Trained`."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self.reports = update.replace(values=update.values[:, :0])

    def rows(self) -> Update:
        return self._update

    def total(self, factors: Tensor) -> Tensor:
        return factors.float() @ self._update.values


def points(count: int, seed: int, features: int = 3) -> Examples:
    """Return examples of three classes."""
    drawn = torch.randn(count, features, generator=torch.Generator().manual_seed(seed))
    return Examples.of(drawn, (drawn[:, 0] > 0).long() + (drawn[:, 1] > 0).long())


TASK = Task.classification(
    model=lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)),
    classes=3,
    train_data=lambda: points(240, 1),
    test_data=lambda: points(60, 2),
)
SETTINGS: Mapping[str, Any] = {
    "clients": 12,
    "rounds": 3,
    "partition": QuantitySkew(1.0),
    "holdout": 0.2,
    "training": Training(batch_size=8),
    "evaluation": EvaluationPlan(clients=EveryClient()),
    "faults": Faults(drop=0.1, nan=0.1),
    "device": "cpu",
}


def same(one: History, other: History) -> None:
    """Hold that two runs had the same answer, up to the order of additions, and the same traffic."""
    torch.testing.assert_close(one.parameters, other.parameters, rtol=1e-5, atol=1e-6)
    for a, b in zip(one.reports, other.reports, strict=True):
        assert (a.participants, a.missing, a.excluded) == (b.participants, b.missing, b.excluded)
        assert a.bytes_down == b.bytes_down
        assert a.bytes_up == pytest.approx(b.bytes_up, rel=0.02)  # numbers as text differ in length
        for place in a.metrics:
            assert dict(a.metrics[place]) == pytest.approx(dict(b.metrics[place]), rel=1e-5)


def killing(place: Path, when: int) -> Task:
    """Return a task whose client 5 kills the process that loads it, until it has done so `when` times."""
    parent = os.getpid()

    def load(client: int) -> ClientData:
        if client == 5 and os.getpid() != parent:
            deaths = len(list(place.iterdir()))
            if deaths < when:
                (place / str(deaths)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return ClientData(points(10 + client, client))

    return Task.classification(model=lambda: nn.Linear(3, 3), classes=3, client_data=load)


def without_a_disk() -> Task:
    """Return a task whose client 3 cannot be loaded."""

    def load(client: int) -> ClientData:
        if client == 3:
            raise OSError("disk 3 is gone")
        return ClientData(points(8, client))

    return Task.classification(model=lambda: nn.Linear(3, 3), classes=3, client_data=load)


NO_DISK = r"client 3: client_data\(3\) failed: OSError: disk 3 is gone"
"""What is said of `without_a_disk`."""
