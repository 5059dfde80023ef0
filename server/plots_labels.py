"""The plot of which classes each client holds: stacked bars for a few clients, a heat map for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedml_core.errors import ConfigError
from server.plots_style import BLUE, CLASS_COLORS, PANEL_INCHES, dress, grid, name_ticks, new_figure, plain, whole_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BARS = 40
MOST_ROWS = 400


def label_figure(label_counts: ArrayLike, class_names: Sequence[str] | None = None) -> Figure:
    """Return the plot of a (clients, classes) array of examples.

    Up to 40 clients with up to 10 classes are stacked bars. Beyond, a heat map shows each client's shares beside its
    size; more than 40 clients are sorted by their largest class, since single rows cannot be read any more, and
    beyond 400 clients a row is the average of neighbours.

    Raises: ConfigError: if the array or the names have the wrong shape, or a count is negative or not a number.
    """
    counts = _counts(label_counts)
    names = [str(place) for place in range(counts.shape[1])] if class_names is None else list(class_names)
    if len(names) != counts.shape[1]:
        raise ConfigError(f"class_names has {len(names)} names for {counts.shape[1]} classes; give one for each")
    few = len(counts) <= MOST_BARS and counts.shape[1] <= len(CLASS_COLORS)
    return (_stacked_bars if few else _heat_map)(counts, names)


def _stacked_bars(counts: NDArray[np.float64], names: Sequence[str]) -> Figure:
    figure = new_figure(1.5 * PANEL_INCHES[0], 1.7 + 0.24 * max(6, len(counts)))
    axes = figure.add_subplot()
    starts = np.zeros(len(counts))
    for code, name in enumerate(names):
        label = f"class {name}" if str(name).isdigit() else plain(name, 14)
        places = np.arange(len(counts))
        axes.barh(places, counts[:, code], left=starts, color=CLASS_COLORS[code], height=0.8, label=label)
        starts = starts + counts[:, code]
    axes.set_ylim(len(counts) - 0.4, -0.6)
    axes.margins(x=0.01)
    whole_ticks(axes.xaxis, 8)
    axes.set_yticks(range(len(counts)))
    grid(axes.xaxis)
    dress(axes, "Label distribution: examples of each class per client", "examples", "client")
    return figure


def _heat_map(counts: NDArray[np.float64], names: Sequence[str]) -> Figure:
    clients = len(counts)
    sizes = counts.sum(axis=1)
    shares = 100 * counts / np.maximum(sizes, 1)[:, None]
    sorted_rows = clients > MOST_BARS
    if sorted_rows:
        order = np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))
        shares, sizes = shares[order], sizes[order]
    figure = new_figure(1.7 * PANEL_INCHES[0], 5.2)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1])
    rows = np.unique(
        np.linspace(0, clients, MOST_ROWS + 1).astype(int) if clients > MOST_ROWS else np.arange(clients + 1)
    )
    shares, sizes = _averaged(shares, rows), _averaged(sizes, rows)
    extent = (-0.5, counts.shape[1] - 0.5, clients - 0.5, -0.5)
    image = left.imshow(shares, aspect="auto", cmap="viridis", vmin=0, extent=extent, interpolation="nearest")
    bar = figure.colorbar(image, ax=left, pad=0.02, fraction=0.05)
    bar.set_label("% of the client's examples", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    name_ticks(left.xaxis, names, 370)
    whole_ticks(left.yaxis)
    row_label = "clients, sorted by largest class" if sorted_rows else "client"
    dress(left, f"Label distribution of {clients:,} clients", "class", row_label)
    right.stairs(sizes, rows - 0.5, orientation="horizontal", fill=True, color=BLUE)
    right.set_xlim(left=0)
    whole_ticks(right.xaxis, 3)
    right.tick_params(left=False, labelleft=False)
    grid(right.xaxis)
    dress(right, "Size", "examples", "")
    return figure


def _averaged(values: NDArray[np.float64], edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean of each run of neighbours between two edges, so that no row is lost to the pixels' size."""
    sums = np.add.reduceat(values, edges[:-1], axis=0)
    return np.asarray(sums / np.diff(edges).reshape(-1, *[1] * (values.ndim - 1)))


def _counts(label_counts: Any) -> NDArray[np.float64]:
    try:
        counts = np.asarray(label_counts, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError("label_counts must be a (clients, classes) array of numbers, got something else") from None
    if counts.ndim != 2 or 0 in counts.shape:
        raise ConfigError(f"label_counts must have a row per client and a column per class, got shape {counts.shape}")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ConfigError("label_counts holds a count that is negative or not finite; count examples")
    return counts


__all__ = ["label_figure"]
