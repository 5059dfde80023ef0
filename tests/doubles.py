"""Small stand-ins for the tests: a trainer that does arithmetic, a channel that says what it is told to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from clients.client import Client
from clients.memory import InProcessMemory
from fedml_core.data import ClientData, Data, Examples
from fedml_core.errors import FedveilError
from fedml_core.message_frames import reply_to_frame
from fedml_core.messages import Arrival, Assignment, Reply
from fedml_core.model import ModelSpec
from fedml_core.randomness import Key
from fedml_core.training import Training
from fedml_core.transform import Guide
from fedml_core.update import Update

Change = Callable[[Reply], Reply | None]


class PullTrainer:
    """Moves the model towards the mean of the client's targets, half of the way, exactly."""

    def __init__(self, size: int) -> None:
        self.spec = ModelSpec.of_size(size)

    def train(
        self,
        parameters: Tensor,
        data: Data,
        training: Training,
        *,
        round_number: int,
        key: tuple[Key, ...],
        guide: Guide = Guide(),  # noqa: B008  # frozen
    ) -> Update:
        assert isinstance(data, Examples)
        delta = 0.5 * (data.targets.mean(dim=0) - parameters)
        update = Update.of(delta, 1.0, examples=float(len(data)), loss=float(len(data)) * float(delta.norm()))
        return update.replace(facts={"steps": torch.tensor(1.0), "step_size": torch.tensor(0.5)})

    def evaluate(self, parameters: Tensor, data: Data, batch_size: int = 256) -> dict[str, float]:
        assert isinstance(data, Examples)
        errors = (data.targets - parameters).norm(dim=1).double()
        return {"examples": float(len(data)), "loss": float(errors.sum())}


def data_of(client: int, size: int, examples: int | None = None) -> ClientData:
    """Return `client + 1` examples whose targets are all `client`."""
    count = client + 1 if examples is None else examples
    rows = Examples.of(torch.zeros(count, 1), torch.full((count, size), float(client)))
    return ClientData(rows, rows)


class PullChannel:
    """Clients that hold `data_of(i)` and train with a PullTrainer; `changes` tampers with single clients' replies."""

    def __init__(self, count: int, size: int, changes: dict[int, Change] | None = None) -> None:
        self.trainer = PullTrainer(size)
        self.count, self.size, self.changes = count, size, changes or {}
        self.memory = InProcessMemory()
        self.asked: list[tuple[int, tuple[int, ...]]] = []

    def clients(self, round_number: int) -> Sequence[int]:
        return range(self.count)

    def deliver(self, assignments: Mapping[int, Assignment], timeout_s: float | None) -> Iterator[Arrival]:
        for number, assignment in assignments.items():
            yield from self.exchange(assignment, [number], timeout_s)

    def exchange(self, assignment: Assignment, cohort: Sequence[int], timeout_s: float | None) -> Iterator[Arrival]:
        self.asked.append((assignment.round, tuple(cohort)))
        for number in cohort:
            client = Client(number, partial(data_of, number, self.size), self.trainer, self.memory)
            honest = client.answer(assignment)
            reply = self.changes[number](honest) if number in self.changes else honest
            if reply is not None:
                yield Arrival(number, reply, reply_to_frame(reply).size_bytes)


def with_values(values: Tensor) -> Change:
    """Return a change that replaces an update's values."""
    return with_update(lambda update: update.replace(values=values))


def with_update(change: Callable[[Update], Update]) -> Change:
    """Return a change of the update in a reply; other replies pass."""

    def apply(reply: Reply) -> Reply:
        return dataclasses.replace(reply, body=change(reply.body)) if isinstance(reply.body, Update) else reply

    return apply


def raising(error: FedveilError) -> Callable[..., ClientData]:
    """Return a loader that fails."""

    def load(*_: object) -> ClientData:
        raise error

    return load
