"""Who takes part in a round. Draws are keyed by seed and round, so a resumed run samples what it would have sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedml_core.errors import ConfigError
from fedml_core.named import Named
from fedml_core.randomness import seeded


@dataclass(frozen=True)
class Sampling(Named):
    """Chooses a round's cohort; subclass it for your own rule. The base class asks everyone."""

    def cohort(self, clients: Sequence[int], round_number: int, seed: int) -> list[int]:
        """Return the numbers of the clients to ask, each at most once, sorted; at most O(cohort) work for a `range`."""
        return sorted(clients)

    def require(self, population: int) -> None:
        """Raise ConfigError if this cannot be drawn from `population` clients."""


@dataclass(frozen=True)
class EveryClient(Sampling):
    """Every client, in every round."""


@dataclass(frozen=True)
class FixedSampling(Sampling):
    """`size` clients without replacement, uniformly; all of them if fewer can be asked now."""

    size: int

    def __post_init__(self) -> None:
        """Check the size."""
        if self.size < 1:
            raise ConfigError(f"size must be >= 1, got {self.size}")

    def cohort(self, clients: Sequence[int], round_number: int, seed: int) -> list[int]:
        """Return `size` clients."""
        return _draw(clients, min(self.size, len(clients)), seeded(seed, "sample", round_number))

    def require(self, population: int) -> None:
        """Raise ConfigError if there are fewer clients than asked for."""
        if self.size > population:
            raise ConfigError(
                f"a cohort of {self.size} was asked for and there are {population} clients; ask for fewer"
            )


@dataclass(frozen=True)
class PoissonSampling(Sampling):
    """Each client independently with probability `rate`; the cohort's size varies and may be 0."""

    rate: float

    def __post_init__(self) -> None:
        """Check the rate."""
        if not 0 < self.rate <= 1:
            raise ConfigError(f"rate must be > 0 and <= 1, got {self.rate}")

    def cohort(self, clients: Sequence[int], round_number: int, seed: int) -> list[int]:
        """Return the clients whose coin came up."""
        draws = seeded(seed, "sample", round_number)
        return _draw(clients, int(draws.binomial(len(clients), self.rate)), draws)


def _draw(clients: Sequence[int], size: int, draws: np.random.Generator) -> list[int]:
    places = np.sort(draws.choice(len(clients), size=size, replace=False, shuffle=False)) if size else ()
    return sorted(clients[int(place)] for place in places)
