"""Measures the server's side alone: 100 updates of a model of 10,000,000 parameters, checked and added up.

python -m benchmarks.aggregate. The server holds one sum, whatever the cohort: `models` says how many model sizes the
process's peak is above what it was with torch and one update in it.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator

import torch

from benchmarks.measuring import machine, print_line
from fedml_core.accumulate import PlainSum
from fedml_core.messages import Arrival, Assignment, Reply, TrainWork
from fedml_core.training import Training
from fedml_core.update import Update
from server.validation import UpdateIntake

_RUN, _FINGERPRINT = "benchmark", "model"


def arrivals(values: torch.Tensor, replies: int) -> Iterator[Arrival]:
    """Yield replies as a channel would, one after the other; each client's weight is another."""
    for client in range(replies):
        update = Update.of(values, 10.0 + client, examples=10.0 + client, loss=0.5)
        yield Arrival(client, Reply(_RUN, 1, client, _FINGERPRINT, update), 4 * len(values))


def measure(size: int, replies: int) -> dict[str, float]:
    """Return the seconds and the peak of memory for one round's replies."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    assignment = Assignment(_RUN, 1, _FINGERPRINT, values[:1], TrainWork(Training()))
    before_mb = _peak_mb()
    intake = UpdateIntake(assignment, range(replies), PlainSum(size, max_weight=1e9))
    started = time.perf_counter()
    intake.take(arrivals(values, replies))
    total = intake.accumulator.total()
    seconds = time.perf_counter() - started
    if total.count != replies:
        raise RuntimeError(f"{replies} replies were sent and {total.count} counted")
    more_mb = _peak_mb() - before_mb
    return {
        "seconds": round(seconds, 4),
        "gigabytes_per_s": round(4e-9 * size * replies / seconds, 2),
        "rss_mb": round(_peak_mb()),
        "models": round(more_mb / (4 * size / 2**20), 2),
    }


def _peak_mb() -> float:
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--replies", type=int, default=100)
    asked = parser.parse_args()
    for name in ("parameters", "replies"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(asked, name)}")
    row = measure(asked.parameters, asked.replies)
    print_line({"parameters": asked.parameters, "replies": asked.replies, **row, **machine()})


if __name__ == "__main__":
    main()
