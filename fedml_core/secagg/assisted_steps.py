"""How far a session of an assisted sum has come, and the rule that each of its steps is taken in order or not at all.

Guarantees: a step that is asked for out of order, or during another one, and any error within a step, wipes the
    session, which answers nothing more.
Trust: as far as a session can forget: see `secrets`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

from fedml_core.errors import SecureAggregationError

__all__ = ["Stage", "Stepped", "step"]

P = ParamSpec("P")
R = TypeVar("R")


class Stage(IntEnum):
    """What a session has done."""

    FRESH = 0
    ADVERTISED = 1
    GATHERING = 2
    WITNESSED = 3
    OVER = 4


class Stepped(Protocol):
    """A session that is in one stage and can be wiped."""

    stage: Stage
    stepping: threading.Lock

    def wipe(self) -> None:
        """Overwrite every secret and end the session."""


S = TypeVar("S", bound=Stepped)
Step = Callable[Concatenate[S, P], R]


def step(before: Stage, after: Stage) -> Callable[[Step[S, P, R]], Step[S, P, R]]:
    """Return a decorator for the step between two stages; equal ones make a step that may be repeated."""

    def decorate(method: Step[S, P, R]) -> Step[S, P, R]:
        @functools.wraps(method)
        def stepped(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
            if not self.stepping.acquire(blocking=False):
                self.wipe()
                raise SecureAggregationError(f"{method.__name__} was asked of a session during another step")
            try:
                if self.stage is not before:
                    raise SecureAggregationError(
                        f"{method.__name__} was asked of a session that is {self.stage.name.lower()}; "
                        f"it must be {before.name.lower()}"
                    )
                result = method(self, *args, **kwargs)
                if self.stage is before:  # a method may end its session itself
                    self.stage = after
                if after is Stage.OVER:
                    self.wipe()
                return result
            except BaseException:
                self.wipe()
                raise
            finally:
                self.stepping.release()

        return cast("Step[S, P, R]", stepped)

    return decorate
