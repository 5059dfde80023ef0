"""Lossy compression of updates: keep the largest entries, or round to few levels at random.

These transforms decide what is lost, not how it is sent: values stay float32 vectors of full length, so no byte is
saved on the wire yet. Averaged buffers pass whole: they are absolute statistics, and an error that was fed back or
rounded could turn a running variance negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedml_core.checks import require_number, require_whole
from fedml_core.model import ModelSpec
from fedml_core.transform import Draws, State, Transform
from fedml_core.update import Update


@dataclass(frozen=True)
class TopK(Transform):
    """Sends the largest entries and remembers the rest, to add it to the client's next update (error feedback).

    Guarantees: over any number of rounds, what a client sent plus what it still remembers is the sum of its updates, up
    to float32 rounding. Of equal magnitudes the first count. A non-finite update is passed on, to be refused, and the
    memory stays as it was.
    Args: fraction: in (0, 1], of the trainable parameters; at least one entry is sent.
    Source: Stich, Cordonnier and Jaggi (2018), arXiv:1809.07599, Algorithm 1.
    """

    fraction: float

    def __post_init__(self) -> None:
        """Check the fraction."""
        require_number("fraction", self.fraction, above=0, at_most=1)

    def memory(self, spec: ModelSpec) -> State:
        """Return an empty residual."""
        return {"residual": torch.zeros(spec.parameter_count)}

    def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
        """Return the largest entries of update plus residual, and what is left."""
        residual: Tensor = memory["residual"].to(update.values.device)
        count = residual.shape[-1]
        wanted = update.values[..., :count] + residual
        kept = torch.where(
            _largest(wanted.abs(), max(1, round(self.fraction * count))), wanted, torch.zeros_like(wanted)
        )
        finite = torch.isfinite(wanted).all(dim=-1, keepdim=True)
        sent = torch.where(finite, kept, wanted)
        after = torch.where(finite, wanted - kept, residual)
        values = torch.cat([sent, update.values[..., count:]], dim=-1)
        return update.replace(values=values), {"residual": after}


@dataclass(frozen=True)
class StochasticQuantize(Transform):
    """Rounds each entry at random to one of 2^bits - 1 levels, evenly spaced within the client's own range.

    Guarantees: the expectation over the draws is the update, up to float32 rounding; each entry moves by less than
    max|update| / (2^(bits - 1) - 1); none exceeds max|update|. A non-finite update becomes NaN, to be refused.
    Args: bits: 2 to 16 for each trainable parameter.
    Source: Alistarh et al. (2017), arXiv:1610.02132, section 3.1, scaled by the maximum instead of the L2 norm.
    """

    bits: int

    def __post_init__(self) -> None:
        """Check the bits."""
        require_whole("bits", self.bits, at_least=2, at_most=16)

    def init(self, spec: ModelSpec) -> State:
        """Return how many leading values are trainable parameters."""
        return {"parameter_count": spec.parameter_count}

    def told(self, state: State) -> State:
        """Return it to the clients."""
        return state

    def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
        """Return the rounded update."""
        count, levels = int(told["parameter_count"]), 2 ** (self.bits - 1) - 1
        # In float32, adding a uniform draw to a level in the thousands would round away most of the draw.
        exact = update.values[..., :count].double()
        largest = exact.abs().amax(dim=-1, keepdim=True)
        scaled = exact / torch.where(largest > 0, largest, torch.ones_like(largest)) * levels
        rounded = torch.floor(scaled + draws.uniform(count).to(exact))
        values = (rounded * largest / levels).to(update.values.dtype)
        return update.replace(values=torch.cat([values, update.values[..., count:]], dim=-1)), memory


def _largest(magnitudes: Tensor, count: int) -> Tensor:
    """Return a mask of `count` largest entries of each row; of equal ones, the first."""
    threshold = magnitudes.topk(count, dim=-1).values[..., -1:]
    above = magnitudes > threshold
    missing = count - above.sum(dim=-1, keepdim=True)
    tied = magnitudes == threshold
    return above | (tied & (tied.cumsum(dim=-1) <= missing))
