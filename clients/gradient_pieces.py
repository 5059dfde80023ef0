"""One parameter's gradient, example by example, as factors that are multiplied only where that is cheaper.

A dense layer's gradient for one example is the product of what came in and what came back: its norm is known without
the product (Goodfellow 2015, arXiv:1510.01799), and the clipped sum is one product for all examples (Bu et al. 2022,
arXiv:2210.00038). Where the product is the smaller of both, it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from clients.per_example import weighted
from fedml_core.dense import _FEWEST, _NAME, _product

__all__ = ["Lookup", "Outer", "Piece", "Positions", "Rows", "joined", "product"]

# Of the terms that a sum over positions may cancel to nothing, while their rounding stays; see Positions.squares.
_ROUNDING = 2.0**-20


class Piece(Protocol):
    """The gradients of n examples with respect to one parameter, by one use of it."""

    def squares(self) -> Tensor:
        """Return the squared norms (n,)."""
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

    def squares(self) -> Tensor:
        """Return the squared norms."""
        return _square(self.gradients.reshape(len(self.gradients), -1))

    def total(self, factors: Tensor) -> Tensor:
        """Return the weighted sum."""
        return weighted(self.gradients, factors)

    def rows(self) -> Tensor:
        """Return them."""
        return self.gradients


@dataclass(frozen=True)
class Outer:
    """Products of a column (n, o) and a row (n, p)."""

    columns: Tensor = field(repr=False)
    across: Tensor = field(repr=False)

    def squares(self) -> Tensor:
        """Return the products of the squared norms."""
        return _square(self.columns) * _square(self.across)

    def total(self, factors: Tensor) -> Tensor:
        """Return one product for all."""
        return product((self.columns * factors.unsqueeze(1)).t(), self.across.t())

    def rows(self) -> Tensor:
        """Return the products."""
        return self.columns.unsqueeze(2) * self.across.unsqueeze(1)


@dataclass(frozen=True)
class Positions:
    """Sums over t positions of products: (n, t, o) and (n, t, p), where t^2 is smaller than o p."""

    columns: Tensor = field(repr=False)
    across: Tensor = field(repr=False)

    def squares(self) -> Tensor:
        """Return the squared norms, from the products of positions; rounded up, for the terms may cancel."""
        found = (_gram(self.columns) * _gram(self.across)).sum(dim=(1, 2))
        most: Tensor = torch.linalg.vector_norm(self.columns, dim=2) * torch.linalg.vector_norm(self.across, dim=2)
        return found.clamp_min(0) + _ROUNDING * most.sum(dim=1).square()

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

    def squares(self) -> Tensor:
        """Return the squared norms; positions that looked up the same row add up in it. Rounded up as Positions."""
        same = (self.indices.unsqueeze(1) == self.indices.unsqueeze(2)).to(self.gradients.dtype)
        found = (_gram(self.gradients) * same).sum(dim=(1, 2))
        most: Tensor = torch.linalg.vector_norm(self.gradients, dim=2)
        return found.clamp_min(0) + _ROUNDING * most.sum(dim=1).square()

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


def product(rows: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows (n, k) times columns (m, k) transposed, plus the bias; by oneDNN where `quick_dense` takes it."""
    large = rows.numel() * len(columns) >= _FEWEST
    if large and rows.dtype == torch.float32 and rows.device.type == "cpu" and _has_product():
        return _product(rows, columns, bias)
    return torch.nn.functional.linear(rows, columns, bias)


def _has_product() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, _NAME)


def _square(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square()


def _gram(rows: Tensor) -> Tensor:
    return torch.bmm(rows, rows.transpose(1, 2))
