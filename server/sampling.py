"""Who takes part in a round. Draws are keyed by seed and round, so a resumed run samples what it would have sampled.

The seed is the run's, which clients know; where a strategy claims privacy, it is a secret of the run's instead, since
sampling hides nobody from those who can draw it again. What a sampling is worth to an accountant, it says itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedml_core.checks import require_whole
from fedml_core.errors import ConfigError
from fedml_core.named import Named
from fedml_core.randomness import key_bytes, seeded

_WORDS = 1 << 10
_MOST_WORDS = 1 << 15  # a keystream's chunk
_LEAST_RATE = 1e-12


@dataclass(frozen=True)
class Sampling(Named):
    """Chooses a round's cohort; subclass it for your own rule. The base class asks everyone.

    `adjacency`: what two neighbouring populations are, where this sampling's events are accounted for.
    """

    adjacency: ClassVar[str] = "add-or-remove-one"

    def cohort(self, clients: Sequence[int], round_number: int, seed: int) -> list[int]:
        """Return the numbers of the clients to ask, each at most once, sorted; at most O(cohort) work for a `range`."""
        return sorted(clients)

    def hidden_cohort(self, clients: Sequence[int], round_number: int, secret: bytes) -> list[int]:
        """Return such a cohort, drawn by a secret of 32 bytes; overrides take their draws from a keyed cipher."""
        return self.cohort(clients, round_number, int.from_bytes(secret, "big"))

    @property
    def hides(self) -> bool:
        """Return whether hidden cohorts follow this rule: a class that changes `cohort` must change both."""
        definitions = [("cohort" in vars(cls), "hidden_cohort" in vars(cls)) for cls in type(self).__mro__]
        changes, hidden = next((pair for pair in definitions if any(pair)), (False, False))
        return hidden or (changes and type(self).hidden_cohort is Sampling.hidden_cohort)

    def require(self, population: int) -> None:
        """Raise ConfigError if this cannot be drawn from `population` clients."""

    def sizes(self, clients: Sequence[int]) -> tuple[int, int]:
        """Return the fewest and the most that a cohort of these clients can have; change it together with `cohort`.

        The base class does not know: anything from nobody to all.
        """
        return 0, len(clients)

    def event(self, population: int, inner: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what an accountant is told of a round in which `inner` happened to a secret cohort of `population`.

        The base class claims nothing for itself: any client may have been in any round.
        """
        return inner

    @property
    def separation(self) -> int:
        """Return the fewest rounds from one participation of a client to its next."""
        return 1


@dataclass(frozen=True)
class EveryClient(Sampling):
    """Every client, in every round."""

    def sizes(self, clients: Sequence[int]) -> tuple[int, int]:
        """Return that it is always all."""
        return len(clients), len(clients)


