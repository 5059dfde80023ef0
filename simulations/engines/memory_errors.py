"""One error for memory that has run out: a GPU has one of its own, on the CPU torch and NumPy each say another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["memory_named"]

_OF_TORCH = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")


@contextmanager
def memory_named() -> Iterator[None]:
    """Let memory that runs out inside be `torch.OutOfMemoryError`, whoever noticed; other errors pass as they are."""
    try:
        yield
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error)) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(sign in str(error) for sign in _OF_TORCH):
            raise
        raise torch.OutOfMemoryError(str(error)) from error
