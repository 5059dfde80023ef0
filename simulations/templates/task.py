"""The task: what is learned, from what, and how well. Every runner uses this file, on the server and at every site."""

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
    """Return the model: any torch module."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@cache
def images() -> tuple[Examples, Examples]:
    """Return training and test examples; replace these handwritten digits by your own data."""
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return Examples.of(pixels[train], labels[train]), Examples.of(pixels[test], labels[test])


def site(settings: Mapping[str, Any]) -> ClientData:
    """Return what a real site holds; `settings` is the [data] table of its site.toml.

    Here, a simulated client's share, to try several sites out on one machine. A real site reads its own files.
    """
    return site_share(task, settings)


# Integer targets from 0 to classes - 1 for classification; there is Task.regression, and Task for anything else.
task = Task.classification(
    model=model,
    classes=10,
    train_data=lambda: images()[0],  # a simulation shares these out over its clients
    test_data=lambda: images()[1],  # the server evaluates the model on these
    site_data=site,
)
