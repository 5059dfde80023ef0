"""Products of large matrices by the fastest kernels that this torch has, in few shapes.

On some processors oneDNN's kernels are twice as fast as those behind `torch.mm`. It compiles one for every shape that
it meets, which takes milliseconds and about a megabyte, so rows are worked on in blocks of few sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = ["PADDING", "Threads", "added_up", "inner_products", "linear", "padded", "threads"]

PADDING = 128
"""Matrices of many rows have a multiple of this."""

_BLOCK = 1024
# Of one client's rows with each other: below this many, a compiled kernel saves less than the call to it costs.
_FEWEST, _STEP, _MOST = 48, 16, 256

# What is smaller is over before a second thread has begun; and wherever something else runs on its processor, each such
# piece of work would wait for it: on a busy machine all of them together take ten times as long as in one thread.
_BROAD_FLOPS, _BROAD_BYTES = 5e7, 16 << 20

_Product = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute in `count` threads inside."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Threads:
    """How many threads a piece of work gets: all `most` where it is large enough for them, by its shapes alone."""

    most: int

    def for_flops(self, flops: float) -> AbstractContextManager[None]:
        """Return a context for so many floating-point operations."""
        return threads(self.most if flops >= _BROAD_FLOPS else 1)

    def for_bytes(self, count: int) -> AbstractContextManager[None]:
        """Return a context for moving so many bytes."""
        return threads(self.most if count >= _BROAD_BYTES else 1)


def padded(count: int) -> int:
    """Return the number of rows to hold `count` in."""
    return -(-count // PADDING) * PADDING


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Fill `out` (r, o) with `rows` (r, i) times the transpose of `weight` (o, i), and the bias (o,) added.

    Args: rows: `padded` many.
    """
    product = _product()
    for block in _blocks(len(rows)):
        if product is None:
            torch.mm(rows[block], weight.t(), out=out[block])
        else:
            out[block] = product(rows[block], weight)
    return out if bias is None else out.add_(bias)


def added_up(errors: Tensor, rows: Tensor) -> Tensor:
    """Return the transpose of `errors` (r, o) times `rows` (r, i), both `padded` with zeros: (o, i)."""
    product, total = _product(), None
    for block in _blocks(len(rows)):
        if product is None:
            part = torch.mm(errors[block].t(), rows[block])
        else:
            part = product(errors[block].t(), rows[block].t())
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def inner_products(rows: Tensor, first: int, last: int, out: Tensor) -> None:
    """Fill `out` (m, m) with the products of rows `first` to `last` with each other; reads some of those after them."""
    product, count = _product(), last - first
    if product is None or not _FEWEST <= count <= _MOST or (end := first + -(-count // _STEP) * _STEP) > len(rows):
        held = rows[first:last]
        torch.mm(held, held.t(), out=out)
        return
    held = rows[first:end]
    out.copy_(product(held, held)[:count, :count])


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))


@cache
def _product() -> _Product | None:
    """Return oneDNN's product of one matrix with the transpose of another, or None where it is not to be had.

    It has no public name, so it is believed only after it has been seen to work.
    """
    try:
        call = torch.ops.mkldnn._linear_pointwise

        def product(left: Tensor, right: Tensor) -> Tensor:
            found: Tensor = call(left, right, None, "none", [], "")
            return found

        left, right = torch.arange(12.0).view(3, 4), torch.arange(8.0).view(4, 2)
        right_first = torch.arange(8.0).view(2, 4)
        good = torch.equal(product(left, right_first), left @ right_first.t())
        return product if good and torch.equal(product(left, right.t()), left @ right) else None
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None
