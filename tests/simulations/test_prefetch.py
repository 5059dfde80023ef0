"""Loading ahead: what is loaded, how much of it is kept, and whose error is raised where."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedml_core import ClientData, Examples
from fedml_core.errors import ConfigError, TaskError
from simulations.packing import Packed
from simulations.population import Population
from simulations.prefetch import Prefetched, announce
from simulations.sources import Generated
from tests.guards import wait_until

PATIENCE_S = 20.0
SIZE = 5 * 2 * 4 + 5 * 8  # bytes of one client


def rows(client: int) -> ClientData:
    return ClientData(Examples.of(torch.full((5, 2), float(client)), torch.full((5,), client)))


class Counted:
    """A population that writes down who is loaded, and by which thread; the clients in `bad` fail."""

    def __init__(self, count: int = 100, bad: Sequence[int] = ()) -> None:
        self.inner, self.bad = Generated(count, rows), bad
        self.loaded: list[int] = []
        self.ahead: list[int] = []

    def __len__(self) -> int:
        return len(self.inner)

    def load(self, client: int) -> ClientData:
        self.loaded.append(client)
        if threading.current_thread() is not threading.main_thread():
            self.ahead.append(client)
        if client in self.bad:
            raise TaskError(f"client {client} has no disk")
        return self.inner.load(client)

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64] | None:
        return np.full(len(clients), 5)

    def pack(self, clients: Sequence[int]) -> Packed | None:
        return self.inner.pack(clients)


def value_of(data: ClientData) -> int:
    assert isinstance(data.train, Examples)
    return int(data.train.targets[0])


def eventually(claim: Callable[[], bool]) -> None:
    assert wait_until(claim, PATIENCE_S)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fedveil-prefetch"]


@pytest.mark.parametrize("count", [1, 3])
def test_what_was_announced_is_loaded_ahead_and_once(count: int) -> None:
    behind = Counted()
    with Prefetched(behind, 1 << 20, count) as population:
        population.expect(range(10))
        eventually(lambda: len(behind.ahead) == 10)
        assert [value_of(population.load(client)) for client in range(10)] == list(range(10))
        assert sorted(behind.loaded) == list(range(10))
        assert sorted(behind.ahead) == list(range(10))


def test_what_is_kept_is_loaded_no_second_time_and_what_is_not_is() -> None:
    behind = Counted()
    with Prefetched(behind, 4 * SIZE) as population:
        for client in (1, 2, 3, 1, 2, 3):
            population.load(client)
        assert behind.loaded == [1, 2, 3]
        for client in (4, 5, 1):  # the fifth pushes out what was used longest ago
            population.load(client)
        assert behind.loaded == [1, 2, 3, 4, 5, 1]


@pytest.mark.parametrize("room", [1, 3])
def test_no_more_is_held_than_was_said_and_one_client_a_thread(room: int) -> None:
    behind = Counted()
    with Prefetched(behind, room * SIZE) as population:
        population.expect(range(50))
        eventually(lambda: population.held_bytes >= room * SIZE)
        for client in range(50):
            assert value_of(population.load(client)) == client
            assert population.held_bytes <= (room + 1) * SIZE
        assert len(behind.loaded) == 50


def test_the_thread_waits_for_room_and_goes_on_when_there_is_some() -> None:
    behind = Counted()
    with Prefetched(behind, 3 * SIZE) as population:
        population.expect(range(10))
        eventually(lambda: len(behind.ahead) == 3)
        population.load(0)
        eventually(lambda: len(behind.ahead) == 4)
        assert behind.ahead == [0, 1, 2, 3]


def test_a_client_that_is_asked_for_out_of_turn_does_not_wait_for_room() -> None:
    behind = Counted()
    with Prefetched(behind, 2 * SIZE) as population:
        population.expect(range(50))
        eventually(lambda: len(behind.ahead) == 2)
        assert value_of(population.load(30)) == 30
        assert 30 not in behind.ahead


def test_an_error_surfaces_at_the_client_that_failed_and_only_when_it_is_asked_for() -> None:
    behind = Counted(bad=[2])
    with Prefetched(behind, 1 << 20) as population:
        population.expect(range(5))
        eventually(lambda: len(behind.ahead) == 5)
        assert [value_of(population.load(client)) for client in (0, 1, 3, 4)] == [0, 1, 3, 4]
        for _ in range(2):
            with pytest.raises(TaskError, match="client 2 has no disk"):
                population.load(2)
        behind.bad = []
        assert value_of(population.load(2)) == 2  # an error is not remembered


def test_packing_gives_what_the_population_gives_wherever_the_clients_are() -> None:
    behind = Counted(bad=[7])
    with Prefetched(behind, 1 << 20) as population:
        for announced in ([], [3, 4], [3, 4, 5, 6]):
            population.expect(announced)
            eventually(lambda: not threads())
            packed, expected = population.pack([4, 3, 6]), behind.pack([4, 3, 6])
            assert packed is not None
            assert expected is not None
            assert torch.equal(packed.examples.inputs[0], expected.examples.inputs[0])
            assert packed.offsets.tolist() == expected.offsets.tolist()
        with pytest.raises(TaskError, match="client 7 has no disk"):
            population.pack([3, 7])
        counts = population.counts([1, 2])
        assert counts is not None
        assert counts.tolist() == [5, 5]


def test_what_was_asked_for_already_is_not_loaded_ahead_again() -> None:
    behind, gate = Counted(), threading.Event()
    inner = behind.inner
    behind.inner = Generated(
        100, lambda client: (gate.wait(PATIENCE_S) if client == 0 else None, inner.load(client))[1]
    )
    with Prefetched(behind, 10 * SIZE) as population:
        population.expect(range(10))
        eventually(lambda: behind.ahead == [0])
        for client in range(1, 9):
            population.load(client)
        gate.set()
        eventually(lambda: not threads())
        assert behind.ahead == [0, 9]


def test_a_new_announcement_takes_the_place_of_the_old_one() -> None:
    behind = Counted()
    with Prefetched(behind, 2 * SIZE) as population:
        population.expect(range(50))
        eventually(lambda: len(behind.ahead) == 2)
        population.expect([70, 71])
        eventually(lambda: behind.ahead[-1] == 71)
        assert behind.ahead == [0, 1, 70, 71]


def test_data_that_are_not_in_memory_are_not_loaded_ahead_for_nothing() -> None:
    class Lazy:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[int, int]:
            return index, 0

    loads: list[int] = []

    def make(client: int) -> ClientData:
        loads.append(client)
        return ClientData(Lazy())

    with Prefetched(Generated(9, make), 1 << 20) as population:
        population.expect(range(9))
        eventually(lambda: not threads())
        assert loads == [0]
        assert population.pack([1]) is None
        assert population.held_bytes == 0


@pytest.mark.parametrize("room", [2, 1000])
def test_closing_ends_the_thread_and_a_closed_one_can_be_used_again(room: int) -> None:
    behind = Counted()
    population = Prefetched(behind, room * SIZE)
    for _ in range(2):
        population.expect(range(100))
        eventually(lambda: len(behind.ahead) >= 2)
        population.close()
        assert threads() == []
        assert population.held_bytes == 0
        population.close()
    assert value_of(population.load(3)) == 3
    population.close()


def test_no_thread_outlives_the_work() -> None:
    with Prefetched(Counted(), 1 << 20) as population:
        population.expect(range(10))
        eventually(lambda: not threads())


def test_another_process_loads_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    population = Prefetched(Generated(10, rows), 1 << 20)
    population.expect(range(10))
    copy: Any = pickle.loads(pickle.dumps(population))
    assert value_of(copy.load(4)) == 4
    eventually(lambda: not threads())
    held = population.held_bytes
    assert held == 10 * SIZE
    here = os.getpid()
    monkeypatch.setattr("os.getpid", lambda: here + 1)  # as if this were a forked copy
    population.close()
    assert population.held_bytes == held  # its threads and locks are the parent's: nothing is touched
    assert value_of(population.load(4)) == 4
    assert population.held_bytes == SIZE


def test_only_what_can_load_ahead_is_told() -> None:
    behind: Population = Counted()
    announce(behind, [1, 2])
    with Prefetched(behind, 1 << 20) as population:
        announce(population, [1, 2])
        eventually(lambda: population.held_bytes == 2 * SIZE)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="cache_bytes must be >= 1, got 0"):
        Prefetched(Counted(), 0)
    with pytest.raises(ConfigError, match="threads must be >= 1, got 0"):
        Prefetched(Counted(), 1, threads=0)
