"""What a round, or a step at a client, publishes under noise: how strong the signal can be beside it."""

from __future__ import annotations

import math

from fedml_core.privacy.adaptive_clip import AdaptiveClip
from fedml_core.privacy.outlook import Release
from simulations.simulate import Simulation
from strategies.distributed import DistributedDP
from strategies.private import CentralDP, LocalDP
from strategies.secure import SecureAggregation
from strategies.strategy import Strategy

__all__ = ["release_of_clients", "release_of_examples"]


def release_of_clients(simulation: Simulation) -> Release | None:
    """Return what a round publishes if everybody who is asked answers, or None for a strategy that does not say.

    Where clipping follows the updates, at its first norm: the ratio of signal and noise is the same at any. Of noise
    that rounds partly take back, it is an even share of what is left after the last.
    """
    strategy, size = _private(simulation.strategy), simulation.trainer.spec.size
    if isinstance(strategy, CentralDP):
        return _of_central(strategy, size, simulation.rounds)
    if isinstance(strategy, DistributedDP):
        noise = strategy.noise_multiplier * math.sqrt(strategy.cohort_size / strategy.honest)
        return Release(strategy.clip_norm, noise, strategy.cohort_size, size)
    if isinstance(strategy, LocalDP):
        asked = len(simulation.sampling.cohort(range(len(simulation.population)), 1, simulation.seed))
        if asked:
            return Release(strategy.clip_norm, strategy.noise_multiplier * math.sqrt(asked), asked, size)
    return None


def release_of_examples(simulation: Simulation) -> Release | None:
    """Return what a step at a client adds to its model, or None where clients do not protect examples."""
    clients = simulation.private_clients
    if clients is None:
        return None
    clipping, spec = clients.private.clipping, simulation.trainer.spec
    noise, batch = clients.private.gradient_noise, simulation.training.batch_size
    return Release(clipping.clip_norm, noise, batch, spec.parameter_count, once="step", parts="gradients", of="batch")


def _of_central(strategy: CentralDP, size: int, rounds: int) -> Release | None:
    clip, noise = strategy.clip_norm, strategy.noise
    norm = clip.initial if isinstance(clip, AdaptiveClip) else clip
    left = None if noise is None else noise.left_after(rounds)
    if not isinstance(norm, int | float) or (noise is not None and left is None):
        return None
    multiplier = strategy.noise_multiplier * (1.0 if left is None else math.sqrt(left / rounds))
    return Release(float(norm), multiplier, strategy.expected_cohort, size, share_of=1 if noise is None else rounds)


def _private(strategy: Strategy) -> Strategy:
    """Return the strategy inside secure sums, or itself."""
    return strategy.strategy if isinstance(strategy, SecureAggregation) else strategy
