"""Tables of cells give exactly the probabilities that they are given, whatever is left over for their second table."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fedml_core.errors import PrivacyError
from fedml_core.privacy import discrete
from fedml_core.privacy.cells import CellTable, exact_table, left_over
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.tables import AliasTable, symmetric_weights
from tests.fedml_core.privacy.given_words import Given

CELL = 1 << 112
WHOLE = 1 << 128
WEIGHTS: dict[str, list[int]] = {
    "gaussian 0.4": symmetric_weights(discrete._gaussian_relative(0.4)),
    "gaussian 600": symmetric_weights(discrete._gaussian_relative(600.0)),
    "skellam 9": symmetric_weights(discrete._skellam_relative(9.0)),
    "one value": [WHOLE],
    "whole cells only": [CELL, WHOLE - CELL],
    "no whole cell but one's": [WHOLE - 3, 0, 1, 2],
    "no cell to own": [CELL - 1] * 65536 + [65536],
}


def held(table: AliasTable | CellTable, weights: list[int]) -> list[int]:
    found: Counter[int] = Counter()
    for value, weight in table.weights():
        assert weight >= 0
        found[value] += weight
    return [found[place - 7] for place in range(len(weights))]


@pytest.mark.parametrize("name", WEIGHTS)
def test_cells_and_what_is_left_over_hold_exactly_the_named_weights(name: str) -> None:
    # "each value is drawn with its weight / 2^128, exactly, and no value without a weight is ever drawn."
    weights = WEIGHTS[name]
    assert held(CellTable(-7, weights), weights) == [weight << 16 for weight in weights]


def test_every_cell_gives_its_value_and_the_last_ones_send_the_draw_on() -> None:
    weights = [1 << 127, 1 << 126, (1 << 126) - CELL, CELL // 4, CELL - CELL // 4]
    every = np.arange(65536, dtype="<u2")
    drawn = np.empty(65536, dtype=np.int64)
    CellTable(0, weights).draw_into(Given(every.view("<u8"), NoiseStream(b"g" * 32)), drawn)
    assert left_over(weights) == 1
    assert np.bincount(drawn[:-1], minlength=5).tolist() == [32768, 16384, 16383, 0, 0]
    assert drawn[-1] in (3, 4)


@pytest.mark.parametrize("count", [0, 1, 3, 5, 32768, 32769, 70001])
def test_any_number_of_draws_is_made_and_all_are_values_with_a_weight(count: int) -> None:
    weights = [WHOLE // 2 - 5, 0, 5, WHOLE // 2]
    drawn = np.full(count, 99, dtype=np.int64)
    CellTable(10, weights).draw_into(NoiseStream(b"n" * 32), drawn)
    assert set(drawn.tolist()) <= {10, 12, 13}
    if count > 1000:
        assert abs(float(np.mean(drawn == 10)) - 0.5) < 2.5 / count**0.5


def test_a_share_that_only_the_second_table_knows_is_drawn_as_often_as_it_weighs() -> None:
    # Of 2^16 equal values, each has less than a cell, so that the second table alone decides; then one has half.
    weights = [WHOLE // 2] + [WHOLE // 2 // 96] * 95
    weights.append(WHOLE - sum(weights))
    drawn = np.empty(400_000, dtype=np.int64)
    CellTable(0, weights).draw_into(NoiseStream(b"s" * 32), drawn)
    seen = np.bincount(drawn, minlength=97)
    expected = np.array(weights, dtype=float) / 2.0**128 * len(drawn)
    # Chi-square with 96 degrees of freedom: 150 is passed once in 2,500 times, and the stream is fixed.
    assert float(((seen - expected) ** 2 / expected).sum()) < 150


def test_wide_distributions_keep_the_table_that_needs_no_cells() -> None:
    wide = symmetric_weights(discrete._skellam_relative(2.0**20))
    assert isinstance(exact_table(0, WEIGHTS["gaussian 600"]), CellTable)
    assert isinstance(exact_table(0, WEIGHTS["no cell to own"]), AliasTable)
    assert isinstance(exact_table(0, wide), CellTable) == (left_over(wide) <= 16384)


@pytest.mark.parametrize("weights", [[1, 2], [WHOLE, 1], [-1, WHOLE + 1], [CELL] * 5])
def test_weights_that_do_not_add_up_are_refused(weights: list[int]) -> None:
    for make in (CellTable, exact_table):
        with pytest.raises(PrivacyError, match="add up to 2\\^128"):
            make(0, weights)
