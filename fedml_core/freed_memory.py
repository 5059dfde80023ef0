"""Keeping the memory that a process frees, so that the next step need not ask the system for it: glibc, and back again.

The system hands out fresh memory page by page, which for a convolutional model's activations and gradients takes up to
a tenth of a step. The settings are those of a whole process, so nothing here happens by itself.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

__all__ = ["freed_memory_kept", "keep_freed_memory", "why_not_kept"]

# glibc's numbers of its settings, and values of which the first that it takes counts.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
_Settings = Sequence[tuple[int, Sequence[int]]]
_KEEP: _Settings = (
    (_MMAP_THRESHOLD, (1 << 30, 32 << 20)),
    (_TRIM_THRESHOLD, ((1 << 31) - 1,)),
    (_TOP_PAD, (64 << 20,)),
)
# glibc cannot be asked for its settings. These are where it ends by itself in a process that frees large blocks, as any
# that computes with torch does: it raises its first two as blocks are freed, up to here and not beyond.
_RESTORED: _Settings = ((_MMAP_THRESHOLD, (32 << 20,)), (_TRIM_THRESHOLD, (64 << 20,)), (_TOP_PAD, (128 << 10,)))
_OF_THE_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")

_lock = threading.Lock()
_keepers = 0


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees until it ends; return whether the system can.

    For processes of ours only, such as workers: they never grow smaller than they once were. Linux with glibc; nothing
    happens elsewhere.
    """
    global _keepers
    if not _has_glibc():
        return False
    with _lock:
        _keepers += 1  # whoever keeps memory for a while inside must not end it
        return _set(_KEEP)


def why_not_kept() -> str | None:
    """Return why `freed_memory_kept` would do nothing good in this process, or None where it can be used."""
    if not _has_glibc():
        return "only Linux with glibc can be told to"
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    named = [name for name in _OF_THE_USER if name in os.environ]
    named += ["GLIBC_TUNABLES"] if "glibc.malloc." in tunables else []
    return f"{named[0]} has settings of its own for this process" if named else None


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let this process keep the memory that it frees for as long as anybody is inside.

    When the last one leaves, also by an exception, glibc has settings again under which it gives memory back, and what
    is free goes back to the system at once. They are those of a process that has freed a block of 32 MiB; glibc does
    not raise them by itself any more. Only for where `why_not_kept` returns None.
    """
    global _keepers
    with _lock:
        _keepers += 1
        if _keepers == 1:
            _set(_KEEP)
    try:
        yield
    finally:
        with _lock:
            _keepers -= 1
            if _keepers == 0:
                _set(_RESTORED)
                ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def _set(settings: _Settings) -> bool:
    libc = ctypes.CDLL(None)
    return all(any(libc.mallopt(option, value) == 1 for value in values) for option, values in settings)


@cache
def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
