"""The plot of metrics over virtual time: what a simulated fleet would have reached when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from server.plots_rounds import BEYOND, FEW
from server.plots_style import BLUE, GREEN, PANEL_INCHES, PURPLE, VERMILLION, dress, grid, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]

MOST_PANELS = 8
_COLORS = {"server": (BLUE, "o"), "clients": (VERMILLION, "s"), "train": (GREEN, "^")}
_UNITS = ((2 * 86_400.0, 86_400.0, "days"), (2 * 3600.0, 3600.0, "hours"), (120.0, 60.0, "minutes"))


def time_figure(rounds: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Return a figure with a panel for each metric (the first 8) over the clock of the fleet, or None without one."""
    curves = _curves(rounds)
    if not curves:
        return None
    unit_s, unit = _unit(max(x for lines in curves.values() for points in lines.values() for x, _ in points))
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows)
    for place, (name, lines) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        for where, points in lines.items():
            color, marker = _COLORS.get(where, (PURPLE, "D"))
            xs, ys = [x / unit_s for x, _ in points], [y for _, y in points]
            shape = marker if len(points) <= FEW else ""
            axes.plot(xs, ys, color=color, marker=shape, markersize=4, label=plain(where, 14))
        axes.set_xlim(left=0)
        grid(axes.yaxis)
        dress(axes, f"{plain(name)} over virtual time", f"virtual time, {unit}", plain(name))
    return figure


def _curves(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    found: dict[str, dict[str, Points]] = {}
    for report in rounds:
        clock, places = report.get("virtual_clock"), report.get("metrics")
        if not _is_number(clock) or not isinstance(places, Mapping):
            continue
        for place, metrics in places.items():
            for name, value in metrics.items() if isinstance(metrics, Mapping) else ():
                if name != "examples" and _is_number(value):  # what the others are averages over
                    found.setdefault(str(name), {}).setdefault(str(place), []).append((float(clock), float(value)))
    return dict(list(found.items())[:MOST_PANELS])


def _unit(most_s: float) -> tuple[float, str]:
    return next(((size, name) for least, size, name in _UNITS if most_s >= least), (1.0, "seconds"))


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < BEYOND and math.isfinite(value)


__all__ = ["time_figure"]