@dataclass(frozen=True)
class FixedSampling(Sampling):
    """`size` clients without replacement, uniformly; all of them if fewer can be asked now."""

    adjacency: ClassVar[str] = "replace-one"

    size: int

    def __post_init__(self) -> None:
        """Check the size."""
        if self.size < 1:
            raise ConfigError(f"size must be >= 1, got {self.size}")

    def cohort(self, clients: Sequence[int], round_number: int, seed: int) -> list[int]:
        """Return `size` clients."""
        size = min(self.size, len(clients))
        draws = seeded(seed, "sample", round_number)
        places = np.sort(draws.choice(len(clients), size=size, replace=False, shuffle=False)) if size else np.arange(0)
        return _at(clients, places)

    def hidden_cohort(self, clients: Sequence[int], round_number: int, secret: bytes) -> list[int]:
        """Return `size` clients that cannot be told from a true sample without the secret."""
        size = min(self.size, len(clients))
        key = key_bytes(int.from_bytes(secret, "big"), "sample", round_number, size=32)
        return _at(clients, _distinct(len(clients), size, key))

    def sizes(self, clients: Sequence[int]) -> tuple[int, int]:
        """Return the size, or how many there are."""
        return min(self.size, len(clients)), min(self.size, len(clients))

    def require(self, population: int) -> None:
        """Raise ConfigError if there are fewer clients than asked for."""
        if self.size > population:
            raise ConfigError(
                f"a cohort of {self.size} was asked for and there are {population} clients; ask for fewer"
            )

    def event(self, population: int, inner: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return sampling without replacement; of no use where everybody was asked."""
        if population <= self.size:
            return inner
        return {"name": "fixed-size", "population": population, "sample": self.size, "event": dict(inner)}


@dataclass(frozen=True)
class PoissonSampling(Sampling):
    """Each client independently with probability `rate`; the cohort's size varies and may be 0.

    The coins are those of an AES-256-CTR keystream, so without the seed they cannot be told from true ones.
    """

    rate: float

    def __post_init__(self) -> None:
        """Check the rate."""
        if not 0 < self.rate <= 1:
            raise ConfigError(f"rate must be > 0 and <= 1, got {self.rate}")
        if self.rate < _LEAST_RATE:
            raise ConfigError(f"rate must be at least {_LEAST_RATE:g}, got {self.rate:g}; nobody would ever be asked")

    def cohort(self, clients: Sequence[int], round_number: int, seed: int) -> list[int]:
        """Return the clients whose coin came up."""
        if self.rate == 1:
            return sorted(clients)
        places, count = _successes(self.rate, key_bytes(seed, "poisson", round_number, size=32)), len(clients)
        chosen: list[int] = []
        for place in places:
            if place >= count:
                break
            chosen.append(clients[place])
        return sorted(chosen)

    def event(self, population: int, inner: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return Poisson sampling."""
        return {"name": "poisson", "sampling_probability": float(self.rate), "event": dict(inner)}


@dataclass(frozen=True)
class MinimumSeparation(Sampling):
    """Each client once in `rounds_apart` rounds: in those whose number has the client's remainder. No secret, no luck.

    For noise that is correlated over rounds, which holds only while nobody comes back early. A client that cannot be
    asked in its round waits for its next.
    """

    rounds_apart: int

    def __post_init__(self) -> None:
        """Check the rounds."""
        require_whole("rounds_apart", self.rounds_apart, at_least=1)

    def cohort(self, clients: Sequence[int], round_number: int, seed: int) -> list[int]:
        """Return the clients whose turn it is."""
        turn = round_number % self.rounds_apart
        if isinstance(clients, range) and clients.step == 1:
            return list(
                range(clients.start + (turn - clients.start) % self.rounds_apart, clients.stop, self.rounds_apart)
            )
        return sorted(client for client in clients if client % self.rounds_apart == turn)

    def sizes(self, clients: Sequence[int]) -> tuple[int, int]:
        """Return the shares of a `range`, which are alike; of other numbers, all may have the same remainder."""
        if isinstance(clients, range) and clients.step == 1:
            return len(clients) // self.rounds_apart, -(-len(clients) // self.rounds_apart)
        return super().sizes(clients)

    @property
    def separation(self) -> int:
        """Return `rounds_apart`."""
        return self.rounds_apart


def _at(clients: Sequence[int], places: NDArray[np.int64]) -> list[int]:
    """Return the clients at sorted places, sorted."""
    if isinstance(clients, range) and clients.step > 0:
        return list((clients.start + clients.step * places).tolist())
    return sorted(clients[place] for place in places.tolist())


def _distinct(count: int, size: int, key: bytes) -> NDArray[np.int64]:
    """Return `size` of the places below `count`, each set as likely as any other, sorted; O(size) draws.

    The first `size` different ones among uniform places are such a set. Of a set above half, the rest is drawn.
    """
    from fedml_core.secagg.keystream import Keystream  # loads cryptography, which sampling everybody does without

    if 2 * size > count:
        return np.delete(np.arange(count), _distinct(count, count - size, key))
    if size == 0:
        return np.empty(0, dtype=np.int64)
    stream, found, even = Keystream(key), np.empty(0, dtype=np.int64), (1 << 64) // count * count
    words = np.empty(min(max(_WORDS, size + size // 8), _MOST_WORDS), dtype="<u8")
    while len(found) < size:
        stream.into(words)
        fair = words if even == 1 << 64 else words[words < np.uint64(even)]  # others would favour the first places
        drawn = np.concatenate([found, (fair % np.uint64(count)).astype(np.int64)])
        _, first = np.unique(drawn, return_index=True)
        found = drawn[np.sort(first)]
    return np.sort(found[:size])


def _successes(rate: float, key: bytes) -> Iterator[int]:
    """Yield the places of the successes among endless coins, by the geometric gaps between them.

    A gap is exact up to 2^-53: it is the logarithm of a uniform number of so many bits.
    """
    from fedml_core.secagg.keystream import Keystream  # loads cryptography, which sampling everybody does without

    stream, words, place = Keystream(key), np.empty(_WORDS, dtype="<u8"), -1
    scale = 1 / math.log1p(-rate)
    while True:
        stream.into(words)
        # Uniform in (0, 1]: its logarithm is finite.
        uniform = ((words >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
        for gap in np.floor(np.log(uniform) * scale).tolist():
            place += int(gap) + 1
            yield place
