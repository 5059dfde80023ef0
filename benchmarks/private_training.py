"""How much private steps cost: ours against plain SGD and against each of Opacus's modes, in one process, in turns.

    python -m benchmarks.private_training --workload femnist-mlp --batch-size 64 256 1024

Prints one JSON line with a result for each batch size: seconds a step of each contender (the middle one of all turns),
and ratios, each of which is taken turn by turn before the middle, lowest and highest are; in processor time, too, where
noise that another processor draws counts. Opacus runs as its users run
it: its own optimizer and noise, whole batches. All take as many threads.

Noise costs the same whatever the batch, and plain SGD less the smaller it is, so a ratio means nothing without the
batch. DP-SGD takes the largest that it can, for the noise is one draw a batch: 256 and 1,024 are usual for small
models. `noise_s` is one step's noise by itself, which our trainer draws while it computes, and `keystream_s` the part
of it that is AES: what no cryptographic noise of so many bits can do without.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.measuring import machine, print_line
from benchmarks.workloads import WORKLOADS, Workload
from clients.per_example import FlatClipping
from clients.private_noise import CoarseGrid, GradientNoise
from clients.private_trainer import PrivateTorchTrainer
from clients.private_training import PrivateTraining
from clients.torch_trainer import TorchTrainer
from fedml_core.data import Examples
from fedml_core.devices import fitting_threads, seeded_torch
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.task import Task
from fedml_core.training import Training

__all__ = ["OPACUS_MODES", "Turn", "contenders", "measure", "noise_seconds", "result"]

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


class Turn(NamedTuple):
    """Seconds a step: by the clock, and of all processors together, which other work on the machine disturbs less."""

    clock_s: float
    processor_s: float


def measure(found: Mapping[str, Steps], steps: int, turns: int) -> dict[str, list[Turn]]:
    """Return each contender's turns; all take a turn before one takes its next."""
    seconds: dict[str, list[Turn]] = {name: [] for name in found}
    for take in found.values():
        take(2)
    for _ in range(turns):
        for name, take in found.items():
            start, busy = time.perf_counter(), time.process_time()
            take(steps)
            seconds[name].append(Turn((time.perf_counter() - start) / steps, (time.process_time() - busy) / steps))
    return seconds


def result(workload: str, batch_size: int, turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """Return the result for one batch size; a ratio above 1 means that private steps take longer."""
    by_clock = {name: [turn.clock_s for turn in each] for name, each in turns.items()}
    ratios = _ratios(by_clock)
    busy = _ratios({name: [turn.processor_s for turn in each] for name, each in turns.items()})
    opacus = [name for name in ratios if name.startswith("opacus-")]
    fastest = min(opacus, key=lambda name: statistics.median(by_clock[name]), default=None)
    return {
        "workload": workload,
        "batch_size": batch_size,
        "step_s": {name: round(statistics.median(each), 6) for name, each in by_clock.items()},
        "private_to": {name: round(statistics.median(each), 3) for name, each in ratios.items()},
        "spread": {name: [round(min(each), 3), round(max(each), 3)] for name, each in ratios.items()},
        "private_to_in_processor_time": {name: round(statistics.median(each), 3) for name, each in busy.items()},
        "fastest_opacus": fastest,
        "turns": len(turns["private"]),
    }


def _ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return what private steps take over what the others take, turn by turn."""
    return {
        name: [ours / theirs for ours, theirs in zip(seconds["private"], others, strict=True)]
        for name, others in seconds.items()
        if name != "private"
    }


def noise_seconds(parameters: int, draws: int = 20) -> dict[str, float]:
    """Return the seconds that one step's noise takes by itself, and that its keystream alone takes: middle draws."""
    noise, stream = GradientNoise(_NOISE, parameters), NoiseStream.fresh()
    tables = 2 if isinstance(noise.grid(_NORM), CoarseGrid) else 3
    words = np.empty(-(-tables * parameters // 4), dtype="<u8")
    zeros = torch.zeros(parameters)
    return {
        "noise_s": round(_middle(lambda: noise.added(zeros, _NORM), draws), 6),
        "keystream_s": round(_middle(lambda: stream.into(words), draws), 6),
    }


def _middle(work: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


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
    parser.add_argument("--batch-size", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--opacus", nargs="*", choices=OPACUS_MODES, default=list(OPACUS_MODES))
    given = parser.parse_args()
    workload = WORKLOADS[given.workload]
    results = []
    for batch_size in given.batch_size:
        found = contenders(workload, batch_size, given.opacus)
        results.append(result(given.workload, batch_size, measure(found, given.steps, given.turns)))
    parameters = sum(parameter.numel() for parameter in workload.model().parameters())
    noise = noise_seconds(parameters)
    print_line({"bench": "private_training", "results": results, "parameters": parameters, **noise, **machine()})


if __name__ == "__main__":
    main()
