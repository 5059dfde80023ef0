"""The least noise that keeps a promise: epsilon is given, the noise multiplier is sought.

Guarantees: with the returned noise the events cost at most the target; with 0.02 % less they would cost more.
Trust: the events that are made for a noise multiplier are those that will happen with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedml_core.checks import require_number
from fedml_core.errors import PrivacyError
from fedml_core.privacy.accounting import cost, epsilon_of
from fedml_core.privacy.events import fold
from fedml_core.privacy.losses import FINE

__all__ = ["noise_for"]

MakeEvents = Callable[[float], Iterable[Mapping[str, Any]]]
Excess = Callable[[float], float]

_LOWEST, _HIGHEST = math.log(1e-3), math.log(1e7)
_TOLERANCE = 1e-4
_COARSE = 500
_CLOSE = 3e-3
_SECANTS = 8


def noise_for(target_epsilon: float, delta: float, make_events: MakeEvents, *, unit: str, adjacency: str) -> float:
    """Return the smallest noise multiplier with which `make_events(noise_multiplier)` costs at most `target_epsilon`.

    More noise must never cost more. Raises: PrivacyError: if no noise reaches the target, or next to none does, or
        nothing accounts for the events. ConfigError: for a target or a delta out of range.
    Example:
        >>> rounds = lambda z: [{"name": "gaussian", "noise_multiplier": z}] * 100
        >>> round(noise_for(4.377178, 1e-5, rounds, unit="client", adjacency="add-or-remove-one"), 2)
        10.0
    """
    require_number("target_epsilon", target_epsilon, above=0)
    # It checks the arguments and the events, and says what is wrong with them.
    epsilon_of(make_events(1.0), delta=delta, unit=unit, adjacency=adjacency)

    def excess(steps: int) -> Excess:
        def over(place: float) -> float:
            epsilon, _ = cost(fold(make_events(math.exp(place))), delta, adjacency, steps)
            return math.log(max(epsilon, 1e-12) / target_epsilon)

        return over

    coarse, fine = excess(_COARSE), excess(FINE)
    low, high = _bracket(coarse, 0.0, 1.5)
    _require_reachable(low, high, fine, target_epsilon)
    about = _root(coarse, low, high, _CLOSE / 3)
    return math.exp(_root(fine, *_bracket(fine, about, _CLOSE), _TOLERANCE))


def _bracket(over: Excess, start: float, step: float) -> tuple[float, float]:
    """Return a place that costs too much and one that does not, as near to `start` as `step` finds them."""
    low = high = start
    if over(start) > 0:
        while high < _HIGHEST and over(high := min(high + step, _HIGHEST)) > 0:
            low, step = high, 2 * step
    else:
        while low > _LOWEST and over(low := max(low - step, _LOWEST)) <= 0:
            high, step = low, 2 * step
    return low, high


def _require_reachable(low: float, high: float, over: Excess, target: float) -> None:
    if high == _HIGHEST and (worst := over(high)) > 0:
        raise PrivacyError(
            f"no noise multiplier up to {math.exp(high):.0e} reaches epsilon {target:g}: what the noise does not touch "
            f"costs {target * math.exp(worst):.4g} alone; release that less often, or raise the target"
        )
    if low == _LOWEST and (best := over(low)) <= 0:
        raise PrivacyError(
            f"target_epsilon {target:g} asks for no protection: a noise multiplier of {math.exp(low):g} already gives "
            f"{target * math.exp(best):.4g}; take a smaller target"
        )


def _root(over: Excess, low: float, high: float, tolerance: float) -> float:
    """Return a place that costs at most the target, at most `tolerance` above one that costs more."""
    below, above = over(low), over(high)
    side = 1.0
    for turn in range(200):
        if high - low <= tolerance:
            break
        guess = low + (high - low) * (below / (below - above) if below > above else 0.5)
        # A little beyond the root on the side that was not hit last, so that both ends close in on it.
        place = guess + side * 0.4 * tolerance
        if turn >= _SECANTS or not low < place < high:
            place = 0.5 * (low + high)
        value = over(place)
        if value > 0:
            low, below, side = place, value, 1.0
        else:
            high, above, side = place, value, -1.0
    return high
