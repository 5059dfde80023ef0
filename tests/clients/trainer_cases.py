"""Small problems for the trainer's tests, and the plainest possible training loop to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.torch_trainer import TorchTrainer
from fedml_core.data import Data, Examples
from fedml_core.randomness import Key, key_bytes
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.update import Update

KEY = (0, "client", 1, 7)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def classification(model: Callable[[], nn.Module] = perceptron, **rest: Any) -> Task:
    return Task.classification(model=model, classes=3, **rest)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labelled(count: int = 23, seed: int = 0, weights: Tensor | None = None) -> Examples:
    targets = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed + 1))
    return Examples.of(drawn(count, 5, seed=seed), targets, weights=weights)


def trainer_of(task: Task, **rest: Any) -> TorchTrainer:
    return TorchTrainer(task, device="cpu", **rest)


def trained(trainer: TorchTrainer, data: Data, training: Training | None = None, **rest: Any) -> Update:
    arguments: dict[str, Any] = {"round_number": 1, "key": KEY, **rest}
    return trainer.train(trainer.initial(), data, training or Training(batch_size=4), **arguments)


def orders_of(count: int, epochs: int, key: tuple[int | str, ...] = KEY) -> list[Tensor]:
    return [torch.tensor(_order(key, epoch, count)) for epoch in range(epochs)]


def _order(key: tuple[Key, ...], epoch: int, count: int) -> list[int]:
    """Return the order in plain Python: the examples sorted by the words of the client's stream."""
    *purpose, client = key
    base = int.from_bytes(key_bytes(*purpose, "shuffle", epoch, size=8), "little")
    start = _mixed(base + (int(client) + 1) * 0xD1342543DE82EF95)
    return sorted(range(count), key=lambda place: _mixed(start + (place + 1) * 0x9E3779B97F4A7C15))


def _mixed(word: int) -> int:
    """Return SplitMix64's finalizer of a word."""
    word %= 2**64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
    return word ^ (word >> 31)


def batches_of(data: Examples, batch_size: int, epochs: int = 1) -> list[Tensor]:
    return [rows for order in orders_of(len(data), epochs) for rows in order.split(batch_size)]


def by_hand(
    module: nn.Module,
    data: Examples,
    rows: Iterable[Tensor],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    extra: Callable[[nn.Module], Tensor] | None = None,
) -> nn.Module:
    """Train `module` as a tutorial would, with cross-entropy plus `extra`, and return it."""
    steps = optimizer(module.parameters())
    module.train()
    for index in rows:
        steps.zero_grad()
        loss = F.cross_entropy(module(*(tensor[index] for tensor in data.inputs)), data.targets[index])
        if extra is not None:
            loss = loss + extra(module)
        loss.backward()
        steps.step()
    return module


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
