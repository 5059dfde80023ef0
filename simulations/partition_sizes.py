"""Partitioners that know only how many examples there are, and the draws that they share with label skew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import ConfigError
from simulations.partition_contract import DataOutline, Part, Partitioner, by_owner, positive, whole

# Below this, a Dirichlet draw is one-hot to the last bit of a float64; without it, 1 / alpha could overflow.
_SMALLEST_ALPHA = 1e-100


@dataclass(frozen=True)
class Iid(Partitioner):
    """Deals shuffled examples out in turn: every client's data looks alike, and sizes differ by at most one.

    Example:
        >>> [len(part) for part in Iid().split(DataOutline(7), 3, seed=0)]
        [3, 2, 2]
    """

    def deal(self, examples: DataOutline, clients: int, rng: np.random.Generator) -> list[Part]:
        """Return the parts."""
        owners = np.empty(examples.count, dtype=np.int64)
        owners[rng.permutation(examples.count)] = np.arange(examples.count) % clients
        return by_owner(owners, clients)


@dataclass(frozen=True)
class QuantitySkew(Partitioner):
    """Draws the share of the data that each client holds from Dirichlet(alpha, ..., alpha); labels play no part.

    The smaller alpha, the more unequal: at 0.5, 100 clients of 60,000 examples hold from 1 to some 5,000 each.

    Args: alpha: > 0. minimum: >= 1, the fewest examples of a client; see `topped_up` for who gives.
    Raises: ConfigError: from `split`, if there are fewer than `minimum` examples for each client.
    Source: Li et al. (2022), arXiv:2102.02079, section IV-C.
    """

    alpha: float
    minimum: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        object.__setattr__(self, "alpha", positive("alpha", self.alpha))
        whole("minimum", self.minimum, 1)

    def deal(self, examples: DataOutline, clients: int, rng: np.random.Generator) -> list[Part]:
        """Return the parts."""
        require_minimum(examples.count, clients, self.minimum)
        shares = dirichlet(np.full(clients, self.alpha), rng)
        owners = draw_owners(shares, examples.count, rng)
        return by_owner(topped_up(owners, clients, self.minimum, rng), clients)


def dirichlet(alphas: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return one draw from Dirichlet(alphas), which sums to 1 for every finite alpha > 0, however small or large.

    Gamma(a) is Gamma(a + 1) U^(1/a); taken in logarithms, the second factor cannot underflow.
    """
    alphas = np.maximum(alphas, _SMALLEST_ALPHA)
    logs = np.log(rng.standard_gamma(alphas + 1.0)) - rng.standard_exponential(len(alphas)) / alphas
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def draw_owners(shares: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return `count` independent client numbers; client k comes with probability `shares[k]`."""
    cumulative = np.cumsum(shares)
    owners = np.searchsorted(cumulative / cumulative[-1], rng.random(count), side="right")
    return owners.astype(np.int64, copy=False)


def require_minimum(count: int, clients: int, minimum: int) -> None:
    """Check that each client can have `minimum` examples.

    Raises: ConfigError: if not.
    """
    if clients * minimum > count:
        raise ConfigError(
            f"{clients} clients with at least {minimum} examples each need {clients * minimum} examples, got {count}; "
            "lower clients or minimum"
        )


def topped_up(owners: NDArray[np.int64], clients: int, minimum: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return owners such that every client has at least `minimum` examples; see `require_minimum` for when it can.

    DataOutline leave, one by one, whichever client has the most at that moment; which of its examples is left to `rng`.
    """
    sizes = np.bincount(owners, minlength=clients)
    missing = np.maximum(minimum - sizes, 0)
    if not missing.any():
        return owners
    given = _taken_from_largest(sizes, int(missing.sum()))
    shuffled = rng.permutation(len(owners))
    grouped = shuffled[np.argsort(owners[shuffled], kind="stable")]
    rank = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    moved = rng.permutation(grouped[rank < np.repeat(given, sizes)])
    result = owners.copy()
    result[moved] = np.repeat(np.arange(clients), missing)
    return result


def _taken_from_largest(sizes: NDArray[np.int64], wanted: int) -> NDArray[np.int64]:
    """Return how many each client gives if `wanted` are taken one by one from the client that has the most."""
    low, high = 0, int(sizes.max())
    while low < high:  # the highest level that frees enough when all above it come down to it
        level = (low + high + 1) // 2
        if int(np.maximum(sizes - level, 0).sum()) >= wanted:
            low = level
        else:
            high = level - 1
    given = np.maximum(sizes - low, 0)
    spared = np.flatnonzero(given)[: int(given.sum()) - wanted]
    given[spared] -= 1
    return given


__all__ = ["Iid", "QuantitySkew", "dirichlet", "draw_owners", "require_minimum", "topped_up"]
