"""Three synthetic workloads, the same for every framework: models, shapes and who holds how many examples.

A client's examples are a slice of a small shared pool, so that loading costs next to nothing anywhere and a population
of any size stays lazy. Imports nothing of ours: the peers' environments have torch and NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

__all__ = ["BATCH_SIZE", "WORKLOADS", "Workload"]

BATCH_SIZE = 10
_CLASSES = 10
# Knuth's multiplicative hash, and another odd factor for the places of the slices.
_HASH, _SPREAD = 2654435761, 40503


@dataclass(frozen=True)
class Workload:
    """One workload. `fewest` to `most`: a client's examples. `pool`: how many different examples there are."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    population: int
    cohort: int
    fewest: int
    most: int
    pool: int
    learning_rate: float = 0.1

    @cached_property
    def examples(self) -> tuple[Tensor, Tensor]:
        """Return the pool: inputs (pool, *shape) and labels (pool,)."""
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(self.pool, *self.shape, generator=generator)
        return inputs, torch.randint(0, _CLASSES, (self.pool,), generator=generator)

    @property
    def classes(self) -> int:
        """Return the number of labels."""
        return _CLASSES

    @property
    def round_examples(self) -> int:
        """Return how many examples a mean cohort trains on."""
        return self.cohort * (self.fewest + self.most) // 2

    def counts(self, clients: ArrayLike) -> NDArray[np.int64]:
        """Return how many examples each client holds."""
        numbers = np.asarray(clients, dtype=np.int64)
        return self.fewest + ((numbers * _HASH & 0xFFFFFFFF) >> 8) % (self.most - self.fewest + 1)

    def starts(self, clients: ArrayLike) -> NDArray[np.int64]:
        """Return where in the pool each client's slice begins."""
        return np.asarray(clients, dtype=np.int64) * _SPREAD % (self.pool - self.counts(clients) + 1)

    def client(self, number: int) -> tuple[Tensor, Tensor]:
        """Return one client's inputs and labels, views of the pool."""
        start, count = int(self.starts(number)), int(self.counts(number))
        inputs, labels = self.examples
        return inputs[start : start + count], labels[start : start + count]

    def draw(self, round_number: int) -> list[int]:
        """Return a cohort, for frameworks without a sampling of their own."""
        draws = np.random.Generator(np.random.Philox(key=round_number))
        return [int(client) for client in draws.choice(self.population, self.cohort, replace=False, shuffle=False)]


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * 14 * 14, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, _CLASSES),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, _CLASSES))


def _logreg() -> nn.Module:
    return nn.Sequential(nn.Linear(60, _CLASSES))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("cifar-cnn", _cnn, (3, 32, 32), population=1_000, cohort=50, fewest=50, most=50, pool=5_000),
        Workload("femnist-mlp", _mlp, (784,), population=3_500, cohort=100, fewest=20, most=100, pool=20_000),
        Workload("logreg", _logreg, (60,), population=100_000, cohort=1_000, fewest=10, most=50, pool=20_000),
    )
}
