"""Runs the properties A8 and A9 of differential privacy at full size; prints one JSON line, or fails.

    python -m benchmarks.privacy_properties [--coordinates 1048576] [--clients 20] [--rounds 100] [--points 60]

A8: claims about random runs (rate, noise, steps, delta, adjacency) against exact convolutions that are not the
accountant's: never below, and at most 1 % above. A9: the noise in a sum of integers after no, 10, 30 and 50 % of its
clients are lost; sums of aligned updates that leave 16 bits, of which there are none; a clip norm that finds its
quantile from five beginnings. Progress goes to the standard error.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measuring import print_properties
from fedml_core.accumulate import PlainSum
from fedml_core.errors import SecureAggregationError
from fedml_core.model import ModelSpec
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.adaptive_clip import AdaptiveClip
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.gaussian import ServerGaussian
from fedml_core.privacy.noised_encoding import NoisedEncoding
from fedml_core.transform import Draws, chain
from fedml_core.update import Update
from tests.fedml_core.privacy import exact_losses

_CLIP = 0.5
_BELOW = 1 - 1e-6  # what the exact convolution's own rounding may come to


def accounting(points: int) -> dict[str, float]:
    """Return the least and the largest claim over its exact value, over random runs that are not all private."""
    draws, ratios = np.random.Generator(np.random.Philox(key=5)), list[float]()
    while len(ratios) < points:
        rate, noise = float(10 ** draws.uniform(-3, 0)), float(10 ** draws.uniform(-0.5, 1.0))
        count, delta = round(10 ** draws.uniform(0, 4)), float(10 ** draws.uniform(-9, -3))
        replaced = bool(draws.integers(2))
        exact = exact_losses.epsilon([exact_losses.gaussian(rate, noise, replaced=replaced, count=count)], delta)
        if not 0.01 < exact < 100:
            continue
        gaussian = {"name": "gaussian", "noise_multiplier": noise}
        sampled = {"name": "poisson", "sampling_probability": rate, "event": gaussian}
        adjacency = "replace-one" if replaced else "add-or-remove-one"
        event = {"name": "repeated", "count": count, "event": sampled}
        claim = epsilon_of([event], delta=delta, unit="client", adjacency=adjacency)
        ratios.append(claim.epsilon / exact)
        what = f"rate {rate:.3g}, noise {noise:.3g}, {count} steps, delta {delta:.2g}, {adjacency}"
        print(f"A8, {len(ratios)} of {points}: {what}: {ratios[-1]:.6f}", file=sys.stderr, flush=True)
        if not _BELOW <= ratios[-1] <= 1.01:
            raise SystemExit(f"A8 fails: {what}: {claim.epsilon} is claimed and {exact} is exact")
    return {"least": round(min(ratios), 6), "largest": round(max(ratios), 6)}


def dropouts(coordinates: int, clients: int) -> dict[str, float]:
    """Return the residual noise over the configured one, for each share of clients that are lost."""
    honest = clients // 2
    planned = NoisedEncoding(coordinates, clients, honest, _CLIP, 1.0, rotation="properties")
    rows = _updates(clients, coordinates)
    sent = [planned.encode_rows(row[None])[0] for row in rows]
    if {words.dtype.kind for words in sent} != {"u"}:
        raise SystemExit("A9 fails: something other than integers is sent")
    found = {}
    for share in (0.0, 0.1, 0.3, 0.5):
        left = clients - round(share * clients)
        total = np.sum(sent[:left], axis=0, dtype=sent[0].dtype)
        residual = planned.decode(total, left).values - rows[:left].sum(axis=0, dtype=np.float64)
        configured = planned.local_noise * math.sqrt(left)
        found[f"{share:.0%}"] = round(float(residual.std()) / configured, 5)
        if abs(found[f"{share:.0%}"] - 1) > 0.01 or residual.std() < _CLIP * (1 - 3 / math.sqrt(coordinates)):
            raise SystemExit(f"A9 fails: with {left} of {clients} clients the noise is {residual.std()}")
    try:
        planned.decode(np.sum(sent[: honest - 1], axis=0, dtype=sent[0].dtype), honest - 1)
    except SecureAggregationError:
        return found
    raise SystemExit(f"A9 fails: a sum of {honest - 1} clients is decoded, and its noise is for {honest}")


def wraps(clients: int, rounds: int) -> dict[str, float]:
    """Return how many coordinates of sums of equal updates left the 16 bits, and how near the nearest one came."""
    size, outside, nearest = 1 << 16, 0, 0
    aligned = np.repeat(_updates(1, size), clients, axis=0)[0]
    for number in range(rounds):
        planned = NoisedEncoding(size, clients, clients, _CLIP, 1.0, rotation=str(number))
        wide, stream = clients * planned.rounded(aligned, NoiseStream.fresh()), NoiseStream.fresh()
        for _ in range(clients):
            wide += planned.noise.sampler(planned.deviation).draw(stream, size)
        outside += int(((wide < -(1 << 15)) | (wide >= 1 << 15)).sum())
        nearest = max(nearest, int(np.abs(wide).max()))
    if outside:
        raise SystemExit(f"A9 fails: {outside} coordinates wrapped in {rounds} rounds")
    return {"outside": outside, "nearest": round(nearest / (1 << 15), 4)}


def adaptive(clients: int = 500, rounds: int = 250) -> dict[str, float]:
    """Return, for each beginning, the share of clients that the clip norm leaves alone in the last 50 rounds."""
    rows, half = _norms(clients), 0.5
    norms = rows.double().norm(dim=1)
    found = {}
    for initial in (0.01, 0.1, 1.0, 10.0, 100.0):
        clip = AdaptiveClip(initial=initial, quantile=half).transform(1.0, clients)
        pipeline = chain(clip, ServerGaussian(1.0, clients))
        state, shares = pipeline.init(ModelSpec.of_size(rows.shape[1])), []
        for number in range(rounds):
            update = Update(rows, torch.ones(clients, dtype=torch.float64))
            encoded, _ = pipeline.encode(update, pipeline.told(state), {}, Draws.of(0))
            accumulator = PlainSum(pipeline.encoded_size(rows.shape[1]))
            accumulator.add(encoded)
            _, state = pipeline.decode(accumulator.total(), state, Draws.of(0))
            if number >= rounds - 50:
                shares.append(float((norms <= state["0"]["clip_norm"]).double().mean()))
        found[f"{initial:g}"] = round(float(np.mean(shares)), 4)
        if abs(found[f"{initial:g}"] - half) > 0.05:
            raise SystemExit(f"A9 fails: from {initial} the clip norm went to where {found[f'{initial:g}']} are kept")
    return found


def _updates(count: int, size: int) -> NDArray[np.float32]:
    rows = np.random.Generator(np.random.Philox(key=1)).standard_normal((count, size), dtype=np.float32)
    return np.asarray(rows * (0.8 * _CLIP) / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def _norms(count: int) -> torch.Tensor:
    draws = np.random.Generator(np.random.Philox(key=7))
    rows = draws.standard_normal((count, 20))
    rows *= (np.exp(0.7 * draws.standard_normal(count)) / np.linalg.norm(rows, axis=1))[:, None]
    return torch.from_numpy(rows).float()


def main() -> None:
    """Run them all and print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coordinates", type=int, default=1 << 20)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--points", type=int, default=60)
    asked = parser.parse_args()
    line: dict[str, Any] = {"bench": "privacy-properties", **vars(asked)}
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "a8_claim_over_exact": lambda: accounting(asked.points),
        "a9_noise_over_configured": lambda: dropouts(asked.coordinates, asked.clients),
        "a9_wraps": lambda: wraps(asked.clients, asked.rounds),
        "a9_kept_by_clip": adaptive,
    }
    print_properties(line, runs)


if __name__ == "__main__":
    main()
