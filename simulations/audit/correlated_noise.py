"""Noise that later rounds partly take back, measured over a whole run: its scale, and how rounds hang together.

The run is repeated on nothing. What it releases, unmixed by the mechanism's own matrix, must be draws that are fresh in
every round: half the noise is too quiet, and noise that is mixed in another way, or not at all, stays related.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.model import ModelSpec
from fedml_core.privacy.correlated import BandedNoise, Noise, TreeNoise, root_coefficients
from fedml_core.randomness import seeded
from fedml_core.transform import Chain, Draws, Transform
from fedml_core.update import Total
from strategies.strategy import Strategy

__all__ = ["CORRELATED", "mixing", "unmixed_noise"]

CORRELATED = ("tree", "matrix")
"""The names of the events of correlated noise."""
_MOST_ROUNDS, _MOST_SIZE, _RUNS = 64, 8192, 2
Floats = NDArray[np.float64]


def mixing(noise: Noise, rounds: int) -> Floats | None:
    """Return the matrix that makes each round's noise of fresh draws, one a round; None for an unknown mechanism.

    It is lower triangular and square: the first `rounds` rounds need nothing of later ones.
    """
    if isinstance(noise, TreeNoise):
        return _tree(noise, rounds)
    if isinstance(noise, BandedNoise):
        first = np.zeros(rounds)
        first[: noise.bands] = root_coefficients(noise.bands)[:rounds]
        lags = np.subtract.outer(np.arange(rounds), np.arange(rounds))
        # The matrix times what is released is fresh, so what is released is its inverse times what is fresh.
        return np.asarray(np.linalg.inv(np.where(lags >= 0, first[np.maximum(lags, 0)], 0.0)))
    return None


def _tree(noise: TreeNoise, rounds: int) -> Floats:
    """Return what each round adds to its tree's prefix noise, in nodes; round t makes the node that ends with it."""
    prefixes = np.zeros((rounds, rounds))
    made = np.zeros((rounds, rounds))
    for number in range(rounds):
        start = number - number % noise.apart
        place = number - start + 1
        while place:
            prefixes[number, start + place - 1] = 1.0  # the node that ends there
            place -= place & -place
        made[number] = prefixes[number] - (prefixes[number - 1] if number > start else 0.0)
    return made


def unmixed_noise(strategy: Strategy, place: int, spec: ModelSpec, seed: int) -> tuple[Floats, Floats] | None:
    """Return the noise of several repeated runs, unmixed, and a reference of the right scale, (draws, d) each.

    Args: place: of the noise in the strategy's pipeline. spec: of the model; a large one is measured by a part of it.
    Returns: None for noise whose matrix nobody here knows.
    Raises: FedveilError: if the release fails.
    """
    pipeline = strategy.pipeline()
    parts = pipeline.parts if isinstance(pipeline, Chain) else (pipeline,)
    noise = getattr(parts[place], "noise", None) or getattr(strategy, "noise", None)
    if not isinstance(noise, Noise):
        return None
    rounds = min(noise.rounds, _MOST_ROUNDS)
    matrix = mixing(noise, rounds)
    if matrix is None:
        return None
    if spec.size > _MOST_SIZE:
        spec = ModelSpec.of_size(_MOST_SIZE)
    gain = _gain(parts[:place], spec, _cohort(strategy), seed)
    released = [_run(strategy, parts[place:], spec, rounds, gain, (seed, "correlated", run)) for run in range(_RUNS)]
    unmixed = np.concatenate([np.linalg.solve(matrix, rows) for rows in released])
    event = parts[place].event() or {}
    sd = float(event["noise_multiplier"]) * Chain(parts[:place]).l2_bound(math.inf)
    return unmixed, seeded(seed, "reference noise").standard_normal(unmixed.shape) * sd


def _run(
    strategy: Strategy,
    noise: Sequence[Transform],
    spec: ModelSpec,
    rounds: int,
    gain: float | None,
    key: tuple[int, str, int],
) -> Floats:
    """Return the noise of each round of one run on nothing: as it is released, or, where that is no multiple of it, as
    the noise part alone adds it.
    """
    cohort = _cohort(strategy)
    alone = Chain(tuple(noise))
    size = strategy.pipeline().encoded_size(spec.size)
    nothing = Total(torch.zeros(size), cohort, max(1, round(cohort)))
    still = torch.zeros(spec.size)
    state = strategy.init(spec) if gain is not None else alone.init(spec)
    rows = []
    for number in range(rounds):
        draws = Draws.of(*key, number)
        if gain is None:
            decoded, state = alone.decode(nothing, state, draws)
            rows.append(decoded.values.double().numpy())
        else:
            stepped, state = strategy.step(still, nothing, state, draws)
            rows.append(stepped.double().numpy() / gain)
    return np.stack(rows)


def _cohort(strategy: Strategy) -> float:
    return float(getattr(strategy, "expected_cohort", 10.0))


def _gain(before: Sequence[Transform], spec: ModelSpec, cohort: float, seed: int) -> float | None:
    """Return what a sum is multiplied by on its way to the model, or None where the way is no multiplication."""
    chain = Chain(tuple(before))
    size = chain.encoded_size(spec.size)
    state = chain.init(spec)
    found = []
    for number, scale in enumerate((1.0, 3.0, -2.0)):
        given: Tensor = torch.from_numpy(seeded(seed, "gain", number).standard_normal(size) * scale).float()
        decoded, state = chain.decode(Total(given, cohort, max(1, round(cohort))), state, Draws.of(seed, "gain"))
        if decoded.values.shape != given.shape:
            return None
        ratio = decoded.values.double() / given.double()
        found += [float(ratio.min()), float(ratio.max())]
    steady = max(found) - min(found) <= 1e-4 * max(abs(value) for value in found)
    return found[0] if steady and found[0] != 0 else None
