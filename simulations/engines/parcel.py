"""Messages between processes of one machine: tensors travel as plain bytes, which a pipe carries at once.

Torch's own way opens a file of shared memory for each tensor, which costs more than a million numbers are worth.
"""

from __future__ import annotations

import io
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Beyond this, pages of shared memory are cheaper than a second copy of what they hold.
_MOST_BYTES = 16 << 20
# What multiprocessing's own pipes use, too: both ends are this program.
_HIGHEST_PROTOCOL = -1
_KINDS = (torch.float32, torch.float64, torch.int64)


def packed(message: object) -> bytes:
    """Return what `Connection.send_bytes` must be given so that `recv` returns an equal message; it is sent once or
    often.

    Raises: AttributeError, TypeError or PicklingError: if the message holds what cannot be sent.
    """
    buffer = io.BytesIO()
    _Packer(buffer, _HIGHEST_PROTOCOL).dump(message)
    return buffer.getvalue()


class _Packer(ForkingPickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and _travels(value):
            return _tensor, (value.numpy(),)
        return NotImplemented


def _travels(value: Tensor) -> bool:
    plain = value.device.type == "cpu" and value.layout == torch.strided and not value.requires_grad
    return plain and value.dtype in _KINDS and value.numel() * value.element_size() <= _MOST_BYTES


def _tensor(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array)


__all__ = ["packed"]
