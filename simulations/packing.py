"""The examples of many clients as one tensor and offsets, and the order in which each visits its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.data import Examples
from fedml_core.minibatches import epoch_orders
from fedml_core.randomness import Key
from fedml_core.training import Training


@dataclass(frozen=True)
class Packed:
    """K clients' examples one after the other: client k's are rows offsets[k] to offsets[k + 1] of `examples`."""

    examples: Examples = field(repr=False)
    offsets: NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(cls, parts: Sequence[Examples]) -> Packed:
        """Return the parts as one; one without weights counts 1 an example where others have weights."""
        inputs = tuple(torch.cat(column) for column in zip(*(part.inputs for part in parts), strict=True))
        weights = None
        if any(part.weights is not None for part in parts):
            weights = torch.cat([torch.ones(len(p)) if p.weights is None else p.weights.float() for p in parts])
        examples = Examples(inputs, torch.cat([part.targets for part in parts]), weights)
        return cls(examples, np.concatenate(([0], np.cumsum([len(part) for part in parts]))).astype(np.int64))

    def __len__(self) -> int:
        """Return K."""
        return len(self.offsets) - 1

    @property
    def counts(self) -> NDArray[np.int64]:
        """Return each client's number of examples, (K,)."""
        return np.diff(self.offsets)

    def take(self, places: NDArray[np.int64]) -> Packed:
        """Return some of the clients, in the order of `places`."""
        counts = self.counts[places]
        starts = np.repeat(self.offsets[places], counts)
        ends = np.cumsum(counts)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
        return Packed(self.examples.take(torch.from_numpy(starts + within)), np.concatenate(([0], ends)))


@dataclass(frozen=True)
class Visits:
    """Who trains on what at each step: `rows` (K, S, B) into packed examples, `counts` (K, S), how many are real.

    Clients are sorted by their number of steps, longest first, so that those still training at step s are a prefix;
    `order` (K,) says which client each row is. A row's unused places point at the client's first example.
    """

    rows: Tensor = field(repr=False)
    counts: Tensor = field(repr=False)
    order: NDArray[np.int64] = field(repr=False)

    @property
    def active(self) -> list[int]:
        """Return for each step how many clients, a prefix, still train."""
        return [int(count) for count in (self.counts > 0).sum(dim=0)]


def visits(
    packed: Packed, training: Training, purpose: tuple[Key, ...], clients: Sequence[int], *, skip_single: bool = False
) -> Visits:
    """Return the visits of `clients` to their packed examples: exactly those that a trainer alone would make.

    Args: purpose: the clients' key without its last part. skip_single: leave out a last batch of one example, as
        `fedml_core.minibatches.training_order` does.
    """
    counts, size = packed.counts, training.batch_size
    single = skip_single & (counts > 1) & (counts % size == 1)
    whole = counts - single
    each = -(-whole // size)
    steps = training.epochs * each if training.steps is None else np.full(len(counts), training.steps)
    order = np.argsort(-steps, kind="stable")
    numbers = np.asarray(clients, dtype=np.int64)[order]
    whole, each, steps, counts = whole[order], each[order], steps[order], counts[order]
    rows = torch.empty((len(counts), int(steps.max(initial=0)), size), dtype=torch.int64)
    starts, table = packed.offsets[:-1][order][:, None], rows.numpy().reshape(len(counts), rows.shape[1] * size)
    table[:] = starts
    real = np.zeros(rows.shape[:2], dtype=np.int64)
    step = np.arange(rows.shape[1])
    for number in range(int((-(-steps // np.maximum(each, 1))).max(initial=0))):
        orders = epoch_orders(purpose, number, numbers, counts).numpy()
        taken = np.clip(whole[:, None] - (step - number * each[:, None]) * size, 0, size)
        taken[(step < number * each[:, None]) | (step >= np.minimum(steps, (number + 1) * each)[:, None])] = 0
        real += taken
        if number == 0:
            # Everybody's first order begins at the first step.
            width = min(orders.shape[1], table.shape[1])
            np.add(starts, orders[:, :width], out=table[:, :width], where=np.arange(width) < whole[:, None])
            continue
        client, at = np.nonzero(taken)
        place = (at - number * each[client])[:, None] * size + np.arange(size)
        inside = place < whole[client, None]
        picked = orders[client[:, None], np.minimum(place, orders.shape[1] - 1)]
        rows.numpy()[client, at] = starts[client] + np.where(inside, picked, 0)
    return Visits(rows, torch.from_numpy(real), order)
