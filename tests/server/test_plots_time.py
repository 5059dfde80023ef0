"""The plot over virtual time: what it draws, in which unit, and when there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.plots import draw_all
from server.plots_time import time_figure


def report(number: int, clock: float | None, **metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {"round": number, "status": "ok", "virtual_clock": clock, "metrics": metrics}


def test_each_metric_is_drawn_over_the_clock_at_the_end_of_its_round() -> None:
    rounds = [
        report(1, 60.0, server={"accuracy": 0.25, "examples": 9}, train={"loss": 2.0}),
        report(2, 240.0, server={"accuracy": 0.5}, train={"loss": 1.0}),
    ]
    figure = time_figure(rounds)
    assert figure is not None
    accuracy, loss = figure.axes
    assert np.asarray(accuracy.lines[0].get_xydata()).tolist() == [[1.0, 0.25], [4.0, 0.5]]
    assert np.asarray(loss.lines[0].get_xydata()).tolist() == [[1.0, 2.0], [4.0, 1.0]]
    assert accuracy.get_xlabel() == "virtual time, minutes"
    assert accuracy.get_title(loc="left") == "accuracy over virtual time"


@pytest.mark.parametrize(
    ("clock", "unit"), [(119.0, "seconds"), (120.0, "minutes"), (7200.0, "hours"), (172_800.0, "days")]
)
def test_the_unit_fits_the_run(clock: float, unit: str) -> None:
    figure = time_figure([report(1, clock, server={"loss": 1.0})])
    assert figure is not None and figure.axes[0].get_xlabel() == f"virtual time, {unit}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, None, "0.5"])
def test_what_is_no_finite_number_is_left_out(value: object) -> None:
    assert time_figure([report(1, 60.0, server={"loss": value})]) is None


def test_a_run_without_a_fleet_has_no_such_plot(tmp_path: Path) -> None:
    without = [report(1, None, server={"loss": 1.0}), {"round": 2, "metrics": {"server": {"loss": 1.0}}}]
    assert time_figure(without) is None
    drawn = draw_all([report(1, None, server={"loss": 1.0})], tmp_path)
    assert "virtual_time.png" not in [path.name for path in drawn]
    drawn = draw_all([report(1, 5.0, server={"loss": 1.0})], tmp_path)
    assert "virtual_time.png" in [path.name for path in drawn]
