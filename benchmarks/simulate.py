"""Measures whole rounds of ours: python -m benchmarks.simulate --workload femnist-mlp --rounds 20 --engine fused.

A round is everything that a user waits for: sampling, loading, training, the pipeline, the sum, the server's step and
the history. The samples per second of peers are measured over the same.
"""

from __future__ import annotations

import argparse
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measuring import Peak, Rounds, print_line, since_start
from benchmarks.workloads import BATCH_SIZE, WORKLOADS, Workload
from fedml_core import ClientData, Examples, Task, Training
from fedml_core.errors import FedveilError
from fedml_core.task import cross_entropy
from server import FixedSampling
from simulations.engines import Engine
from simulations.packing import Packed
from simulations.population import Population
from simulations.simulate import Simulation
from strategies import FedAvg

# Rounds before measuring: the first ones choose kernels, touch memory and let an engine make up its mind.
WARM_UP = 3


@dataclass(frozen=True)
class Slices:
    """A population whose clients are slices of a pool; nothing exists until it is asked for."""

    workload: Workload

    def __len__(self) -> int:
        """Return the number of clients."""
        return self.workload.population

    def load(self, client: int) -> ClientData:
        """Return one client's slice."""
        return ClientData(Examples.of(*self.workload.client(client)))

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64]:
        """Return how many examples each has."""
        return self.workload.counts(clients)

    def pack(self, clients: Sequence[int]) -> Packed:
        """Return the slices as one, gathered in one go."""
        counts, starts = self.workload.counts(clients), self.workload.starts(clients)
        ends = np.cumsum(counts)
        rows = torch.from_numpy(np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts))
        inputs, labels = self.workload.examples
        taken = Examples.of(inputs.index_select(0, rows), labels.index_select(0, rows))
        return Packed(taken, np.concatenate(([0], ends)))


@dataclass(frozen=True)
class SlicedSimulation(Simulation):
    """A simulation whose clients are the workload's slices."""

    workload: Workload | None = None

    @property
    def population(self) -> Population:
        """Return the slices."""
        assert self.workload is not None
        return Slices(self.workload)


def engine_named(text: str) -> Engine:
    """Return the engine that a run.toml's `engine = ...` would name: a bare name or a TOML table.

    Raises: ConfigError: if it is neither, or names no engine.

    Example:
        >>> engine_named('{name = "processes", workers = 2}').name
        'processes'
    """
    try:
        value = tomllib.loads(f"engine = {text}")["engine"]
    except tomllib.TOMLDecodeError:
        value = text
    return Engine.from_config(value, "--engine")


def measure(workload: Workload, engine: Engine, rounds: int, peak: Peak) -> Rounds:
    """Return `rounds` measured rounds after a warm-up.

    Raises: FedveilError: whatever ends a simulation.
    """
    task = Task(model=workload.model, loss=cross_entropy, classes=workload.classes)
    training = Training(batch_size=BATCH_SIZE, learning_rate=workload.learning_rate)
    simulation = SlicedSimulation(
        task,
        FedAvg(),
        clients=workload.population,
        rounds=rounds + WARM_UP,
        sampling=FixedSampling(workload.cohort),
        training=training,
        engine=engine,
        device="cpu",
        workload=workload,
    )
    clock = _Clock(peak)
    len(workload.examples)  # made here, so that worker processes share it
    history = simulation.run(callbacks=[clock])
    samples = [float(report.metric("train.examples") or 0) for report in history.reports[WARM_UP:]]
    return Rounds(np.diff(clock.ends[WARM_UP - 1 :]).tolist(), samples, clock.startup_s)


class _Clock:
    """Notes when each round ends; the last round of the warm-up ends with the memory's watcher."""

    def __init__(self, peak: Peak) -> None:
        self.ends: list[float] = []
        self.startup_s, self._peak = 0.0, peak

    def __call__(self, *_: object) -> None:
        if not self.ends:
            self.startup_s = since_start()
        if len(self.ends) == WARM_UP - 1:
            self._peak.look()
            self._peak.pause()
        self.ends.append(time.perf_counter())


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--engine", default="sequential", help="a name, or a table as in a run.toml")
    parser.add_argument("--threads", type=int, help="of torch in this process; torch's own choice if left out")
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {asked.rounds}")
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    workload = WORKLOADS[asked.workload]
    try:
        peak = Peak()
        rounds = measure(workload, engine_named(asked.engine), asked.rounds, peak)
    except FedveilError as error:
        parser.error(str(error))
    print_line(rounds.line(workload.name, f"fedveil {asked.engine}", workload.round_examples, peak.megabytes()))


if __name__ == "__main__":
    main()
