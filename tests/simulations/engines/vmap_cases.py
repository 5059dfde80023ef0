"""Models and cohorts for the vectorised trainer, and the comparison with each client trained alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clients.torch_trainer import TorchTrainer
from fedml_core.data import Examples
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.transform import Guide
from fedml_core.update import Update
from simulations.engines.batch_trainer import BatchWork
from simulations.engines.vmap_trainer import VmapTrainer
from simulations.packing import Packed

PURPOSE = (3, "client", 2)
SIZES = [7, 1, 4, 12, 9, 3, 8]


class Residual(nn.Module):
    """A block as of a residual network, with GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(2, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)])
        self.convolutions = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2)])
        self.leave = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        kept = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = convolution(torch.relu(norm(x)))
        return self.leave((x + kept).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Reader(nn.Module):
    """Embeds tokens, reads them with a layer of sequences and classifies the last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = layer
        self.norm = nn.LayerNorm(8)
        self.leave = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        read = self.layer(self.embed(tokens))
        read = read[0] if isinstance(read, tuple) else read
        return self.leave(self.norm(read[:, -1]))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Two layers with one weight, and a frozen one between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.second = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.frozen(torch.relu(self.first(x)))))[:, :3]  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One dropout layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(5, 8), nn.Linear(8, 3), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.relu(self.first(self.drop(x)))))  # type: ignore[no-any-return]


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout2d(0.25),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.SELU(),
        nn.AlphaDropout(0.4),
        nn.Linear(8, 3),
    )


def normalised(**arguments: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, **arguments), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


IMAGE, VECTOR, TOKENS = (2, 8, 8), (5,), "tokens"
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), VECTOR),
    "logistic": (lambda: nn.Linear(5, 3), VECTOR),
    "cnn-dropout": (convolutional, IMAGE),
    "dropout-twice": (Twice, VECTOR),
    "residual": (Residual, IMAGE),
    "batch-norm": (normalised, IMAGE),
    "batch-norm-all": (lambda: normalised(momentum=None), IMAGE),
    "instance-norm": (lambda: nn.Sequential(nn.InstanceNorm2d(2), nn.Flatten(), nn.Linear(128, 3)), IMAGE),
    "tied": (Tied, VECTOR),
    "embedding": (lambda: Reader(nn.Identity()), TOKENS),
    "transformer": (lambda: Reader(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)), TOKENS),
    "gru": (lambda: Reader(nn.GRU(8, 8, num_layers=2, batch_first=True)), TOKENS),
    "lstm": (lambda: Reader(nn.LSTM(8, 4, bidirectional=True, batch_first=True)), TOKENS),
    "rnn": (lambda: Reader(nn.RNN(8, 8, nonlinearity="relu", bias=False, batch_first=True)), TOKENS),
}


def cohort(shape: Any, sizes: Sequence[int], *, weighted: bool = False, classes: int = 3) -> list[Examples]:
    generator = torch.Generator().manual_seed(5)
    parts = []
    for size in sizes:
        if shape == TOKENS:
            x = torch.randint(0, 11, (size, 6), generator=generator)
        else:
            x = torch.randn(size, *shape, generator=generator)
        y = torch.randint(0, classes, (size,), generator=generator)
        weights = torch.rand(size, generator=generator) + 0.1 if weighted else None
        parts.append(Examples.of(x, y, weights=weights))
    return parts


def work_of(
    parts: Sequence[Examples], parameters: Tensor, training: Training, clients: Sequence[int], guide: Guide | None
) -> BatchWork:
    return BatchWork(parameters, Packed.of(parts), training, 3, clients, PURPOSE, guide or Guide())


def alone(task: Task, work: BatchWork, parts: Sequence[Examples], **rest: Any) -> list[Update]:
    trainer, offset = TorchTrainer(task, device="cpu", **rest), work.guide.offset
    updates = []
    for place, (client, data) in enumerate(zip(work.clients, parts, strict=True)):
        own = offset[place] if offset is not None and offset.dim() == 2 else offset
        guide, key = Guide(work.guide.mu, own), (*PURPOSE, client)
        updates.append(trainer.train(work.parameters, data, work.training, round_number=3, key=key, guide=guide))
    return updates


def check(
    task: Task,
    parts: Sequence[Examples],
    training: Training,
    *,
    guide: Guide | None = None,
    trainer: VmapTrainer | None = None,
    clients: Sequence[int] | None = None,
    tolerance: float = 1e-5,
    **rest: Any,
) -> Update:
    """Fail unless every client's update is what it is alone, to the batch trainer's promise; return the updates."""
    trainer = trainer or VmapTrainer(task, device="cpu", **rest)
    numbers = clients or [40 + 3 * place for place in range(len(parts))]
    work = work_of(parts, TorchTrainer(task, device="cpu").initial(), training, numbers, guide)
    made = trainer.train(work)
    expected = alone(task, work, parts, **rest)
    for place, update in enumerate(expected):
        assert update.values.abs().max() > 1e-4
        scale = float(update.values.abs().max())
        assert torch.allclose(made.values[place], update.values, rtol=tolerance, atol=tolerance * scale)
        assert made.weight[place] == update.weight
        for given, own in ((made.sums, update.sums), (made.facts, update.facts)):
            assert given.keys() == own.keys()
            for name, value in own.items():
                assert torch.allclose(given[name][place], value, rtol=1e-5, atol=1e-6), name
    return made
