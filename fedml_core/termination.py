"""SIGTERM, as process managers send it, ends a command as cleanly as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fedml_core.console import Console

__all__ = ["Terminated", "terminable"]

TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """Somebody sent SIGTERM."""


@contextmanager
def terminable(console: Console) -> Iterator[None]:
    """Raise `Terminated` inside when SIGTERM comes, and end the command then with one line and exit code 143.

    Outside the main thread, where Python handles no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Terminated:
        raise console.failed("Terminated", f"terminated{console.on_interrupt()}", TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
