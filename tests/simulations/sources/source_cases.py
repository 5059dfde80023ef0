"""What the tests of sources share: clients of different sizes, and files that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedml_core import ClientData, Examples
from fedml_core.data import Data
from simulations.population import Population
from simulations.sources import Generated, write_packed


def rows(client: int, count: int) -> Examples:
    """Return `count` examples that tell whose they are and which."""
    inputs = torch.arange(count * 3, dtype=torch.float32).reshape(count, 3) + 100 * client
    return Examples.of(inputs, torch.arange(count) % 2)


def held_aside(client: int) -> ClientData:
    """Return client + 1 examples; every other client keeps two more aside."""
    return ClientData(rows(client, client + 1), rows(client + 50, 2) if client % 2 else None)


def people(count: int = 7) -> Generated:
    return Generated(count, held_aside)


def same(one: Data | None, other: Data | None) -> bool:
    if one is None or other is None:
        return one is other
    assert isinstance(one, Examples)
    assert isinstance(other, Examples)
    pairs = [*zip(one.inputs, other.inputs, strict=True), (one.targets, other.targets)]
    weighted = (one.weights is None) == (other.weights is None)
    if one.weights is not None and other.weights is not None:
        pairs.append((one.weights, other.weights))
    return weighted and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def agree(one: Population, other: Population) -> bool:
    """Say whether both hold the same clients, each by itself and many at once."""
    everyone = range(len(other))
    alone = all(
        same(one.load(client).train, other.load(client).train) and same(one.load(client).test, other.load(client).test)
        for client in everyone
    )
    some = [client for client in (5, 0, 3) if client in everyone]
    packed, expected = one.pack(some), other.pack(some)
    assert packed is not None
    assert expected is not None
    counts = one.counts(some)
    known = counts is None or counts.tolist() == expected.counts.tolist()
    together = same(packed.examples, expected.examples) and packed.offsets.tolist() == expected.offsets.tolist()
    return len(one) == len(other) and alone and together and known


def arrays_of(client: ClientData) -> dict[str, Any]:
    """Return a client's arrays under the names that files use."""
    named: dict[str, Any] = {}
    for prefix, part in (("", client.train), ("test_", client.test)):
        if isinstance(part, Examples):
            named |= {f"{prefix}inputs": part.inputs[0].numpy(), f"{prefix}targets": part.targets.numpy()}
    return named


def packed_npz(path: Path, population: Population) -> None:
    """Write a packed .npz as a user would, with NumPy alone."""
    train = [population.load(client).train for client in range(len(population))]
    parts = [part for part in train if isinstance(part, Examples)]
    offsets = np.concatenate(([0], np.cumsum([len(part) for part in parts])))
    inputs = np.concatenate([part.inputs[0].numpy() for part in parts])
    np.savez(path, inputs=inputs, targets=np.concatenate([part.targets.numpy() for part in parts]), offsets=offsets)


def packed(path: Path, population: Population) -> Path:
    write_packed(path, population)
    return path
