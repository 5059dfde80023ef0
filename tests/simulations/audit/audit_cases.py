"""A small federation under central differential privacy, and what may be wrong with it without anybody's saying so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedml_core.data import Examples
from fedml_core.privacy.analytic import analytic_gaussian_sigma
from fedml_core.privacy.clipping import BoundedSum
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.gaussian import ServerGaussian
from fedml_core.privacy.lattice import Lattice
from fedml_core.randomness import key_bytes, seeded
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.transform import Chain, Draws, State, Transform
from fedml_core.update import Total, Update
from fedml_core.weighting import Uniform
from server.sampling import Sampling
from simulations.audit.audit import Audit
from simulations.simulate import Simulation
from strategies import CentralDP, FedAvg
from strategies.strategy import Strategy

PIXELS, CLASSES = 144, 8
EPSILON, DELTA, ROUNDS = 3.0, 1e-6, 2
CLIENTS = 6


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def examples(count: int) -> Examples:
    draws = seeded("audit examples", count)
    pixels = torch.from_numpy(2.0 * draws.integers(0, 2, (count, 1, 12, 12)) - 1.0).float()
    return Examples.of(pixels, torch.from_numpy(draws.integers(0, CLASSES, count)))


task = Task.classification(
    model=model, classes=CLASSES, train_data=lambda: examples(60), test_data=lambda: examples(40)
)


def plain() -> FedAvg:
    return FedAvg(weighting=Uniform())


def private(kind: type[CentralDP] = CentralDP) -> CentralDP:
    """Return the strategy whose two rounds cost an epsilon of 3."""
    multiplier = analytic_gaussian_sigma(EPSILON, DELTA) * ROUNDS**0.5
    return kind(plain(), clip_norm=0.5, noise_multiplier=multiplier, expected_cohort=float(CLIENTS), delta=DELTA)


def federation(strategy: Strategy, rounds: int = ROUNDS, sampling: Sampling | None = None) -> Simulation:
    more: dict[str, Any] = {} if sampling is None else {"sampling": sampling}
    training = Training(epochs=1, batch_size=5, learning_rate=0.1)
    return Simulation(task, strategy, clients=CLIENTS, rounds=rounds, training=training, **more)


def audit(strategy: Strategy, canaries: int = 400, **settings: Any) -> Audit:
    return Audit(simulation=federation(strategy, **settings), canaries=canaries, shadows=0, search_steps=20, seed=11)


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let noise be drawn from the keys 1, 2, ..., so that what the test sees reproduces."""
    drawn = iter(range(1, 1 << 30))
    keyed = lambda: NoiseStream(key_bytes("test noise", next(drawn), size=32))  # noqa: E731
    monkeypatch.setattr(NoiseStream, "fresh", keyed)


@dataclass(frozen=True)
class _Halved(ServerGaussian):
    """Adds half the noise that it tells the accountant of."""

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        half = ServerGaussian(self.noise_multiplier / 2, self.expected_cohort, bound=self.bound)
        return half.decode(total, state, draws)


@dataclass(frozen=True)
class _Stale(ServerGaussian):
    """Adds the same noise in every round."""

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        return self.released(total, total.values + _noise(self, total, "stale")), state


@dataclass(frozen=True)
class _Layered(ServerGaussian):
    """Seeds each layer's noise alike, in every round anew."""

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        fresh = _noise(self, total, "layered", *draws.keys[0])
        first = PIXELS * 16
        values = torch.cat([fresh[:first], fresh[:16], fresh[: 16 * CLASSES], fresh[:CLASSES]])
        return self.released(total, total.values + values), state


@dataclass(frozen=True)
class _Late(ServerGaussian):
    """Lets the exact sum through; its noise goes elsewhere, after the release."""

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        return self.released(total, total.values), state


def _noise(part: ServerGaussian, total: Total, *key: int | str) -> Tensor:
    lattice: Lattice = part.lattice(len(total.values))
    return torch.from_numpy(seeded(*key).standard_normal(len(total.values)) * lattice.sigma).float()


@dataclass(frozen=True)
class _Unclipped(Transform):
    """Promises a bound and clips nothing."""

    clip_norm: float

    def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
        return update, memory

    def l2_bound(self, incoming: float) -> float:
        return self.clip_norm


def _swapped(strategy: CentralDP, place: int, part: Transform) -> Transform:
    chain = CentralDP.pipeline(strategy)
    assert isinstance(chain, Chain)
    parts = list(chain.parts)
    parts[place] = part
    return Chain(tuple(parts))


def _noisy(strategy: CentralDP, kind: type[ServerGaussian]) -> Transform:
    chain = CentralDP.pipeline(strategy)
    assert isinstance(chain, Chain)
    last = chain.parts[-1]
    assert isinstance(last, ServerGaussian)
    return _swapped(strategy, -1, kind(last.noise_multiplier, last.expected_cohort, bound=last.bound))


@dataclass(frozen=True)
class _HalfNoise(CentralDP):
    def pipeline(self) -> Transform:
        return _noisy(self, _Halved)


@dataclass(frozen=True)
class _StaleNoise(CentralDP):
    def pipeline(self) -> Transform:
        return _noisy(self, _Stale)


@dataclass(frozen=True)
class _LayeredNoise(CentralDP):
    def pipeline(self) -> Transform:
        return _noisy(self, _Layered)


@dataclass(frozen=True)
class _LateNoise(CentralDP):
    def pipeline(self) -> Transform:
        return _noisy(self, _Late)


@dataclass(frozen=True)
class _NoClipping(CentralDP):
    def pipeline(self) -> Transform:
        return _swapped(self, -2, _Unclipped(float(self.clip_norm)))  # type: ignore[arg-type]  # a number in these tests

    def accumulator(self, spec: Any) -> BoundedSum:
        return BoundedSum(spec.size, self.max_weight, 1e9)  # a server that does not measure, either


SABOTAGE: Mapping[str, type[CentralDP]] = {
    "half the noise": _HalfNoise,
    "no clipping": _NoClipping,
    "noise not refreshed": _StaleNoise,
    "same seed per layer": _LayeredNoise,
    "noise after release": _LateNoise,
}


@dataclass(frozen=True)
class _Shuffled(Sampling):
    """Deals the clients out in a shuffled order, epoch by epoch, and claims Poisson sampling."""

    rate: float

    def cohort(self, clients: Sequence[int], round_number: int, seed: int) -> list[int]:
        epochs, size = round(1 / self.rate), round(len(clients) * self.rate)
        epoch, turn = divmod(round_number, epochs)
        order = seeded(seed, "epoch", epoch).permutation(np.asarray(clients))
        return sorted(order[turn * size : (turn + 1) * size].tolist())

    def event(self, population: int, inner: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"name": "poisson", "sampling_probability": self.rate, "event": dict(inner)}


def shuffled(rate: float) -> Sampling:
    return _Shuffled(rate)
