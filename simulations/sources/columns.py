"""Named arrays as examples: what the arrays in a file must be called, and what they must look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.data import Examples
from fedml_core.errors import ConfigError
from fedml_core.named import nearest

Array = NDArray[Any]

TEST = "test_"
"""What the names of examples that a client keeps aside begin with."""

_OFFSETS = "offsets"
_REMEDY = "name the arrays inputs (or inputs_0, inputs_1, ...), targets and, if you have them, weights"


@dataclass(frozen=True, eq=False)
class Columns:
    """Examples of one client, or with `offsets` of K: client k's are rows offsets[k] to offsets[k + 1] of each."""

    inputs: tuple[Array, ...] = field(repr=False)
    targets: Array = field(repr=False)
    weights: Array | None = field(default=None, repr=False)
    offsets: Array | None = field(default=None, repr=False)

    @classmethod
    def of(cls, arrays: Mapping[str, Array], where: str, prefix: str = "") -> Columns:
        """Return the arrays of `where` whose names begin with `prefix`.

        Raises: ConfigError: if one is missing, or they are not as many rows as one another.
        """
        names = list(input_names(arrays, prefix))
        if not names or f"{prefix}targets" not in arrays:
            lacking = f"{prefix}targets" if names else f"{prefix}inputs"
            held = ", ".join(sorted(arrays)) or "nothing"
            raise ConfigError(f"{where} has no array {lacking!r}, it holds {held}; {_REMEDY}")
        found = {name: arrays[name] for name in (*names, f"{prefix}targets")}
        weights = arrays.get(f"{prefix}weights")
        rows = len(_plain(where, f"{prefix}targets", found[f"{prefix}targets"]))
        for name, array in {**found, **({} if weights is None else {f"{prefix}weights": weights})}.items():
            if len(_plain(where, name, array)) != rows:
                raise ConfigError(f"{where}: {name} has {len(array)} rows and the targets have {rows}; they must agree")
        offsets = arrays.get(f"{prefix}{_OFFSETS}")
        if offsets is not None:
            _check_offsets(where, f"{prefix}{_OFFSETS}", offsets, rows)
        return cls(tuple(found[name] for name in names), found[f"{prefix}targets"], weights, offsets)

    def examples(self, rows: slice | NDArray[np.int64] = slice(None)) -> Examples:
        """Return a copy of some rows as examples."""
        weights = None if self.weights is None else _tensor(self.weights[rows])
        return Examples(tuple(_tensor(column[rows]) for column in self.inputs), _tensor(self.targets[rows]), weights)

    @property
    def count(self) -> int:
        """Return how many arrays hold a value of each example."""
        return len(self.inputs) + 1 + (self.weights is not None)


def refuse_unknown(arrays: Mapping[str, Array], where: str) -> None:
    """Raise ConfigError if an array has a name that would be left unread; the nearest is offered."""
    known = [f"{prefix}{name}" for prefix in ("", TEST) for name in ("inputs", "targets", "weights", _OFFSETS)]
    known += [name for prefix in ("", TEST) for name in input_names(arrays, prefix)]
    for name in arrays:
        if name not in known:
            raise ConfigError(f"{where} has an array {name[:80]!r}, which nobody reads; {nearest(name, known)}")


def input_names(arrays: Mapping[str, object], prefix: str) -> Iterator[str]:
    """Yield the names of the inputs, one for each argument of the model's `forward`."""
    if f"{prefix}inputs" in arrays:
        yield f"{prefix}inputs"
        return
    place = 0
    while f"{prefix}inputs_{place}" in arrays:
        yield f"{prefix}inputs_{place}"
        place += 1


def _plain(where: str, name: str, array: Array) -> Array:
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        shape = "a single value" if array.ndim == 0 else f"{array.dtype}"
        raise ConfigError(f"{where}: {name} must be numbers of shape (n, ...), got {shape}; convert it first")
    return array


def _check_offsets(where: str, name: str, offsets: Array, rows: int) -> None:
    if offsets.ndim != 1 or len(offsets) < 2 or offsets.dtype.kind not in "iu":
        raise ConfigError(
            f"{where}: {name} must be whole numbers of shape (clients + 1,), got {offsets.dtype} {offsets.shape}"
        )
    if int(offsets[0]) != 0 or int(offsets[-1]) != rows:
        raise ConfigError(
            f"{where}: {name} must begin with 0 and end with the {rows} rows, got {offsets[0]} and {offsets[-1]}"
        )


def _tensor(array: Array) -> Tensor:
    native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True)
    return torch.from_numpy(native)
