"""Messages between processes of one machine: tensors travel as plain bytes, large ones on a shelf that both ends see.

Torch's own way opens a file of shared memory for each tensor, which costs more than a million numbers are worth; a pipe
takes milliseconds for as many, in pieces of a few pages.
"""

from __future__ import annotations

import io
import math
from contextvars import ContextVar
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Shelf", "packed", "unpacked"]

# Below this a tensor goes through the pipe with the rest of its message.
_FEWEST_BYTES = 1 << 18
# Beyond this, where there is no shelf, pages of shared memory are cheaper than a second copy of what they hold.
_MOST_BYTES = 16 << 20
# What multiprocessing's own pipes use, too: both ends are this program.
_HIGHEST_PROTOCOL = -1
_KINDS = (torch.float32, torch.float64, torch.int64)
_ALIGNED = 64

_AT_HAND: ContextVar[Shelf | None] = ContextVar("fedveil_shelf", default=None)


@dataclass(frozen=True)
class Shelf:
    """Memory that two processes see, where a message's large tensors lie until it is unpacked.

    One message lies there at a time: whoever packs the next must know that the last has been unpacked, or is not going
    to be. `memory`: bytes in shared memory, which a process is given at its start.
    """

    memory: Tensor = field(repr=False)

    @classmethod
    def of(cls, size_bytes: int) -> Self | None:
        """Return a shelf for tensors of `size_bytes` in all; none where they are better off in the pipe."""
        if size_bytes < _FEWEST_BYTES:
            return None
        return cls(torch.empty(size_bytes + _ALIGNED, dtype=torch.uint8).share_memory_())

    def put(self, value: Tensor, place: int) -> None:
        """Copy a tensor to a place, in bytes."""
        self._room(place, tuple(value.shape), value.dtype).copy_(value)

    def tensor(self, place: int, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        """Return a copy of what lies at a place."""
        return self._room(place, shape, kind).clone()

    def _room(self, place: int, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return self.memory[place : place + math.prod(shape) * kind.itemsize].view(kind).view(shape)


def packed(message: object, shelf: Shelf | None = None) -> bytes:
    """Return what `Connection.send_bytes` must be given; whoever receives it calls `unpacked` with the same shelf.

    Without a shelf, or where nothing was put there, `Connection.recv` will do. It may be sent to several processes.
    Raises: AttributeError, TypeError or PicklingError: if the message holds what cannot be sent.
    """
    buffer = io.BytesIO()
    _Packer(buffer, shelf).dump(message)
    return buffer.getvalue()


def unpacked(message: bytes, shelf: Shelf | None = None) -> Any:
    """Return what was packed; its tensors are the receiver's own.

    Only for messages of this program's own processes, as `Connection.recv`: reading one can run what is in it.
    """
    token = _AT_HAND.set(shelf)
    try:
        return ForkingPickler.loads(message)
    finally:
        _AT_HAND.reset(token)


class _Packer(ForkingPickler):
    def __init__(self, buffer: io.BytesIO, shelf: Shelf | None) -> None:
        super().__init__(buffer, _HIGHEST_PROTOCOL)
        self._shelf, self._filled = shelf, 0

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or not _travels(value):
            return NotImplemented
        size = value.numel() * value.element_size()
        if self._shelf is not None and size >= _FEWEST_BYTES and self._filled + size <= self._shelf.memory.numel():
            place, self._filled = self._filled, -(-(self._filled + size) // _ALIGNED) * _ALIGNED
            self._shelf.put(value, place)
            return _shelved, (place, tuple(value.shape), value.dtype)
        return (_tensor, (value.numpy(),)) if size <= _MOST_BYTES else NotImplemented


def _travels(value: Tensor) -> bool:
    plain = value.device.type == "cpu" and value.layout == torch.strided and not value.requires_grad
    return plain and value.dtype in _KINDS


def _tensor(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array)


def _shelved(place: int, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    shelf = _AT_HAND.get()
    if shelf is None:
        raise RuntimeError("a message that lies on a shelf was unpacked without it; this is a bug")
    return shelf.tensor(place, shape, kind)
