"""How one data set becomes the data of many clients: every partitioner.

All keep one promise, checked in `Partitioner.split`: each example goes to exactly one client and no client is empty.
A configuration names them as Python does, or in lower case with dashes: `{name = "label-limited", ...}`.

    Iid                alike and of equal size
    Dirichlet          label mix and size vary (alpha)
    BalancedDirichlet  label mix varies (alpha), equal sizes
    LabelLimited       each client sees k classes
    Shards             each client holds k slices of the examples sorted by label
    QuantitySkew       sizes vary (alpha), labels alike
    ByKey              one client per natural key, such as a writer or a hospital
    Explicit           the indices you say
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedml_core.errors import ConfigError
from simulations.partition_contract import DataOutline, Part, Partitioner, by_owner, class_codes, indices_of
from simulations.partition_labels import BalancedDirichlet, Dirichlet, LabelLimited, Shards
from simulations.partition_sizes import Iid, QuantitySkew


@dataclass(frozen=True)
class ByKey(Partitioner):
    """Gives the examples of each natural key to one client: client i holds the i-th distinct key in sorted order.

    Nothing is drawn: the seed has no effect.

    Args: merge: allow fewer clients than keys; key i then goes to client i modulo `clients`.
    Raises: ConfigError: from `split`, without groups, or if `clients` does not fit the number of distinct keys.
    """

    merge: bool = False

    def __post_init__(self) -> None:
        """Check `merge`."""
        if not isinstance(self.merge, bool):
            raise ConfigError(f"merge must be true or false, got {self.merge!r}")

    def deal(self, examples: DataOutline, clients: int, rng: np.random.Generator) -> list[Part]:
        """Return the parts."""
        keys, codes = np.unique(examples.needed_groups(), return_inverse=True)
        if clients > len(keys) or (clients < len(keys) and not self.merge):
            alternative = " or fewer" if self.merge else " or merge = true" if clients < len(keys) else ""
            raise ConfigError(
                f"groups hold {len(keys)} distinct keys, got {clients} clients; use {len(keys)} clients{alternative}"
            )
        return by_owner(codes % clients, clients)


@dataclass(frozen=True)
class Explicit(Partitioner):
    """Gives each client the indices named for it; the seed has no effect.

    Args: indices: for each client, the rows that it holds; together every row once.
    Raises: ConfigError: if an index is not an integer; from `split`, if examples are lost, repeated or not there.

    Example:
        >>> [part.tolist() for part in Explicit([[2, 0], [1]]).split(DataOutline(3), 2, seed=0)]
        [[0, 2], [1]]
    """

    indices: Sequence[Sequence[int]] = field(repr=False)

    def __post_init__(self) -> None:
        """Make the indices tuples, so that they compare and cannot change."""
        object.__setattr__(self, "indices", _as_tuples(self.indices))

    def deal(self, examples: DataOutline, clients: int, rng: np.random.Generator) -> Sequence[ArrayLike]:
        """Return the parts."""
        return self.indices


def label_counts(labels: ArrayLike, parts: Iterable[ArrayLike]) -> NDArray[np.int64]:
    """Return a (clients, classes) array: how many examples of each class each client holds.

    Column j counts the j-th value of `np.unique(labels)`; float labels are binned as `class_codes` says.

    Raises: ConfigError: if labels are unusable, or an index has no label.
    """
    codes = class_codes(labels)
    classes = int(codes.max()) + 1
    rows = []
    for client, part in enumerate(parts):
        indices = np.asarray(part, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(codes)):
            raise ConfigError(f"client {client} holds an index outside 0 to {len(codes) - 1}; pass the labels of all")
        rows.append(np.bincount(codes[indices], minlength=classes))
    return np.array(rows, dtype=np.int64).reshape(len(rows), classes)


def _as_tuples(indices: object) -> tuple[tuple[int, ...], ...]:
    if not isinstance(indices, Sequence | np.ndarray) or isinstance(indices, str):
        raise ConfigError(f"indices must be one list of integers for each client, got a {type(indices).__name__}")
    return tuple(tuple(indices_of("Explicit", client, part).tolist()) for client, part in enumerate(indices))


__all__ = [
    "BalancedDirichlet",
    "ByKey",
    "DataOutline",
    "Dirichlet",
    "Explicit",
    "Iid",
    "LabelLimited",
    "Partitioner",
    "QuantitySkew",
    "Shards",
    "label_counts",
]
