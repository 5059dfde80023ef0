"""The randomness and the clipping norms of K clients that train by DP-SGD side by side: nothing of it is shared."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.per_example import AdaptiveClipping
from clients.private_noise import GradientNoise, noised_count, poisson_rows
from clients.private_training import PrivateTraining
from fedml_core.privacy.entropy import NoiseStream

__all__ = ["Streams"]


class Streams:
    """What each of K clients draws in one training, from streams that are made for it and forgotten with it.

    Guarantees: no two clients, steps or trainings share a sample or noise.

    `norms`: (K,) float64, what each client's examples are cut to in the step that comes.
    """

    def __init__(self, private: PrivateTraining, clients: int, size: int) -> None:
        self._private = private
        self._samples = [NoiseStream.fresh() for _ in range(clients)]
        self._counts = [NoiseStream.fresh() for _ in range(clients)]
        self._noise = [GradientNoise(private.gradient_noise, size) for _ in range(clients)]
        self.norms = torch.full((clients,), float(private.clipping.clip_norm), dtype=torch.float64)

    def samples(self, counts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return which of its `counts[k]` examples are in each client's next batch."""
        rate = self._private.sampling_rate
        return [
            poisson_rows(stream, int(count), rate).numpy() for stream, count in zip(self._samples, counts, strict=True)
        ]

    def noised(self, sums: Tensor, denominator: int) -> Tensor:
        """Return the clipped sums (K, p) of one step, each with its client's noise, over a public number; float32.

        Raises: PrivacyError: if a sum is not finite.
        """
        rows = zip(self._noise, sums.unbind(), self.norms.tolist(), strict=True)
        return torch.stack([noise.added(total, norm, denominator) for noise, total, norm in rows])

    def adapt(self, centred: NDArray[np.float64], denominator: int) -> None:
        """Move adaptive norms, given (K,): +1/2 for each example of the step that needed no clipping, -1/2 for others.

        The count is noised first.
        """
        clipping = self._private.clipping
        if not isinstance(clipping, AdaptiveClipping):
            return
        for place, stream in enumerate(self._counts):
            share = noised_count(stream, float(centred[place]), clipping.count_noise) / denominator + 0.5
            self.norms[place] = clipping.next_norm(float(self.norms[place]), share)
