"""What is not sampled costs nothing: cohorts of huge populations, and memories that are never rewritten."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from clients import InProcessMemory, TorchTrainer
from clients.memory import STORE_NAME, MemoryStore
from clients.spilling_memory import SpillingMemory
from fedml_core import ClientData, Examples, Task, Training
from fedml_core.config import load_run
from fedml_core.errors import ConfigError
from server import FixedSampling, PoissonSampling
from server.coordinator import Coordinator
from server.history import RunFolder
from server.plan import EvaluationPlan, Plan
from server.record import record_rounds
from server.sampling import Sampling
from simulations import Faults, Processes, Sequential, Simulation, SimulationChannel, simulate
from simulations.configure import simulation_from
from simulations.engines.engine import Engine, Stage
from simulations.engines.fused import Fused
from simulations.packing import Packed
from simulations.population import KeyedSubset, Population
from simulations.prefetch import Prefetched
from simulations.sources import Generated, SafetensorsClients, write_packed
from strategies import FedAvg, Scaffold, Strategy


def rows(client: int) -> ClientData:
    generator = torch.Generator().manual_seed(client)
    inputs = torch.randn(4 + client % 3, 3, generator=generator)
    return ClientData(Examples.of(inputs, (inputs[:, 0] > 0).long()))


TASK = Task.classification(model=lambda: nn.Linear(3, 2), classes=2, client_data=rows)


class Watched:
    """A population that writes down who is looked at."""

    def __init__(self, inner: Population) -> None:
        self.inner = inner
        self.loaded: list[int] = []
        self.counted: list[int] = []

    def __len__(self) -> int:
        return len(self.inner)

    def load(self, client: int) -> ClientData:
        self.loaded.append(client)
        return self.inner.load(client)

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64] | None:
        self.counted.extend(clients)
        return self.inner.counts(clients)

    def pack(self, clients: Sequence[int]) -> Packed | None:
        self.loaded.extend(clients)
        return self.inner.pack(clients)


def train(
    population: Population,
    *,
    rounds: int = 2,
    sampling: Sampling | None = None,
    strategy: Strategy | None = None,
    engine: Engine | None = None,
    memory: MemoryStore | None = None,
) -> Coordinator:
    """Run some rounds over a population and return the coordinator."""
    trainer, rule = TorchTrainer(TASK, 0, device="cpu"), strategy or FedAvg()
    stage = Stage(TASK, rule, trainer, population, memory or InProcessMemory())
    plan = Plan(strategy=rule, training=Training(batch_size=4), sampling=sampling or FixedSampling(5), seed=1)
    coordinator = Coordinator(plan, trainer.spec, Coordinator.begin(plan, trainer.spec, trainer.initial(), "run"))
    session = (engine or Sequential()).open(stage)
    try:
        list(coordinator.rounds(SimulationChannel(stage, session), rounds))
    finally:
        session.close()
    return coordinator


@pytest.mark.parametrize("sampling", [FixedSampling(40), PoissonSampling(4e-8)], ids=lambda rule: type(rule).__name__)
def test_a_cohort_of_a_billion_clients_looks_at_its_own_alone(sampling: Sampling) -> None:
    class Numbers:
        looks = 0

        def __len__(self) -> int:
            return 1_000_000_000

        def __getitem__(self, place: int) -> int:
            Numbers.looks += 1
            return place

    sampling.cohort(range(9), 1, 0)  # what a first draw imports is not the cohort's
    tracemalloc.start()
    cohort = sampling.cohort(Numbers(), 1, 0)  # type: ignore[arg-type]  # all of a sequence that a sampling needs
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 10 < len(cohort) == len(set(cohort)) == Numbers.looks < 80
    assert peak < 100_000


@pytest.mark.parametrize("engine", [Sequential(), Fused()], ids=lambda engine: engine.name)
def test_a_round_looks_at_the_cohort_alone(engine: Engine) -> None:
    population = Watched(Generated(100_000_000, rows))
    coordinator = train(population, engine=engine)
    assert coordinator.state.accepted == 2
    assert len(population.loaded) == 10
    assert set(population.counted) in (set(), set(population.loaded))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_source_on_disk_trains_the_model_that_its_clients_would(tmp_path: Path, ahead: bool) -> None:
    people = Generated(30, rows)
    write_packed(tmp_path / "clients.safetensors", people)
    source = SafetensorsClients(tmp_path / "clients.safetensors")
    expected = train(people).state.parameters
    if ahead:
        with Prefetched(source, 1 << 20) as population:
            population.expect(range(30))
            assert torch.equal(train(population).state.parameters, expected)
    else:
        population_of_disk = Watched(source)
        assert torch.equal(train(population_of_disk).state.parameters, expected)
        assert len(population_of_disk.loaded) == 10


def test_memory_does_not_grow_with_the_population() -> None:
    peaks = []
    for clients in (100_000, 100_000, 10_000_000):  # the first pays for what is made once
        simulation = Simulation(
            TASK,
            FedAvg(),
            clients=clients,
            rounds=2,
            sampling=FixedSampling(20),
            evaluation=EvaluationPlan(every=0),
            device="cpu",
        )
        tracemalloc.start()
        simulation.run()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A bit for each client would be 1.2 megabytes.
    assert peaks[2] < peaks[1] + 1_000_000


@pytest.mark.parametrize("count", [1, 2, 3, 10, 255, 256, 257, 1000])
def test_a_keyed_subset_of_everybody_is_a_permutation(count: int) -> None:
    everyone = KeyedSubset((0, "x", 1), range(count), count)
    assert sorted(everyone) == list(range(count))
    assert list(everyone) == list(KeyedSubset((0, "x", 1), range(count), count))
    if count > 100:
        assert list(everyone) != list(KeyedSubset((0, "x", 2), range(count), count))
        assert list(everyone) != list(range(count))


def test_a_keyed_subset_holds_every_client_equally_often() -> None:
    counts, pairs = np.zeros(30), 0
    for number in range(3000):
        chosen = list(KeyedSubset((7, number), range(30), 12))
        assert len(set(chosen)) == 12
        counts[chosen] += 1
        pairs += {3, 4} <= set(chosen)
    # Each count is near 1200 with standard deviation 27, that of pairs near 455 with 20; 5 of those.
    assert np.abs(counts - 1200).max() < 135
    assert abs(pairs - 3000 * 12 * 11 / (30 * 29)) < 100


def test_a_keyed_subset_is_a_sequence_of_any_size() -> None:
    subset = KeyedSubset((1,), range(10_000_000), 9_000_000)
    assert len(subset) == 9_000_000
    assert subset[-1] == subset[8_999_999]
    assert subset[2:4] == [subset[2], subset[3]]
    with pytest.raises(IndexError, match="place 9000000 is outside a subset of 9000000"):
        _ = subset[9_000_000]
    with pytest.raises(ConfigError, match="size must be 0 to 3, got 4"):
        KeyedSubset((1,), range(3), 4)
    assert list(KeyedSubset((1,), [], 0)) == []
    assert set(KeyedSubset((1,), [4, 8, 15], 2)) < {4, 8, 15}
    cohort = FixedSampling(50).cohort(subset, 1, 0)
    assert len(set(cohort)) == 50
    assert max(cohort) > 5_000_000


@pytest.mark.parametrize("engine", [Sequential(), Fused()], ids=lambda engine: engine.name)
@pytest.mark.parametrize("room", [0, 200, 1 << 20])
def test_spilled_memories_train_the_same_model(tmp_path: Path, room: int, engine: Engine) -> None:
    strategy = Scaffold(population=12)
    expected = train(Generated(12, rows), strategy=strategy, engine=engine, rounds=5).state.parameters
    with SpillingMemory(tmp_path, room) as memory:
        found = train(Generated(12, rows), strategy=strategy, engine=engine, rounds=5, memory=memory)
        assert torch.equal(found.state.parameters, expected)
        memory.to_tree()
    assert (tmp_path / STORE_NAME).exists()


@pytest.mark.parametrize("engine", [Sequential(), Fused(), Processes(workers=2)], ids=lambda engine: engine.name)
def test_a_run_in_a_folder_spills_and_resumes_bit_for_bit(tmp_path: Path, engine: Engine) -> None:
    write_packed(tmp_path / "clients.safetensors", Generated(12, rows))
    settings: dict[str, Any] = {
        "clients": SafetensorsClients(tmp_path / "clients.safetensors"),
        "sampling": FixedSampling(5),
        "engine": engine,
        "memory_bytes": 100,
        "device": "cpu",
    }
    straight = simulate(TASK, Scaffold(population=12), rounds=6, **settings)
    simulate(TASK, Scaffold(population=12), rounds=3, out=tmp_path / "run", **settings)
    resumed = simulate(TASK, Scaffold(population=12), rounds=6, out=tmp_path / "run", resume=True, **settings)
    torch.testing.assert_close(straight.parameters, resumed.parameters, rtol=1e-6, atol=1e-7)
    if not isinstance(engine, Processes):  # which adds up in the order in which its workers are done
        assert torch.equal(straight.parameters, resumed.parameters)
    assert (tmp_path / "run" / STORE_NAME).stat().st_size > 0
    assert (tmp_path / "run" / "checkpoint.fedveil").stat().st_size < 6000
    again = simulate(TASK, Scaffold(population=12), rounds=3, out=tmp_path / "run", overwrite=True, **settings)
    assert again.summary["clients"] == 12


def test_those_who_cannot_be_asked_cost_nothing_either() -> None:
    everyone = range(100_000_000)
    tracemalloc.start()
    available = Faults(unavailable=0.25).available(everyone, 1, 0)
    cohort = FixedSampling(50).cohort(available, 1, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert abs(len(available) / 1e8 - 0.75) < 0.001
    assert cohort == sorted(set(cohort))
    assert len(cohort) == 50
    assert peak < 100_000


def test_a_run_toml_can_name_a_source(tmp_path: Path) -> None:
    write_packed(tmp_path / "clients.safetensors", Generated(12, rows))
    text = 'task = "task.py"\n[clients]\nsource = {name = "SafetensorsClients", path = "clients.safetensors"}\n'
    (tmp_path / "run.toml").write_text(text)
    simulation = simulation_from(load_run(tmp_path / "run.toml"), TASK)
    assert len(simulation.population) == 12
    (tmp_path / "run.toml").write_text(text.replace("[clients]", "[clients]\ncount = 4"))
    with pytest.raises(ConfigError, match="a source has its own clients and data, and clients.count is given"):
        simulation_from(load_run(tmp_path / "run.toml"), TASK)
    (tmp_path / "run.toml").write_text(text.replace('path = "clients', 'path = "nobody'))
    with pytest.raises(ConfigError, match="nobody.safetensors does not exist"):
        simulation_from(load_run(tmp_path / "run.toml"), TASK)


class _KilledError(Exception):
    """Stands for a kill: nothing after it is done."""


@pytest.mark.parametrize("ahead", [False, True], ids=["at a checkpoint", "between store and checkpoint"])
def test_a_resumed_run_with_spilled_memories_is_equal_bit_for_bit(tmp_path: Path, ahead: bool) -> None:
    def run(folder: Path, rounds: int, *, resume: bool = False, dies: int | None = None) -> torch.Tensor:
        trainer, strategy = TorchTrainer(TASK, 0, device="cpu"), Scaffold(population=12)
        plan = Plan(strategy=strategy, training=Training(batch_size=4), sampling=FixedSampling(5), seed=1)
        kept = RunFolder(folder, plan)
        begin = Coordinator.begin(plan, trainer.spec, trainer.initial(), "run")
        state = kept.begin(lambda: begin, trainer.spec, resume=resume, overwrite=False)
        coordinator = Coordinator(plan, trainer.spec, state)
        with SpillingMemory(folder, 300) as memory:
            memory.restore(state.extra)

            def extra() -> dict[str, object]:
                tree = memory.to_tree()
                if coordinator.state.round == dies:
                    raise _KilledError
                return tree

            stage = Stage(TASK, strategy, trainer, Generated(12, rows), memory)
            channel = SimulationChannel(stage, Sequential().open(stage))
            record_rounds(coordinator, channel, rounds, folder=kept, extra=extra)
        return coordinator.state.parameters

    straight = run(tmp_path / "straight", 6)
    if ahead:
        with pytest.raises(_KilledError):
            run(tmp_path / "run", 6, dies=4)
    else:
        run(tmp_path / "run", 3)
    assert torch.equal(run(tmp_path / "run", 6, resume=True), straight)


def test_a_checkpoint_costs_a_round_and_not_the_population(tmp_path: Path) -> None:
    """The checkpoint of many clients is no larger than that of few."""
    sizes = []
    for clients in (5, 500):
        folder = tmp_path / str(clients)
        with SpillingMemory(folder, 0) as memory:
            strategy = Scaffold(population=clients)
            train(Generated(clients, rows), strategy=strategy, memory=memory, rounds=1, sampling=FixedSampling(clients))
            sizes.append(len(str(memory.to_tree())))
        assert (folder / STORE_NAME).stat().st_size > clients * 2 * 4 * 8
    assert sizes[0] == sizes[1]
