"""The audit's one page of pictures: what canaries told, the noise, the cohorts, and what came back of an example."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.privacy.auditing import Estimate
from fedml_core.privacy.goodness import SizeTest
from server.plots_style import BLUE, GREY, PANEL_INCHES, VERMILLION, dress, grid, new_figure, plain
from simulations.audit.audit import Audited
from simulations.audit.disclosure import Case
from simulations.audit.example_audit import ExamplesAudited
from simulations.audit.mechanism import Residuals
from simulations.audit.shadows import Membership

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

__all__ = ["page_of_pictures"]

_COLUMNS = 2


Draw = Callable[["Figure", "SubplotSpec"], None]
Scores = tuple[NDArray[np.float64], NDArray[np.float64]]


def page_of_pictures(audited: Audited) -> bytes:
    """Return a PNG with a panel for everything that was measured."""
    panels = [*_of_clients(audited), *(() if audited.examples is None else _of_examples(audited.examples))]
    if audited.membership is not None:
        panels.append(_panel(_curve, audited.membership))
    if audited.cases:
        panels.append(_panel(_attacks, audited.cases))
    if shown := [case for case in audited.cases if case.best is not None and _side(case.best.truth) is not None]:
        panels.append(lambda figure, cell: _examples(figure, cell, shown))
    rows = -(-len(panels) // _COLUMNS)
    figure = new_figure(PANEL_INCHES[0] * _COLUMNS, PANEL_INCHES[1] * rows)
    cells = figure.add_gridspec(rows, _COLUMNS)
    for place, draw in enumerate(panels):
        draw(figure, cells[place // _COLUMNS, place % _COLUMNS])
    made = io.BytesIO()
    figure.savefig(made, format="png")
    return made.getvalue()


def _of_clients(audited: Audited) -> list[Draw]:
    claimed = None if audited.claim is None else float(audited.claim["epsilon"])
    aligned = "alignment with what was released (standard deviations)"
    panels = [
        _panel(_epsilons, "Epsilon", audited.bound, audited.estimate, claimed),
        _panel(_canaries, "Canaries", aligned, audited.scores),
    ]
    if audited.residuals is not None:
        panels.append(_panel(_noise, "Noise of a release", audited.residuals))
    if audited.sizes is not None:
        panels.append(_panel(_sizes, "Cohort sizes", "clients, from", audited.sizes))
    return panels


def _of_examples(audited: ExamplesAudited) -> list[Draw]:
    panels, attacked = [], audited.attacked
    if attacked is not None:
        claimed = attacked.claim.epsilon
        panels.append(_panel(_epsilons, "Epsilon of examples", attacked.bound, attacked.estimate, claimed))
        panels.append(_panel(_canaries, "Canary examples", "sum of what was released", attacked.scores))
    if audited.residuals is not None:
        panels.append(_panel(_noise, "Noise of a step", audited.residuals))
    if audited.sizes is not None:
        panels.append(_panel(_sizes, "Batch sizes", "examples, from", audited.sizes))
    return panels


def _panel(draw: Callable[..., None], *values: Any) -> Draw:
    return lambda figure, cell: draw(figure.add_subplot(cell), *values)


def _epsilons(axes: Axes, title: str, bound: float, estimate: Estimate, claimed: float | None) -> None:
    names = ["proved (one run)", "estimated"] + ([] if claimed is None else ["claimed"])
    values = [bound, estimate.epsilon] + ([] if claimed is None else [claimed])
    colors = [VERMILLION, VERMILLION] + ([] if claimed is None else [BLUE])
    axes.barh(names, values, color=colors, height=0.55)
    axes.errorbar([values[1]], [1], xerr=[1.645 * estimate.sd], color=GREY, capsize=4)
    dress(axes, title, "epsilon", "")
    grid(axes.xaxis)


def _canaries(axes: Axes, title: str, score: str, scores: Scores) -> None:
    included, excluded = scores
    together = np.concatenate([included, excluded])
    bins = np.linspace(together.min(), together.max(), max(6, min(40, len(together) // 6))).tolist()
    axes.hist(excluded, bins=bins, color=GREY, alpha=0.7, label="took no part")
    axes.hist(included, bins=bins, color=VERMILLION, alpha=0.6, label="took part")
    dress(axes, title, score, "canaries")
    grid(axes.yaxis)


def _noise(axes: Axes, title: str, residuals: Residuals) -> None:
    sd = float(residuals.reference.std()) or 1.0
    bins = np.linspace(-4, 4, 61).tolist()
    for values, color, label in (
        (residuals.reference, BLUE, "as configured"),
        (residuals.measured, VERMILLION, "measured"),
    ):
        axes.hist(
            (values / sd).ravel(), bins=bins, density=True, histtype="step", linewidth=1.6, color=color, label=label
        )
    dress(axes, title, "standard deviations, as configured", "density")
    grid(axes.yaxis)


def _sizes(axes: Axes, title: str, counted: str, sizes: SizeTest) -> None:
    places = np.arange(len(sizes.edges))
    axes.bar(places, sizes.observed, color=VERMILLION, alpha=0.7, label="drawn")
    axes.step(places, sizes.expected, where="mid", color=BLUE, label="Binomial")
    axes.set_xticks(places.tolist(), [str(edge) for edge in sizes.edges])
    dress(axes, title, counted, "draws")
    grid(axes.yaxis)


def _curve(axes: Axes, membership: Membership) -> None:
    members, others = np.sort(membership.members), np.sort(membership.others)
    thresholds = np.unique(np.concatenate([members, others]))
    caught = 1 - np.searchsorted(members, thresholds) / len(members)
    alarms = 1 - np.searchsorted(others, thresholds) / len(others)
    least = 1 / (2 * len(others))
    axes.plot(np.maximum(alarms, least), np.maximum(caught, least), color=VERMILLION, label="shadow models")
    axes.plot([least, 1], [least, 1], color=GREY, linestyle="--", label="chance")
    axes.set_xscale("log")
    axes.set_yscale("log")
    dress(axes, "Membership of training examples", "false-positive rate", "true-positive rate")
    grid(axes.xaxis)
    grid(axes.yaxis)


def _attacks(axes: Axes, cases: Sequence[Case]) -> None:
    shown = [case for case in cases if case.best is not None]
    names = [plain(f"{case.view.by.split(': ')[-1]}, {case.batch}", 44) for case in shown]
    best = [min(60.0, case.best.psnr_db) if case.best else 0.0 for case in shown]
    axes.barh(np.arange(len(shown)), best, color=VERMILLION, height=0.6, label="best attack (60 and more as 60)")
    axes.plot([case.chance_db for case in shown], np.arange(len(shown)), "|", color=BLUE, ms=12, label="mean input")
    axes.set_yticks(np.arange(len(shown)).tolist(), names)
    dress(axes, "Gradient inversion", "PSNR (dB)", "")
    grid(axes.xaxis)


def _examples(figure: Figure, cell: SubplotSpec, cases: Sequence[Case]) -> None:
    shown = cases[:5]
    grid_of_cells = cell.subgridspec(2, len(shown))
    for column, case in enumerate(shown):
        assert case.best is not None
        side = _side(case.best.truth) or 1
        low, high = float(case.best.truth.min()), float(case.best.truth.max())
        for row, values in enumerate((case.best.truth, case.best.recovered)):
            axes = figure.add_subplot(grid_of_cells[row, column])
            axes.imshow(values.reshape(side, side).numpy(), cmap="gray", vmin=low, vmax=high)
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel("held" if row == 0 else "came back", fontsize=8)
            if row == 0:
                axes.set_title(plain(case.batch, 16), fontsize=8)


def _side(values: Tensor) -> int | None:
    """Return the side of the square image that the values may be, or None."""
    side = math.isqrt(values.numel())
    return side if side > 2 and side * side == values.numel() else None
