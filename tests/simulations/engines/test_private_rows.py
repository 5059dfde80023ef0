"""Clipped sums of K clients: no norm is too small, whatever the scales and sizes of what an example holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clients.per_example import FlatClipping
from fedml_core.data import Examples
from simulations.engines.private_rows import BatchTable, ClippedSums, Outer, Piece, Whole
from tests.clients.trainer_cases import drawn

SCALES = [1e-38, 1e-23, 8e-24, 1e-10, 1.0, 1e10, 1e18]


def moved(piece: Piece, norm: float) -> float:
    """Return how far two clients' only examples move their sums, at most."""
    examples = Examples.of(torch.zeros(2, 1), torch.zeros(2))
    rows = BatchTable.of([torch.zeros(1).long().numpy()] * 2, torch.arange(2).numpy())
    sums = ClippedSums(lambda parameters, places: [piece], FlatClipping(norm).clip(1.0), 8)
    size = piece.total(torch.zeros(2, 1)).shape[1]
    total, _ = sums.of([torch.zeros(2, size)], examples, rows, torch.full((2,), norm, dtype=torch.float64))
    return float(total.double().norm(dim=1).max())


@pytest.mark.parametrize("left", SCALES)
@pytest.mark.parametrize("right", SCALES)
def test_a_tiny_column_times_a_huge_row_is_cut_like_any_other_gradient(left: float, right: float) -> None:
    # The square of 1e-23 is no float32 number, and the one of 1e18 is: their product is not 0 times anything.
    columns, across = drawn(2, 1, 8) * left, drawn(2, 1, 5, seed=1) * right
    assert moved(Outer(columns, across), 1e-7) <= 1e-7


@pytest.mark.parametrize("kind", ["whole", "outer"])
def test_small_numbers_do_not_vanish_beside_a_large_one(kind: str) -> None:
    row = torch.full((2, 1, 1 << 21), 2.0**-12.6)
    row[..., :64] = 1.0
    true: Tensor = row.double().norm(dim=2)
    assert float(torch.linalg.vector_norm(row, dim=2).max()) < float(true.max()) * (1 - 2.0**-12)
    piece = Whole(row) if kind == "whole" else Outer(torch.ones(2, 1, 1), row)
    assert moved(piece, 1.0) <= 1.0
