"""Messages under way in a Flower grid inside this process: what will go wrong with each, and its reply to come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from enum import Enum

import fedml_core.engine_guard  # noqa: F401 - switches Flower's calls home off, so it goes before flwr

# isort: split
from flwr.app import Message

from simulations.flower_messages import expiry

__all__ = ["Fault", "FaultHook", "Sent", "wait_for"]


class Fault(Enum):
    """What may go wrong with one message, for tests of a strategy's patience."""

    DROP = "the client never sees the message, and no reply ever comes"
    LATE = "the client does its work and keeps its new state, but its reply never comes"
    ERROR = "the client is not run; the server gets an error reply with the reason InjectedFault"


FaultHook = Callable[[int, Message], Fault | None]


@dataclass(frozen=True)
class Sent:
    """A message on its way, what will go wrong with it, and its reply to come."""

    instruction: Message
    fault: Fault | None = None
    reply: Future[Message] = field(default_factory=Future)


def wait_for(awaited: Sequence[Sent], patience_s: float) -> None:
    """Return when each reply is there or its message's time to live is over, or when patience ends."""
    deadline_s = time.monotonic() + patience_s
    while True:
        now = time.time()
        waiting = [sent for sent in awaited if not sent.reply.done() and expiry(sent.instruction) >= now]
        left_s = min(deadline_s - time.monotonic(), max((expiry(s.instruction) - now for s in waiting), default=0.0))
        if not waiting or left_s < 0:
            return
        wait([sent.reply for sent in waiting], timeout=min(left_s, threading.TIMEOUT_MAX))
