"""How every plot looks: palette, titles, legends and ticks. Matplotlib is imported only when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

PANEL_INCHES = (5.4, 3.4)
DPI = 144

# Okabe and Ito (2008): told apart by readers with any common kind of colour blindness.
BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
BLACK, GREY, PALE = "#222222", "#666666", "#E3E3E3"
# Paul Tol's "muted" scheme, for up to ten classes side by side.
CLASS_COLORS = (
    *("#332288", "#88CCEE", "#44AA99", "#117733", "#999933"),
    *("#DDCC77", "#CC6677", "#882255", "#AA4499", "#DDDDDD"),
)

_TITLE, _TEXT, _SMALL = 11, 9, 8
_BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
_LEGEND_COLUMNS, _LEGEND_ROW_POINTS = 5, 14


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, that belongs to no window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    return figure


def dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Give axes that hold all their data a title, labels, a light grid, and a legend between title and data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=_SMALL, color=GREY, labelcolor=BLACK)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, fontsize=_TEXT, color=BLACK)
    axes.set_ylabel(y_label, fontsize=_TEXT, color=BLACK)
    entries = len(axes.get_legend_handles_labels()[1])
    rows = -(-entries // _LEGEND_COLUMNS)
    axes.set_title(
        title, loc="left", fontsize=_TITLE, fontweight="bold", color=BLACK, pad=6 + _LEGEND_ROW_POINTS * rows
    )
    if entries:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=_LEGEND_COLUMNS,
            frameon=False,
            fontsize=_SMALL,
            borderaxespad=0.2,
            borderpad=0.1,
            handlelength=1.4,
            columnspacing=1.2,
        )


def grid(axis: Axis) -> None:
    """Draw light lines at the ticks of one axis."""
    axis.grid(True, color=PALE, linewidth=0.8)


def whole_ticks(axis: Axis, most: int = 10) -> None:
    """Put ticks at whole numbers only, with digits grouped by thousands."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def name_ticks(axis: Axis, names: Sequence[str], room_points: float) -> None:
    """Name the places 0, 1, ... of the horizontal axis, as many as fit side by side without touching.

    Long names are turned, so that all of some 40 can be read; short ones stay level and are thinned out.
    """
    texts = [plain(name, 14) for name in names]
    longest = max(len(text) for text in texts)
    level = room_points / (5.5 * longest + 6)
    turned = longest > 4 and len(texts) > level
    step = _round_step(len(texts) / (room_points / 14 if turned else level))
    places = range(0, len(texts), step)
    axis.set_ticks(list(places), [texts[place] for place in places])
    if turned:
        axis.set_tick_params(rotation=45)
        for label in axis.get_ticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")


def byte_unit(size_bytes: float) -> tuple[float, str]:
    """Return the largest decimal unit of which `size_bytes` holds at least one: its bytes and its name."""
    return next((unit for unit in _BYTE_UNITS if size_bytes >= unit[0]), _BYTE_UNITS[-1])


def plain(text: object, most: int = 40) -> str:
    """Return text on one line of at most `most` characters, in which Matplotlib finds no formula."""
    line = " ".join(str(text).split())
    cut = line if len(line) <= most else line[: most - 1] + "…"
    return cut.replace("$", r"\$")


def _round_step(least: float) -> int:
    step = 1
    while True:
        for factor in (1, 2, 5):
            if step * factor >= least:
                return step * factor
        step *= 10


__all__ = [
    "BLACK",
    "BLUE",
    "CLASS_COLORS",
    "DPI",
    "GREEN",
    "GREY",
    "ORANGE",
    "PALE",
    "PANEL_INCHES",
    "PURPLE",
    "SKY",
    "VERMILLION",
    "byte_unit",
    "dress",
    "grid",
    "name_ticks",
    "new_figure",
    "plain",
    "whole_ticks",
]
