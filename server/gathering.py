"""How a round's updates come together at the server: as they are, or as a secure sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedml_core.message_frames import assignment_to_frame
from fedml_core.messages import Assignment, Channel, TrainWork
from fedml_core.model import ModelSpec
from fedml_core.transform import State
from fedml_core.update import Total
from server.validation import Exclusion, UpdateIntake
from strategies.strategy import Strategy

__all__ = ["Gathered", "Gathering", "InTheClear", "Order"]


@dataclass(frozen=True)
class Order:
    """What a round asks for.

    `assignment`: its training. `cohort`: who is asked; `next_cohort`: who will probably be asked in the next round.
    `state`: the strategy's. `timeout_s`: of each exchange. `again`: called before another sum of the round is taken
    although one may have been opened; it counts what that costs, and refuses by raising FedveilError.
    """

    assignment: Assignment
    cohort: Sequence[int]
    state: State = field(default_factory=dict, repr=False)
    next_cohort: Sequence[int] = ()
    timeout_s: float | None = None
    again: Callable[[], object] | None = field(default=None, repr=False)

    @property
    def train(self) -> TrainWork:
        """Return the work of the assignment."""
        assert isinstance(self.assignment.work, TrainWork)
        return self.assignment.work


@dataclass(frozen=True)
class Gathered:
    """What came of a round's training, and at what cost.

    `accepted`: the clients in the total. `why`: why there is no total to use, or "". `facts`: how a protocol went.
    """

    total: Total
    accepted: Sequence[int] = ()
    excluded: Sequence[Exclusion] = ()
    missing: Sequence[int] = ()
    bytes_up: int = 0
    bytes_down: int = 0
    why: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


class Gathering(Protocol):
    """Takes the updates of a round together; kept for a whole run. `looks_ahead`: it makes use of the next cohort."""

    looks_ahead: bool

    def gather(self, channel: Channel, order: Order) -> Gathered:
        """Return what came of asking the cohort."""
        ...


class InTheClear:
    """Every update reaches the server, which checks each and adds it up as it arrives."""

    looks_ahead = False

    def __init__(self, strategy: Strategy, spec: ModelSpec) -> None:
        self._strategy, self._spec = strategy, spec
        strategy.accumulator(spec)  # what may not be summed in the clear is refused before anybody trains

    def gather(self, channel: Channel, order: Order) -> Gathered:
        """Return the total of the good replies."""
        intake = UpdateIntake(order.assignment, order.cohort, self._strategy.accumulator(self._spec))
        bytes_down = 0
        if order.cohort:
            intake.take(channel.exchange(order.assignment, order.cohort, order.timeout_s))
            bytes_down = assignment_to_frame(order.assignment).size_bytes * len(order.cohort)
        return Gathered(
            intake.accumulator.total(),
            sorted(intake.accepted),
            tuple(intake.excluded),
            intake.missing,
            intake.bytes_up,
            bytes_down,
        )
