"""A value as it crosses a wire or rests in a file: one JSON header and named arrays. No pickle anywhere.

A *tree* is what states, messages and checkpoints are made of: dicts with string keys, lists, tuples, None, bool, int,
float, str, and torch tensors or NumPy arrays as leaves. `to_frame` takes the arrays out of a tree and leaves the
rest as JSON; `from_frame` puts them back. Tuples come back as lists, NumPy scalars as numbers, arrays as tensors.
NaN and infinities travel as Python's `json` writes them; whoever may not see them checks for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedml_core.errors import StrategyError

__all__ = ["Frame", "Tree", "from_frame", "to_frame"]

Tree = Mapping[str, Any]
"""What can be sent: see the module's first lines for the leaves."""

_ARRAY_KEY = "$array"
_MAX_DEPTH = 100


@dataclass(frozen=True, eq=False)
class Frame:
    """What is sent: `kind` routes it, `header` is JSON text, `arrays` are C-contiguous NumPy arrays by name.

    Guarantees: its `repr` shows neither header nor arrays. Frames compare by identity.
    """

    kind: str
    header: str = field(repr=False)
    arrays: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict, repr=False)

    @property
    def size_bytes(self) -> int:
        """Return the bytes of header and arrays, without the transport's own framing."""
        return len(self.header.encode()) + sum(int(a.nbytes) for a in self.arrays.values())


def to_frame(kind: str, tree: Tree) -> Frame:
    """Return `tree` as a frame; array names are JSON pointers into the tree, such as `/state/0/momentum`.

    Guarantees: the tree is not changed. The frame's arrays may share its memory: send or copy before changing it.
    Raises: StrategyError: if the tree holds something that cannot be sent, naming its path.
    """
    if not isinstance(tree, Mapping):
        raise StrategyError(f"a tree must be a dict at its root, got {type(tree).__name__}")
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    body = _take_arrays(tree, (), arrays)
    try:
        header = json.dumps(body, separators=(",", ":"))
    except ValueError as error:
        raise StrategyError("the tree holds an integer too long for JSON; send it as text in hexadecimal") from error
    return Frame(kind, header, arrays)


def from_frame(frame: Frame) -> dict[str, Any]:
    """Return the tree that was sent; its arrays are tensors on the CPU that own their memory.

    Guarantees: whatever the frame holds, the outcome is a tree or a ValueError. Each array is used exactly once, so
    a small header cannot ask for more memory than was sent.
    Raises: ValueError: if the header is not a JSON object, or header and arrays do not belong together.
    """
    try:
        body = json.loads(frame.header)
    except RecursionError as error:
        raise ValueError(f"the header nests deeper than {_MAX_DEPTH} levels") from error
    waiting = dict(frame.arrays)
    tree = _put_arrays(body, waiting, 0)
    if not isinstance(tree, dict):
        raise ValueError(f"a frame's header must be a JSON object, got {type(tree).__name__}")
    if waiting:
        raise ValueError(f"the frame holds {len(waiting)} arrays that its header does not name")
    return tree


def _take_arrays(value: Any, path: tuple[str, ...], arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    if len(path) > _MAX_DEPTH:
        raise StrategyError(f"the tree nests deeper than {_MAX_DEPTH} levels at {_pointer(path[:3])}")
    if isinstance(value, torch.Tensor | np.ndarray):
        name = _pointer(path)
        arrays[name] = _plain_array(value, name)
        return {_ARRAY_KEY: name}
    if isinstance(value, np.bool_ | np.integer | np.floating):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == _ARRAY_KEY:
                place = _pointer(path)
                raise StrategyError(f"a tree's keys must be text other than {_ARRAY_KEY!r}, got {key!r} at {place}")
        return {key: _take_arrays(item, (*path, key), arrays) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_take_arrays(item, (*path, str(index)), arrays) for index, item in enumerate(value)]
    raise StrategyError(
        f"a {type(value).__name__} at {_pointer(path)} cannot be sent; use tensors, numbers, text, lists and dicts"
    )


def _plain_array(value: torch.Tensor | np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Return `value` as a C-contiguous array in this machine's byte order; refuse what would need pickle."""
    array = _numpy_of(value, name) if isinstance(value, torch.Tensor) else value
    if not _is_plain(array.dtype):
        raise StrategyError(f"an array of {array.dtype} at {name} cannot be sent; use numbers of at most 64 bits")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    # ascontiguousarray alone would turn a scalar array into one of shape (1,).
    return np.ascontiguousarray(native).reshape(array.shape)


def _numpy_of(tensor: torch.Tensor, name: str) -> np.ndarray[Any, Any]:
    try:
        return tensor.numpy(force=True)
    except (TypeError, RuntimeError) as error:
        kind = f"{tensor.dtype} {tensor.layout}".replace("torch.", "")
        raise StrategyError(f"a {kind} tensor at {name} cannot be sent; make it a dense float32 one") from error


def _put_arrays(value: Any, waiting: dict[str, np.ndarray[Any, Any]], depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError(f"the header nests deeper than {_MAX_DEPTH} levels")
    if isinstance(value, dict):
        if _ARRAY_KEY not in value:
            return {key: _put_arrays(item, waiting, depth + 1) for key, item in value.items()}
        name = value[_ARRAY_KEY]
        if len(value) > 1 or not isinstance(name, str) or name not in waiting:
            raise ValueError("the header names an array that is not in the frame, or names it twice")
        array = waiting.pop(name)
        if not _is_plain(array.dtype):
            raise ValueError(f"the frame holds an array of {array.dtype}; only numbers of at most 64 bits are read")
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True))
    if isinstance(value, list):
        return [_put_arrays(item, waiting, depth + 1) for item in value]
    return value


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Say whether NumPy, torch and a file agree on `dtype`: truth values, integers, half to double, complex."""
    return dtype.kind in "biu" or dtype.char in "efdFD"


def _pointer(path: tuple[str, ...]) -> str:
    """Return `path` as a JSON pointer (RFC 6901), so that no two places of a tree share a name."""
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in path) or "the root"
