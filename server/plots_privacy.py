"""The plots of epsilon over rounds: what a run has cost, what it would cost, and when a budget is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from fedml_core.privacy.terms import epsilon_text
from server.plots_rounds import BEYOND, FEW, WIDE_INCHES, Curve, Rounds, curve_of, dress_rounds, mapping_of
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
from server.uncovered import over_rounds, uncovered_text
from server.wording import privacy_terms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]

_COLORS = (BLUE, GREEN, PURPLE)


def spent_figure(rounds: Rounds) -> Figure | None:
    """Return a figure of what was spent up to each round, by round reports, or None where they hold no epsilon.

    Terms, and what epsilon does not cover, are said in the title.
    """
    spent, examples = curve_of(rounds, "epsilon"), _of_examples(rounds)
    if not spent:
        return None
    # One curve alone has nothing to be told from: its unit is in the title.
    curves = {"client": spent, "example": examples} if examples else {"": spent}
    figure = new_figure(WIDE_INCHES, PANEL_INCHES[1])
    axes = figure.add_subplot()
    _draw(axes, {name: list(curve.items()) for name, curve in curves.items()})
    last = max(spent)
    terms = next((privacy_terms(row["privacy"]) for row in reversed(rounds) if row.get("privacy")), "")
    title = f"Privacy spent: epsilon {epsilon_text(spent[last])} after round {last:,}" + (
        f",\n{terms.strip()}" if terms else ""
    )
    beside = uncovered_text(over_rounds(row.get("privacy") for row in rounds))
    title = "\n".join([title, *(plain(line, 90) for line in wrap(beside, 90)[:3])])
    dress_rounds(axes, rounds, title, "epsilon so far")
    return figure


def outlook_figure(curves: Mapping[str, Points], terms: str, budget: float | None = None) -> Figure | None:
    """Return a figure of what rounds would cost, or None without a finite point.

    `curves`: (round, epsilon) by what a curve stands for, such as the unit. `terms`: delta, adjacency and sampling,
    said below the rounds, since an epsilon without them means nothing. `budget`: the epsilon not to go beyond.
    """
    shown = {name: finite for name, points in curves.items() if (finite := [point for point in points if _fits(point)])}
    if not shown:
        return None
    figure = new_figure(*PANEL_INCHES)
    axes = figure.add_subplot()
    _draw(axes, shown, budget)
    axes.set_xlim(left=0)
    whole_ticks(axes.xaxis)
    dress(axes, "Privacy spent", f"round ({plain(terms, 80)})", "epsilon")
    return figure


def _draw(axes: Axes, curves: Mapping[str, Points], budget: float | None = None) -> None:
    """Draw one line for each curve and one for the budget, from epsilon 0."""
    for place, (name, points) in enumerate(curves.items()):
        rounds, costs = [number for number, _ in points], [cost for _, cost in points]
        marker, color = "o" if len(points) <= FEW else "", _COLORS[place % len(_COLORS)]
        axes.plot(rounds, costs, color=color, marker=marker, markersize=4, label=plain(name, 24))
    if budget is not None and _fits((0, budget)):
        axes.axhline(budget, color=VERMILLION, linewidth=1.2, linestyle="--", label=f"budget {budget:g}")
    axes.set_ylim(bottom=0)
    grid(axes.yaxis)


def _of_examples(rounds: Rounds) -> Curve:
    """Return what examples have cost where `epsilon` is about clients."""
    others = [row for row in rounds if mapping_of(row.get("privacy")).get("unit") != "example"]
    return curve_of([{**mapping_of(row.get("example_privacy")), "round": row["round"]} for row in others], "epsilon")


def _fits(point: tuple[int, float]) -> bool:
    return math.isfinite(point[1]) and abs(point[1]) < BEYOND


__all__ = ["outlook_figure", "spent_figure"]
