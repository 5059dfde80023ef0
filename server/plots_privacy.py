"""The plot of epsilon over rounds: what a run has cost, or would cost, and when a budget is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from server.plots_style import (
    BLUE,
    GREEN,
    PANEL_INCHES,
    PURPLE,
    VERMILLION,
    dress,
    grid,
    new_figure,
    plain,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]

_FEW = 60
_MOST = 1e100  # as in plots.py: no axis can span more
_COLORS = (BLUE, GREEN, PURPLE)


def epsilon_figure(curves: Mapping[str, Points], terms: str, budget: float | None = None) -> Figure | None:
    """Return a figure of epsilon over rounds, or None without a finite point.

    `curves`: (round, epsilon) by what a curve stands for, such as the unit. `terms`: delta, adjacency and sampling,
    said below the rounds, since an epsilon without them means nothing. `budget`: the epsilon not to go beyond.
    """
    shown = {name: finite for name, points in curves.items() if (finite := [point for point in points if _fits(point)])}
    if not shown:
        return None
    figure = new_figure(*PANEL_INCHES)
    axes = figure.add_subplot()
    for place, (name, points) in enumerate(shown.items()):
        marker = "o" if len(points) <= _FEW else ""
        rounds, costs = [number for number, _ in points], [cost for _, cost in points]
        color = _COLORS[place % len(_COLORS)]
        axes.plot(rounds, costs, color=color, marker=marker, markersize=4, label=plain(name, 24))
    if budget is not None and _fits((0, budget)):
        axes.axhline(budget, color=VERMILLION, linewidth=1.2, linestyle="--", label=f"budget {budget:g}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    grid(axes.yaxis)
    whole_ticks(axes.xaxis)
    dress(axes, "Privacy spent", f"round ({plain(terms, 80)})", "epsilon")
    return figure


def _fits(point: tuple[int, float]) -> bool:
    return math.isfinite(point[1]) and abs(point[1]) < _MOST


__all__ = ["epsilon_figure"]
