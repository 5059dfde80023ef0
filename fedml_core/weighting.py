"""What "mean" means: how much each client's update counts, and what the sum is divided by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedml_core.errors import ReplyError, StrategyError
from fedml_core.named import Named
from fedml_core.transform import Draws, State, Transform
from fedml_core.update import Total, Update


@dataclass(frozen=True)
class Weighting(Named):
    """Gives each client's weight from what it reports about itself. Subclass it to weigh by anything else."""

    def weight(self, update: Update) -> Tensor:
        """Return the weights, float64 of shape (...), for an update of leading shape (...)."""
        raise StrategyError(f"{type(self).__name__} must define weight(update)")


@dataclass(frozen=True)
class ByExamples(Weighting):
    """Weigh by the (weighted) number of training examples: FedAvg's own rule (McMahan et al. 2017, Algorithm 1)."""

    def weight(self, update: Update) -> Tensor:
        """Return the client's summed example weights."""
        return _reported(update, "examples")


@dataclass(frozen=True)
class Uniform(Weighting):
    """Weigh every client alike: weight 1."""

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

    def weight(self, update: Update) -> Tensor:
        """Return the metric's average over the client's examples, to the given power."""
        return (_reported(update, self.metric) / _reported(update, "examples")) ** self.power


@dataclass(frozen=True)
class Weigh(Transform):
    """The mean: the client multiplies its values by its weight, the server divides the sum by the summed weights.

    Guarantees: decode(sum(encode(u_i))) = sum(w_i u_i) / sum(w_i), up to float32 rounding; zeros for an empty cohort.
    """

    by: Weighting = ByExamples()

    def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
        """Return the weighted values; the weights replace the update's own."""
        weight = self.by.weight(update)
        values = update.values * weight.unsqueeze(-1).to(update.values)
        return update.replace(values=values, weight=weight), memory

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
