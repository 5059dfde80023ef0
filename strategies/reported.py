"""Metrics that clients report as records of numbers: checked, and averaged by examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from fedml_core.errors import ReplyError

Metrics = Mapping[str, float | list[float]]


def read_metrics(record: Mapping[str, object], weight_key: str, max_weight: float) -> tuple[float, Metrics]:
    """Return the number of examples, and the other metrics.

    Raises: ReplyError: with rule `weight`, unless `weight_key` is one number in (0, max_weight]; with rule
        `non-finite`, if a metric is NaN or infinite.
    """
    metrics = {str(name): _numbers(value) for name, value in record.items()}
    examples = metrics.pop(weight_key, None)
    if not isinstance(examples, float):
        raise ReplyError("weight", f"it must report {weight_key!r} as one number")
    if not 0 < examples <= max_weight:
        raise ReplyError("weight", f"{weight_key!r} must be > 0 and <= {max_weight:g}, got {examples:g}")
    for name, value in metrics.items():
        if not np.isfinite(value).all():
            raise ReplyError("non-finite", f"the metric {name[:80]!r} is NaN or infinite")
    return examples, metrics


def mean_metrics(reported: Iterable[tuple[float, Metrics]]) -> dict[str, float | list[float]]:
    """Return each metric's mean by examples, over the clients that report it.

    Lists are averaged item by item; a metric whose lists differ in length has no mean and is left out.
    Example:
        >>> mean_metrics([(1, {"loss": 4.0}), (3, {"loss": 8.0, "accuracy": 0.5})])
        {'loss': 7.0, 'accuracy': 0.5}
    """
    columns: dict[str, list[tuple[float, float | list[float]]]] = {}
    for examples, metrics in reported:
        for name, value in metrics.items():
            columns.setdefault(name, []).append((examples, value))
    means: dict[str, float | list[float]] = {}
    for name, column in columns.items():
        if len({np.shape(value) for _, value in column}) == 1:
            weights = [examples for examples, _ in column]
            means[name] = np.average([value for _, value in column], axis=0, weights=weights).tolist()
    return means


def _numbers(value: object) -> float | list[float]:
    try:
        return [float(item) for item in value] if isinstance(value, list) else float(value)  # type: ignore[arg-type]  # what is no number raises TypeError
    except (TypeError, ValueError, OverflowError):
        return math.nan
