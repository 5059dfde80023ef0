"""What a run is to do, as one value: the part that a checkpoint must find unchanged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedml_core.errors import ConfigError
from fedml_core.training import Training
from server.sampling import EveryClient, Sampling
from strategies.strategy import Strategy


@dataclass(frozen=True)
class EvaluationPlan:
    """When and by whom the model is evaluated.

    `every`: rounds between evaluations, 0 for never. `server`: on the server's own test data, where there are any.
    `clients`: on the held-out examples of the clients that this sampling draws, or None.
    """

    every: int = 1
    server: bool = True
    clients: Sampling | None = None
    batch_size: int = 256

    def due(self, round_number: int) -> bool:
        """Return whether the model is evaluated after this round."""
        return self.every > 0 and round_number % self.every == 0


@dataclass(frozen=True)
class EarlyStopping:
    """Stop when a metric has not improved for `patience` evaluations.

    `metric`: "server.loss", "server.accuracy", "clients.accuracy", "train.loss", ... `minimum_change`: what counts.
    """

    metric: str = "server.loss"
    patience: int = 5
    minimum_change: float = 0.0
    higher_is_better: bool | None = None

    def __post_init__(self) -> None:
        """Check the patience and the metric's form."""
        if self.patience < 1:
            raise ConfigError(f"patience must be >= 1, got {self.patience}")
        if self.metric.split(".")[0] not in ("server", "clients", "train") or "." not in self.metric:
            raise ConfigError(f"metric must be server.NAME, clients.NAME or train.NAME, got {self.metric!r}")

    def better(self, value: float, best: float) -> bool:
        """Return whether `value` improves on `best`."""
        higher = self.higher_is_better
        if higher is None:
            higher = not any(word in self.metric for word in ("loss", "error", "mae", "rmse", "perplexity"))
        gain = value - best if higher else best - value
        return math.isnan(best) or gain > self.minimum_change


@dataclass(frozen=True)
class Plan:
    """What a run is to do in each round.

    `minimum_replies`: with fewer good replies a round is void: the model is unchanged and the report says so.
    `round_timeout_s`: how long to wait for training replies, and again for evaluations; None waits for all.
    `seed`: of cohorts, shuffles and dropout; it protects nothing.
    """

    strategy: Strategy
    training: Training = field(default_factory=Training)
    sampling: Sampling = field(default_factory=EveryClient)
    seed: int = 0
    minimum_replies: int = 1
    round_timeout_s: float | None = None
    evaluation: EvaluationPlan = field(default_factory=EvaluationPlan)
    early_stopping: EarlyStopping | None = None

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.minimum_replies < 1:
            raise ConfigError(f"minimum_replies must be >= 1, got {self.minimum_replies}")
        if self.round_timeout_s is not None and self.round_timeout_s <= 0:
            raise ConfigError(f"round_timeout_s must be > 0, got {self.round_timeout_s}")
        if self.strategy.privacy() is not None:
            from server.books import require_accountable  # loads the accountant, which others do without

            stops_by = None if self.early_stopping is None else self.early_stopping.metric
            require_accountable(self.strategy, self.sampling, self.minimum_replies, stops_by=stops_by)

    def identity(self) -> Mapping[str, Any]:
        """Return what must be equal for a checkpoint to go on: everything that decides the model."""
        return {
            "strategy": _config(self.strategy),
            "training": self.training.model_dump(mode="json"),
            "sampling": _config(self.sampling),
            "seed": self.seed,
            "minimum_replies": self.minimum_replies,
        }


def _config(named: Strategy | Sampling) -> Any:
    try:
        return named.to_config()
    except ConfigError:
        # An object with a function in it has no name to compare by; the rest of it still prints.
        return repr(type(named))
