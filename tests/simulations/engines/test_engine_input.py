"""What users get wrong, and what no engine can know before: said once and clearly, and all engines agree."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedml_core import ClientData, Examples, Task, Training
from fedml_core.errors import TaskError
from server import FixedSampling, History
from simulations import Auto, Engine, Fused, Processes, Sequential, Suited, Tuned, Vectorised, simulate
from simulations.engines.batch_trainer import BatchWork
from simulations.engines.vmap_trainer import VmapTrainer
from strategies import FedAvg

CLIENTS = 12
EVERY_ENGINE: list[Engine] = [
    Sequential(),
    Suited(),
    Tuned(threads=1, inner=Fused()),
    Fused(clients_at_once=4),
    Vectorised(clients_at_once=4),
    Auto(workers=1),
    Auto(workers=2),
    Processes(workers=2, inner=Vectorised(clients_at_once=4)),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fedveil" / "engines.json"


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def shown(engine: Engine) -> str:
    return f"{engine.name}-{engine.workers}" if isinstance(engine, Processes | Auto) else engine.name


def points(client: int) -> Examples:
    drawn = torch.randn(9, 4, generator=torch.Generator().manual_seed(client))
    return Examples.of(drawn, (drawn[:, 0] > 0).long())


class Undecided(nn.Module):
    """A layer whose path depends on what it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if x.sum() > 0 else torch.relu(x)


def branching() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), Undecided(), nn.Linear(6, 2))


def task_of(model: Callable[[], nn.Module], load: Callable[[int], Examples] = points) -> Task:
    return Task.classification(model=model, classes=2, client_data=lambda client: ClientData(load(client)))


def run(engine: Engine, model: Callable[[], nn.Module] = lambda: nn.Linear(4, 2), **changes: Any) -> History:
    common: dict[str, Any] = {"clients": CLIENTS, "rounds": 3, "training": Training(batch_size=4), "seed": 3}
    task = changes.pop("task", None) or task_of(model)
    return simulate(task, FedAvg(), engine=engine, device="cpu", **{**common, **changes})


def assert_same(one: History, other: History) -> None:
    torch.testing.assert_close(one.parameters, other.parameters, rtol=1e-5, atol=1e-6)
    for a, b in zip(one.reports, other.reports, strict=True):
        assert (a.participants, a.excluded) == (b.participants, b.excluded)


def test_a_model_that_decides_by_its_values_is_named_once_and_trained_one_by_one(
    told: Callable[[], list[str]],
) -> None:
    assert_same(run(Sequential(), branching), run(Vectorised(clients_at_once=5), branching))
    (line,) = told()
    assert line == (
        "the vectorised engine cannot do this, so clients train one by one: layer 1 (Undecided) cannot be vectorised: "
        "what it computes depends on the values of a tensor"
    )


def test_the_fused_engine_says_once_that_it_cannot_read_such_a_model(told: Callable[[], list[str]]) -> None:
    assert_same(run(Sequential(), branching), run(Fused(clients_at_once=5), branching))
    (line,) = told()
    assert line == (
        "the fused engine cannot do this, so clients train one by one: layer 1 (Undecided).forward cannot be read as a "
        "stack of layers: what it computes depends on the values of a tensor"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_an_engine_that_nobody_asked_for_does_not_complain(workers: int, told: Callable[[], list[str]]) -> None:
    assert_same(run(Sequential(), branching, rounds=12), run(Auto(workers=workers), branching, rounds=12))
    assert len(told()) <= 1 and all(line.startswith("engine: ") and "vectorised" not in line for line in told())


def failing(client: int) -> Examples:
    if client == 3:
        raise OSError("disk 3 is gone")
    return points(client)


@pytest.mark.parametrize("engine", EVERY_ENGINE, ids=shown)
def test_a_client_whose_data_cannot_be_loaded_is_named_by_every_engine(engine: Engine) -> None:
    task = task_of(lambda: nn.Linear(4, 2), failing)
    with pytest.raises(TaskError, match=r"client 3: client_data\(3\) failed: OSError: disk 3 is gone"):
        run(engine, task=task)


@pytest.mark.parametrize("engine", EVERY_ENGINE, ids=shown)
def test_a_client_whose_data_cannot_be_loaded_is_skipped_by_every_engine(engine: Engine) -> None:
    task = task_of(lambda: nn.Linear(4, 2), failing)
    found = run(dataclasses.replace(engine, skip_failures=True), task=task)
    assert_same(run(Sequential(skip_failures=True), task=task), found)
    assert [(row.client, row.rule) for row in found.reports[0].excluded] == [(3, "task")]


@pytest.mark.parametrize("sampled", [CLIENTS, 7])
def test_when_too_many_clients_at_once_do_not_fit_auto_goes_on_with_fewer(
    sampled: int, monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]], cache: Path
) -> None:
    real, sizes = VmapTrainer.descend, list[int]()

    def hold_at_most_three(self: VmapTrainer, work: BatchWork) -> Any:
        sizes.append(len(work.clients))
        if len(work.clients) > 3:
            raise torch.OutOfMemoryError("too many")
        return real(self, work)

    def softplus() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 2))

    settings: dict[str, Any] = {"rounds": 30, "sampling": FixedSampling(sampled)}
    expected = run(Sequential(), softplus, **settings)
    monkeypatch.setattr(VmapTrainer, "descend", hold_at_most_three)
    assert_same(expected, run(Auto(workers=1), softplus, **settings))
    assert sizes[0] == sampled and 3 in sizes
    (line,) = told()
    assert line.startswith("engine: ") and "vectorised with 3 clients at once" in line
    (choice,) = json.loads(cache.read_text())["choices"].values()
    assert choice.get("clients_at_once") in (None, 3)


def test_when_nothing_fits_at_once_the_user_is_told_how_many_do(
    monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]]
) -> None:
    real = VmapTrainer.descend

    def hold_at_most_two(self: VmapTrainer, work: BatchWork) -> Any:
        if len(work.clients) > 2:
            raise torch.OutOfMemoryError("too many")
        return real(self, work)

    expected = run(Sequential())
    monkeypatch.setattr(VmapTrainer, "descend", hold_at_most_two)
    assert_same(expected, run(Vectorised(clients_at_once=9)))
    assert told() == [
        "out of memory with 9 clients at once; going on with 4",
        "out of memory with 4 clients at once; going on with 2",
    ]
