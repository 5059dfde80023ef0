from __future__ import annotations

import math
from typing import Any

from server.plots_privacy import outlook_figure

POINTS = [(1, 1.5), (10, 2.5), (20, 3.5)]


def test_each_curve_and_the_budget_are_drawn_and_named() -> None:
    figure = outlook_figure({"client": POINTS, "example": POINTS[:2]}, "delta 1e-05, replace-one", budget=4.0)
    assert figure is not None
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.get_lines()] == ["client", "example", "budget 4"]
    drawn: Any = axes.get_lines()[0].get_xydata()
    assert [tuple(point) for point in drawn] == POINTS
    assert axes.get_xlabel() == "round (delta 1e-05, replace-one)" and axes.get_ylabel() == "epsilon"
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 4


def test_what_is_not_finite_is_left_out() -> None:
    figure = outlook_figure({"client": [(1, math.inf), (2, 1.0)], "example": [(1, math.nan)]}, "delta 1e-05")
    assert figure is not None
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["client"]
    assert outlook_figure({"client": [(1, math.inf)]}, "delta 1e-05") is None
    assert outlook_figure({}, "delta 1e-05") is None


def test_a_budget_without_an_end_is_not_drawn() -> None:
    figure = outlook_figure({"client": POINTS}, "delta 1e-05", budget=math.inf)
    assert figure is not None and len(figure.axes[0].get_lines()) == 1
