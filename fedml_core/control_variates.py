"""SCAFFOLD's control variates: clients correct their drift by what they learned about their own gradients.

Karimireddy et al. (2020), arXiv:1910.06378, Algorithm 1 with option II.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedml_core.checks import require_whole
from fedml_core.errors import ReplyError, StrategyError
from fedml_core.model import ModelSpec
from fedml_core.transform import Draws, Guide, State, Transform
from fedml_core.update import Total, Update


@dataclass(frozen=True)
class ControlVariates(Transform):
    """Steers local training by c - c_i, and learns the server's c and each client's c_i from the updates.

    `encode` turns d values into 2 d: the update, then the change of c_i (zeros at the buffers, which have none).
    `decode` expects their uniform mean, so `Weigh(Uniform())` stands to the right; it moves c by count/population
    times the mean change, which keeps c the mean of all c_i, and passes the d values of the step on.

    Clients must run SGD and report `step_size`, the sum of the learning rates of their steps, as a fact. A client that
    took no step, or diverged, keeps its c_i. In the paper no reply is ever lost; here a client whose reply is lost has
    changed its c_i all the same, and from then on c is off by 1/population of that change.
    Args: population: how many clients there are in all, sampled or not.
    Raises: StrategyError: in `decode`, for a cohort larger than the population.
    Source: Karimireddy et al. (2020), arXiv:1910.06378, Algorithm 1, option II, lines 7 to 17.
    """

    population: int

    def __post_init__(self) -> None:
        """Check the population."""
        require_whole("population", self.population, at_least=1)

    def init(self, spec: ModelSpec) -> State:
        """Return c = 0 over the trainable parameters."""
        return {"c": torch.zeros(spec.parameter_count)}

    def told(self, state: State) -> State:
        """Return c."""
        return {"c": state["c"]}

    def memory(self, spec: ModelSpec) -> State:
        """Return c_i = 0 over the trainable parameters."""
        return {"c_i": torch.zeros(spec.parameter_count)}

    def encoded_size(self, size: int) -> int:
        """Return 2 d."""
        return 2 * size

    def guide(self, told: State, memory: State) -> Guide:
        """Return the offset c - c_i, which each step adds to its gradient."""
        return Guide(offset=told["c"] - memory["c_i"].to(told["c"].device))

    def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
        """Return the update followed by the change of c_i, and the new c_i."""
        values = update.values
        before: Tensor = memory["c_i"].to(values.device)
        count = before.shape[-1]
        rates = _step_size(update).to(values)
        # Option II: c_i+ = c_i - c + (x - y_i) / (sum of learning rates), and x - y_i is minus the update.
        change = -told["c"].to(values) - values[..., :count] / rates
        learned = (rates > 0) & torch.isfinite(change).all(dim=-1, keepdim=True)
        change = torch.where(learned, change, torch.zeros_like(change))
        padded = torch.nn.functional.pad(change, (0, values.shape[-1] - count))
        return update.replace(values=torch.cat([values, padded], dim=-1)), {"c_i": before + change}

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the mean update, and c moved by count/population of the mean change."""
        if total.count > self.population:
            raise StrategyError(
                f"a cohort of {total.count} exceeds the population of {self.population}; "
                "population must count every client"
            )
        step, change = total.values.chunk(2)
        before: Tensor = state["c"].to(change.device)
        after = before + change[: len(before)] * (total.count / self.population)
        return total.replace(values=step), {"c": after}


def _step_size(update: Update) -> Tensor:
    """Return the clients' summed learning rates, (..., 1)."""
    rates = update.facts.get("step_size")
    if rates is None:
        known = ", ".join(sorted(update.facts)) or "nothing"
        raise ReplyError(
            "facts", f"local training reports {known}, and control variates need 'step_size'; train with SGD"
        )
    return rates.unsqueeze(-1)
