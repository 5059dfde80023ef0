"""What privacy costs in accuracy: the runs of examples/digits at several epsilons, each beside itself without privacy.

python -m benchmarks.accuracy_against_epsilon [--seeds 3] [--processes 2] [--markdown]

A run is one of the example's files with the settings that a row shows. Its epsilon is the one that the run reports.
Prints one JSON line, or with --markdown the table of docs/privacy.md. Takes some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import machine, print_line
from fedml_core.config import load_run
from fedml_core.loading import load_task
from fedml_core.weighting import Uniform
from server import EvaluationPlan
from simulations.configure import simulation_from
from simulations.simulate import Simulation
from strategies import FedAvg

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"
PLAIN_RATE = 10.0
"""The clients' learning rate without privacy: the best there; under privacy each file has its own."""
_TERMS = ("epsilon", "delta", "unit", "adjacency", "sampling", "accountant")

__all__ = ["ROWS", "Row", "markdown", "prepared", "rows"]


@dataclass(frozen=True)
class Row:
    """One run. `name`: as the table has it. `file`: in the example. `epsilon`: promised. `settings`: its overrides."""

    name: str
    file: str
    epsilon: float
    settings: tuple[str, ...] = ()


_SAMPLED = "`CentralDP`, each client in a fifth of 100 rounds"
_ALL = "`CentralDP`, all clients in each of 50 rounds"
_EVERYBODY = (
    "sampling=EveryClient",
    "rounds=50",
    "strategy.expected_cohort=1000",
    "strategy.strategy.server_learning_rate=8.0",
)
_DISTRIBUTED = "`SecureAggregation(DistributedDP)`, all clients in each of 50 rounds"
_CORRELATED = "`CentralDP` with `BandedNoise`, each client in every fourth of 100 rounds"
_HOSPITALS = "DP-SGD at 10 hospitals, an epoch in each of 25 rounds"

ROWS = (
    Row(_SAMPLED, "private.toml", 8),
    Row(_SAMPLED, "private.toml", 4, ("strategy.noise_multiplier=2.376",)),
    Row(_ALL, "private.toml", 8, (*_EVERYBODY, "strategy.noise_multiplier=4.245")),
    Row(_ALL, "private.toml", 4, (*_EVERYBODY, "strategy.noise_multiplier=7.646")),
    Row(_DISTRIBUTED, "distributed.toml", 8),
    Row(_DISTRIBUTED, "distributed.toml", 4, ("strategy.strategy.noise_multiplier=8.19",)),
    Row(_CORRELATED, "correlated.toml", 8),
    Row(_HOSPITALS, "hospitals.toml", 8),
    Row(_HOSPITALS, "hospitals.toml", 4, ("clients.examples.noise_multiplier=3.97",)),
    Row(_HOSPITALS, "hospitals.toml", 1, ("clients.examples.noise_multiplier=13.33", "training.learning_rate=10.0")),
)
"""The rows of the table, in order."""


def prepared(row: Row, seed: int, *, private: bool) -> Simulation:
    """Return the row's run with a seed, or its twin: nothing clipped, no noise, the learning rate that is best there.

    Only the last model is evaluated.
    """
    config = load_run(EXAMPLE / row.file, (*row.settings, f"seed={seed}"))
    run = simulation_from(config, load_task(config.task, config.folder))
    run = dataclasses.replace(run, evaluation=EvaluationPlan(every=0))
    if private:
        return run
    training = run.training.model_copy(update={"learning_rate": PLAIN_RATE})
    return dataclasses.replace(run, strategy=FedAvg(weighting=Uniform()), private=None, training=training)


def rows(wanted: Sequence[Row], seeds: Sequence[int], processes: int = 1) -> list[dict[str, Any]]:
    """Return for each row the epsilon that its runs report, and the accuracies of its runs and of its twins by seed.

    Rows of one name have one twin.
    """
    jobs = [_Job(row, seed, private=True) for row in wanted for seed in seeds]
    jobs += [_Job(row, seed, private=False) for row in _twins(wanted).values() for seed in seeds]
    jobs.sort(key=lambda job: job.row.file != "distributed.toml")  # the longest first, so that no process ends alone
    found = dict(zip(jobs, _outcomes(jobs, processes), strict=True))
    return [_line(row, _twins(wanted)[row.name], seeds, found) for row in wanted]


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the table: each row's mean accuracy with its range over the seeds, and its twin's."""
    head = "| run | unit | epsilon | accuracy | without privacy |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| {row['name']} | {row['privacy']['unit']} | {row['privacy']['epsilon']:.2f} | {_spread(row['accuracy'])} | "
        f"{_spread(row['without'])} |\n"
        for row in found
    )


@dataclass(frozen=True)
class _Job:
    row: Row
    seed: int
    private: bool


@dataclass(frozen=True)
class _Outcome:
    accuracy: float
    privacy: Mapping[str, Any] | None


def _twins(wanted: Sequence[Row]) -> dict[str, Row]:
    return {row.name: row for row in reversed(wanted)}


def _outcomes(jobs: Sequence[_Job], processes: int) -> list[_Outcome]:
    if processes == 1:
        return [_outcome(job) for job in jobs]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_outcome, jobs))


def _outcome(job: _Job) -> _Outcome:
    torch.set_num_threads(1)
    history = prepared(job.row, job.seed, private=job.private).run()
    claimed = history.reports[-1].privacy
    privacy = None if claimed is None else {name: claimed[name] for name in _TERMS}
    accuracy = round(history.metric("server.accuracy")[-1], 4)
    said = "no bound" if privacy is None else f"epsilon {privacy['epsilon']:.2f}"
    print(f"{job.row.name:80} seed {job.seed} {said:14} accuracy {accuracy:.3f}", file=sys.stderr, flush=True)
    return _Outcome(accuracy, privacy)


def _line(row: Row, twin: Row, seeds: Sequence[int], found: Mapping[_Job, _Outcome]) -> dict[str, Any]:
    outcomes = [found[_Job(row, seed, private=True)] for seed in seeds]
    without = [found[_Job(twin, seed, private=False)].accuracy for seed in seeds]
    return {
        **dataclasses.asdict(row),
        "privacy": outcomes[0].privacy,
        "accuracy": [outcome.accuracy for outcome in outcomes],
        "without": without,
    }


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args()
    found = rows(ROWS, range(asked.seeds), asked.processes)
    if asked.markdown:
        print(markdown(found), end="")
    else:
        print_line({"benchmark": "accuracy_against_epsilon", "rows": found, **machine()})


if __name__ == "__main__":
    main()
