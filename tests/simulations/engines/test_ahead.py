"""What is packed while something else trains is what would have been packed then, and nothing stays behind."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedml_core.data import Examples
from fedml_core.errors import TaskError
from fedml_core.training import Precision, Training
from simulations import simulate
from simulations.engines import batched
from simulations.engines.ahead import Ahead
from simulations.engines.engine import Stage
from simulations.engines.vectorised import Vectorised
from simulations.engines.vmap_trainer import VmapTrainer
from simulations.packing import Packed
from strategies import FedAvg
from tests.simulations.engines.engine_cases import SETTINGS, TASK, points, same
from tests.simulations.engines.test_out_of_memory import hold_at_most, torch_says

CPU = torch.device("cpu")


class Packing:
    """Packs a client's number as its one example, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked, self.done = list[list[int]](), threading.Event()

    def __call__(self, chunk: Sequence[int]) -> Packed | None:
        self.asked.append(list(chunk))
        if chunk[0] == 9:
            raise TaskError("client 9 has no data")
        numbers = torch.tensor(list(chunk), dtype=torch.float32)
        self.done.set()
        return Packed(Examples.of(numbers[:, None], numbers), np.arange(len(chunk) + 1))


def numbers(packed: Packed | None) -> list[float]:
    assert packed is not None
    return packed.examples.targets.tolist()


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fedveil-ahead")]


def test_the_next_chunk_is_packed_before_it_is_asked_for_and_once() -> None:
    packing = Packing()
    ahead = Ahead(packing, CPU)
    try:
        assert numbers(ahead.take([1, 2], [3, 4])) == [1, 2]
        packing.done.clear()
        assert packing.done.wait(10) or packing.asked[-1] == [3, 4]
        assert numbers(ahead.take([3, 4], [])) == [3, 4]
        assert packing.asked == [[1, 2], [3, 4]]
    finally:
        ahead.close()
    assert not alive()


def test_another_chunk_than_the_one_that_was_begun_is_packed_anew() -> None:
    ahead = Ahead(Packing(), CPU)
    try:
        ahead.take([1, 2], [3, 4])
        assert numbers(ahead.take([3], [4])) == [3]
        ahead.forget()
        assert numbers(ahead.take([4], [])) == [4]
    finally:
        ahead.close()


def test_an_error_belongs_to_the_chunk_that_has_it() -> None:
    ahead = Ahead(Packing(), CPU)
    try:
        assert numbers(ahead.take([1], [9])) == [1]
        with pytest.raises(TaskError, match="client 9 has no data"):
            ahead.take([9], [2])
        assert numbers(ahead.take([2], [])) == [2]
        ahead.take([1], [9])
    finally:
        ahead.close()  # what nobody asked for any more raises nothing
    assert not alive()


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chunks be packed ahead on a CPU too."""

    def pays(stage: Stage) -> bool:
        return True

    monkeypatch.setattr(batched, "pays_ahead", pays)


@pytest.mark.usefixtures("everywhere")
def test_a_run_ends_where_it_does_without_and_leaves_no_thread() -> None:
    found = simulate(TASK, FedAvg(), engine=Vectorised(clients_at_once=4), **SETTINGS)
    assert not alive()
    same(simulate(TASK, FedAvg(), **SETTINGS), found)


@pytest.mark.usefixtures("everywhere")
def test_chunks_that_do_not_fit_the_memory_are_packed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = hold_at_most(VmapTrainer, "_descend", 2, torch_says, monkeypatch)
    found = simulate(TASK, FedAvg(), engine=Vectorised(clients_at_once=5), **SETTINGS)
    assert sizes[:2] == [5, 2] and not alive()
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
    assert not alive()
