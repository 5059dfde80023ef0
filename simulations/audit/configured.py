"""What an audit reads off a configured run: its limits, and the noise that its accountant is told of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fedml_core.transform import Chain
from server.sampling import EveryClient
from simulations.simulate import Simulation
from strategies.secure import SecureAggregation
from strategies.strategy import Strategy

__all__ = ["most_at_once", "multiplier_of", "without_masks"]


def most_at_once(simulation: Simulation) -> int | None:
    """Return how many clients a round may have at most, where everybody is asked and the strategy knows a limit."""
    limit = next((part.cohort_size for part in _parts(simulation.strategy) if hasattr(part, "cohort_size")), None)
    return int(limit) if limit is not None and type(simulation.sampling) is EveryClient else None


def _parts(strategy: Strategy) -> Sequence[Any]:
    pipeline = strategy.pipeline()
    return pipeline.parts if isinstance(pipeline, Chain) else (pipeline,)


def multiplier_of(simulation: Simulation) -> float | None:
    """Return the noise multiplier that the pipeline's event names, if it is one Gaussian."""
    event = simulation.strategy.pipeline().event()
    found = [one for one in (event or {}).get("events", [event]) if one and "noise_multiplier" in one]
    return float(found[0]["noise_multiplier"]) if len(found) == 1 else None


def without_masks(strategy: Strategy) -> Strategy:
    """Return the strategy, or one that takes the same sums without hiding what they are taken of."""
    return dataclasses.replace(strategy, draw_masks=False) if isinstance(strategy, SecureAggregation) else strategy
