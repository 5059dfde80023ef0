"""What a population costs: logistic regression with a cohort of 100,000 of 10^5, 10^6 and 10^7 generated clients.

Each size runs in a process of its own; one JSON line a size says seconds a round (the first, which starts everything
up, apart) and the peak of resident memory. Memory must not grow with the population.

    python -m benchmarks.scale --engine fused --cohort 100000 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedml_core import ClientData, Examples, Task, Training
from fedml_core.randomness import seeded
from server import EvaluationPlan, FixedSampling
from simulations import Faults, Simulation
from simulations.engines import Engine
from strategies import FedAvg

FEATURES, CLASSES, EXAMPLES = 60, 10, 10
POPULATIONS = (100_000, 1_000_000, 10_000_000)
_ROOT = Path(__file__).resolve().parent.parent


class Pool:
    """A pool of examples of which each client holds a window, so that making a client costs a slice."""

    def __init__(self) -> None:
        draws = seeded(0, "benchmark")
        inputs = draws.standard_normal((20_000, FEATURES), dtype="float32")
        self.inputs = torch.from_numpy(inputs)
        self.targets = self.inputs[:, :CLASSES].argmax(dim=1)

    def client(self, number: int) -> ClientData:
        """Return the data of client `number`."""
        start = number * 7919 % (len(self.targets) - EXAMPLES)
        rows = slice(start, start + EXAMPLES)
        return ClientData(Examples.of(self.inputs[rows], self.targets[rows]))


def measure(population: int, cohort: int, rounds: int, engine: str, unavailable: float) -> Mapping[str, Any]:
    """Return the row of one population, measured in this process."""
    torch.set_num_threads(1)  # more of them wait for each other wherever something else runs
    task = Task.classification(model=lambda: nn.Linear(FEATURES, CLASSES), classes=CLASSES, client_data=Pool().client)
    simulation = Simulation(
        task,
        FedAvg(),
        clients=population,
        rounds=rounds,
        sampling=FixedSampling(min(cohort, population)),
        training=Training(batch_size=10),
        evaluation=EvaluationPlan(every=0, server=False),
        faults=Faults(unavailable=unavailable),
        engine=Engine.from_config(engine),
        device="cpu",
    )
    before = _peak_mb()
    reports = simulation.run().reports
    seconds = [report.seconds for report in reports]
    return {
        "population": population,
        "cohort": reports[0].cohort,
        "engine": engine,
        "unavailable": unavailable,
        "first_round_s": round(seconds[0], 3),
        "round_s": round(statistics.median(seconds[1:] or seconds), 3),
        "clients_per_s": round(reports[0].replies / statistics.median(seconds[1:] or seconds)),
        "rss_before_mb": before,
        "rss_mb": _peak_mb(),
    }


def main() -> None:
    """Print one JSON line for each population."""
    parser = argparse.ArgumentParser(description="What a population costs in time and memory.")
    parser.add_argument("--populations", type=int, nargs="+", default=list(POPULATIONS), help="numbers of clients")
    parser.add_argument("--cohort", type=int, default=100_000, help="clients a round")
    parser.add_argument("--rounds", type=int, default=2, help="the first is reported apart")
    parser.add_argument("--engine", default="sequential", help="as in a run.toml: sequential, fused, vectorised, ...")
    parser.add_argument("--unavailable", type=float, default=0.0, help="the share of clients that cannot be asked")
    parser.add_argument("--here", action="store_true", help="measure the first population in this process")
    asked = parser.parse_args()
    if asked.here:
        row = measure(asked.populations[0], asked.cohort, asked.rounds, asked.engine, asked.unavailable)
        print(json.dumps(row), flush=True)
        return
    settings = [f"--cohort={asked.cohort}", f"--rounds={asked.rounds}", f"--engine={asked.engine}"]
    for population in asked.populations:
        command = [sys.executable, "-m", "benchmarks.scale", "--here", f"--populations={population}", *settings]
        outcome = subprocess.run([*command, f"--unavailable={asked.unavailable}"], cwd=_ROOT, check=False)
        if outcome.returncode:
            raise SystemExit(outcome.returncode)


def _peak_mb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)


if __name__ == "__main__":
    main()
