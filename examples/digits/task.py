"""Handwritten digits (scikit-learn's 1,797 images of 8 x 8 pixels), held by clients that see different digits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from fedml_core import ClientData, Examples, Task
from simulations import site_share


def model() -> nn.Module:
    """Return a small dense network."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@cache
def images() -> tuple[Examples, Examples]:
    """Return training and test images, the same split every time."""
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return Examples.of(pixels[train], labels[train]), Examples.of(pixels[test], labels[test])


def site(settings: Mapping[str, Any]) -> ClientData:
    """Return what one site holds; here, a client's share of the pool. A real site would read its own files."""
    return site_share(task, settings)


task = Task.classification(
    model=model,
    classes=10,
    train_data=lambda: images()[0],
    test_data=lambda: images()[1],
    site_data=site,
)
