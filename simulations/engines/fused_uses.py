"""Which examples a training uses, each once, and where the rows of every step are among them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simulations.packing import Visits

__all__ = ["Uses"]


@dataclass(frozen=True)
class Uses:
    """The examples that K clients visit, client by client, each client's in the order of its first visits.

    `rows` (M,): into the packed examples. `counts` (K,): how many each client uses. `by_step` (V,): places in `rows`,
    step by step and client by client; one that stands for no example points at the client's first. `again`: whether any
    example is visited twice.
    """

    rows: Tensor = field(repr=False)
    counts: NDArray[np.int64] = field(repr=False)
    by_step: Tensor = field(repr=False)
    again: bool

    @classmethod
    def of(cls, seen: Visits, sizes: NDArray[np.int64]) -> Uses:
        """Return the uses of clients that hold `sizes` (K,) examples, in the order of the visits."""
        clients, steps, batch = seen.rows.shape
        visited = seen.counts.sum(dim=1).numpy()
        # No example comes twice before all have come once, and only an order's last batch is not full.
        counts = np.minimum(sizes, visited)
        starts = (np.cumsum(counts) - counts)[:, None]
        flat, place = seen.rows.view(clients, steps * batch).numpy(), np.arange(steps * batch)
        first = place < counts[:, None]
        rows = flat[first]
        again = bool((counts < visited).any())
        if again:
            where = np.zeros(int(flat.max(initial=0)) + 1, dtype=np.int64)
            where[rows] = np.arange(len(rows))
            real = (np.arange(batch) < seen.counts.unsqueeze(2).numpy()).reshape(clients, -1)
            table = np.where(real, where[flat], starts)
        else:
            table = starts + np.where(first, place, 0)
        trains = (seen.counts > 0).t().numpy()
        by_step = table.reshape(clients, steps, batch).transpose(1, 0, 2)[trains].ravel()
        return cls(torch.from_numpy(rows), counts, torch.from_numpy(by_step), again)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Return where each client's examples begin, (K,)."""
        return np.cumsum(self.counts) - self.counts

    @property
    def owners(self) -> NDArray[np.int64]:
        """Return whose each example is, (M,)."""
        return np.repeat(np.arange(len(self.counts)), self.counts)
