"""Short spellings of events, and exact numbers to compare accountants with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Event = dict[str, Any]
Pmf = npt.NDArray[np.float64]


def gaussian(noise_multiplier: float) -> Event:
    return {"name": "gaussian", "noise_multiplier": noise_multiplier}


def laplace(scale: float) -> Event:
    return {"name": "laplace", "scale": scale}


def poisson(rate: float, event: Event) -> Event:
    return {"name": "poisson", "sampling_probability": rate, "event": event}


def fixed_size(sample: int, population: int, event: Event) -> Event:
    return {"name": "fixed-size", "population": population, "sample": sample, "event": event}


def shuffled(event: Event) -> Event:
    return {"name": "shuffled", "event": event}


def repeated(count: int, event: Event) -> Event:
    return {"name": "repeated", "count": count, "event": event}


def composed(*events: Event) -> Event:
    return {"name": "composed", "events": list(events)}


def tree(noise_multiplier: float, steps: int, restarts: int = 0) -> Event:
    return {"name": "tree", "noise_multiplier": noise_multiplier, "steps": steps, "restarts": restarts}


def matrix(noise_multiplier: float, sensitivity: float) -> Event:
    return {"name": "matrix", "noise_multiplier": noise_multiplier, "sensitivity": sensitivity}


def local(noise_multiplier: float) -> Event:
    return {"name": "analytic-gaussian-local", "noise_multiplier": noise_multiplier}


def integer_sum(name: str, **changed: Any) -> Event:
    """Return the row of 16 bits: 100 clients, 65,536 parameters, clip norm and noise multiplier 1."""
    row: Event = {
        "clients": 100,
        "dimension": 65_536,
        "l2": 1.0,
        "local_noise": 0.1,
        "scale": 1 / 1.9657963468e-4,
        "ring_bits": 16,
        "beta": float(np.exp(-0.5)),
    }
    return {"name": name, **row, **changed}


def divergence(first: Pmf, second: Pmf, order: float) -> float:
    """Return the Renyi divergence between two distributions on the same points."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = order * np.log(first) + (1 - order) * np.log(second)
    kept = terms[(first > 0) & (second > 0)]
    return float((kept.max() + np.log(np.sum(np.exp(kept - kept.max())))) / (order - 1))


def normal(points: Pmf, mean: float) -> Pmf:
    """Return the normal density of deviation 1, times the spacing of `points`."""
    found: Pmf = np.exp(-0.5 * (points - mean) ** 2) / np.sqrt(2 * np.pi) * (points[1] - points[0])
    return found
