"""A small task of two classes, which can be learnt, for whole simulations of protocols."""

from __future__ import annotations

import torch
from torch import nn

from fedml_core import Examples, Task


def points(count: int, seed: int) -> Examples:
    drawn = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return Examples.of(drawn, (drawn[:, 0] > 0).long())


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))


TASK = Task.classification(model=dense, classes=2, train_data=lambda: points(240, 1), test_data=lambda: points(40, 2))
