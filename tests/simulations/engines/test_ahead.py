"""What is packed while something else trains is what would have been packed then, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedml_core.data import ClientData, Examples
from fedml_core.errors import TaskError
from fedml_core.task import Task
from fedml_core.training import Precision, Training
from simulations import simulate
from simulations.engines import batched
from simulations.engines.ahead import Ahead
from simulations.engines.engine import Stage
from simulations.engines.vectorised import Vectorised
from simulations.engines.vmap_trainer import VmapTrainer
from simulations.packing import Packed
from simulations.sources import Generated
from strategies import FedAvg
from tests.simulations.engines.engine_cases import SETTINGS, TASK, points, same
from tests.simulations.engines.test_out_of_memory import hold_at_most, torch_says

CPU = torch.device("cpu")


class Packing:
    """Packs clients' numbers as their examples, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked = list[list[int]]()

    def __call__(self, chunk: Sequence[int]) -> Packed | None:
        self.asked.append(list(chunk))
        if chunk[0] == 9:
            raise TaskError("client 9 has no data")
        numbers = torch.tensor(list(chunk), dtype=torch.float32)
        return Packed(Examples.of(numbers[:, None], numbers), np.arange(len(chunk) + 1))


def numbers(packed: Packed | None) -> list[float]:
    assert packed is not None
    return packed.examples.targets.tolist()


def test_a_chunk_that_was_begun_is_packed_once() -> None:
    packing = Packing()
    ahead = Ahead(packing, CPU)
    assert numbers(ahead.take([1, 2])) == [1, 2]
    ahead.begin([3, 4])
    assert packing.asked == [[1, 2], [3, 4]]
    assert numbers(ahead.take([3, 4])) == [3, 4]
    assert packing.asked == [[1, 2], [3, 4]]
    # What was taken is the caller's, and so is what the next call packs.
    assert numbers(ahead.take([3, 4])) == [3, 4]
    assert len(packing.asked) == 3


def test_another_chunk_than_the_one_that_was_begun_is_packed_anew() -> None:
    ahead = Ahead(Packing(), CPU)
    ahead.begin([3, 4])
    assert numbers(ahead.take([3])) == [3]
    ahead.begin([4])
    ahead.forget()
    assert numbers(ahead.take([5])) == [5]
    ahead.begin([])  # the last chunk has no other after it


def test_an_error_is_raised_where_it_happens_and_leaves_nothing_begun() -> None:
    ahead = Ahead(Packing(), CPU)
    with pytest.raises(TaskError, match="client 9 has no data"):
        ahead.begin([9])
    assert numbers(ahead.take([2])) == [2]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chunks be packed ahead on a CPU too."""

    def pays(stage: Stage) -> bool:
        return True

    monkeypatch.setattr(batched, "pays_ahead", pays)


@pytest.mark.usefixtures("everywhere")
def test_a_run_ends_where_it_does_without() -> None:
    found = simulate(TASK, FedAvg(), engine=Vectorised(clients_at_once=4), **SETTINGS)
    same(simulate(TASK, FedAvg(), **SETTINGS), found)


def seeding(client: int) -> ClientData:
    """Return data drawn from torch's own generator, as users draw it."""
    torch.manual_seed(client)
    drawn = torch.randn(8, 5)
    return ClientData(Examples.of(drawn, (drawn[:, 0] > 0).long()))


@pytest.mark.usefixtures("everywhere")
def test_data_that_are_drawn_from_torchs_generator_are_what_they_are_alone() -> None:
    task = Task.classification(model=lambda: nn.Linear(5, 2), classes=2)
    settings: Mapping[str, Any] = {"clients": Generated(9, seeding), "rounds": 2, "device": "cpu"}
    found = simulate(task, FedAvg(), engine=Vectorised(clients_at_once=2), **settings)
    expected = simulate(task, FedAvg(), **settings)
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("everywhere")
def test_chunks_that_do_not_fit_the_memory_are_packed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = hold_at_most(VmapTrainer, "_descend", 2, torch_says, monkeypatch)
    found = simulate(TASK, FedAvg(), engine=Vectorised(clients_at_once=5), **SETTINGS)
    assert sizes[:2] == [5, 2]
    same(simulate(TASK, FedAvg(), **SETTINGS), found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_on_a_gpu_chunks_that_were_sent_ahead_end_where_the_cpu_does(precision: Precision, tolerance: float) -> None:
    parts = [points(5 + client, client) for client in range(9)]
    settings: Mapping[str, Any] = {"clients": parts, "rounds": 2, "training": Training(batch_size=4)}
    low = {**settings, "training": Training(batch_size=4, precision=precision)}
    expected = simulate(TASK, FedAvg(), device="cpu", **settings).parameters
    found = simulate(TASK, FedAvg(), engine=Vectorised(clients_at_once=2), device="cuda:0", **low).parameters
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
