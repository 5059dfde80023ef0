"""One site that protects its examples, as an audit sees it: it is asked to train, and what it sends is looked at.

Whoever makes the site's trainer may be wrong about it, so an audit asks for nothing but trainings, and compares what
comes with what `PrivateTraining` says of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.client import Trainer
from clients.private_trainer import Reserve
from clients.private_training import PrivateTraining
from fedml_core.data import Data, Examples, batch_of
from fedml_core.errors import TaskError
from fedml_core.privacy.accounting import Claim, epsilon_of
from fedml_core.task import Task
from fedml_core.training import Training

__all__ = ["Account", "AuditedTrainer", "ExampleSite", "Make", "Probe", "weighing_nothing"]

_MOST_EXAMPLES = 4096  # of a site's own that an audit trains on
_KEPT = 1 << 20  # coordinates of a release that are looked at
_NOTHING = 1e-30  # an example's weight: a gradient times this is no more than rounding beside any noise


class AuditedTrainer(Trainer, Protocol):
    """What an audit needs of a trainer; `clients.TorchTrainer` and `clients.PrivateTorchTrainer` are such."""

    def initial(self) -> Tensor:
        """Return the built model as a new vector."""
        ...


Make = Callable[[Task, Reserve], AuditedTrainer]
"""Makes the trainer of a task, which asks an account before it trains."""


class Account:
    """Takes down what a trainer reserves, beside what it was asked to do."""

    def __init__(self) -> None:
        self.reserved: list[Mapping[str, Any]] = []
        self.asked: list[Mapping[str, Any]] = []

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take an event down."""
        self.reserved.append(dict(event))


@dataclass(frozen=True)
class ExampleSite:
    """An audited site.

    `data`: what it holds. `make`: makes its trainer. `engine`: whose trainer it is, where it is no real site's, and
    which may read examples as it likes. `private`: how that says that it trains. `training`: as a server
    asks for it, and `rounds`: how often. `delta`: of the claim. `seed`: of everything that the audit chooses.
    """

    task: Task = field(repr=False)
    data: Examples = field(repr=False)
    make: Make = field(repr=False)
    private: PrivateTraining
    training: Training
    rounds: int
    delta: float
    seed: int = field(repr=False)
    engine: str = ""
    account: Account = field(default_factory=Account, repr=False)

    @staticmethod
    def examples(data: Data) -> Examples:
        """Return the first few thousand of some examples, in memory and without weights."""
        whole = data if isinstance(data, Examples) else batch_of(data, torch.arange(min(len(data), _MOST_EXAMPLES)))
        part = whole.take(torch.arange(min(len(whole), _MOST_EXAMPLES)))
        return Examples(part.inputs, part.targets)

    @property
    def steps(self) -> int:
        """Return the steps of all rounds."""
        return self.rounds * self.private.steps(self.training)

    def claim(self, steps: int) -> Claim:
        """Return what so many steps cost an example, as an accountant of the audit's own works it out."""
        event = {**self.private.event(Training(steps=1)), "count": steps}
        return epsilon_of([event], delta=self.delta, unit="example", adjacency="add-or-remove-one")

    def train(self, trainer: AuditedTrainer, start: Tensor, data: Data, training: Training, number: int) -> Tensor:
        """Return what one training adds to a model, the site's account being charged."""
        self.account.asked.append(dict(self.private.event(training)))
        key = (self.seed, "audited training", number)
        return trainer.train(start, data, training, round_number=number, key=key).values

    def probe(self, task: Task | None = None) -> Probe:
        """Return a probe of how the site trains a task; by default its own."""
        return Probe(self, self.make(task or self.task, self.account))


class Probe:
    """Trains a fresh model by plain steps whose noise is to have a standard deviation of 1, and looks at the result."""

    def __init__(self, site: ExampleSite, trainer: AuditedTrainer) -> None:
        self._site, self._trainer, self._number = site, trainer, 0
        self._start = trainer.initial()

    @property
    def size(self) -> int:
        """Return how many parameters are trained."""
        return self._trainer.spec.parameter_count

    def released(self, data: Data, steps: int = 1) -> NDArray[np.float64]:
        """Return what a training adds to the first parameters, in standard deviations of one step's noise.

        Raises: FedveilError: if it fails. TaskError: if what comes is not finite.
        """
        return np.asarray(self._trained(data, steps)[:_KEPT].numpy())

    def squared(self, data: Data) -> float:
        """Return the squared L2 norm of all that one step adds, in the same units.

        Raises: as `released`.
        """
        return float(self._trained(data, 1).square().sum())

    def _trained(self, data: Data, steps: int) -> Tensor:
        site, self._number = self._site, self._number + 1
        # A step subtracts rate x noised sum / batch_size, and the sum's noise is noise_multiplier x clip_norm.
        rate = site.training.batch_size / (site.private.noise_multiplier * site.private.clipping.clip_norm)
        training = Training(steps=steps, batch_size=site.training.batch_size, learning_rate=rate)
        found = site.train(self._trainer, self._start, data, training, self._number)[: self.size].double()
        if not bool(torch.isfinite(found).all()):
            raise TaskError("a private training returned what is not finite, whatever its examples; see to the model")
        return found


def weighing_nothing(data: Examples) -> Examples:
    """Return examples whose gradients are next to nothing: a training on them releases its noise."""
    return Examples(data.inputs, data.targets, torch.full((len(data),), _NOTHING))
