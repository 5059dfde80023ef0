"""A frame as Flower's records, and back: the header as one text, arrays as raw little-endian bytes, chunked by Flower.

Only Flower's public classes are used here. What arrives is untrusted: nothing in it is executed or unpickled, and it
must say exactly what `pack` says.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedml_core import engine_guard  # noqa: F401 - its import sets Flower's switches, before Flower reads them
from fedml_core.errors import StrategyError
from fedml_core.wire import Frame

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

MAX_HEADER_CHARACTERS = 8 << 20  # arrays are sent in chunks, a header is not
_STYPE = "fedveil.raw"
_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
}


def pack(frame: Frame, *, salt: bytes = b"", shared: dict[int, Array] | None = None) -> RecordDict:
    """Return `frame` as records.

    Args: salt: bytes added to every part. Flower's store keeps equal parts once and tells a sender which parts it has
    already; with a secret salt, nobody can find out that way whether they guessed another client's reply. shared: the
    arrays that were packed already with this salt, by `id`, for frames that hold the same arrays; filled here.
    Raises: StrategyError: if an array holds anything but plain numbers, or the header is too long to travel whole.
    """
    if len(frame.header) > MAX_HEADER_CHARACTERS:
        raise StrategyError(
            f"a frame's header must have at most {MAX_HEADER_CHARACTERS} characters, got {len(frame.header)}; "
            "send numbers as arrays"
        )
    shared = {} if shared is None else shared
    arrays = ArrayRecord()
    for name, array in frame.arrays.items():
        if id(array) not in shared:
            shared[id(array)] = _pack_array(name, array, salt)
        arrays[name] = shared[id(array)]
    head = ConfigRecord({"kind": frame.kind, "header": frame.header, "salt": salt})
    return RecordDict({"frame": head, "arrays": arrays})


def unpack(records: RecordDict) -> Frame:
    """Return the frame that `records` hold; its arrays are read-only.

    Raises: ValueError: if they hold anything else than what `pack` makes.
    """
    head, arrays = records.get("frame"), records.get("arrays")
    if len(records) != 2 or not isinstance(head, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise ValueError("records must be one header and its arrays")
    kind, header, salt = head.get("kind"), head.get("header"), head.get("salt")
    if not (len(head) == 3 and isinstance(kind, str) and isinstance(header, str) and isinstance(salt, bytes)):
        raise ValueError("a header must have a kind, a text and a salt")
    return Frame(kind, header, {name: _unpack_array(array, salt) for name, array in arrays.items()})


def _pack_array(name: str, array: np.ndarray[Any, Any], salt: bytes) -> Array:
    if array.dtype.name not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise StrategyError(f"array {name!r} of type {array.dtype.name} cannot be sent; use one of {known}")
    data = array.astype(_DTYPES[array.dtype.name], copy=False).tobytes() + salt
    return Array(dtype=array.dtype.name, shape=tuple(array.shape), stype=_STYPE, data=data)


def _unpack_array(array: Array, salt: bytes) -> np.ndarray[Any, Any]:
    dtype = _DTYPES.get(array.dtype)
    if dtype is None or array.stype != _STYPE:
        raise ValueError("an array must be raw numbers of a known type")
    if not all(type(size) is int and size >= 0 for size in array.shape):
        raise ValueError("an array's sizes must be whole numbers from 0")
    size_bytes = math.prod(array.shape) * dtype.itemsize
    if len(array.data) != size_bytes + len(salt) or not array.data.endswith(salt):
        raise ValueError("an array's bytes must be as many as its shape says")
    return np.frombuffer(memoryview(array.data)[:size_bytes], dtype=dtype).reshape(array.shape)
