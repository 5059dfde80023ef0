"""A regression: how far diabetes has progressed after a year, from ten measurements of 442 patients in six clinics."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import nn

from fedml_core import ClientData, Examples, Task
from simulations import site_share


def model() -> nn.Module:
    """Return a linear regression."""
    return nn.Linear(10, 1)


@cache
def patients() -> tuple[Examples, Examples]:
    """Return training and test patients; the target is progression in hundreds, the inputs have unit scale."""
    data = load_diabetes()
    inputs = torch.tensor(data.data, dtype=torch.float32) * len(data.target) ** 0.5
    progression = torch.tensor(data.target, dtype=torch.float32) / 100
    train, test = train_test_split(torch.arange(len(progression)), test_size=0.2, random_state=0)
    return Examples.of(inputs[train], progression[train]), Examples.of(inputs[test], progression[test])


def site(settings: Mapping[str, Any]) -> ClientData:
    """Return what one clinic holds; here, its share of the pool."""
    return site_share(task, settings)


task = Task.regression(
    model=model,
    train_data=lambda: patients()[0],
    test_data=lambda: patients()[1],
    site_data=site,
)
