"""Server optimizers as transforms (Reddi et al. 2021, arXiv:2003.00295): the mean update is a step's pseudo-gradient.

Each goes left of the mean: `chain(ServerAdam(0.01), Weigh())`. Their moments cover the trainable parameters only;
averaged buffers, such as BatchNorm's running statistics, take the mean update as it is. The formulas, and their results
to float32 rounding, are those of the strategies in Flower 1.41; where these leave the paper, the class says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedml_core.checks import require_number
from fedml_core.model import ModelSpec
from fedml_core.transform import Draws, State, Transform
from fedml_core.update import Total
from strategies.schedules import Schedule, rate_at, require_rate


@dataclass(frozen=True)
class ServerStep(Transform):
    """Gradient descent with the server's own learning rate: step = learning_rate * mean.

    Args: learning_rate: > 0, or a schedule over rounds.
    """

    learning_rate: Schedule | float = 1.0

    def __post_init__(self) -> None:
        """Check the rate."""
        require_rate("learning_rate", self.learning_rate)

    def init(self, spec: ModelSpec) -> State:
        """Return the round, and how many leading values are trainable parameters."""
        return {"round": 0, "parameter_count": spec.parameter_count}

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the scaled mean."""
        count, now = state["parameter_count"], state["round"] + 1
        step = rate_at(self.learning_rate, now) * total.values[:count]
        return _with_step(total, step), {**state, "round": now}


@dataclass(frozen=True)
class ServerMomentum(Transform):
    """Momentum: m = momentum * m + mean; step = learning_rate * m.

    Args: momentum: in [0, 1). learning_rate: > 0, or a schedule over rounds.
    Source: Hsu, Qi and Brown (2019), arXiv:1909.06335, FedAvgM; Flower's `FedAvgM` is the same.
    """

    learning_rate: Schedule | float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Check the arguments."""
        require_rate("learning_rate", self.learning_rate)
        require_number("momentum", self.momentum, at_least=0, below=1)

    def init(self, spec: ModelSpec) -> State:
        """Return the round and a momentum of zero."""
        return {"round": 0, "momentum": torch.zeros(spec.parameter_count)}

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the step along the momentum."""
        (before,), delta, now = _opened(total, state, "momentum")
        momentum = self.momentum * before + delta
        return _with_step(total, rate_at(self.learning_rate, now) * momentum), {"round": now, "momentum": momentum}


@dataclass(frozen=True)
class ServerAdagrad(Transform):
    """Adagrad: v = v + mean²; step = learning_rate * mean / (sqrt(v) + tau).

    Reddi et al. start v at tau² or more and allow a first moment; Flower starts v at 0 without one, and so do we.
    Args: learning_rate: > 0, or a schedule over rounds. tau: > 0, the degree of adaptivity (smaller adapts more).
    Source: Reddi et al. (2021), arXiv:2003.00295, Algorithm 2, FedAdagrad; Flower 1.41 `FedAdagrad`.
    """

    learning_rate: Schedule | float = 0.1
    tau: float = 1e-3

    def __post_init__(self) -> None:
        """Check the arguments."""
        require_rate("learning_rate", self.learning_rate)
        require_number("tau", self.tau, above=0)

    def init(self, spec: ModelSpec) -> State:
        """Return the round and a second moment of zero."""
        return {"round": 0, "second_moment": torch.zeros(spec.parameter_count)}

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the adapted step."""
        (before,), delta, now = _opened(total, state, "second_moment")
        second = before + delta.square()
        step = rate_at(self.learning_rate, now) * delta / (second.sqrt() + self.tau)
        return _with_step(total, step), {"round": now, "second_moment": second}


@dataclass(frozen=True)
class ServerAdam(Transform):
    """Adam: m and v are moving averages of mean and mean²; step = corrected rate * m / (sqrt(v) + tau).

    Reddi et al. start v at tau² or more and correct no bias. Flower starts it at 0 and multiplies round t's rate (t = 1
    is the first) by sqrt(1 - beta_2^(t + 1)) / (1 - beta_1^(t + 1)); Kingma and Ba's exponent is t. We follow Flower.
    Args: learning_rate: > 0, or a schedule over rounds. beta_1, beta_2: in [0, 1). tau: > 0, the degree of adaptivity.
    Source: Reddi et al. (2021), arXiv:2003.00295, Algorithm 2, FedAdam; Flower 1.41 `FedAdam`.
    """

    learning_rate: Schedule | float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        """Check the arguments."""
        _require_moments(self.learning_rate, self.beta_1, self.beta_2, self.tau)

    def init(self, spec: ModelSpec) -> State:
        """Return the round and moments of zero."""
        return _no_moments(spec)

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the adapted step."""
        (first, second), delta, now = _opened(total, state, "first_moment", "second_moment")
        first = self.beta_1 * first + (1 - self.beta_1) * delta
        second = self.beta_2 * second + (1 - self.beta_2) * delta.square()
        correction = math.sqrt(1 - self.beta_2 ** (now + 1)) / (1 - self.beta_1 ** (now + 1))
        step = rate_at(self.learning_rate, now) * correction * first / (second.sqrt() + self.tau)
        return _with_step(total, step), {"round": now, "first_moment": first, "second_moment": second}


@dataclass(frozen=True)
class ServerYogi(Transform):
    """Yogi: as Adam, but v moves towards mean² by at most (1 - beta_2) mean²; no bias is corrected.

    Reddi et al. start v at tau² or more; Flower starts it at 0, and so do we.
    Args: as `ServerAdam`.
    Source: Reddi et al. (2021), arXiv:2003.00295, Algorithm 2, FedYogi; Flower 1.41 `FedYogi`.
    """

    learning_rate: Schedule | float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        """Check the arguments."""
        _require_moments(self.learning_rate, self.beta_1, self.beta_2, self.tau)

    def init(self, spec: ModelSpec) -> State:
        """Return the round and moments of zero."""
        return _no_moments(spec)

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the adapted step."""
        (first, second), delta, now = _opened(total, state, "first_moment", "second_moment")
        first = self.beta_1 * first + (1 - self.beta_1) * delta
        squared = delta.square()
        second = second - (1 - self.beta_2) * squared * torch.sign(second - squared)
        step = rate_at(self.learning_rate, now) * first / (second.sqrt() + self.tau)
        return _with_step(total, step), {"round": now, "first_moment": first, "second_moment": second}


def _require_moments(learning_rate: Schedule | float, beta_1: float, beta_2: float, tau: float) -> None:
    require_rate("learning_rate", learning_rate)
    require_number("beta_1", beta_1, at_least=0, below=1)
    require_number("beta_2", beta_2, at_least=0, below=1)
    require_number("tau", tau, above=0)


def _no_moments(spec: ModelSpec) -> State:
    count = spec.parameter_count
    return {"round": 0, "first_moment": torch.zeros(count), "second_moment": torch.zeros(count)}


def _opened(total: Total, state: State, *names: str) -> tuple[list[Tensor], Tensor, int]:
    """Return the named moments, the trainable part of the mean, and the round's number."""
    moments = [state[name].to(total.values.device) for name in names]
    return moments, total.values[: len(moments[0])], int(state["round"]) + 1


def _with_step(total: Total, step: Tensor) -> Total:
    return total.replace(values=torch.cat([step, total.values[len(step) :]]))
