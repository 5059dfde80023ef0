"""What plots read of round reports, and how an axis of rounds looks: its ticks, and void rounds shaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from server.plots_style import PALE, PANEL_INCHES, dress, whole_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rounds = Sequence[Mapping[str, Any]]
"""Round reports in order, as a history holds them."""
Curve = dict[int, float]
"""Values by round."""

FEW = 60
"""Beyond so many points, each is not marked by itself."""
WIDE_INCHES = 1.6 * PANEL_INCHES[0]
BEYOND = 1e100
"""No axis can span more; such a value is a diverged run and leaves a gap, as infinity does."""


def curve_of(rounds: Rounds, name: str) -> Curve:
    """Return the finite numbers that reports hold under a name."""
    numbers = ((report["round"], number_of(report.get(name))) for report in rounds)
    return {x: y for x, y in numbers if y is not None and math.isfinite(y)}


def number_of(value: object) -> float | None:
    """Return what is a number as one, infinity for what no axis can span, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    number = math.inf if isinstance(value, int) and abs(value) >= BEYOND else float(value)
    return math.inf if abs(number) >= BEYOND else number


def mapping_of(value: object) -> Mapping[Any, Any]:
    """Return what is a mapping, and an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def bars(curve: Curve, half: float) -> tuple[list[float], list[float]]:
    """Return heights and edges of a step outline: a block around each round, `half` to either side, and 0 between."""
    heights: list[float] = []
    edges: list[float] = []
    for x, y in curve.items():
        if edges and edges[-1] < x - half:
            heights.append(0.0)
        if not edges or edges[-1] < x - half:
            edges.append(x - half)
        heights.append(y)
        edges.append(x + half)
    return heights, edges


def dress_rounds(axes: Axes, rounds: Rounds, title: str, y_label: str) -> None:
    """Give axes over rounds what `dress` gives, ticks at whole rounds, and a shade where a round was void."""
    from matplotlib.patches import StepPatch

    void = {report["round"]: 1.0 for report in rounds if report.get("status") == "void"}
    if void:  # one patch over the whole height, in axes' coordinates there, so that it moves no limit
        whole = axes.get_xaxis_transform()
        heights, edges = bars(void, 0.5)
        axes.add_patch(
            StepPatch(heights, edges, transform=whole, color=PALE, linewidth=0, zorder=0, label="void round")
        )
    axes.set_xlim(rounds[0]["round"] - 0.6, rounds[-1]["round"] + 0.6)
    whole_ticks(axes.xaxis, 10 if rounds[-1]["round"] < 100_000 else 4)
    dress(axes, title, "round", y_label)


__all__ = [
    "BEYOND",
    "FEW",
    "WIDE_INCHES",
    "Curve",
    "Rounds",
    "bars",
    "curve_of",
    "dress_rounds",
    "mapping_of",
    "number_of",
]
