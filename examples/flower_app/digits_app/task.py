"""Handwritten digits, shared out over Flower's nodes by their `partition-id` and `num-partitions`."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from fedml_core import Examples, Task
from simulations import site_share


def model() -> nn.Module:
    """Return a small dense network."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def images() -> Examples:
    """Return every image."""
    digits = load_digits()
    return Examples.of(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))


task = Task.classification(model=model, classes=10, train_data=images)


def part(partition: int, partitions: int) -> Examples:
    """Return what one node holds."""
    held = site_share(task, {"client": partition, "clients": partitions}).train
    assert isinstance(held, Examples)
    return held
