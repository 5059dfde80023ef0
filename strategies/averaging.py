"""Strategies whose step is a mean: FedAvg, its weighted kin, and FedProx."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedml_core.errors import ConfigError, StrategyError
from fedml_core.proximal import Proximal
from fedml_core.transform import Transform, chain
from fedml_core.update import Update
from fedml_core.weighting import ByExamples, Weigh, Weighting
from strategies.schedules import Schedule, require_rate
from strategies.server_optimizers import ServerStep
from strategies.strategy import Strategy

WeightFunction = Callable[[Update], Any]
"""Takes an update of one client or of K and returns the weight or weights, numbers > 0."""


@dataclass(frozen=True, kw_only=True)
class FedAvg(Strategy):
    """The mean of the clients' updates, by their numbers of examples.

    Args: weighting: what each client counts. server_learning_rate: scales the step; 1 is the paper's.
    Source: McMahan et al. (2017), arXiv:1602.05629, Algorithm 1.
    """

    weighting: Weighting = field(default_factory=ByExamples)
    server_learning_rate: Schedule | float = 1.0

    def pipeline(self) -> Transform:
        """Return the mean, scaled where asked."""
        return mean(self.weighting, self.server_learning_rate)


@dataclass(frozen=True, kw_only=True)
class WeightedFedAvg(Strategy):
    """The mean of the clients' updates, by whatever you say: a metric that they report, equal voices, a function.

    Args: weighting: `ByMetric("accuracy")`, `Uniform()`, `ByExamples()`, a `Weighting` of your own, or, within one
        process, a function of the update: `lambda update: update.sums["examples"] ** 0.5`. server_learning_rate: as
        `FedAvg`.
    Raises: ConfigError: in `to_config`, for a function: only what has a name can be sent to a fleet.
    """

    weighting: Weighting | WeightFunction
    server_learning_rate: Schedule | float = 1.0

    def pipeline(self) -> Transform:
        """Return the mean, scaled where asked."""
        return mean(_as_weighting(self.weighting), self.server_learning_rate)

    def to_config(self) -> dict[str, Any]:
        """Return the name and the fields that make an equal object; refuse, with the way out, if one is a function."""
        _as_weighting(self.weighting).to_config()
        return super().to_config()


@dataclass(frozen=True, kw_only=True)
class FedProx(Strategy):
    """FedAvg whose clients are drawn back to the model they started from, against drift on heterogeneous data.

    Args: mu: >= 0, the strength of the proximal term; 0 is FedAvg. Others: as `FedAvg`.
    Source: Li et al. (2020), arXiv:1812.06127, Algorithm 2, with FedAvg's weights, as Flower has it.
    """

    mu: float
    weighting: Weighting = field(default_factory=ByExamples)
    server_learning_rate: Schedule | float = 1.0

    def pipeline(self) -> Transform:
        """Return the proximal term and the mean."""
        return chain(Proximal(self.mu), mean(self.weighting, self.server_learning_rate))


def mean(weighting: Weighting, server_learning_rate: Schedule | float = 1.0) -> Transform:
    """Return the transform that makes of a sum the mean, times the server's learning rate.

    Raises: ConfigError: if the weighting is none, or the rate is not > 0.
    """
    if not isinstance(weighting, Weighting):
        raise ConfigError(f"weighting must be a Weighting such as ByExamples(), got {type(weighting).__name__}")
    return chain(scaled(server_learning_rate), Weigh(weighting))


def scaled(server_learning_rate: Schedule | float) -> Transform:
    """Return the server's own step, or the identity where it would multiply by 1.

    Raises: ConfigError: if the rate is not > 0.
    """
    require_rate("server_learning_rate", server_learning_rate)
    return chain() if server_learning_rate == 1.0 else ServerStep(server_learning_rate)


@dataclass(frozen=True)
class _ByFunction(Weighting):
    """Weighs by a plain function; its name is not registered, because nothing could be sent under it."""

    function: WeightFunction

    def weight(self, update: Update) -> Tensor:
        """Return what the function says, one number a client."""
        weights = torch.as_tensor(self.function(update), dtype=torch.float64, device=update.values.device)
        if weights.shape not in ((), update.lead):
            raise StrategyError(
                f"the weighting function returned shape {tuple(weights.shape)}; one weight a client is "
                f"{tuple(update.lead)}"
            )
        return weights.expand(update.lead)

    def to_config(self) -> dict[str, Any]:
        """Refuse."""
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        raise ConfigError(
            f"the weighting function {name} cannot be sent to a fleet or saved; "
            "write a frozen dataclass that subclasses Weighting instead, and install it on both sides"
        )


def _as_weighting(weighting: Weighting | WeightFunction) -> Weighting:
    if isinstance(weighting, Weighting):
        return weighting
    if isinstance(weighting, type) or not callable(weighting):
        raise ConfigError(f"weighting must be a Weighting or a function of an update, got {weighting!r}")
    return _ByFunction(weighting)
