"""Strategies with a server optimizer: FedAvgM, FedAdagrad, FedAdam and FedYogi."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedml_core.checks import require_number
from fedml_core.transform import Transform, chain
from fedml_core.weighting import ByExamples, Weighting
from strategies.averaging import mean
from strategies.schedules import Schedule, require_rate
from strategies.server_optimizers import ServerAdagrad, ServerAdam, ServerMomentum, ServerYogi
from strategies.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class FedAvgM(Strategy):
    """FedAvg with momentum at the server.

    Flower's `server_momentum` is 0 by default, which is FedAvg; the paper's usual value stands here.
    Args: server_learning_rate: > 0, or a schedule over rounds. server_momentum: in [0, 1). weighting: as `FedAvg`.
    Source: Hsu, Qi and Brown (2019), arXiv:1909.06335; formulas in `ServerMomentum`.
    """

    server_learning_rate: Schedule | float = 1.0
    server_momentum: float = 0.9
    weighting: Weighting = field(default_factory=ByExamples)

    def __post_init__(self) -> None:
        """Check the arguments under their own names."""
        require_rate("server_learning_rate", self.server_learning_rate)
        require_number("server_momentum", self.server_momentum, at_least=0, below=1)
        super().__post_init__()

    def pipeline(self) -> Transform:
        """Return momentum over the mean."""
        return chain(ServerMomentum(self.server_learning_rate, self.server_momentum), mean(self.weighting))


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(Strategy):
    """FedAvg whose mean update is a gradient for Adagrad at the server.

    Args: learning_rate: the server's (Flower's and the paper's eta), > 0, or a schedule over rounds. tau: > 0, the
        degree of adaptivity. weighting: as `FedAvg`.
    Source: Reddi et al. (2021), arXiv:2003.00295; formulas, and where Flower leaves the paper, in `ServerAdagrad`.
    """

    learning_rate: Schedule | float = 0.1
    tau: float = 1e-3
    weighting: Weighting = field(default_factory=ByExamples)

    def pipeline(self) -> Transform:
        """Return Adagrad over the mean."""
        return chain(ServerAdagrad(self.learning_rate, self.tau), mean(self.weighting))


@dataclass(frozen=True, kw_only=True)
class FedAdam(Strategy):
    """FedAvg whose mean update is a gradient for Adam at the server.

    Args: learning_rate: the server's (Flower's and the paper's eta), > 0, or a schedule over rounds. beta_1, beta_2:
        in [0, 1), decay of the moments. tau: > 0, the degree of adaptivity. weighting: as `FedAvg`.
    Source: Reddi et al. (2021), arXiv:2003.00295; formulas, and where Flower leaves the paper, in `ServerAdam`.
    """

    learning_rate: Schedule | float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    weighting: Weighting = field(default_factory=ByExamples)

    def pipeline(self) -> Transform:
        """Return Adam over the mean."""
        optimizer = ServerAdam(self.learning_rate, self.beta_1, self.beta_2, self.tau)
        return chain(optimizer, mean(self.weighting))


@dataclass(frozen=True, kw_only=True)
class FedYogi(Strategy):
    """FedAvg whose mean update is a gradient for Yogi at the server.

    Args: as `FedAdam`.
    Source: Reddi et al. (2021), arXiv:2003.00295; formulas, and where Flower leaves the paper, in `ServerYogi`.
    """

    learning_rate: Schedule | float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    weighting: Weighting = field(default_factory=ByExamples)

    def pipeline(self) -> Transform:
        """Return Yogi over the mean."""
        optimizer = ServerYogi(self.learning_rate, self.beta_1, self.beta_2, self.tau)
        return chain(optimizer, mean(self.weighting))
