"""Which examples K clients train on at each step, laid out so that a step is a few views of one gather."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.data import Examples
from simulations.packing import Packed, Visits

__all__ = ["Batches", "Group", "Plan", "Step"]

# One gather serves many steps; this bounds what it holds beside the clients' data.
_GATHERED_BYTES = 64 << 20


@dataclass(frozen=True)
class Group:
    """Some of the clients of a step, whose batches have `count` examples: a slice, or their places."""

    places: slice | Tensor = field(repr=False)
    count: int
    whole: bool


@dataclass(frozen=True)
class Step:
    """Step `number` of the first `active` clients; its rows start at `first` in the plan's columns."""

    number: int
    active: int
    first: int
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Batches:
    """A step's examples: inputs (m, B, ...), targets (m, B, ...)."""

    inputs: tuple[Tensor, ...] = field(repr=False)
    targets: Tensor = field(repr=False)


@dataclass(frozen=True)
class Plan:
    """All steps of K clients, longest first, in columns with one row a step and client: step by step.

    `order` (K,): which client each row of the chunk is. `rows` (R, B): into the packed examples; `weights` (R, B), of
    each example, 0 where a place is unused; `shares` (R, B): what its loss contributes to its batch's mean.
    `who` (R,): the client's place. `steps_taken` (K,), `totals` (K,): each client's whole weight.
    """

    order: NDArray[np.int64] = field(repr=False)
    steps: tuple[Step, ...] = field(repr=False)
    rows: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    shares: Tensor = field(repr=False)
    who: Tensor = field(repr=False)
    steps_taken: Tensor = field(repr=False)
    totals: Tensor = field(repr=False)
    weighted: bool = False

    @classmethod
    def of(cls, packed: Packed, visits: Visits, *, grouped: bool, device: torch.device) -> Plan:
        """Return the plan of `visits`.

        Args: grouped: batches of different sizes are apart, instead of filled up. device: where the columns are.
        """
        counts, rows, order = visits.counts.numpy(), visits.rows, visits.order
        taken = (counts > 0).sum(axis=1)
        if grouped and len(counts):
            # Clients whose last batches are of one size stand together, so that a group is a slice where it can be.
            last = counts[np.arange(len(counts)), np.maximum(taken - 1, 0)]
            better = np.lexsort((-last, -taken))
            counts, rows, order, taken = counts[better], rows[torch.from_numpy(better)], order[better], taken[better]
        width = int(counts.max(initial=1))
        # The same examples step by step: of each step only the clients that take it.
        step, who = np.nonzero(counts.T > 0)
        flat = rows.numpy()[who, step, :width]
        real = np.arange(width) < counts[who, step][:, None]
        # A place that is not used holds an example of the batch, which can bring no infinity that is not there anyway.
        flat = np.where(real, flat, flat[:, :1])
        table = torch.from_numpy(flat).to(device)
        weights, shares = _weighed(packed.examples.weights, table, torch.from_numpy(real).to(device))
        return cls(
            order,
            tuple(_steps(counts, grouped=grouped, width=width, device=device)),
            table,
            weights,
            shares,
            torch.from_numpy(who).to(device),
            torch.from_numpy(taken),
            _totals(packed)[order],
            packed.examples.weights is not None,
        )

    def batches(self, examples: Examples) -> Iterator[tuple[Step, Batches]]:
        """Yield each step with its examples, which must be on the plan's device."""
        columns = (*examples.inputs, examples.targets)
        row_bytes = sum(column[:1].numel() * column.element_size() for column in columns) * self.rows.shape[1]
        limit = max(1, _GATHERED_BYTES // max(1, row_bytes))
        for block in _blocks(self.steps, limit):
            first, end = block[0].first, block[-1].first + block[-1].active
            index = self.rows[first:end]
            gathered = [
                column.index_select(0, index.reshape(-1)).view(*index.shape, *column.shape[1:]) for column in columns
            ]
            for step in block:
                at = slice(step.first - first, step.first - first + step.active)
                *inputs, targets = (column[at] for column in gathered)
                yield step, Batches(tuple(inputs), targets)


def _steps(counts: NDArray[np.int64], *, grouped: bool, width: int, device: torch.device) -> Iterator[Step]:
    first = 0
    for number in range(counts.shape[1]):
        active = int((counts[:, number] > 0).sum())
        groups = tuple(_groups(counts[:active, number], device)) if grouped else (Group(slice(0, active), width, True),)
        yield Step(number, active, first, groups)
        first += active


def _groups(counts: NDArray[np.int64], device: torch.device) -> Iterator[Group]:
    for count in np.unique(counts)[::-1]:
        places = np.flatnonzero(counts == count)
        start, end = int(places[0]), int(places[-1]) + 1
        if end - start == len(places):
            yield Group(slice(start, end), int(count), len(places) == len(counts))
        else:
            yield Group(torch.from_numpy(places).to(device), int(count), False)


def _blocks(steps: tuple[Step, ...], limit: int) -> Iterator[list[Step]]:
    block: list[Step] = []
    for step in steps:
        if block and step.first + step.active - block[0].first > limit:
            yield block
            block = []
        block.append(step)
    if block:
        yield block


def _weighed(weights: Tensor | None, rows: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    if weights is None:
        each = real.float()
        return each, each / each.sum(dim=1, keepdim=True)
    each = weights.float().to(rows.device)[rows] * real
    # A batch whose weights are all 0 contributes nothing.
    return each, each / each.sum(dim=1, keepdim=True).clamp_min(torch.finfo(each.dtype).tiny)


def _totals(packed: Packed) -> Tensor:
    weights = packed.examples.weights
    if weights is None:
        return torch.from_numpy(packed.counts.astype(np.float64))
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), weights.cpu().double().cumsum(0)])[packed.offsets]
    return ends.diff()
