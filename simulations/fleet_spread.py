"""How a number differs from client to client: the speeds, bandwidths and latencies of a simulated fleet.

A client's number depends on the seed, on what it is for, and on the client alone, so a cohort costs O(cohort) whatever
the population.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedml_core.checks import require_number
from fedml_core.errors import ConfigError
from fedml_core.named import Named
from fedml_core.randomness import keyed_coins, keyed_words

__all__ = ["Constant", "LogNormal", "Spread", "Tiers"]


@dataclass(frozen=True)
class Spread(Named, ABC):
    """A number for each client; subclass it for your own."""

    @abstractmethod
    def draw(self, seed: int, purpose: str, clients: ArrayLike) -> NDArray[np.float64]:
        """Return the clients' numbers, (K,); `purpose` tells a fleet's draws apart, such as "examples_per_s"."""

    @abstractmethod
    def least(self) -> float:
        """Return a bound below which no client's number lies, by which a fleet checks it."""


@dataclass(frozen=True)
class Constant(Spread):
    """The same for every client."""

    value: float

    def __post_init__(self) -> None:
        """Check the value."""
        require_number("value", self.value)

    def draw(self, seed: int, purpose: str, clients: ArrayLike) -> NDArray[np.float64]:
        """Return the value for each client."""
        return np.full(np.shape(clients), float(self.value))

    def least(self) -> float:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class LogNormal(Spread):
    """Log-normal over the clients: half of them lie below `median`; `sigma` is the logarithm's standard deviation.

    With sigma = 1, one client in six is more than 2.7 times as slow as the median, and one in six as much faster.
    """

    median: float
    sigma: float = 1.0

    def __post_init__(self) -> None:
        """Check both; a larger sigma would overflow."""
        require_number("median", self.median, above=0)
        require_number("sigma", self.sigma, at_least=0, at_most=20)

    def draw(self, seed: int, purpose: str, clients: ArrayLike) -> NDArray[np.float64]:
        """Return each client's number: a normal draw by Box and Muller's method, exponentiated."""
        words = keyed_words((seed, "fleet", purpose), clients, 2)
        # In (0, 1], so that the logarithm is finite; 53 bits, as many as a float64 holds.
        uniform = ((words >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53
        normal = np.sqrt(-2 * np.log(uniform[:, 0])) * np.cos(2 * np.pi * uniform[:, 1])
        return np.asarray(self.median * np.exp(self.sigma * normal))

    def least(self) -> float:
        """Return how far a draw of 53 bits can reach below the median: 8.58 standard deviations."""
        return float(self.median * np.exp(-8.6 * self.sigma))


@dataclass(frozen=True)
class Tiers(Spread):
    """Kinds of devices: `values` for each kind, `shares` of the clients that are of it, by default equal ones.

    A client's place among the tiers is the same in every `Tiers` of a fleet, so that with the same shares whoever
    computes slowly can be made to send slowly, too.
    """

    values: Sequence[float]
    shares: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check that there is a share for each value and that together they are all clients."""
        for name, numbers in (("values", self.values), ("shares", self.shares)):
            if numbers is not None and (isinstance(numbers, str) or not isinstance(numbers, Sequence) or not numbers):
                raise ConfigError(f"{name} must be a list of numbers with at least one in it, got {numbers!r:.80}")
        for place, value in enumerate(self.values):
            require_number(f"values[{place}]", value)
        if self.shares is None:
            return
        for place, share in enumerate(self.shares):
            require_number(f"shares[{place}]", share, at_least=0, at_most=1)
        if len(self.shares) != len(self.values):
            raise ConfigError(f"there are {len(self.values)} values and {len(self.shares)} shares; give one for each")
        if abs(sum(self.shares) - 1) > 1e-6:
            raise ConfigError(f"shares must add up to 1, got {sum(self.shares):g}")

    def draw(self, seed: int, purpose: str, clients: ArrayLike) -> NDArray[np.float64]:
        """Return the value of each client's tier."""
        shares = self.shares or [1 / len(self.values)] * len(self.values)
        edges = np.cumsum(shares)[:-1]
        places = np.searchsorted(edges, keyed_coins((seed, "fleet", "tier"), clients), side="right")
        return np.asarray(self.values, dtype=np.float64)[places]

    def least(self) -> float:
        """Return the smallest value."""
        return min(self.values)
