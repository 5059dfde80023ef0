"""A site that protects its examples, and what may be wrong with its trainer without the account's knowing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clients.per_example import Clipping, FlatClipping
from clients.private_trainer import PrivateTorchTrainer, Reserve
from clients.private_training import PrivateTraining
from fedml_core.data import Data, Examples, batch_of
from fedml_core.model import ModelSpec
from fedml_core.randomness import Key, seeded
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.transform import Guide
from fedml_core.update import Update
from simulations.audit.example_site import ExampleSite, Make
from tests.simulations.audit.audit_cases import examples, task

RATE, NOISE, CLIP, ROUNDS = 0.25, 1.2, 0.5, 4
TRAINING = Training(epochs=1, batch_size=10, learning_rate=0.1)


def private_of(noise: float = NOISE, rate: float = RATE, clipping: Clipping | None = None) -> PrivateTraining:
    return PrivateTraining(noise_multiplier=noise, clipping=clipping or FlatClipping(CLIP), sampling_rate=rate)


def real(private: PrivateTraining) -> Make:
    return lambda a_task, reserve: PrivateTorchTrainer(a_task, private, reserve, device="cpu")


def site(make: Callable[[PrivateTraining], Make] = real, **settings: Any) -> ExampleSite:
    """Return a site of 40 examples that trains four rounds, whose trainer may do other things than it says."""
    rounds = settings.pop("rounds", ROUNDS)
    private = private_of(**settings)
    return ExampleSite(task, examples(40), make(private), private, TRAINING, rounds, 1e-5, seed=5)


@dataclass
class Sabotaged:
    """A trainer that tells its account what it should do, and lets another one train."""

    told: PrivateTraining
    reserve: Reserve = field(repr=False)
    inner: PrivateTorchTrainer

    def __post_init__(self) -> None:
        self.spec: ModelSpec = self.inner.spec

    def initial(self) -> Tensor:
        return self.inner.initial()

    def evaluate(self, parameters: Tensor, data: Data, batch_size: int = 256) -> dict[str, float]:
        return self.inner.evaluate(parameters, data, batch_size)

    def train(
        self,
        parameters: Tensor,
        data: Data,
        training: Training,
        *,
        round_number: int,
        key: tuple[Key, ...],
        guide: Guide = Guide(),  # noqa: B008  (frozen, and the contract's own default)
    ) -> Update:
        self.reserve(self.told.event(training))
        return self.trained(parameters, data, training, round_number, key)

    def trained(self, parameters: Tensor, data: Data, training: Training, number: int, key: tuple[Key, ...]) -> Update:
        return self.inner.train(parameters, data, training, round_number=number, key=key)


def _quietly(event: Mapping[str, Any]) -> None:
    """Enter nothing: the wrapper has entered what it claims."""


def _by(changed: Callable[[PrivateTraining], PrivateTraining], kind: type[Sabotaged] = Sabotaged) -> Any:
    def make(told: PrivateTraining) -> Make:
        def trainer(a_task: Task, reserve: Reserve) -> Sabotaged:
            return kind(told, reserve, PrivateTorchTrainer(a_task, changed(told), _quietly, device="cpu"))

        return trainer

    return make


def _silent(told: PrivateTraining) -> PrivateTraining:
    return replace(told, noise_multiplier=1e-6)


class _OneNoise(Sabotaged):
    """Draws a training's noise once and adds it in each of its steps."""

    def trained(self, parameters: Tensor, data: Data, training: Training, number: int, key: tuple[Key, ...]) -> Update:
        update = super().trained(parameters, data, training, number, key)
        steps = self.told.steps(training)
        sd = training.learning_rate * self.told.noise_multiplier * self.told.clipping.clip_norm / training.batch_size
        drawn = seeded("noise", *self.about(number)).standard_normal(self.spec.size) * sd * steps
        return update.replace(values=update.values + torch.from_numpy(drawn).float())

    def about(self, number: int) -> tuple[Key, ...]:
        return ("of", number)


class _Forever(_OneNoise):
    """Draws its noise once for all trainings."""

    def about(self, number: int) -> tuple[Key, ...]:
        return ("for ever",)


class _Shuffled(Sabotaged):
    """Deals the examples out in a shuffled order, in batches of one size, and calls that Poisson sampling."""

    def trained(self, parameters: Tensor, data: Data, training: Training, number: int, key: tuple[Key, ...]) -> Update:
        size = max(1, round(len(data) * self.told.sampling_rate))
        order = torch.from_numpy(seeded("order", number).permutation(len(data)))
        step = Training(steps=1, batch_size=training.batch_size, learning_rate=training.learning_rate)
        at, update = parameters, None
        for place in range(self.told.steps(training)):
            rows = order[torch.arange(place * size, (place + 1) * size) % len(data)]
            update = self.inner.train(at, batch_of(data, rows), step, round_number=number, key=key)
            at = at + update.values
        assert update is not None
        return update.replace(values=at - parameters)


class _FixedSize(_Shuffled):
    """Draws batches of one size anew in each step, and calls that Poisson sampling."""

    def trained(self, parameters: Tensor, data: Data, training: Training, number: int, key: tuple[Key, ...]) -> Update:
        one = training if training.steps == 1 else Training(steps=1, batch_size=training.batch_size)
        return super().trained(parameters, data, one, number, key)


class _OncePerRun(Sabotaged):
    """Tells the account of its first training only."""

    def train(self, *values: Any, **named: Any) -> Update:
        self.told, self.reserve = self.told, self._first(self.reserve)
        return super().train(*values, **named)

    def _first(self, reserve: Reserve) -> Reserve:
        def once(event: Mapping[str, Any]) -> None:
            if not self.__dict__.setdefault("entered", False):
                self.__dict__["entered"] = True
                reserve(event)

        return once


def _same(told: PrivateTraining) -> PrivateTraining:
    return told


def _unclipped(told: PrivateTraining) -> PrivateTraining:
    # The same noise, of which a gradient may be a thousand times as long.
    return replace(
        told, clipping=FlatClipping(told.clipping.clip_norm * 1e3), noise_multiplier=told.noise_multiplier / 1e3
    )


def _twice_as_long(told: PrivateTraining) -> PrivateTraining:
    return replace(told, clipping=FlatClipping(told.clipping.clip_norm * 2), noise_multiplier=told.noise_multiplier / 2)


SABOTAGE: Mapping[str, Callable[[PrivateTraining], Make]] = {
    "half the noise": _by(lambda told: replace(told, noise_multiplier=told.noise_multiplier / 2)),
    "no noise": _by(_silent),
    "no clipping": _by(_unclipped),
    "clipping to twice the norm": _by(_twice_as_long),
    "one noise for all steps of a training": _by(_silent, _OneNoise),
    "one noise for all trainings": _by(_silent, _Forever),
    "shuffled": _by(lambda told: replace(told, sampling_rate=1.0), _Shuffled),
    "batches of one size": _by(lambda told: replace(told, sampling_rate=1.0), _FixedSize),
    "twice the rate": _by(lambda told: replace(told, sampling_rate=2 * told.sampling_rate)),
    "an account that is told once": _by(_same, _OncePerRun),
}


def mapped(data: Examples) -> list[tuple[Tensor, Tensor]]:
    """Return the examples as a map-style data set."""
    return [(data.inputs[0][place], data.targets[place]) for place in range(len(data))]
