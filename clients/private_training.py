"""What a site demands of private training by example, in numbers that are public, and what that costs an account."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from clients.per_example import AdaptiveClipping, Clipping, FlatClipping, PerLayerClipping
from fedml_core.checks import require_number, require_whole
from fedml_core.errors import ConfigError
from fedml_core.named import nearest
from fedml_core.policy_tables import ExampleTable
from fedml_core.training import Training

__all__ = ["GRADIENT_MODES", "PrivateTraining"]

GRADIENT_MODES = ("auto", "bookkeeping", "vmap", "hooks", "functorch", "ghost")
"""Ways of taking clipped sums, by name; the last three are Opacus's."""


@dataclass(frozen=True)
class PrivateTraining:
    """How one site trains privately, whatever a server asks for. Every number is public and none depends on the data.

    Each step takes every example with probability `sampling_rate`, cuts its gradient, adds the gradients up, adds
    noise, and divides by `Training.batch_size`, which is what a batch is expected to be and never what it was.

    Args: noise_multiplier: > 0; the noise's standard deviation over the L2 norm that one example's gradient may have.
        clipping: `FlatClipping`, `PerLayerClipping` or `AdaptiveClipping`. sampling_rate: in (0, 1].
        max_physical_batch: how many examples are in memory at a time; larger batches are added up in parts. gradients:
        one of `GRADIENT_MODES`; "auto" is bookkeeping where the model's layers allow it, else the fastest of the rest.
    Raises: ConfigError: if a value is out of range.
    """

    noise_multiplier: float
    clipping: Clipping
    sampling_rate: float
    max_physical_batch: int = 512
    gradients: str = "auto"

    def __post_init__(self) -> None:
        """Check the numbers and the name."""
        require_number("noise_multiplier", self.noise_multiplier, at_least=1e-6, at_most=1e6)
        if not isinstance(self.clipping, Clipping):
            raise ConfigError(f"clipping must say how gradients are clipped, got {type(self.clipping).__name__}")
        require_number("sampling_rate", self.sampling_rate, above=0, at_most=1)
        require_whole("max_physical_batch", self.max_physical_batch, at_least=1)
        if self.gradients not in GRADIENT_MODES:
            raise ConfigError(f"unknown gradients {self.gradients!r}; {nearest(str(self.gradients), GRADIENT_MODES)}")
        if isinstance(self.clipping, AdaptiveClipping) and self.noise_multiplier >= 2 * self.clipping.count_noise:
            raise ConfigError(
                f"count_noise must be > noise_multiplier / 2, got {self.clipping.count_noise:g} for "
                f"{self.noise_multiplier:g}; the count would cost more than the whole step may"
            )

    @classmethod
    def of(cls, table: ExampleTable) -> Self:
        """Return what a site.toml says."""
        kinds: dict[str, type[Clipping]] = {
            "flat": FlatClipping,
            "per-layer": PerLayerClipping,
            "adaptive": AdaptiveClipping,
        }
        clipping = kinds[table.clipping](clip_norm=table.clip_norm)
        return cls(table.noise_multiplier, clipping, table.sampling_rate, table.max_physical_batch, table.gradients)

    @property
    def gradient_noise(self) -> float:
        """The noise multiplier of the gradients: more than `noise_multiplier` where a count is paid for, too."""
        if not isinstance(self.clipping, AdaptiveClipping):
            return self.noise_multiplier
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.clipping.count_noise) ** -2)

    def steps(self, training: Training) -> int:
        """Return how many steps a round takes: as asked for, or the nearest to so many expected epochs; 1 at least."""
        if training.steps is not None:
            return training.steps
        return max(1, math.floor(training.epochs / self.sampling_rate + 0.5))

    def event(self, training: Training) -> Mapping[str, Any]:
        """Return what one round of training costs: unit example, adjacency add-or-remove-one, Poisson sampling.

        Example:
            >>> from clients.per_example import FlatClipping
            >>> private = PrivateTraining(noise_multiplier=1.0, clipping=FlatClipping(1.0), sampling_rate=0.1)
            >>> private.event(Training(epochs=2))["count"]
            20
        """
        step = {"name": "gaussian", "noise_multiplier": float(self.noise_multiplier)}
        sampled = {"name": "poisson", "sampling_probability": float(self.sampling_rate), "event": step}
        return {"name": "repeated", "count": self.steps(training), "event": sampled}
