"""Iris flowers, read from LIBSVM text: federated multinomial logistic regression."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_svmlight_file
from sklearn.model_selection import train_test_split
from torch import nn

from fedml_core import ClientData, Examples, Task
from simulations import site_share

FILE = Path(__file__).with_name("iris.libsvm")


def model() -> nn.Module:
    """Return a multinomial logistic regression on four measurements in centimetres."""
    return nn.Linear(4, 3)


@cache
def flowers() -> tuple[Examples, Examples]:
    """Return training and test flowers; labels 1 to 3 in the file become 0 to 2."""
    sparse, labels = load_svmlight_file(str(FILE), n_features=4)
    measured, kinds = torch.tensor(sparse.toarray(), dtype=torch.float32), torch.tensor(labels).long() - 1
    train, test = train_test_split(torch.arange(len(kinds)), test_size=0.3, random_state=0, stratify=kinds)
    return Examples.of(measured[train], kinds[train]), Examples.of(measured[test], kinds[test])


def site(settings: Mapping[str, Any]) -> ClientData:
    """Return what one garden holds; here, its share of the pool."""
    return site_share(task, settings)


task = Task.classification(
    model=model,
    classes=3,
    class_names=("setosa", "versicolor", "virginica"),
    train_data=lambda: flowers()[0],
    test_data=lambda: flowers()[1],
    site_data=site,
)
