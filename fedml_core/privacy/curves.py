"""Which Rényi curve an event has under which adjacency, and which events are Gaussian noise in disguise.

Guarantees: where no theorem covers an event under an adjacency, that is a PrivacyError which names both.
    Fixed-size sampling counts its noise over twice one unit's bound: a replaced unit moves the sum by that much.
Trust: a tree or matrix event must come from a schedule that does not depend on the data.
"""

from __future__ import annotations

import math

from fedml_core.errors import PrivacyError
from fedml_core.privacy import renyi
from fedml_core.privacy.distributed import discrete_gaussian_sum, skellam_sum
from fedml_core.privacy.events import Mechanism, Term
from fedml_core.privacy.renyi import Array, Curve

__all__ = ["curve_of", "gaussian_ratio"]


def curve_of(term: Term, adjacency: str) -> Curve:
    """Return the Rényi curve of one term.

    Raises: PrivacyError: if none is known under this adjacency.
    """
    ratio = gaussian_ratio(term, adjacency)
    if term.scheme == "poisson" and term.rate < 1:
        if adjacency == "replace-one":
            raise PrivacyError(
                "no Rényi curve is known for poisson sampling under replace-one, and something else in the list needs "
                "one; claim add-or-remove-one, or account for them apart"
            )
        if ratio is not None:
            return renyi.poisson_gaussian(term.rate, ratio)
        return renyi.poisson(term.rate, _together(term, adjacency))
    if term.scheme == "fixed-size":
        if adjacency != "replace-one":
            raise PrivacyError(
                f"fixed-size sampling is accounted under replace-one, not under {adjacency}: one unit less changes the "
                "odds of all others; claim replace-one, or sample by poisson"
            )
        if ratio is not None:
            return renyi.fixed_size_gaussian(term.rate, ratio)
        return renyi.fixed_size(term.rate, _together(term, adjacency))
    return _together(term, adjacency)


def gaussian_ratio(term: Term, adjacency: str) -> float | None:
    """Return the noise over the L2 sensitivity if all of the term's mechanisms are one Gaussian release, else None.

    Raises: PrivacyError: if a mechanism is not defined under this adjacency.
    """
    precision = 0.0
    for mechanism, count in term.parts:
        if mechanism.name not in ("gaussian", "matrix", "analytic-gaussian-local"):
            return None
        precision += count / _ratio(mechanism, adjacency) ** 2
    return 1 / math.sqrt(precision)


def _together(term: Term, adjacency: str) -> Curve:
    curves = [(_curve(mechanism, adjacency), count) for mechanism, count in term.parts]

    def curve(orders: Array) -> Array:
        total: Array = sum(count * one(orders) for one, count in curves)  # type: ignore[assignment]  # never empty
        return total

    return curve


def _curve(mechanism: Mechanism, adjacency: str) -> Curve:
    times = _times(adjacency)
    if mechanism.name == "laplace":
        return renyi.laplace(mechanism["scale"] / times)
    if mechanism.name == "discrete-gaussian-sum":
        return discrete_gaussian_sum(mechanism, times)
    if mechanism.name == "skellam-sum":
        return skellam_sum(mechanism, times)
    return renyi.gaussian(_ratio(mechanism, adjacency))


def _ratio(mechanism: Mechanism, adjacency: str) -> float:
    """Return the noise over the L2 sensitivity of the whole release."""
    name, ratio = mechanism.name, mechanism["noise_multiplier"] / _times(adjacency)
    if name in ("tree", "matrix") and adjacency == "add-or-remove-one":
        raise PrivacyError(
            f"the event {name} has a schedule, in which nobody can be one more or less: its adjacency is "
            f"replace-special or replace-one, not {adjacency}"
        )
    if name == "analytic-gaussian-local" and adjacency != "replace-one":
        raise PrivacyError(f"local noise hides which update a client sent: claim replace-one for it, not {adjacency}")
    if name == "matrix":
        return ratio / mechanism["sensitivity"]
    if name == "tree":
        # A unit is in one leaf, and so in every node above it.
        depth = int(mechanism["steps"]).bit_length()
        return ratio / math.sqrt(depth * (mechanism["restarts"] + 1))
    return ratio


def _times(adjacency: str) -> int:
    return 2 if adjacency == "replace-one" else 1
