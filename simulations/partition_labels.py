"""Partitioners that skew which labels a client sees. All but `Shards` see float labels as `class_codes` bins them."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import ConfigError
from simulations.partition_contract import DataOutline, Part, Partitioner, by_owner, positive, whole
from simulations.partition_sizes import dirichlet, draw_owners, require_minimum, topped_up


@dataclass(frozen=True)
class Dirichlet(Partitioner):
    """Spreads each class over the clients by its own draw from Dirichlet(alpha, ..., alpha): labels and sizes skew.

    With 10 classes, two of them make up nine tenths of the average client's data at alpha = 0.1, a quarter at 100
    (iid: a fifth). Time grows with classes x clients.

    Args: alpha: > 0. minimum: >= 1, the fewest examples of a client; see `topped_up` for who gives.
    Raises: ConfigError: from `split`, without labels or with fewer than `minimum` examples for each client.
    Source: Yurochkin et al. (2019), arXiv:1905.12022, section 4.
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
        alphas = np.full(clients, self.alpha)
        owners = np.empty(examples.count, dtype=np.int64)
        for members in examples.members():
            owners[members] = draw_owners(dirichlet(alphas, rng), len(members), rng)
        return by_owner(topped_up(owners, clients, self.minimum, rng), clients)


@dataclass(frozen=True)
class BalancedDirichlet(Partitioner):
    """Gives all clients the same number of examples (up to one), each with its own mix of classes.

    A client's mix is drawn from Dirichlet(alpha p), p being the share of each class in the data: alpha is the total
    concentration here, and the concentration per class in `Dirichlet`. A class that has run out is left out of the
    mix, so clients that are served late (a random few) lean towards what remains.

    Args: alpha: > 0.
    Raises: ConfigError: from `split`, without labels.
    Source: Hsu et al. (2019), arXiv:1909.06335, section 2.
    """

    alpha: float

    def __post_init__(self) -> None:
        """Check the field."""
        object.__setattr__(self, "alpha", positive("alpha", self.alpha))

    def deal(self, examples: DataOutline, clients: int, rng: np.random.Generator) -> list[Part]:
        """Return the parts."""
        pools = [rng.permutation(members) for members in examples.members()]
        left = np.array([len(pool) for pool in pools])
        alphas = self.alpha * (left / examples.count)
        owners = np.empty(examples.count, dtype=np.int64)
        for place, client in enumerate(rng.permutation(clients)):
            size = examples.count // clients + (place < examples.count % clients)
            taken = _taken(size, dirichlet(alphas, rng), left, rng)
            for code in np.flatnonzero(taken):
                owners[pools[code][left[code] - taken[code] : left[code]]] = client
            left = left - taken
        return by_owner(owners, clients)


@dataclass(frozen=True)
class LabelLimited(Partitioner):
    """Lets each client see exactly `classes_per_client` classes.

    Larger classes go to more clients, and a class is dealt evenly to the clients that see it.

    Args: classes_per_client: >= 1.
    Raises: ConfigError: from `split`, without labels or if so many classes for each client cannot be had.
    Source: Li et al. (2022), arXiv:2102.02079, section IV-A.
    """

    classes_per_client: int

    def __post_init__(self) -> None:
        """Check the field."""
        whole("classes_per_client", self.classes_per_client, 1)

    def deal(self, examples: DataOutline, clients: int, rng: np.random.Generator) -> list[Part]:
        """Return the parts."""
        pools = examples.members()
        seats = self._seats(np.array([len(pool) for pool in pools]), clients)
        free = np.full(clients, self.classes_per_client)
        owners = np.empty(examples.count, dtype=np.int64)
        for code in rng.permutation(len(pools)):
            # Serving whoever lacks most classes never paints itself into a corner (Gale-Ryser).
            shuffled = rng.permutation(clients)
            chosen = shuffled[np.argsort(-free[shuffled], kind="stable")[: seats[code]]]
            free[chosen] -= 1
            owners[rng.permutation(pools[code])] = np.resize(chosen, len(pools[code]))
        return by_owner(owners, clients)

    def _seats(self, sizes: NDArray[np.int64], clients: int) -> NDArray[np.int64]:
        """Return how many clients see each class: at least one, and so that the fullest seat is as small as can be."""
        wanted = clients * self.classes_per_client
        limits = np.minimum(sizes, clients)
        if wanted < len(sizes):
            raise ConfigError(
                f"{clients} clients with {self.classes_per_client} classes each cannot hold all {len(sizes)} classes; "
                "raise clients or classes_per_client"
            )
        if wanted > int(limits.sum()):
            raise ConfigError(
                f"{clients} clients cannot each see {self.classes_per_client} of {len(sizes)} classes in "
                f"{int(sizes.sum())} examples; lower clients or classes_per_client"
            )
        seats = np.ones(len(sizes), dtype=np.int64)
        queue = [(-float(size), code) for code, size in enumerate(sizes) if limits[code] > 1]
        heapq.heapify(queue)
        for _ in range(wanted - len(sizes)):  # the next seat goes where a seat now holds most examples
            code = heapq.heappop(queue)[1]
            seats[code] += 1
            if seats[code] < limits[code]:
                heapq.heappush(queue, (-float(sizes[code]) / int(seats[code]), code))
        return seats


@dataclass(frozen=True)
class Shards(Partitioner):
    """Sorts the examples by label, cuts them into equal shards, and deals each client `per_client` of them.

    Shards, and so clients, differ in size by at most one example per shard. Float labels are sorted as they are.

    Args: per_client: >= 1; 2 is the pathological split of the paper.
    Raises: ConfigError: from `split`, without labels or with fewer examples than shards.
    Source: McMahan et al. (2017), arXiv:1602.05629, section 3.
    """

    per_client: int = 2

    def __post_init__(self) -> None:
        """Check the field."""
        whole("per_client", self.per_client, 1)

    def deal(self, examples: DataOutline, clients: int, rng: np.random.Generator) -> list[Part]:
        """Return the parts."""
        labels = examples.needed_labels()
        shards = clients * self.per_client
        if shards > examples.count:
            raise ConfigError(
                f"{clients} clients with {self.per_client} shards each need {shards} examples, got {examples.count}; "
                "lower clients or per_client"
            )
        shuffled = rng.permutation(examples.count)
        ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]
        holders = rng.permutation(shards) % clients
        owners = np.empty(examples.count, dtype=np.int64)
        owners[ordered] = holders[np.arange(examples.count) * shards // examples.count]
        return by_owner(owners, clients)


def _taken(size: int, mix: NDArray[np.float64], left: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return `size` examples by class, drawn by `mix` from what is left; `size` is at most `left.sum()`.

    Each pass either fills the client or empties a class, so there are at most as many passes as classes, plus one.
    """
    taken = np.zeros_like(left)
    while size > 0:
        weights = np.where(left > taken, mix, 0.0)
        if not weights.any():  # the mix is (to the last bit) on classes that are gone
            weights = (left - taken).astype(np.float64)
        codes = np.flatnonzero(weights)
        drawn = rng.multinomial(size, weights[codes] / weights[codes].sum())
        drawn = np.minimum(drawn, (left - taken)[codes])
        taken[codes] += drawn
        size -= int(drawn.sum())
    return taken


__all__ = ["BalancedDirichlet", "Dirichlet", "LabelLimited", "Shards"]
