"""One step of private training: a Poisson batch, the sum of its clipped gradients, noise, guide, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clients.local_step import Steering
from clients.per_example import AdaptiveClipping, Clip, GradientMode
from clients.private_noise import GradientNoise, noised_count, poisson_rows
from clients.private_training import PrivateTraining
from fedml_core.minibatches import Batch
from fedml_core.privacy.entropy import NoiseStream

__all__ = ["PrivateSteps"]


@dataclass
class PrivateSteps:
    """The steps of one training. `denominator`: what noised sums are divided by, a public number.

    `batch`: returns the examples at an index. `begin`: called with the number of each batch before it is used.
    """

    private: PrivateTraining
    mode: GradientMode
    noise: GradientNoise
    steering: Steering
    denominator: int
    batch: Callable[[Tensor], Batch] = field(repr=False)
    begin: Callable[[int], None] = field(repr=False)

    def __post_init__(self) -> None:
        """Begin at the first step's norm, with fresh randomness."""
        self._norm = float(self.private.clipping.clip_norm)
        self._sample, self._count = NoiseStream.fresh(), NoiseStream.fresh()
        self._number = 0

    def gradients(self, examples: int) -> None:
        """Leave one step's noised mean gradient, and the guide, in the parameters, given how many examples there are.

        An empty batch leaves noise alone.
        """
        rows = poisson_rows(self._sample, examples, self.private.sampling_rate)
        total, unclipped = self._sum(rows, self.private.clipping.clip(self._norm))
        noised = self.noise.added(total, self._norm, self.denominator)
        self._adapt(unclipped - len(rows) / 2)
        start = 0
        for parameter in self.steering.parameters:
            parameter.grad = noised[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        self.steering.apply()

    def _sum(self, rows: Tensor, clip: Clip) -> tuple[Tensor, int]:
        """Return the clipped sum as one vector, and how many examples needed no clipping if that is counted."""
        total, unclipped = None, 0
        for part in rows.split(self.private.max_physical_batch) if len(rows) else ():
            self.begin(self._number)
            self._number += 1
            found = self.mode.clipped(self._padded(part), clip)
            joined = torch.cat([summed.reshape(-1) for summed in found.sums])
            total = joined if total is None else _wide(total).add_(joined)
            unclipped += found.unclipped if clip.counted else 0
        return (_zeros(self.steering.parameters) if total is None else total), unclipped

    def _padded(self, rows: Tensor) -> Batch:
        """Return the batch of the examples at `rows`, with some that weigh nothing so that batches have few sizes.

        Libraries prepare for each new size, which can take longer than a step; Poisson batches have ever new ones.
        """
        extra = 0 if isinstance(self.private.clipping, AdaptiveClipping) else padding(len(rows))
        inputs, targets, weights = self.batch(torch.cat([rows, rows[-1:].expand(extra)]))
        if not extra:
            return inputs, targets, weights
        counted = (torch.arange(len(targets), device=targets.device) < len(rows)).to(torch.float32)
        return inputs, targets, counted if weights is None else counted * weights

    def _adapt(self, centred: float) -> None:
        """Move the norm by the noised sum of +1/2 for each unclipped example and -1/2 for each other."""
        clipping = self.private.clipping
        if isinstance(clipping, AdaptiveClipping):
            counted = noised_count(self._count, centred, clipping.count_noise)
            self._norm = clipping.next_norm(self._norm, counted / self.denominator + 0.5)


def padding(count: int) -> int:
    """Return how many more make `count` a size with four leading bits at most; never more than an eighth.

    Example:
        >>> padding(13), padding(256), padding(257)
        (0, 0, 31)
    """
    unit = 1 << max(0, count.bit_length() - 4)
    return -count % unit


def _wide(total: Tensor) -> Tensor:
    """Return the sum in float64, where parts are added up without rounding to speak of; Apple's GPUs have none."""
    return total if total.device.type == "mps" else total.to(torch.float64)


def _zeros(parameters: Sequence[nn.Parameter]) -> Tensor:
    size = sum(parameter.numel() for parameter in parameters)
    return torch.zeros(size, dtype=torch.float32, device=parameters[0].device)
