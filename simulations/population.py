"""Who the virtual clients are and what each holds. A client's data exist when it is asked for and not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset

from fedml_core.checks import require_number
from fedml_core.data import ClientData, Data, Examples, targets_of
from fedml_core.errors import ConfigError, TaskError
from fedml_core.named import nearest
from fedml_core.randomness import Key, key_bytes, seeded
from fedml_core.task import Task
from simulations.packing import Packed
from simulations.partition import DataOutline, Partitioner
from simulations.partition_contract import whole
from simulations.sources.generated import Generated
from simulations.sources.held import Held


class Population(Protocol):
    """Numbered clients, 0 to len - 1."""

    def __len__(self) -> int:
        """Return the number of clients."""
        ...

    def load(self, client: int) -> ClientData:
        """Return one client's data."""
        ...

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64] | None:
        """Return how many training examples each has, (K,), or None where only loading would tell."""
        ...

    def pack(self, clients: Sequence[int]) -> Packed | None:
        """Return the clients' training examples as one, or None if one of them is not in memory as `Examples`."""
        ...


Virtual = Generated
"""The older name of `Generated`."""


@dataclass(frozen=True)
class KeyedSubset(Sequence[int]):
    """`size` of some clients, each found when it is asked for, so that a subset of millions costs nothing.

    Guarantees: as many different clients as `size`, in an order of the key's own; equal fields give equal subsets.
    Protects nobody: a Feistel network of few rounds over the numbers, as Luby and Rackoff (1988) have it, walked until
    it stays within them.
    """

    key: tuple[Key, ...]
    clients: Sequence[int] = field(repr=False)
    size: int

    def __post_init__(self) -> None:
        """Check that there are as many."""
        if not 0 <= self.size <= len(self.clients):
            raise ConfigError(f"size must be 0 to {len(self.clients)}, got {self.size}")

    def __len__(self) -> int:
        """Return the size."""
        return self.size

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        """Return the client at `place`."""
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(self.size))]
        at = place + self.size if place < 0 else place
        if not 0 <= at < self.size:
            raise IndexError(f"place {place} is outside a subset of {self.size}")
        at = self._mixed(at)
        while at >= len(self.clients):
            at = self._mixed(at)
        return self.clients[at]

    @cached_property
    def _rounds(self) -> tuple[int, ...]:
        key = key_bytes(*self.key, size=8 * _ROUNDS)
        return tuple(int.from_bytes(key[at : at + 8], "little") for at in range(0, len(key), 8))

    def _mixed(self, number: int) -> int:
        """Return the number's image under a permutation of all numbers of twice `half` bits."""
        half = max(1, ((len(self.clients) - 1).bit_length() + 1) // 2)
        left, right = number >> half, number & ((1 << half) - 1)
        for key in self._rounds:
            word = (right + 1) * 0x9E3779B97F4A7C15 + key & _WORD
            word = (word ^ word >> 32) * 0xD6E8FEB86659FD93 & _WORD
            left, right = right, left ^ word >> 64 - half
        return left << half | right


_ROUNDS, _WORD = 6, (1 << 64) - 1


@dataclass(frozen=True)
class Partitioned:
    """Clients that share out one pool of examples.

    `parts`: each client's indices, together every example once. `holdout`: the share of its examples that a client
    keeps aside to evaluate on, rounded down; which ones depends on the seed and the client alone.
    """

    pool: Data = field(repr=False)
    parts: Sequence[NDArray[np.int64]] = field(repr=False)
    holdout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"holdout must be >= 0 and < 1, got {self.holdout}")

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.parts)

    def load(self, client: int) -> ClientData:
        """Return the client's part of the pool, and of that what it keeps aside."""
        train, aside = self._split(client)
        held = _take(self.pool, aside) if len(aside) else None
        return ClientData(_take(self.pool, train), held)

    def counts(self, clients: Sequence[int]) -> NDArray[np.int64] | None:
        """Return how many training examples each has."""
        sizes = np.array([len(self.parts[client]) for client in clients], dtype=np.int64)
        return sizes - (sizes * self.holdout).astype(np.int64)

    def pack(self, clients: Sequence[int]) -> Packed | None:
        """Return the clients' training examples as one, gathered in one go."""
        if not isinstance(self.pool, Examples):
            return None
        rows = [self._split(client)[0] for client in clients]
        offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows])))
        return Packed(self.pool.take(torch.from_numpy(np.concatenate(rows))), offsets)

    def _split(self, client: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        part = self.parts[client]
        aside = int(len(part) * self.holdout)
        if aside == 0:
            return part, part[:0]
        order = seeded(self.seed, "holdout", client).permutation(len(part))
        return part[np.sort(order[aside:])], part[np.sort(order[:aside])]


def partition(task: Task, partitioner: Partitioner, clients: int, *, seed: int, holdout: float = 0.0) -> Partitioned:
    """Return the task's pooled training examples, shared out over `clients`.

    Raises: TaskError: if the task has no pooled data or they are faulty. ConfigError: if they cannot be shared out so.
    """
    if task.train_data is None:
        raise TaskError("the task has neither train_data nor client_data; a simulation needs one of them")
    pool = task.train_data()
    task.check(pool, "the task's train_data")
    groups = None if task.groups is None else np.asarray(task.groups())
    targets = targets_of(pool)
    labels = targets.numpy() if targets.dim() == 1 else None
    outline = DataOutline(len(pool), labels, groups)
    return Partitioned(pool, partitioner.split(outline, clients, seed), holdout, seed)


def given_clients(clients: Population | Sequence[Data | ClientData]) -> Population:
    """Return the clients that a user gave: as they are, or those who hold the parts of a list.

    Raises: ConfigError: if they are neither.
    """
    if isinstance(clients, list | tuple):
        return Held(clients)
    if not all(hasattr(clients, name) for name in ("__len__", "load", "counts", "pack")):
        raise ConfigError(
            f"clients must be a number, a list with each client's data, or a source, got {type(clients).__name__}"
        )
    return clients  # type: ignore[return-value]  # which has a population's methods, as far as can be seen


def population_of(task: Task, partitioner: Partitioner, clients: int, *, seed: int, holdout: float = 0.0) -> Population:
    """Return the task's virtual clients if it has them, else its pooled examples shared out."""
    if task.client_data is not None:
        return Generated(clients, task.client_data)
    return partition(task, partitioner, clients, seed=seed, holdout=holdout)


def site_share(task: Task, settings: Mapping[str, Any]) -> ClientData:
    """Return what client `client` of a simulated population of `clients` holds, for sites that try a fleet out.

    `settings`: a site's `[data]` table: `client`, `clients`, and as in a run.toml `partition`, `seed` and `holdout`.
    With those of a simulation, the fleet trains the same model. Real sites load their own data instead.

    Raises: ConfigError: for a setting that does not exist or cannot be. TaskError: as `partition`.
    """
    known = ("client", "clients", "partition", "seed", "holdout")
    for key in settings:
        if key not in known:
            raise ConfigError(f"[data] has no key {key!r}; {nearest(key, known)}")
    clients = whole("[data] clients", settings.get("clients", 1), 1)
    client = whole("[data] client", settings.get("client", 0), 0)
    if client >= clients:
        raise ConfigError(f"[data] client must be 0 to {clients - 1} for clients = {clients}, got {client}")
    seed, holdout = whole("[data] seed", settings.get("seed", 0)), settings.get("holdout", 0.0)
    require_number("[data] holdout", holdout, at_least=0, below=1)
    rule = Partitioner.from_config(settings.get("partition", "iid"), "[data] partition")
    return population_of(task, rule, clients, seed=seed, holdout=holdout).load(client)


def _take(pool: Data, indices: NDArray[np.int64]) -> Data:
    if isinstance(pool, Examples):
        return pool.take(torch.from_numpy(indices))
    return Subset(pool, indices.tolist())  # type: ignore[arg-type]  # torch types Subset for its own Dataset class only
