"""Clients given as a list of what each holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedml_core import ClientData, Examples, Task
from fedml_core.data import Data
from fedml_core.errors import ConfigError
from simulations import Processes, Vectorised, simulate
from simulations.engines.engine import Engine
from simulations.engines.sequential import Sequential
from simulations.sources import Generated, Held
from strategies import FedAvg

TASK = Task.classification(model=lambda: nn.Linear(3, 2), classes=2)


def points(count: int) -> Examples:
    drawn = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    return Examples.of(drawn, (drawn[:, 0] > 0).long())


PARTS: list[Data | ClientData] = [points(5), ClientData(points(9), points(3)), points(2), points(12)]


@pytest.mark.parametrize("engine", [Sequential(), Vectorised(), Processes(workers=2)], ids=str)
def test_a_list_of_parts_is_a_population_for_every_engine(engine: Engine) -> None:
    settings: dict[str, Any] = {"rounds": 2, "device": "cpu"}
    made = Generated(4, lambda client: part if isinstance(part := PARTS[client], ClientData) else ClientData(part))
    expected = simulate(TASK, FedAvg(), clients=made, **settings)
    found = simulate(TASK, FedAvg(), clients=PARTS, engine=engine, **settings)
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=1e-5, atol=1e-6)


def test_data_sets_of_torch_are_parts_too() -> None:
    held = Held([TensorDataset(torch.ones(4, 3), torch.zeros(4)), points(2)])
    assert held.counts([1, 0]) is not None and held.counts([1, 0]).tolist() == [2, 4]  # type: ignore[union-attr]
    assert held.pack([1]) is not None and held.pack([0, 1]) is None
    assert isinstance(held.load(0).train, TensorDataset)


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([], "clients must be >= 1, got 0"),
        (
            [points(3), (torch.ones(3), torch.ones(3))],
            r"clients\[1\] must be .* got tuple; for pooled",
        ),
        ([3], r"clients\[0\] must be Examples, a map-style data set or ClientData, got int"),
        (points(3), "clients must be a number, a list with each client's data, or a source, got Examples"),
        ("data", "or a source, got str"),
    ],
)
def test_what_is_no_clients_is_one_clear_line(clients: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(TASK, FedAvg(), clients=clients, rounds=1, device="cpu")


def test_a_copy_of_the_simulation_keeps_its_clients() -> None:
    held = Held(PARTS)
    assert dataclasses.replace(held).load(3) == held.load(3)
