"""What "mean" means: how much each client's update counts, and what the sum is divided by."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedml_core.errors import ReplyError, StrategyError
from fedml_core.named import Named
from fedml_core.transform import Chain, Draws, State, Transform
from fedml_core.update import Total, Update


@dataclass(frozen=True)
class Weighting(Named):
    """Gives each client's weight from what it reports about itself. Subclass it to weigh by anything else.

    `reads_values`: whether `weight` reads the update's values. A class whose `weight` does not says so beside it, and
    engines may then add updates up without making them.
    """

    reads_values: ClassVar[bool] = True

    def weight(self, update: Update) -> Tensor:
        """Return the weights, float64 of shape (...), for an update of leading shape (...)."""
        raise StrategyError(f"{type(self).__name__} must define weight(update)")

    @classmethod
    def ignores_values(cls) -> bool:
        """Return whether the class that defines `weight` says that it reads no values; a subclass's is not believed."""
        definer = next(kind for kind in cls.__mro__ if "weight" in vars(kind))
        return vars(definer).get("reads_values", True) is False


@dataclass(frozen=True)
class ByExamples(Weighting):
    """Weigh by the (weighted) number of training examples: FedAvg's own rule (McMahan et al. 2017, Algorithm 1)."""

    reads_values: ClassVar[bool] = False

    def weight(self, update: Update) -> Tensor:
        """Return the client's summed example weights."""
        return _reported(update, "examples")


@dataclass(frozen=True)
class Uniform(Weighting):
    """Weigh every client alike: weight 1."""

    reads_values: ClassVar[bool] = False

    def weight(self, update: Update) -> Tensor:
        """Return ones."""
        return torch.ones(update.lead, dtype=torch.float64, device=update.values.device)


@dataclass(frozen=True)
class ByMetric(Weighting):
    """Weigh by the client's average of one of its reported metrics, such as "accuracy", raised to `power`.

    A metric that is zero or negative for a client gives it no valid weight: its update is excluded, with the reason.
    """

    metric: str
    power: float = 1.0
    reads_values: ClassVar[bool] = False

    def weight(self, update: Update) -> Tensor:
        """Return the metric's average over the client's examples, to the given power."""
        return (_reported(update, self.metric) / _reported(update, "examples")) ** self.power


@dataclass(frozen=True)
class Scaling(Transform, ABC):
    """A transform whose client half does no more than multiply a client's values by one number, its new weight."""

    @abstractmethod
    def factor(self, update: Update) -> Tensor:
        """Return the factors, float64 of shape (...), for an update of leading shape (...)."""

    def ignores_values(self) -> bool:
        """Return whether the factor is the same whatever the values are."""
        return False

    def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
        """Return the values times the factors; these replace the update's own weights."""
        factor = self.factor(update)
        return update.replace(values=update.values * factor.unsqueeze(-1).to(update.values), weight=factor), memory


def scales_only(pipeline: Transform) -> bool:
    """Return whether `pipeline`'s client half is a few factors that do not depend on values, and nothing else."""
    return all(_scales(part) or _leaves_alone(part) for part in _parts(pipeline))


def scaled_reports(pipeline: Transform, reports: Update) -> tuple[Tensor, Update]:
    """Return what `pipeline`, which only scales, multiplies K clients' values by, and what it makes of their reports.

    Args: reports: of K clients, with values of shape (K, 0). Returns: the factors, float64 (K,), and the reports.
    Raises: ReplyError: as the pipeline's own encode.
    """
    factors = torch.ones(reports.lead, dtype=torch.float64)
    for part in _parts(pipeline):
        if isinstance(part, Scaling):
            factor = part.factor(reports)
            factors, reports = factors * factor, reports.replace(weight=factor)
    return factors, reports


def _scales(part: Transform) -> bool:
    return (
        isinstance(part, Scaling)
        and type(part).encode is Scaling.encode
        and part.ignores_values()
        and _keeps_nothing(part)
    )


def _leaves_alone(part: Transform) -> bool:
    return type(part).encode is Transform.encode and _keeps_nothing(part)


def _keeps_nothing(part: Transform) -> bool:
    kind = type(part)
    return kind.memory is Transform.memory and kind.encoded_size is Transform.encoded_size


def _parts(pipeline: Transform) -> list[Transform]:
    if type(pipeline) is not Chain:
        return [pipeline]
    return [inner for part in pipeline.parts for inner in _parts(part)]


@dataclass(frozen=True)
class Weigh(Scaling):
    """The mean: the client multiplies its values by its weight, the server divides the sum by the summed weights.

    Guarantees: decode(sum(encode(u_i))) = sum(w_i u_i) / sum(w_i), up to float32 rounding; zeros for an empty cohort.
    """

    by: Weighting = ByExamples()

    def factor(self, update: Update) -> Tensor:
        """Return the weights."""
        return self.by.weight(update)

    def ignores_values(self) -> bool:
        """Return whether the weights are the same whatever the values are."""
        return self.by.ignores_values()

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the weighted mean."""
        if total.weight <= 0:
            return total.replace(values=torch.zeros_like(total.values)), state
        return total.replace(values=total.values / total.weight, weight=1.0), state

    def l2_bound(self, incoming: float) -> float:
        """Return the incoming bound where every weight is 1; else none, since clients choose their weights."""
        return incoming if isinstance(self.by, Uniform) else math.inf


def _reported(update: Update, name: str) -> Tensor:
    value: Any = update.sums.get(name, update.facts.get(name))
    if value is None:
        known = ", ".join(sorted({*update.sums, *update.facts})) or "nothing"
        raise ReplyError("weight", f"the client reports no {name!r} to weigh by; it reports {known}")
    return torch.as_tensor(value, dtype=torch.float64)
