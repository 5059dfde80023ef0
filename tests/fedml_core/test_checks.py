from __future__ import annotations

import math
from typing import Any

import pytest

from fedml_core.checks import require_number, require_whole
from fedml_core.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "bounds"),
    [(0, {"at_least": 0}), (0.5, {"above": 0, "below": 1}), (1, {"at_most": 1}), (-1e300, {}), (10**300, {"above": 0})],
)
def test_a_number_within_its_bounds_passes(value: float, bounds: dict[str, float]) -> None:
    require_number("x", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (-1.0, {"at_least": 0}, "x must be >= 0, got -1.0"),
        (0, {"above": 0}, "x must be > 0, got 0"),
        (1.0, {"at_least": 0, "below": 1}, "x must be >= 0 and < 1, got 1.0"),
        (2, {"above": 0, "at_most": 1}, "x must be > 0 and <= 1, got 2"),
        (math.nan, {"at_least": 0}, "x must be >= 0, got nan"),
        (math.inf, {"above": 0}, "x must be > 0, got inf"),
        (math.inf, {}, "x must be finite, got inf"),
        ("1", {}, "x must be a number, got '1'"),
        (True, {}, "x must be a number, got True"),
        (None, {}, "x must be a number, got None"),
    ],
)
def test_what_is_no_number_or_out_of_bounds_is_refused_in_words(
    value: Any, bounds: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        require_number("x", value, **bounds)


def test_a_whole_number_is_an_integer_within_its_bounds() -> None:
    require_whole("x", 3, at_least=3, at_most=3)
    for wrong, message in ((3.0, "a whole number, got 3.0"), (True, "a whole number, got True"), (2, ">= 3, got 2")):
        with pytest.raises(ConfigError, match=f"^x must be {message}$"):
            require_whole("x", wrong, at_least=3)


def test_an_integer_beyond_every_float_is_refused_without_a_traceback() -> None:
    with pytest.raises(ConfigError, match="^x must be a number that a float can hold, got a larger one$"):
        require_number("x", 10**400, at_least=0)
