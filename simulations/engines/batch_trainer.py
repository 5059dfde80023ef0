"""Training K clients in one go: what the vectorised and the fused engines have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fedml_core.randomness import Key
from fedml_core.training import Training
from fedml_core.transform import Guide
from fedml_core.update import Update
from simulations.packing import Packed


class UnsupportedError(Exception):
    """This way of training cannot do that model, optimizer or data; the message names the layer or setting and why."""


@dataclass(frozen=True)
class BatchWork:
    """K clients to train from the same parameters.

    `parameters`: (d,). `packed`: their examples. `clients`: their numbers, (K,). `purpose`: their keys without the last
    part, which is the client's number. `guide`: its offset, if any, has shape (K, p), or (p,) for all.
    """

    parameters: Tensor = field(repr=False)
    packed: Packed
    training: Training
    round: int
    clients: Sequence[int]
    purpose: tuple[Key, ...]
    guide: Guide = field(default_factory=Guide)


class Trained(Protocol):
    """K clients that were trained, for as long as their trainer trains no others."""

    @property
    def reports(self) -> Update:
        """Return what they report: weights, sums and facts (K,), and values of shape (K, 0)."""
        ...

    def rows(self) -> Update:
        """Return the K updates."""
        ...

    def total(self, factors: Tensor) -> Tensor:
        """Return the sum (d,) of the values, each times its factor (K,); not finite if one of the values is not."""
        ...


class BatchTrainer(ABC):
    """Trains K clients at once, each exactly as `TorchTrainer.train` would train it alone.

    Guarantees: row k of the result equals the update of client `clients[k]` alone with key (*purpose, clients[k]), to
    1e-5 relative: values (K, d), weights, sums and facts (K,).
    """

    @abstractmethod
    def descend(self, work: BatchWork) -> Trained:
        """Return the K clients trained, in the order of `work.clients`.

        Raises: UnsupportedError: if this trainer cannot do the work; nothing has changed.
        """

    def train(self, work: BatchWork) -> Update:
        """Return the K updates; raises as `descend`."""
        return self.descend(work).rows()
