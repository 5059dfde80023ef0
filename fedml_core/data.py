"""Examples as a trainer takes them: inputs, targets, and optionally one weight an example."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import default_collate

from fedml_core.errors import TaskError


@runtime_checkable
class MapDataset(Protocol):
    """Any map-style data set, such as torch's: item i is `(input, ..., target)`."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return example `index` as a tuple whose last part is the target."""
        ...


@dataclass(frozen=True)
class Examples:
    """n examples in memory, or one batch of them.

    `inputs`: a tuple of tensors of shape (n, ...), one for each argument of the model's `forward`; `targets`: (n, ...);
    `weights`: (n,) non-negative, or None for 1 each.

    Example:
        >>> len(Examples.of(torch.zeros(5, 3), torch.zeros(5)))
        5
    """

    inputs: tuple[Tensor, ...] = field(repr=False)
    targets: Tensor = field(repr=False)
    weights: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check that every part is a tensor with the same number of examples."""
        count = _count("the targets", self.targets)
        for place, tensor in enumerate(self.inputs):
            if (held := _count(f"input {place}", tensor)) != count:
                raise TaskError(f"input {place} has {held} examples and the targets have {count}; they must agree")
        if self.weights is None:
            return
        if _count("the weights", self.weights) != count or self.weights.dim() != 1:
            raise TaskError(f"example weights must have shape ({count},), got {tuple(self.weights.shape)}")
        # Written so that NaN is refused too.
        if not bool(((self.weights >= 0) & (self.weights < math.inf)).all()):
            raise TaskError("example weights must be finite and >= 0; mend or leave out those that are not")

    @classmethod
    def of(cls, *tensors: Tensor, weights: Tensor | None = None) -> Examples:
        """Return the examples with these inputs; the last tensor is the targets."""
        return cls(tensors[:-1], tensors[-1], weights)

    def __len__(self) -> int:
        """Return n."""
        return len(self.targets)

    def take(self, index: Tensor | Sequence[int]) -> Examples:
        """Return the examples at `index`, in its order."""
        at = torch.as_tensor(index, dtype=torch.long)
        weights = None if self.weights is None else self.weights[at]
        return Examples(tuple(tensor[at] for tensor in self.inputs), self.targets[at], weights)

    def to(self, device: torch.device) -> Examples:
        """Return the examples on `device`."""
        weights = None if self.weights is None else self.weights.to(device)
        return Examples(tuple(tensor.to(device) for tensor in self.inputs), self.targets.to(device), weights)


Data = Examples | MapDataset


@dataclass(frozen=True)
class ClientData:
    """What one client holds: examples to train on and, if it keeps some aside, examples to evaluate on."""

    train: Data
    test: Data | None = None


def batch_of(data: Data, index: Tensor) -> Examples:
    """Return the examples at `index` as one batch, collating a map-style data set."""
    if isinstance(data, Examples):
        return data.take(index)
    items = [data[i] for i in index.tolist()]
    if not isinstance(items[0], tuple | list) or len(items[0]) < 2:
        # Anything else would be unpacked all the same: a tensor along its first dimension, a dict into its keys.
        raise TaskError(
            f"a data set's item must be (input, ..., target), got {_shape_of(items[0])}; return at least two"
        )
    *inputs, targets = default_collate(items)
    return Examples(tuple(inputs), targets)


def batches(data: Data, batch_size: int) -> Iterator[Examples]:
    """Yield `data` in order, `batch_size` examples at a time; the last batch may be smaller."""
    count = len(data)
    for start in range(0, count, batch_size):
        yield batch_of(data, torch.arange(start, min(start + batch_size, count)))


def targets_of(data: Data) -> Tensor:
    """Return every target as one tensor of shape (n, ...)."""
    if isinstance(data, Examples):
        return data.targets
    return cast(Tensor, default_collate([data[i][-1] for i in range(len(data))]))


def _count(name: str, tensor: object) -> int:
    if not isinstance(tensor, Tensor) or tensor.dim() == 0:
        shown = "a single number" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TaskError(f"{name} must be a tensor of shape (n, ...), got {shown}")
    return len(tensor)


def _shape_of(item: object) -> str:
    return f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else type(item).__name__
