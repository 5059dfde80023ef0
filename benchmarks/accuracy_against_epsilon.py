"""What privacy costs in accuracy: the handwritten digits of 1,000 clients, at several epsilons and by two mechanisms.

python -m benchmarks.accuracy_against_epsilon [--seeds 3]

Noise is calibrated for each epsilon before the run; the epsilon in a row is the one that the run itself reported.
Prints a table on stderr and one JSON line. Takes some minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import print_line
from fedml_core import Task, Training
from fedml_core.loading import load_task
from fedml_core.privacy.calibration import noise_for
from fedml_core.weighting import Uniform
from server import EveryClient, History, PoissonSampling
from server.sampling import Sampling
from simulations import simulate
from strategies import CentralDP, DistributedDP, FedAvg, SecAggPlus, SecureAggregation, Strategy

CLIENTS, DELTA = 1_000, 1e-5
SAMPLED_ROUNDS, RATE, SAMPLED_CLIP = 100, 0.2, 0.3
ALL_ROUNDS, ALL_CLIP, HONEST = 25, 0.3, 800
EPSILONS = (4.0, 8.0)

__all__ = ["rows"]


def rows(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return for each kind of run its epsilon with its terms, and its accuracy on the test data by seed."""
    task = load_task("task.py", Path(__file__).parents[1] / "examples" / "digits")
    plain = FedAvg(weighting=Uniform())
    found = [
        _row(
            "none, a fifth of the clients in each of 100 rounds",
            task,
            plain,
            PoissonSampling(RATE),
            SAMPLED_ROUNDS,
            seeds,
        ),
        _row("none, all clients in every round", task, plain, EveryClient(), ALL_ROUNDS, seeds),
    ]
    for epsilon in EPSILONS:
        strategy = _central(plain, epsilon)
        name = f"CentralDP at epsilon {epsilon:g}"
        found.append(_row(name, task, strategy, PoissonSampling(RATE), SAMPLED_ROUNDS, seeds))
    size = _run(task, plain, EveryClient(), 1, 0).spec.size
    for epsilon in EPSILONS:
        strategy = _distributed(plain, epsilon, size)
        name = f"SecureAggregation(DistributedDP) at epsilon {epsilon:g}"
        found.append(_row(name, task, strategy, EveryClient(), ALL_ROUNDS, seeds))
    return found


def _central(inner: Strategy, epsilon: float) -> Strategy:
    def events(noise: float) -> list[Mapping[str, Any]]:
        event = {
            "name": "poisson",
            "sampling_probability": RATE,
            "event": {"name": "gaussian", "noise_multiplier": noise},
        }
        return [{"name": "repeated", "count": SAMPLED_ROUNDS, "event": event}]

    noise = noise_for(epsilon, DELTA, events, unit="client", adjacency="add-or-remove-one")
    return CentralDP(inner, SAMPLED_CLIP, noise, RATE * CLIENTS, DELTA)


def _distributed(inner: Strategy, epsilon: float, size: int) -> Strategy:
    def made(noise: float) -> DistributedDP:
        return DistributedDP(inner, ALL_CLIP, noise, DELTA, size=size, cohort_size=CLIENTS, honest=HONEST, bits=20)

    def events(noise: float) -> list[Mapping[str, Any]]:
        event = made(noise).pipeline().event()
        assert event is not None
        return [{"name": "repeated", "count": ALL_ROUNDS, "event": event}]

    terms = made(1.0).privacy()
    noise = noise_for(epsilon, DELTA, events, unit=terms.unit, adjacency=terms.adjacency or "replace-one")
    protocol = SecAggPlus(minimum=850, corrupt_share=0.05, dropout_share=0.1)
    return SecureAggregation(made(noise), protocol, bits=32, draw_masks=False)


def _run(task: Task, strategy: Strategy, sampling: Sampling, rounds: int, seed: int) -> History:
    training = Training(epochs=5, batch_size=10, learning_rate=0.3)
    return simulate(task, strategy, clients=CLIENTS, rounds=rounds, sampling=sampling, training=training, seed=seed)


def _row(
    name: str, task: Task, strategy: Strategy, sampling: Sampling, rounds: int, seeds: Sequence[int]
) -> dict[str, Any]:
    histories = [_run(task, strategy, sampling, rounds, seed) for seed in seeds]
    accuracies = [round(history.metric("server.accuracy")[-1], 4) for history in histories]
    privacy = histories[-1].reports[-1].privacy
    shown = "no bound" if privacy is None else f"epsilon {privacy['epsilon']:.2f}"
    print(f"{name:58} {shown:14} accuracy {statistics.median(accuracies):.3f} {accuracies}", file=sys.stderr)
    return {"name": name, "privacy": privacy, "accuracy": accuracies, "rounds": rounds}


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    print_line({"clients": CLIENTS, "delta": DELTA, "rows": rows(range(asked.seeds))})


if __name__ == "__main__":
    main()
