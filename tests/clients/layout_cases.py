"""Models whose layers care about the order of numbers in memory, or must not: for tests of every layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedml_core.data import Examples
from tests.clients.trainer_cases import drawn

SIZE = 8


class Transformer(nn.Module):
    """Tokens are the columns of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * SIZE, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 3, 1, 2).reshape(len(x), SIZE, 3 * SIZE)
        return self.head(self.encoder(self.embed(tokens)).mean(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(3 * SIZE, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.cell(x.permute(0, 3, 1, 2).reshape(len(x), SIZE, 3 * SIZE))
        return self.head(outputs[:, -1])  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(_norm(norm, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(x + self.norms[1](self.second(inner)))


class ResNet(nn.Module):
    def __init__(self, norm: str = "group") -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), _norm(norm, 8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.block, self.up = _Block(8, norm), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4 * SIZE * SIZE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.block(self.stem(x))).flatten(1))  # type: ignore[no-any-return]


class Viewing(nn.Module):
    """Calls `.view` on activations, which only the default layout bears; `count` says how often it was called."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 3)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(len(x), -1)) * self.scale  # type: ignore[no-any-return]


def normed() -> nn.Module:
    return ResNet("batch")


def images(count: int = 18, seed: int = 0) -> Examples:
    targets = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed + 1))
    return Examples.of(drawn(count, 3, SIZE, SIZE, seed=seed), targets)


def _norm(name: str, channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels) if name == "group" else nn.BatchNorm2d(channels)
