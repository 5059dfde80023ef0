"""A run's plots, drawn from its round reports: what it learnt, what it sent, who took part, what it spent.

Every figure is a `matplotlib.figure.Figure` of its own: no global state, no window, and Matplotlib is imported only
when something is drawn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fedml_core.errors import ConfigError
from server.plots_labels import label_figure
from server.plots_privacy import spent_figure
from server.plots_rounds import FEW, WIDE_INCHES, Curve, Rounds, bars, curve_of, dress_rounds, mapping_of, number_of
from server.plots_style import (
    BLACK,
    BLUE,
    DPI,
    GREEN,
    ORANGE,
    PANEL_INCHES,
    PURPLE,
    SKY,
    VERMILLION,
    byte_unit,
    dress,
    grid,
    name_ticks,
    new_figure,
    plain,
    whole_ticks,
)
from server.plots_time import time_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS_PER_FIGURE = 8
MOST_CLIENTS = 200
_KNOWN_PLACES = {"server": (BLUE, "o"), "clients": (VERMILLION, "s"), "train": (GREEN, "^")}
_OTHER_PLACES = ((PURPLE, "D"), (ORANGE, "v"), (SKY, "P"))


def draw_all(
    rounds: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    baseline: Mapping[str, float] | None = None,
    label_counts: ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
) -> list[Path]:
    """Write every plot that the reports hold data for into `folder`, as PNG, and return the files.

    The files are metrics.png (and metrics-2.png, ... beyond 8 metrics), virtual_time.png, traffic.png,
    participation.png, epsilon.png and labels.png. Void rounds are shaded. What the reports lack is not drawn. The last
    report of a round counts.
    Names are written in Matplotlib's own `font.family`, which warns of letters that it lacks.

    Args: rounds: one mapping for each round, as in the history. baseline: a value for each metric that has one, drawn
        as a dashed line, such as the accuracy of central training. label_counts: (clients, classes) examples.
        class_names: one for each class.
    Raises: ConfigError: if a report has no round number, an argument the wrong shape, or a file cannot be written.
    """
    reports = _checked(rounds)
    figures: dict[str, Figure | None] = {}
    for page, figure in enumerate(metric_figures(reports, _checked_baseline(baseline or {})), start=1):
        figures["metrics.png" if page == 1 else f"metrics-{page}.png"] = figure
    figures["virtual_time.png"] = time_figure(reports)
    figures["traffic.png"] = traffic_figure(reports)
    figures["participation.png"] = participation_figure(reports)
    figures["epsilon.png"] = spent_figure(reports)
    figures["labels.png"] = None if label_counts is None else label_figure(label_counts, class_names)
    return [_write(figure, Path(folder) / name) for name, figure in figures.items() if figure is not None]


def metric_figures(rounds: Rounds, baseline: Mapping[str, float]) -> list[Figure]:
    """Return figures with one panel for each metric, and in it one line for each place where it was measured."""
    curves: dict[str, dict[str, Curve]] = {}
    for report in rounds:
        for place, metrics in mapping_of(report.get("metrics")).items():
            for name, value in mapping_of(metrics).items():
                if name == "examples":  # what the others are averages over
                    continue
                if (number := number_of(value)) is not None:
                    curves.setdefault(str(name), {}).setdefault(str(place), {})[report["round"]] = number
    names = [
        name for name, lines in curves.items() if np.isfinite([y for c in lines.values() for y in c.values()]).any()
    ]
    figures = []
    for start in range(0, len(names), PANELS_PER_FIGURE):
        page = names[start : start + PANELS_PER_FIGURE]
        columns = min(2, len(page))
        rows = -(-len(page) // columns)
        figure = new_figure(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows)
        for place, name in enumerate(page, start=1):
            _draw_metric(figure.add_subplot(rows, columns, place), name, curves[name], baseline.get(name), rounds)
        figures.append(figure)
    return figures


def traffic_figure(rounds: Rounds) -> Figure | None:
    """Return the bytes of each round: what clients sent above zero, what they were sent below."""
    up, down = curve_of(rounds, "bytes_up"), curve_of(rounds, "bytes_down")
    if not up and not down:
        return None
    scale, unit = byte_unit(max([*up.values(), *down.values()]))
    figure = new_figure(WIDE_INCHES, PANEL_INCHES[1])
    axes = figure.add_subplot()
    for curve, sign, color, name in ((up, 1, BLUE, "up, from clients"), (down, -1, VERMILLION, "down, to clients")):
        if curve:
            total_scale, total_unit = byte_unit(sum(curve.values()))
            label = f"{name} ({sum(curve.values()) / total_scale:.3g} {total_unit} in all)"
            heights, edges = bars({x: sign * y / scale for x, y in curve.items()}, 0.4 if len(curve) <= FEW else 0.5)
            axes.stairs(heights, edges, fill=True, color=color, label=label)
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    grid(axes.yaxis)
    dress_rounds(axes, rounds, "Traffic per round", f"{unit}, up and down")
    return figure


def participation_figure(rounds: Rounds) -> Figure | None:
    """Return how often each client took part and was excluded; beyond 200 clients, how many did so how often."""
    took = Counter(client for report in rounds for client in _clients(report.get("participants")))
    rows = [row for report in rounds for row in _list(report.get("excluded")) if isinstance(row, Mapping)]
    excluded = Counter(client for row in rows for client in _clients([row.get("client")]))
    clients = sorted({*took, *excluded}, key=lambda client: (isinstance(client, str), client))
    if not clients:
        return None
    figure = new_figure(WIDE_INCHES, PANEL_INCHES[1])
    axes = figure.add_subplot()
    partial = any((number_of(r.get("replies")) or 0) > len(_list(r.get("participants"))) for r in rounds)
    count = f"{len(rounds):,} round{'s' * (len(rounds) != 1)}"
    note = " (as far as reports list them)" if partial else ""
    if len(clients) <= MOST_CLIENTS:
        _draw_participation(axes, clients, took, excluded)
        dress(axes, f"Participation in {count}{note}", "client", "rounds")
    else:
        _draw_frequencies(axes, [took[client] for client in clients])
        title = f"Participation of {len(clients):,} clients in {count}{note}"
        dress(axes, title, "rounds that a client took part in", "clients")
    whole_ticks(axes.yaxis, 6)
    grid(axes.yaxis)
    return figure


def _draw_metric(axes: Axes, name: str, lines: Mapping[str, Curve], baseline: float | None, rounds: Rounds) -> None:
    others = iter(_OTHER_PLACES * len(lines))
    for place, curve in lines.items():
        color, marker = _KNOWN_PLACES.get(place) or next(others)
        ys = np.array(list(curve.values()))
        lone = len(ys) <= FEW or not np.isfinite(ys).all()  # a point between two gaps shows by its marker only
        ys[~np.isfinite(ys)] = np.nan
        axes.plot(list(curve), ys, color=color, marker=marker if lone else "", markersize=4, label=plain(place, 14))
    if baseline is not None:
        axes.axhline(baseline, color=BLACK, linestyle="--", linewidth=1.2, label=f"baseline {baseline:.4g}")
    values = np.array([y for curve in lines.values() for y in curve.values() if math.isfinite(y)])
    if values.min() > 0 and values.max() > 1.5 and values.max() / values.min() > 100:
        axes.set_yscale("log")
    grid(axes.yaxis)
    dress_rounds(axes, rounds, f"{plain(name)} per round", plain(name))


def _draw_participation(
    axes: Axes, clients: Sequence[int | str], took: Counter[int | str], excluded: Counter[int | str]
) -> None:
    places = np.arange(len(clients))
    heights = np.array([took[client] for client in clients])
    axes.bar(places, heights, color=BLUE, label="took part")
    if excluded:
        refused = np.array([excluded[client] for client in clients])
        some = refused > 0
        axes.bar(places[some], refused[some], bottom=heights[some], color=ORANGE, label="excluded")
        heights = heights + refused
    axes.set_ylim(0, 1.06 * heights.max())
    name_ticks(axes.xaxis, [str(client) for client in clients], 500)
    axes.set_xlim(-0.8, len(clients) - 0.2)


def _draw_frequencies(axes: Axes, times: Sequence[int]) -> None:
    width = max(1, -(-(max(times) + 1) // FEW))
    heights = np.bincount(np.array(times) // width)
    edges = np.arange(len(heights) + 1) * width - 0.5
    axes.stairs(heights, edges, fill=True, facecolor=BLUE, edgecolor="white")
    whole_ticks(axes.xaxis)
    axes.set_xlim(edges[0], edges[-1])


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _clients(value: object) -> Iterator[int | str]:
    return (client for client in _list(value) if isinstance(client, int | str) and not isinstance(client, bool))


def _checked(rounds: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    reports: dict[int, Mapping[str, Any]] = {}
    for place, report in enumerate(rounds, start=1):
        number = mapping_of(report).get("round")
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 10**9:
            raise ConfigError(
                f"report {place} needs a whole number below 10^9 as its round, got {number!r:.40}; give a run's history"
            )
        reports[number] = report
    return [reports[number] for number in sorted(reports)]


def _checked_baseline(baseline: object) -> dict[str, float]:
    if not isinstance(baseline, Mapping):
        raise ConfigError(f"baseline must name metrics, such as {{'accuracy': 0.9}}, got {baseline!r}")
    numbers = {str(name): number_of(value) for name, value in baseline.items()}
    for name, number in numbers.items():
        if number is None or not math.isfinite(number):
            raise ConfigError(f"the baseline of {name} must be a finite number, got {baseline[name]!r}")
    return {name: number for name, number in numbers.items() if number is not None}


def _write(figure: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=DPI)
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}); name a folder that can be written to") from None
    return path


__all__ = ["draw_all"]
