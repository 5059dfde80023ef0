"""Measures the accountants: calibrating the noise of 1,000 rounds, and what 14,040 steps of DP-SGD cost.

python -m benchmarks.accounting. Seconds are of this process's CPU, imports of the accountants included in the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.measuring import machine, print_line
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.calibration import noise_for

_DELTA = 1e-5


def rounds(count: int, rate: float, noise_multiplier: float) -> list[dict[str, Any]]:
    """Return the events of `count` rounds of Gaussian noise on Poisson samples."""
    once = {"name": "gaussian", "noise_multiplier": noise_multiplier}
    return [{"name": "poisson", "sampling_probability": rate, "event": once}] * count


def seconds(work: Callable[[], float]) -> tuple[float, float]:
    """Return the CPU seconds of `work` and what it returned."""
    started = time.process_time()
    found = work()
    return round(time.process_time() - started, 3), found


def measure(count: int = 1_000, steps: int = 14_040, ledger: int = 10_000) -> dict[str, Any]:
    """Return the figures: CPU seconds, and the numbers that were found."""
    about: dict[str, Any] = {"unit": "client", "adjacency": "add-or-remove-one"}
    calibrate_s, noise = seconds(lambda: noise_for(4.0, _DELTA, lambda z: rounds(count, 0.1, z), **about))
    steps_s, steps_epsilon = seconds(
        lambda: epsilon_of(rounds(steps, 256 / 60_000, 1.1), delta=_DELTA, **about).epsilon
    )
    ledger_s, _ = seconds(lambda: epsilon_of(rounds(ledger, 0.01, 1.0), delta=_DELTA, **about).epsilon)
    return {
        "rounds": count,
        "calibrate_s": calibrate_s,
        "noise_multiplier": round(noise, 5),
        "steps": steps,
        "steps_s": steps_s,
        "steps_epsilon": round(steps_epsilon, 4),
        "ledger_rounds": ledger,
        "ledger_s": ledger_s,
    }


def main() -> None:
    """Measure and print one line."""
    print_line({"benchmark": "accounting", **measure(), **machine()})


if __name__ == "__main__":
    main()
