"""Which rows are worked on when: steps in segments, and in each the clients with equally many steps together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simulations.engines.fused_stack import Dense
from simulations.packing import Packed, Visits

# What one core of today does with all clients' weights in its caches and beyond; the best segment is broad.
_FLOPS_A_SECOND = 1e11
_CACHED_BYTES_A_SECOND, _BYTES_A_SECOND, _CACHE_BYTES = 1e11, 2e10, 12 << 20
# The same of products over all rows at once, and of inner products client by client; what a call costs beside.
_BROAD_FLOPS_A_SECOND, _INNER_FLOPS_A_SECOND, _CALL_S = 1.5e11, 1e11, 1e-5
# Below this many steps, one product a segment saves less than the bookkeeping costs.
_FEWEST = 4


@dataclass(frozen=True)
class Group:
    """Clients `first` to `last` of the sorted ones, which take `steps` steps; their rows start at `start`."""

    first: int
    last: int
    steps: int
    start: int


@dataclass(frozen=True)
class Segment:
    """Some consecutive steps: `first`, and how many clients each has in `active`.

    `rows` (r,): into the examples, group by group, client by client, step by step. `pads`: places in `rows` that stand
    for no example. `by_step`: places in `rows` step by step, client by client, or None where that is their order.
    """

    first: int
    active: tuple[int, ...]
    groups: tuple[Group, ...]
    rows: Tensor = field(repr=False)
    pads: Tensor = field(repr=False)
    by_step: Tensor | None = field(repr=False)


def segments(visits: Visits, together: int) -> Iterator[Segment]:
    """Yield the visits in segments of at most `together` steps."""
    active, size = visits.active, visits.rows.shape[2]
    steps = (visits.counts > 0).sum(dim=1).numpy()
    unreal = torch.arange(size) >= visits.counts.unsqueeze(2)
    for first in range(0, len(active), together):
        here = tuple(active[first : first + together])
        left = np.clip(steps[: here[0]] - first, 0, len(here))
        groups = _groups(left, size)
        parts = [(slice(g.first, g.last), slice(first, first + g.steps)) for g in groups]
        rows = torch.cat([visits.rows[part].reshape(-1) for part in parts])
        pads = torch.cat([unreal[part].reshape(-1) for part in parts]).nonzero().squeeze(1)
        by_step = None if len(here) == 1 else _by_step(left, here, size)
        yield Segment(first, here, groups, rows, pads, by_step)


def together(layer: Dense, visits: Visits, *, hidden: bool) -> int:
    """Return in how many steps' worth of rows the first layer's weights are best touched.

    Touching them moves 12 bytes a weight and client; not touching them for a segment costs products of all its rows
    with each other. The sum is least at the square root of their ratio.
    """
    steps, size = visits.rows.shape[1], visits.rows.shape[2]
    weights = layer.inputs * layer.outputs
    cached = 4 * weights * len(visits.rows) <= _CACHE_BYTES
    touch = 12 * weights / (_CACHED_BYTES_A_SECOND if cached else _BYTES_A_SECOND)
    avoid = size * size * (1.5 * layer.inputs + layer.outputs) / _FLOPS_A_SECOND
    best = math.sqrt(touch / avoid) if hidden or layer.inputs > size else 1.0
    if min(best, steps) < _FEWEST:
        return 1
    return steps if steps <= 2 * best else math.ceil(steps / round(steps / best))


def dual_pays(layer: Dense, packed: Packed, seen: Visits) -> bool:
    """Return whether the dual form of the first layer's descent costs less than its weights would."""
    steps = seen.rows.shape[1]
    visits, clients, weights = int(seen.counts.sum()), len(seen.rows), layer.inputs * layer.outputs
    counts = packed.counts.astype(np.float64)
    cached = 4 * weights * clients <= _CACHE_BYTES
    # Forward and backward of every visit, and the weights once for each step or once for some together.
    touch = 12 * weights / (_CACHED_BYTES_A_SECOND if cached else _BYTES_A_SECOND)
    held = 4 * visits * weights / _FLOPS_A_SECOND + clients * steps * touch / together(layer, seen, hidden=True)
    broad = 4 * float(counts.sum()) * weights / _BROAD_FLOPS_A_SECOND
    inner = 2 * float((counts**2).sum()) * layer.inputs / _INNER_FLOPS_A_SECOND
    # Every step meets all examples of its client.
    meet = 2 * visits * float(counts.mean()) * layer.outputs / _FLOPS_A_SECOND
    return broad + inner + meet + clients * _CALL_S < held


def _groups(left: NDArray[np.int64], size: int) -> tuple[Group, ...]:
    bounds = [0, *(np.flatnonzero(np.diff(left)) + 1).tolist(), len(left)]
    groups, start = [], 0
    for first, last in pairwise(bounds):
        groups.append(Group(first, last, int(left[first]), start))
        start += (last - first) * groups[-1].steps * size
    return tuple(groups)


def _by_step(left: NDArray[np.int64], active: tuple[int, ...], size: int) -> Tensor:
    starts = (np.cumsum(left) - left) * size
    places = [(starts[:count, None] + step * size + np.arange(size)).ravel() for step, count in enumerate(active)]
    return torch.from_numpy(np.concatenate(places))
