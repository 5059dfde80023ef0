"""Handwritten digits (scikit-learn's 1,797 images of 8 x 8 pixels), held by clients that see different digits.

`task` is a small network; `linear` a linear model on pixels and edges, which noise on its parameters harms less.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from fedml_core import ClientData, Examples, Task
from simulations import site_share


def model() -> nn.Module:
    """Return a small dense network."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def linear_model() -> nn.Module:
    """Return a multinomial logistic regression on what `edges` makes of an image, from zeros."""
    layer = nn.Linear(176, 10)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@cache
def images() -> tuple[Examples, Examples]:
    """Return training and test images, the same split every time."""
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return Examples.of(pixels[train], labels[train]), Examples.of(pixels[test], labels[test])


@cache
def edges() -> tuple[Examples, Examples]:
    """Return the same images as 64 pixels and the 112 differences between neighbours: nothing is learned from data."""
    train, test = (Examples.of(_with_edges(part.inputs[0]), part.targets) for part in images())
    return train, test


def _with_edges(pixels: Tensor) -> Tensor:
    image = pixels.view(-1, 8, 8)
    across, down = image.diff(dim=2).abs().flatten(1), image.diff(dim=1).abs().flatten(1)
    return torch.cat([pixels, across, down], dim=1) - 0.3


def site(settings: Mapping[str, Any]) -> ClientData:
    """Return what one site holds; here, a client's share of the pool. A real site would read its own files."""
    return site_share(task, settings)


def linear_site(settings: Mapping[str, Any]) -> ClientData:
    """Return the same share for the linear model."""
    return site_share(linear, settings)


task = Task.classification(
    model=model,
    classes=10,
    train_data=lambda: images()[0],
    test_data=lambda: images()[1],
    site_data=site,
)
linear = Task.classification(
    model=linear_model,
    classes=10,
    train_data=lambda: edges()[0],
    test_data=lambda: edges()[1],
    site_data=linear_site,
)
