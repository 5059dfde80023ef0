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
    """Return what a round publishes if everybody who is asked answers, or None for noise that rounds share.

    Where clipping follows the updates, at its first norm: the ratio of signal and noise is the same at any.
    """
    strategy, size = _private(simulation.strategy), simulation.trainer.spec.size
    if isinstance(strategy, CentralDP) and not strategy.noise:
        clip = strategy.clip_norm
        norm = clip.initial if isinstance(clip, AdaptiveClip) else clip
        if isinstance(norm, int | float):
            return Release(float(norm), strategy.noise_multiplier, strategy.expected_cohort, size)
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


def _private(strategy: Strategy) -> Strategy:
    """Return the strategy inside secure sums, or itself."""
    return strategy.strategy if isinstance(strategy, SecureAggregation) else strategy
