"""Measures distributed noise: exact integer draws a second, and what a client's part of a noised sum costs.

python -m benchmarks.distributed_noise. Seconds are of one core's CPU, the least of five; contenders take turns. A part
is clipping, rotation, rounding, noise and packing; beside it stands the part of a secure sum without noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import machine, print_line
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.discrete import DiscreteGaussian, Skellam
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.integer_noise import GaussianIntegers, SkellamIntegers
from fedml_core.privacy.noised_encoding import NoisedEncoding
from fedml_core.privacy.packing import SUM_BITS
from fedml_core.privacy.rotation import Rotation
from fedml_core.secagg.encoding import RingEncoding

_TURNS = 5


def least_seconds(contenders: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least CPU seconds of each, over turns taken one after the other; a first turn is not counted."""
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(_TURNS + 1):
        for name, work in contenders.items():
            started = time.process_time()
            work()
            if turn > 0:
                best[name] = min(best[name], time.process_time() - started)
    return best


def measure(parameters: int = 1_000_000, clients: int = 100) -> dict[str, Any]:
    """Return the figures for one model and cohort, all of it honest, with noise multiplier 1."""
    values = np.random.default_rng(0).normal(size=(1, parameters)).astype(np.float32)
    plans = {bits: NoisedEncoding(parameters, clients, clients, 1.0, 1.0, sum_bits=bits) for bits in SUM_BITS}
    noises = {f"gaussian_{bits}": GaussianIntegers().sampler(plan.deviation) for bits, plan in plans.items()}
    skellam = SkellamIntegers().sampler(plans[16].deviation)
    plain = RingEncoding(1.0, clients)
    seconds = least_seconds(
        {
            **{name: partial(_draw, noise, parameters) for name, noise in noises.items()},
            "skellam_16": partial(_draw, skellam, parameters),
            **{f"encode_{bits}": partial(plan.encode_rows, values) for bits, plan in plans.items()},
            "encode_without_noise": lambda: plain.encode_rows(values, [bytes(32)]),
            "rotate": lambda: Rotation(parameters, "").forward(values[0]),
        }
    )
    draws = {name: round(parameters / seconds.pop(name) / 1e6, 1) for name in (*noises, "skellam_16")}
    about: dict[str, Any] = {"delta": 1e-5, "unit": "client", "adjacency": "replace-special"}
    return {
        "parameters": parameters,
        "clients": clients,
        "million_draws_per_s": draws,
        "seconds": {name: round(spent, 5) for name, spent in seconds.items()},
        "upload_bytes": {bits: plan.length(parameters) * plan.bits // 8 for bits, plan in plans.items()},
        "epsilon": {bits: round(epsilon_of([plan.event()], **about).epsilon, 4) for bits, plan in plans.items()},
    }


def _draw(noise: DiscreteGaussian | Skellam, count: int) -> object:
    return noise.draw(NoiseStream.fresh(), count)


def main() -> None:
    """Measure and print one line."""
    torch.set_num_threads(1)
    print_line({"benchmark": "distributed noise", **measure(), **machine()})


if __name__ == "__main__":
    main()
