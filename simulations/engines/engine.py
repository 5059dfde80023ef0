"""What an engine is: it takes a cohort's work whole and yields replies in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

from clients.client import Trainer
from clients.memory import MemoryStore
from fedml_core.messages import Arrival, Assignment, Reply, reply_to_frame
from simulations.population import Population


class Engine(Protocol):
    """Does the work of a cohort in this process, or spreads it."""

    name: ClassVar[str]

    def run(
        self,
        assignment: Assignment,
        cohort: Sequence[int],
        population: Population,
        trainer: Trainer,
        memory: MemoryStore,
    ) -> Iterator[Arrival]:
        """Yield each client's reply as it is ready.

        Guarantees: replies depend on the assignment and the client alone, not on the order of work.
        """
        ...


def arrival_of(reply: Reply) -> Arrival:
    """Return a reply as it would have arrived over a wire, with the size of its message."""
    return Arrival(reply.client, reply, reply_to_frame(reply).size_bytes)
