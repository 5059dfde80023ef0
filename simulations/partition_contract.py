"""What every partitioner promises, and the one place that checks it: each example goes to exactly one client."""

from __future__ import annotations

import contextlib
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedml_core.errors import ConfigError
from fedml_core.named import Named
from fedml_core.randomness import seeded

Column = NDArray[Any]
Part = NDArray[np.int64]

TARGET_BINS = 10
MAX_CLASSES = 10_000


@dataclass(frozen=True, eq=False)
class DataOutline:
    """What a partitioner may know of a data set: how many examples, and a label and a natural key for each.

    Args: count: >= 1. labels: one per example: integers, booleans or strings are classes, floats are regression
        targets. groups: one natural key per example (the writer, the device, the hospital): integers or strings.
    Raises: ConfigError: if a column is not one value per example, or holds NaN or another kind of value.
    """

    count: int
    labels: Column | None = field(default=None, repr=False)
    groups: Column | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the columns and make them arrays."""
        object.__setattr__(self, "count", whole("count", self.count, 1))
        for name, kinds in (("labels", "biufU"), ("groups", "iuU")):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, _column(name, values, kinds, self.count))

    @classmethod
    def of(cls, labels: ArrayLike, groups: ArrayLike | None = None) -> DataOutline:
        """Return the examples that `labels` counts.

        Example:
            >>> DataOutline.of([0, 1, 1])
            DataOutline(count=3)
        """
        column = _column("labels", labels, "biufU", None)
        keys = None if groups is None else _column("groups", groups, "iuU", len(column))
        return cls(len(column), column, keys)

    def needed_labels(self) -> Column:
        """Return the labels.

        Raises: ConfigError: if there are none.
        """
        if self.labels is None:
            raise ConfigError(
                "this partitioner needs one label per example, got none; give labels, or use iid or quantity-skew"
            )
        return self.labels

    def needed_groups(self) -> Column:
        """Return the natural keys.

        Raises: ConfigError: if there are none.
        """
        if self.groups is None:
            raise ConfigError("this partitioner needs one natural key per example, got none; give groups, or use iid")
        return self.groups

    def members(self) -> list[Part]:
        """Return, for each class of `class_codes`, the indices of its examples in rising order."""
        codes = class_codes(self.needed_labels())
        return by_owner(codes, int(codes.max()) + 1)


class Partitioner(Named, ABC):
    """Says which client holds which example; to write your own, define `deal` in a frozen dataclass that subclasses it.

    `members` and `from_config` know those that come with fedveil once `simulations.partition` is imported.
    """

    @abstractmethod
    def deal(self, examples: DataOutline, clients: int, rng: np.random.Generator) -> Sequence[ArrayLike]:
        """Return one collection of example indices per client, in any order; draw from nothing but `rng`.

        Args: clients: 1 to `examples.count`.
        """

    @final
    def split(self, examples: DataOutline, clients: int, seed: int) -> list[Part]:
        """Return the indices of each client's examples, rising, as int64.

        Guarantees: every example is in exactly one part and no part is empty; equal arguments give equal parts.
        Args: clients: >= 1 and at most `examples.count`. seed: any integer.
        Raises: ConfigError: if the examples cannot be split so, or `deal` broke the guarantee.
        """
        if not isinstance(examples, DataOutline):
            raise ConfigError(f"split takes a DataOutline, got a {type(examples).__name__}; use DataOutline.of(labels)")
        clients = whole("clients", clients, 1)
        seed = whole("seed", seed)
        if clients > examples.count:
            raise ConfigError(
                f"{clients} clients cannot share {examples.count} examples; use at most {examples.count} clients"
            )
        name = type(self).__name__
        parts = self.deal(examples, clients, seeded(seed, "partition", name))
        return by_owner(_owners(name, parts, examples.count, clients), clients)


def by_owner(owners: NDArray[np.int64], clients: int) -> list[Part]:
    """Return each client's indices, rising, where `owners[i]` in 0 to `clients` - 1 holds example i.

    Example:
        >>> [part.tolist() for part in by_owner(np.array([1, 0, 1]), 2)]
        [[1], [0, 2]]
    """
    order = np.argsort(owners, kind="stable").astype(np.int64, copy=False)
    ends = np.cumsum(np.bincount(owners, minlength=clients))
    return np.split(order, ends[:-1])


def class_codes(labels: ArrayLike) -> NDArray[np.int64]:
    """Return the class of each label, numbered from 0 in the order of `np.unique`, without gaps.

    Float labels with more than 10 distinct values are regression targets: they are cut at their deciles, so that a
    class is a tenth of the examples (fewer classes where ties make deciles coincide).

    Raises: ConfigError: if there are more than 10,000 classes.
    """
    column = _column("labels", labels, "biufU", None)
    values, codes = np.unique(column, return_inverse=True)
    if column.dtype.kind == "f" and len(values) > TARGET_BINS:
        cuts = np.quantile(column.astype(np.float64), np.arange(1, TARGET_BINS) / TARGET_BINS)
        bins = np.searchsorted(cuts, column, side="right")
        codes = np.unique(bins, return_inverse=True)[1]
    elif len(values) > MAX_CLASSES:
        raise ConfigError(
            f"labels hold {len(values)} classes, more than {MAX_CLASSES}; give regression targets as floats"
        )
    return codes.astype(np.int64, copy=False)


def whole(name: str, value: object, minimum: int | None = None) -> int:
    """Return `value` as an int.

    Raises: ConfigError: if it is not a whole number (booleans are not), or below `minimum`.
    """
    wanted = "an integer" if minimum is None else f"an integer >= {minimum}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{name} must be {wanted}, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} must be {wanted}, got {value!r}") from None
    if minimum is not None and number < minimum:
        raise ConfigError(f"{name} must be {wanted}, got {number}")
    return number


def positive(name: str, value: object) -> float:
    """Return `value` as a float.

    Raises: ConfigError: if it is not a finite number > 0.
    """
    number = math.nan
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an int may be larger than any float
            number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(f"{name} must be a finite number > 0, got {value!r}")
    return number


def indices_of(name: str, client: int, part: object) -> Part:
    """Return what partitioner `name` gave `client` as an int64 array.

    Raises: ConfigError: if it is not a flat collection of integers.
    """
    try:
        indices = np.asarray(part)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{name} gave client {client} something that is not an array of integers") from None
    if indices.ndim == 1 and indices.size == 0:
        return np.empty(0, dtype=np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ConfigError(
            f"{name} must give each client a flat array of integers, got {indices.dtype} of shape {indices.shape} "
            f"for client {client}"
        )
    return indices.astype(np.int64, copy=False)


def _column(name: str, values: ArrayLike, kinds: str, count: int | None) -> Column:
    try:
        column = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} cannot be read as an array ({error}); give a list or a NumPy array") from None
    if column.ndim != 1:
        raise ConfigError(f"{name} must be one value per example, got shape {column.shape}; reduce it to one column")
    if len(column) == 0 or (count is not None and len(column) != count):
        raise ConfigError(f"{name} has {len(column)} values for {count or 'at least 1'} examples; give one for each")
    if column.dtype.kind == "O" or (column.dtype.kind == "U" and not isinstance(values, np.ndarray)):
        # NumPy turns 1 into "1" beside a string, which would merge two keys in silence.
        strings = all(isinstance(value, str) for value in np.asarray(values, dtype=object))
        column = column.astype(str) if strings else column.astype(object)
    if column.dtype.kind not in kinds:
        allowed = "integers or strings" if "f" not in kinds else "integers, floats or strings"
        raise ConfigError(f"{name} must be all {allowed}, got {column.dtype} values; convert them first")
    if column.dtype.kind == "f" and not np.isfinite(column).all():
        bad = int((~np.isfinite(column)).sum())
        raise ConfigError(f"{name} holds {bad} values that are NaN or infinite; remove those examples or mend them")
    return column


def _owners(name: str, parts: object, count: int, clients: int) -> NDArray[np.int64]:
    """Return the client of each example: the check behind the guarantee of `Partitioner.split`."""
    if not isinstance(parts, Sequence | np.ndarray) or len(parts) != clients:
        got = len(parts) if isinstance(parts, Sequence | np.ndarray) else f"a {type(parts).__name__}"
        raise ConfigError(f"{name} must give one index array for each of {clients} clients, got {got}")
    arrays = [indices_of(name, client, part) for client, part in enumerate(parts)]
    flat = np.concatenate(arrays)
    outside = flat[(flat < 0) | (flat >= count)]
    if len(outside):
        raise ConfigError(
            f"{name} names {len(outside)} indices outside 0 to {count - 1}, such as {outside[0]}; use row numbers"
        )
    uses = np.bincount(flat, minlength=count)
    lost, repeated = int((uses == 0).sum()), int((uses > 1).sum())
    if lost or repeated:
        raise ConfigError(
            f"{name} loses {lost} and repeats {repeated} of {count} examples; give each index to one client"
        )
    sizes = np.array([len(array) for array in arrays])
    if not sizes.all():
        empty = np.flatnonzero(sizes == 0)
        raise ConfigError(
            f"{name} leaves {len(empty)} of {clients} clients without examples, such as client {empty[0]}; use fewer"
        )
    owners = np.empty(count, dtype=np.int64)
    owners[flat] = np.repeat(np.arange(clients), sizes)
    return owners


__all__ = ["DataOutline", "Part", "Partitioner", "by_owner", "class_codes", "indices_of", "positive", "whole"]
