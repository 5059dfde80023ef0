"""Clients' examples on a GPU: a pool that fits stays there for the whole run; what does not is sent without waiting.

A gather on the device moves numbers of rows over the bus instead of the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.data import ClientData, Examples
from simulations.packing import Packed
from simulations.population import Partitioned, Population

__all__ = ["Resident", "resident", "uploaded"]

# The share of a device's free memory that a pool may take; the rest is for models and what steps make.
_SHARE = 0.25


@dataclass(frozen=True)
class Resident:
    """A population whose clients share out one pool, a copy of which is on `device`.

    Guarantees: gives what `clients` gives; what is packed is on the device.
    """

    clients: Partitioned
    device: torch.device
    _there: Partitioned = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Copy the pool."""
        pool = self.clients.pool
        assert isinstance(pool, Examples)
        object.__setattr__(self, "_there", dataclasses.replace(self.clients, pool=pool.to(self.device)))

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.clients)

    def load(self, client: int) -> ClientData:
        """Return one client's data, on the CPU."""
        return self.clients.load(client)

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64] | None:
        """Return how many training examples each has."""
        return self.clients.counts(clients)

    def pack(self, clients: Sequence[int]) -> Packed | None:
        """Return the clients' training examples as one, gathered on the device."""
        return self._there.pack(clients)


_IN_USE: WeakValueDictionary[tuple[int, str], Resident] = WeakValueDictionary()


def resident(population: Population, device: torch.device) -> Population:
    """Return the population with its pool on a CUDA device, if it has one that fits; otherwise as it is.

    All who ask while it is in use share one copy.
    """
    if device.type != "cuda" or not isinstance(population, Partitioned) or not isinstance(population.pool, Examples):
        return population
    # Whoever holds the copy holds the population, so that its identity is no other's meanwhile.
    if (known := _IN_USE.get((id(population), str(device)))) is not None:
        return known
    free, _ = torch.cuda.mem_get_info(device)
    if _bytes(population.pool) > _SHARE * free:
        return population
    made = _IN_USE[id(population), str(device)] = Resident(population, device)
    return made


def uploaded(examples: Examples, device: torch.device) -> Examples:
    """Return the examples on `device`; from memory to a GPU, the copies go on while this process does something else.

    Who uses them on the device's current stream waits for them there, and what they were copied from may be let go.
    """
    if device.type != "cuda" or examples.targets.device.type != "cpu":
        return examples.to(device)
    # Only from pages that cannot be moved does a copy go on by itself; torch keeps them until it is over.
    inputs = tuple(_sent(tensor, device) for tensor in examples.inputs)
    weights = None if examples.weights is None else _sent(examples.weights, device)
    return _unchecked(inputs, _sent(examples.targets, device), weights)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True)


def _unchecked(inputs: tuple[Tensor, ...], targets: Tensor, weights: Tensor | None) -> Examples:
    """Return examples that were checked where they came from: to check them again would wait for the device."""
    made = Examples(inputs, targets)
    if weights is not None:
        object.__setattr__(made, "weights", weights)
    return made


def _bytes(examples: Examples) -> int:
    columns = (*examples.inputs, examples.targets, *([] if examples.weights is None else [examples.weights]))
    return sum(column.numel() * column.element_size() for column in columns)
