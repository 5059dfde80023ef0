"""How much private steps cost: ours against plain SGD and against each of Opacus's modes, in one process, in turns.

    python -m benchmarks.private_training --workload femnist-mlp --batch-size 1024

Prints one JSON line: seconds a step of each contender (the middle one of all turns), and ratios, each of which is taken
turn by turn before the middle is. Opacus runs as its users run it: its own optimizer and noise, whole batches. All take
as many threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import machine, print_line
from benchmarks.workloads import WORKLOADS, Workload
from clients.per_example import FlatClipping
from clients.private_trainer import PrivateTorchTrainer
from clients.private_training import PrivateTraining
from clients.torch_trainer import TorchTrainer
from fedml_core.data import Examples
from fedml_core.devices import fitting_threads, seeded_torch
from fedml_core.task import Task
from fedml_core.training import Training

__all__ = ["OPACUS_MODES", "contenders", "measure"]

OPACUS_MODES = ("hooks", "functorch", "ew", "ghost")
_NOISE, _NORM = 1.0, 1.0
_KEY = (0, "client", 1, 0)

Steps = Callable[[int], None]
"""Takes so many steps."""


def contenders(workload: Workload, batch_size: int, modes: Sequence[str] = OPACUS_MODES) -> dict[str, Steps]:
    """Return who is measured, by name: "plain", "private", and Opacus's modes that can do the workload."""
    inputs, labels = workload.examples
    data = Examples.of(inputs, labels)
    task = Task.classification(model=workload.model, classes=workload.classes)
    plain, private = TorchTrainer(task, device="cpu"), _private(task, batch_size / len(data))
    found: dict[str, Steps] = {
        "plain": lambda steps: _train(plain, data, batch_size, steps),
        "private": lambda steps: _train(private, data, batch_size, steps),
    }
    for mode in modes:
        steps = _opacus(workload, batch_size, mode)
        if _works(steps):
            found[f"opacus-{mode}"] = steps
    return found


def measure(found: Mapping[str, Steps], steps: int, turns: int) -> dict[str, list[float]]:
    """Return the seconds a step of each contender in each turn; all take a turn before one takes its next."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for take in found.values():
        take(2)
    for _ in range(turns):
        for name, take in found.items():
            start = time.perf_counter()
            take(steps)
            seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def line(workload: str, batch_size: int, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the line of results; a ratio above 1 means that private steps take longer."""
    private = seconds["private"]
    ratios = {
        name: statistics.median(ours / theirs for ours, theirs in zip(private, others, strict=True))
        for name, others in seconds.items()
        if name != "private"
    }
    opacus = [name for name in ratios if name.startswith("opacus-")]
    fastest = min(opacus, key=lambda name: statistics.median(seconds[name]), default=None)
    return {
        "workload": workload,
        "batch_size": batch_size,
        "step_s": {name: round(statistics.median(each), 6) for name, each in seconds.items()},
        "private_to": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "fastest_opacus": fastest,
        "turns": len(private),
        **machine(),
    }


def _private(task: Task, rate: float) -> PrivateTorchTrainer:
    private = PrivateTraining(_NOISE, FlatClipping(_NORM), rate, max_physical_batch=1 << 20)
    return PrivateTorchTrainer(task, private, reserve=lambda event: None, device="cpu")


def _train(trainer: TorchTrainer | PrivateTorchTrainer, data: Examples, batch_size: int, steps: int) -> None:
    training = Training(steps=steps, batch_size=batch_size)
    trainer.train(trainer.initial(), data, training, round_number=1, key=_KEY)


def _works(take: Steps) -> bool:
    try:
        take(1)
    except (RuntimeError, NotImplementedError, AttributeError):
        # Some of torch's versions and layers are beyond some of Opacus's modes.
        return False
    return True


def _opacus(workload: Workload, batch_size: int, mode: str) -> Steps:
    from opacus.grad_sample import wrap_model
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    ghost = mode == "ghost"
    extra = {"max_grad_norm": _NORM, "use_ghost_clipping": True} if ghost else {}
    module: Any = wrap_model(workload.model(), grad_sample_mode=mode, loss_reduction="mean", **extra)
    plain = torch.optim.SGD(module.parameters(), workload.learning_rate)
    kind = DPOptimizerFastGradientClipping if ghost else DPOptimizer
    optimizer = kind(plain, noise_multiplier=_NOISE, max_grad_norm=_NORM, expected_batch_size=batch_size)
    criterion: Any = nn.CrossEntropyLoss()
    if ghost:
        criterion = DPLossFastGradientClipping(module, optimizer, criterion)
    inputs, labels = workload.examples

    threads = fitting_threads(module)

    def take(steps: int) -> None:
        # As many threads as our trainers take: a second one would only slow a small model down.
        with warnings.catch_warnings(), seeded_torch(0, torch.device("cpu"), threads):
            warnings.simplefilter("ignore")
            for step in range(steps):
                rows = torch.arange(step * batch_size, (step + 1) * batch_size) % len(labels)
                optimizer.zero_grad()
                criterion(module(inputs[rows]), labels[rows]).backward()
                optimizer.step()

    return take


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(WORKLOADS), default="femnist-mlp")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--opacus", nargs="*", choices=OPACUS_MODES, default=list(OPACUS_MODES))
    given = parser.parse_args()
    found = contenders(WORKLOADS[given.workload], given.batch_size, given.opacus)
    print_line(line(given.workload, given.batch_size, measure(found, given.steps, given.turns)))


if __name__ == "__main__":
    main()
