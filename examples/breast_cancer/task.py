"""Benign or malignant: the Wisconsin breast cancer data, held by five hospitals of unequal size."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from fedml_core import ClientData, Examples, Task
from simulations import site_share


def model() -> nn.Module:
    """Return a logistic regression on 30 measurements."""
    return nn.Linear(30, 2)


@cache
def patients() -> tuple[Examples, Examples]:
    """Return training and test patients. Measurements are scaled by public ranges, not by the patients' own."""
    data = load_breast_cancer()
    measured = torch.tensor(data.data, dtype=torch.float32)
    scaled = torch.asinh(measured / TYPICAL) - 0.88
    labels = torch.tensor(data.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return Examples.of(scaled[train], labels[train]), Examples.of(scaled[test], labels[test])


def sensitivity(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1 for each malignant tumour (class 0) that was found; divided by all patients."""
    return ((outputs.argmax(dim=1) == 0) & (targets == 0)).float()


def site(settings: Mapping[str, Any]) -> ClientData:
    """Return what one hospital holds; here, its share of the pool."""
    return site_share(task, settings)


# The magnitude of each measurement, as a textbook gives it: radius, texture, perimeter, area, smoothness, compactness,
# concavity, concave points, symmetry, fractal dimension; each as mean, standard error and worst.
TYPICAL = torch.tensor(
    [
        [14, 19, 92, 650, 0.1, 0.1, 0.09, 0.05, 0.18, 0.06],
        [0.4, 1.2, 2.9, 40, 0.007, 0.025, 0.03, 0.01, 0.02, 0.004],
        [16, 26, 107, 880, 0.13, 0.25, 0.27, 0.11, 0.29, 0.08],
    ]
).flatten()

task = Task.classification(
    model=model,
    classes=2,
    class_names=("malignant", "benign"),
    metrics={"malignant_found": sensitivity},
    train_data=lambda: patients()[0],
    test_data=lambda: patients()[1],
    site_data=site,
)
