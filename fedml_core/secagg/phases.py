"""The order of a session's steps: each in its turn, and none after anything went wrong.

Guarantees: a step that is asked for out of order, twice, while another is being taken, or that fails for whatever
    reason, ends the session, and its secrets are overwritten.
Trust: whoever runs the session calls its steps and nothing else.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.codec import Kind, Writer

__all__ = ["AssistedPhase", "ComplaintError", "Phase", "Stepped", "step"]


class Phase(IntEnum):
    """What a session has done; each step may be taken once, in this order."""

    FRESH = 0
    ADVERTISED = 1
    SHARED = 2
    RECEIVED = 3
    MASKED = 4
    CONFIRMED = 5
    OVER = 6


class AssistedPhase(IntEnum):
    """What a session of an assisted sum has done: a client goes from the first to the last at once."""

    FRESH = 0
    ADVERTISED = 1
    GATHERING = 2
    WITNESSED = 3
    OVER = 4


class ComplaintError(SecureAggregationError):
    """Boxes of these members cannot be opened: `members`; `message` says so to the server."""

    def __init__(self, members: Sequence[int]) -> None:
        super().__init__(tuple(members))
        self.members = tuple(members)

    @property
    def message(self) -> bytes:
        """Return the complaint as it is sent."""
        return Writer(Kind.COMPLAINT).numbers(self.members).bytes()

    def __str__(self) -> str:
        """Return who is complained about."""
        return f"the shares of members {', '.join(map(str, self.members))} cannot be opened"


class Stepped(Protocol):
    """A session that is in one phase and can be wiped."""

    phase: Any
    stepping: threading.Lock

    def wipe(self) -> None:
        """Overwrite every secret and end the session."""


S = TypeVar("S", bound=Stepped)
P = ParamSpec("P")
R = TypeVar("R")
Step = Callable[Concatenate[S, P], R]


def step(
    before: IntEnum, after: IntEnum, *, last: Callable[[Any], bool] | None = None
) -> Callable[[Step[S, P, R]], Step[S, P, R]]:
    """Return a decorator for the step between two phases: any other phase, and any error, ends the session.

    Equal phases make a step that may be repeated. `last`: says, after a step, whether it was the session's last; a step
    to a phase called OVER always is.
    """

    def decorate(method: Step[S, P, R]) -> Step[S, P, R]:
        @functools.wraps(method)
        def stepped(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
            if not self.stepping.acquire(blocking=False):
                # Whoever is taking the other step finds the session over when it ends.
                self.wipe()
                raise SecureAggregationError(f"{method.__name__} was asked of a session during another step")
            try:
                _require(self, before, method.__name__)
                result = method(self, *args, **kwargs)
                _require(self, before, method.__name__)  # a second caller may have ended the session meanwhile
                self.phase = after
                if after.name == "OVER" or (last is not None and last(self)):
                    self.wipe()
                return result
            except BaseException:
                self.wipe()
                raise
            finally:
                self.stepping.release()

        return cast("Step[S, P, R]", stepped)

    return decorate


def _require(session: Stepped, phase: IntEnum, name: str) -> None:
    if session.phase is not phase:
        raise SecureAggregationError(
            f"{name} was asked of a session that is {session.phase.name.lower()}; it must be {phase.name.lower()}"
        )
