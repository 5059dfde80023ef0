"""Named NumPy arrays as one vector and back: what a strategy needs of a model that is neither torch's nor ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedml_core.errors import ReplyError, StrategyError
from fedml_core.model import ModelSpec, TensorSpec

NDArray = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ArrayLayout:
    """Which of a model's arrays stand where in its vector: floating-point ones, parameters before buffers.

    Arrays of integers and truth values do not travel: whoever merges keeps its own.
    Example:
        >>> layout = ArrayLayout.of({"weight": np.zeros((2, 2)), "steps": np.array(7)})
        >>> layout.spec.size, layout.merge(torch.ones(4), {"weight": np.zeros((2, 2)), "steps": np.array(7)})["steps"]
        (4, array(7))
    """

    spec: ModelSpec
    names: frozenset[str]

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray], buffers: Collection[str] = ()) -> ArrayLayout:
        """Return the layout of a model.

        Args: buffers: names of floating-point arrays that are averaged but not trained, such as running statistics.
        Raises: StrategyError: if no array is trainable, one holds no real numbers, or a buffer is not there.
        """
        for name, array in arrays.items():
            if array.dtype.kind not in "fiub":
                raise StrategyError(f"array {name!r} holds {array.dtype}; a model's arrays must be real numbers")
        if missing := sorted(set(buffers) - set(arrays)):
            raise StrategyError(f"buffer {missing[0]!r} is not among the model's arrays: {', '.join(sorted(arrays))}")
        floats = [name for name, array in arrays.items() if array.dtype.kind == "f"]
        parameters = [name for name in floats if name not in buffers]
        if not parameters:
            raise StrategyError("the model has no floating-point array to train; give it at least one")
        rows, offset = {}, 0
        for name in [*parameters, *(name for name in floats if name in buffers)]:
            rows[name] = TensorSpec(name, arrays[name].shape, arrays[name].dtype.name, offset)
            offset += rows[name].size
        first = tuple(rows[name] for name in parameters)
        return cls(ModelSpec(first, tuple(rows[name] for name in rows if name in buffers)), frozenset(arrays))

    def flatten(self, arrays: Mapping[str, NDArray]) -> Tensor:
        """Return the float32 vector (d,) of arrays that somebody sent; numbers beyond float32 become infinite.

        Raises: ReplyError: with rule `keys`, `shape` or `dtype`, if they are not arrays of this model.
        """
        self._check_names(arrays)
        parts = []
        for row in (*self.spec.parameters, *self.spec.buffers):
            array = arrays[row.name]
            if array.shape != row.shape:
                raise ReplyError("shape", f"array {row.name!r} must have shape {row.shape}, got {array.shape}")
            if array.dtype.kind != "f":
                raise ReplyError("dtype", f"array {row.name!r} must hold floats, got {array.dtype}")
            with np.errstate(over="ignore"):
                parts.append(array.astype(np.float32).reshape(-1))
        return torch.from_numpy(np.concatenate(parts))

    def merge(self, vector: Tensor, arrays: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Return `arrays`, in their order and dtypes, with the values of `vector` where it has any.

        Raises: StrategyError: if a value does not fit its array's dtype.
        """
        values, merged = vector.numpy(force=True), dict(arrays)
        for row in (*self.spec.parameters, *self.spec.buffers):
            part = values[row.offset : row.offset + row.size].reshape(row.shape)
            with np.errstate(over="ignore"):
                merged[row.name] = part.astype(arrays[row.name].dtype)
            if not np.isfinite(merged[row.name]).all():
                raise StrategyError(f"the step leaves the range of {row.dtype} in array {row.name!r}; send float32")
        return merged

    def _check_names(self, arrays: Mapping[str, NDArray]) -> None:
        if missing := sorted(self.names - arrays.keys()):
            raise ReplyError("keys", f"array {missing[0]!r} is missing, of {len(missing)}")
        if extra := sorted(arrays.keys() - self.names):
            raise ReplyError("keys", f"array {extra[0][:80]!r} is not one of the model's, of {len(extra)}")
