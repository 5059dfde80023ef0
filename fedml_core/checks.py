"""Checks of constructor arguments whose messages write themselves: `mu must be >= 0, got -1.0`."""

from __future__ import annotations

import math

from fedml_core.errors import ConfigError

__all__ = ["require_number", "require_whole"]


def require_number(
    name: str,
    value: object,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise ConfigError unless `value` is a finite number within the bounds.

    Example:
        >>> require_number("fraction", 0.5, above=0, at_most=1)
        >>> require_number("mu", -1.0, at_least=0)
        Traceback (most recent call last):
        fedml_core.errors.ConfigError: mu must be >= 0, got -1.0
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ConfigError(f"{name} must be a number that a float can hold, got a larger one") from None
    # NaN fails every comparison, so it ends up outside.
    if math.isfinite(number) and at_least <= number <= at_most and above < number < below:
        return
    bounds = (("> ", above), (">= ", at_least), ("< ", below), ("<= ", at_most))
    shown = [f"{sign}{bound:g}" for sign, bound in bounds if math.isfinite(bound)]
    raise ConfigError(f"{name} must be {' and '.join(shown) or 'finite'}, got {value}")


def require_whole(name: str, value: object, *, at_least: int, at_most: float = math.inf) -> None:
    """Raise ConfigError unless `value` is an integer within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a whole number, got {value!r}")
    require_number(name, value, at_least=at_least, at_most=at_most)
