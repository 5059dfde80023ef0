"""One parameter's gradient, example by example, as factors that are multiplied only where that is cheaper.

A dense layer's gradient for one example is the product of what came in and what came back: its norm is known without
the product (Goodfellow 2015, arXiv:1510.01799), and the clipped sum is one product for all examples (Bu et al. 2022,
arXiv:2210.00038). Where the product is the smaller of both, it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from clients.per_example import lengths, weighted
from fedml_core.dense import product

__all__ = ["Lookup", "Outer", "Piece", "Positions", "Rows", "joined"]

# Of the terms that a sum over positions may cancel to nothing, while their rounding stays; see Positions.norms.
_ROUNDING = 2.0**-20
# What a float32 norm can miss of each number: squares below 2^-126 vanish, and so do products of two such numbers.
_SQUARE_MISSES, _PRODUCT_MISSES = 2.0**-62, 2.0**-52


class Piece(Protocol):
    """The gradients of n examples with respect to one parameter, by one use of it."""

    def norms(self) -> Tensor:
        """Return the norms (n,), never too small by more than clipping stays inside by."""
        ...

    def total(self, factors: Tensor) -> Tensor:
        """Return the sum of the gradients, each times its factor (n,)."""
        ...

    def rows(self) -> Tensor:
        """Return the gradients (n, *shape)."""
        ...


@dataclass(frozen=True)
class Rows:
    """Gradients that are there: (n, *shape)."""

    gradients: Tensor = field(repr=False)

    def norms(self) -> Tensor:
        """Return the norms."""
        return self._norms

    @cached_property
    def _norms(self) -> Tensor:
        return lengths(self.gradients)

    def total(self, factors: Tensor) -> Tensor:
        """Return the weighted sum."""
        return weighted(self.gradients, factors)

    def rows(self) -> Tensor:
        """Return them."""
        return self.gradients


@dataclass(frozen=True)
class Outer:
    """Products of a column (n, o) and a row (n, p). The columns are a bias's gradients, too."""

    columns: Rows = field(repr=False)
    across: Tensor = field(repr=False)

    def norms(self) -> Tensor:
        """Return the products of the norms; rounded up, for a tiny norm may be multiplied by a huge one."""
        width, length = self.columns.gradients.shape[1], self.across.shape[1]
        ours: Tensor = self.columns.norms() + width**0.5 * _SQUARE_MISSES
        theirs: Tensor = lengths(self.across) + length**0.5 * _SQUARE_MISSES
        return ours * theirs

    def total(self, factors: Tensor) -> Tensor:
        """Return one product for all."""
        return product((self.columns.gradients * factors.unsqueeze(1)).t(), self.across.t())

    def rows(self) -> Tensor:
        """Return the products."""
        return self.columns.gradients.unsqueeze(2) * self.across.unsqueeze(1)


@dataclass(frozen=True)
class Positions:
    """Sums over t positions of products: (n, t, o) and (n, t, p), where t^2 is smaller than o p."""

    columns: Tensor = field(repr=False)
    across: Tensor = field(repr=False)

    def norms(self) -> Tensor:
        """Return the norms, from the products of positions; rounded up, for the terms may cancel, or vanish."""
        found = (_gram(self.columns) * _gram(self.across)).sum(dim=(1, 2))
        most = (_at_least(self.columns) * _at_least(self.across)).sum(dim=1)
        return (found.clamp_min(0) + _ROUNDING * most.square()).sqrt()

    def total(self, factors: Tensor) -> Tensor:
        """Return one product for all."""
        columns = (self.columns * factors.view(-1, 1, 1)).flatten(0, 1)
        return product(columns.t(), self.across.flatten(0, 1).t())

    def rows(self) -> Tensor:
        """Return the sums."""
        return torch.bmm(self.columns.transpose(1, 2), self.across)


@dataclass(frozen=True)
class Lookup:
    """Rows of a table of `size` that were looked up: indices (n, t), and what came back for each, (n, t, p)."""

    indices: Tensor = field(repr=False)
    gradients: Tensor = field(repr=False)
    size: int

    def norms(self) -> Tensor:
        """Return the norms; positions that looked up the same row add up in it. Rounded up as Positions."""
        same = (self.indices.unsqueeze(1) == self.indices.unsqueeze(2)).to(self.gradients.dtype)
        found = (_gram(self.gradients) * same).sum(dim=(1, 2))
        most: Tensor = torch.linalg.vector_norm(self.gradients, dim=2)
        return (found.clamp_min(0) + _ROUNDING * most.sum(dim=1).square()).sqrt()

    def total(self, factors: Tensor) -> Tensor:
        """Return the table's gradient."""
        made = self.gradients.new_zeros(self.size, self.gradients.shape[2])
        return made.index_add_(0, self.indices.flatten(), (self.gradients * factors.view(-1, 1, 1)).flatten(0, 1))

    def rows(self) -> Tensor:
        """Return each example's table."""
        count, _, width = self.gradients.shape
        made = self.gradients.new_zeros(count, self.size, width)
        return made.scatter_add_(1, self.indices.unsqueeze(2).expand_as(self.gradients), self.gradients)


def joined(pieces: Sequence[Piece]) -> Piece:
    """Return the gradients of one parameter by all its uses: their sum, example by example, (n, size)."""
    if len(pieces) == 1:
        return pieces[0]
    return Rows(torch.stack([piece.rows().flatten(1) for piece in pieces]).sum(dim=0))


def _at_least(rows: Tensor) -> Tensor:
    """Return the norms (n, t) of rows (n, t, w), rounded up by what can vanish."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=2)
    return norms.add_(rows.shape[2] ** 0.5 * _PRODUCT_MISSES)


def _gram(rows: Tensor) -> Tensor:
    return torch.bmm(rows, rows.transpose(1, 2))
