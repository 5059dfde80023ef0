"""SCAFFOLD: stochastic controlled averaging against client drift."""

from __future__ import annotations

from dataclasses import dataclass

from fedml_core.control_variates import ControlVariates
from fedml_core.transform import Transform, chain
from fedml_core.weighting import Uniform
from strategies.averaging import mean, scaled
from strategies.schedules import Schedule
from strategies.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Scaffold(Strategy):
    """Federated averaging whose clients correct their drift with control variates, which they keep between rounds.

    Clients train with plain SGD and count alike; an update is twice the model's size on the wire, and each round also
    sends c, once the number of trainable parameters. Buffers are averaged.
    Args: population: the number of all clients, sampled or not. It is an argument because the algorithm needs the true
        number, and a server only knows who is connected now: a client that sleeps through a round still has its c_i in
        the mean c. server_learning_rate: the paper's global eta, > 0, or a schedule over rounds.
    Source: Karimireddy et al. (2020), arXiv:1910.06378, Algorithm 1, option II; the transform is `ControlVariates`.
    """

    population: int
    server_learning_rate: Schedule | float = 1.0

    def pipeline(self) -> Transform:
        """Return the server's step over control variates over the uniform mean."""
        return chain(scaled(self.server_learning_rate), ControlVariates(self.population), mean(Uniform()))
