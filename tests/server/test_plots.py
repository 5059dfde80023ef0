"""Plots: what is drawn is what was reported, it can be read, and nothing global is touched."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.text import Text

from fedml_core.errors import ConfigError
from fedml_core.randomness import seeded
from server import plots, plots_labels, plots_privacy
from server.plots import draw_all
from server.round import RoundReport

PNG = b"\x89PNG\r\n\x1a\n"
LONG_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def history(count: int, clients: int = 12, name: str = "{}") -> list[dict[str, Any]]:
    """Return reports with every part that can be drawn; rounds 3, 4 and 7 are void."""
    rng = seeded(0, "history")
    reports = []
    for number in range(1, count + 1):
        void = number in (3, 4, 7)
        chosen = [name.format(client) for client in rng.choice(clients, size=4, replace=False)]
        loss = 2.3 / number + 0.1
        metrics = {"server": {"loss": loss, "accuracy": 1 - loss / 2.5}, "train": {"loss": 1.1 * loss}}
        reports.append(
            {
                "round": number,
                "status": "void" if void else "ok",
                "cohort": 4,
                "participants": chosen[1:],
                "excluded": [{"client": chosen[0], "rule": "non-finite", "reason": "an update was not finite"}],
                "metrics": {} if void else metrics,
                "bytes_up": 2_500_000 + number,
                "bytes_down": 3_000_000,
                "seconds": 0.1,
                "epsilon": 0.4 * number**0.5,
            }
        )
    return reports


def measured(metric: str, values: list[float], place: str = "server") -> list[dict[str, Any]]:
    return [{"round": i, "status": "ok", "metrics": {place: {metric: v}}} for i, v in enumerate(values, start=1)]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)]


def only(figures: list[Figure]) -> Figure:
    (figure,) = figures
    return figure


def existing(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def ordinates(data: Any) -> list[float]:
    return [float(number) for number in np.asarray(data)]


def bar_heights(figure: Figure) -> dict[str, list[float]]:
    (axes,) = figure.axes
    return {str(bars.get_label()): [patch.get_height() for patch in bars] for bars in axes.containers}


def test_everything_that_the_reports_hold_is_written_as_png(tmp_path: Path) -> None:
    files = draw_all(history(9), tmp_path / "a" / "b", baseline={"accuracy": 0.97}, label_counts=[[5, 1], [0, 7]])
    assert [file.name for file in files] == [
        "metrics.png",
        "traffic.png",
        "participation.png",
        "epsilon.png",
        "labels.png",
    ]
    assert sorted(files) == sorted((tmp_path / "a" / "b").iterdir())
    assert all(file.read_bytes().startswith(PNG) for file in files)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ({"metrics": {"server": {"loss": 1.0}}}, "metrics.png"),
        ({"bytes_up": 5}, "traffic.png"),
        ({"bytes_down": 5}, "traffic.png"),
        ({"participants": [3]}, "participation.png"),
        ({"excluded": [{"client": 3}]}, "participation.png"),
        ({"epsilon": 1.5}, "epsilon.png"),
    ],
    ids=str,
)
def test_a_report_with_one_part_gives_one_plot(tmp_path: Path, part: dict[str, Any], file: str) -> None:
    assert [path.name for path in draw_all([{"round": 1, **part}], tmp_path)] == [file]


@pytest.mark.parametrize(
    "reports",
    [
        [],
        [{"round": 1}],
        [{"round": 1, "metrics": None, "participants": None, "excluded": None, "bytes_up": None, "epsilon": None}],
        [
            {
                "round": 1,
                "metrics": {"server": {"loss": float("nan"), "name": "x", "flag": True}},
                "epsilon": float("inf"),
            }
        ],
        [{"round": 1, "metrics": [1], "participants": "abc", "excluded": [3, {}], "bytes_up": "7", "replies": "x"}],
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_missing_or_cannot_be_drawn_leaves_no_file(tmp_path: Path, reports: list[dict[str, Any]]) -> None:
    assert draw_all(reports, tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


def test_the_coordinators_own_reports_can_be_drawn(tmp_path: Path) -> None:
    report = RoundReport(
        round=1,
        status="ok",
        why="",
        cohort=2,
        replies=2,
        participants=[0, 1],
        missing=[],
        excluded=[],
        metrics={"server": {"loss": 0.5}},
        bytes_up=10,
        bytes_down=10,
        seconds=0.1,
        protection="none",
    )
    files = draw_all([report.to_json()], tmp_path)
    assert [file.name for file in files] == ["metrics.png", "traffic.png", "participation.png"]


def test_equal_reports_give_equal_bytes(tmp_path: Path) -> None:
    first = draw_all(history(9), tmp_path / "first", label_counts=[[1, 2]])
    second = draw_all(iter(history(9)), str(tmp_path / "second"), label_counts=np.array([[1, 2]]))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never(tmp_path: Path) -> None:
    code = (
        "import sys; from server.plots import draw_all; assert 'matplotlib' not in sys.modules, 'too early'\n"
        f"assert draw_all([{{'round': 1, 'epsilon': 1.0, 'bytes_up': 1}}], {str(tmp_path)!r}, label_counts=[[1]])\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules, 'pyplot'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_metric_is_drawn_as_reported_with_one_line_for_each_place() -> None:
    reports = measured("loss", [2.0, 1.0, 0.5])
    reports[1]["metrics"]["clients"] = {"loss": 1.5}
    (axes,) = only(plots.metric_figures(reports, {})).axes
    lines = {line.get_label(): (ordinates(line.get_xdata()), ordinates(line.get_ydata())) for line in axes.get_lines()}
    assert lines == {"server": ([1, 2, 3], [2.0, 1.0, 0.5]), "clients": ([2], [1.5])}


def test_lines_of_different_places_differ_in_colour_and_marker() -> None:
    places = ["server", "clients", "train", "site a", "site b"]
    report = {"round": 1, "metrics": {place: {"loss": 1.0} for place in places}}
    (axes,) = only(plots.metric_figures([report], {})).axes
    assert len({line.get_color() for line in axes.get_lines()}) == len(places)
    assert len({line.get_marker() for line in axes.get_lines()}) == len(places)


def test_a_baseline_is_a_dashed_line_in_its_own_metrics_panel_only() -> None:
    loss, accuracy = only(plots.metric_figures(history(5), {"accuracy": 0.97})).axes
    dashed = [line for line in accuracy.get_lines() if line.get_linestyle() == "--"]
    assert [line.get_label() for line in dashed] == ["baseline 0.97"]
    assert ordinates(dashed[0].get_ydata()) == [0.97, 0.97]
    assert not [line for line in loss.get_lines() if line.get_linestyle() == "--"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200, -(10**400)])
def test_a_diverged_round_is_a_gap(bad: float) -> None:
    (axes,) = only(plots.metric_figures(measured("loss", [1.0, bad, 2.0]), {})).axes
    (line,) = axes.get_lines()
    assert np.isnan(line.get_ydata()).tolist() == [False, True, False]
    assert line.get_marker() == "o"  # or the points beside the gap would not be seen
    assert axes.get_ylim()[1] < 3


def test_a_loss_over_decades_is_logarithmic_and_a_rate_is_not() -> None:
    (axes,) = only(plots.metric_figures(measured("loss", [900.0, 3.0, 0.5]), {})).axes
    assert axes.get_yscale() == "log"
    for values in ([0.001, 0.5, 0.9], [900.0, 3.0, -0.5], [900.0, 300.0]):
        (axes,) = only(plots.metric_figures(measured("loss", values), {})).axes
        assert axes.get_yscale() == "linear"


def test_more_than_eight_metrics_go_to_further_files(tmp_path: Path) -> None:
    metrics = {f"metric {number}": float(number) for number in range(17)}
    files = draw_all([{"round": 1, "metrics": {"server": metrics}}], tmp_path)
    assert [file.name for file in files] == ["metrics.png", "metrics-2.png", "metrics-3.png"]
    panels = [len(figure.axes) for figure in plots.metric_figures([{"round": 1, "metrics": {"server": metrics}}], {})]
    assert panels == [8, 8, 1]


@pytest.mark.parametrize(
    "draw", [plots.traffic_figure, plots_privacy.spent_figure, lambda r: only(plots.metric_figures(r, {}))]
)
def test_void_rounds_are_shaded_and_named_once(draw: Any) -> None:
    figure = draw(history(9))
    figure.draw_without_rendering()
    for axes in figure.axes:
        (shade,) = [p for p in axes.patches if isinstance(p, StepPatch) and p.get_label() == "void round"]
        values, edges, _ = shade.get_data()
        shaded = {
            x for x in range(1, 10) if values[int(np.searchsorted(edges, x)) - 1 : int(np.searchsorted(edges, x))].any()
        }
        assert shaded == {3, 4, 7}
        shade_box, box = shade.get_window_extent(), axes.get_window_extent()
        assert (shade_box.y0, shade_box.y1) == pytest.approx((box.y0, box.y1))
        assert [text.get_text() for text in axes.get_legend().get_texts()].count("void round") == 1


def test_without_void_rounds_nothing_is_shaded() -> None:
    (axes,) = existing(plots_privacy.spent_figure([{"round": 1, "epsilon": 1.0}])).axes
    assert not axes.patches
    assert axes.get_legend() is None


def test_traffic_is_up_above_zero_and_down_below_in_readable_units() -> None:
    reports = [{"round": 1, "bytes_up": 1_500_000, "bytes_down": 4_000_000}, {"round": 3, "bytes_up": 500_000}]
    (axes,) = existing(plots.traffic_figure(reports)).axes
    up, down = (patch for patch in axes.patches if isinstance(patch, StepPatch))
    assert up.get_data()[0].tolist() == [1.5, 0.0, 0.5]
    assert down.get_data()[0].tolist() == [-4.0]
    assert [up.get_label(), down.get_label()] == [
        "up, from clients (2 MB in all)",
        "down, to clients (4 MB in all)",
    ]
    assert axes.get_ylabel() == "MB, up and down"
    assert axes.yaxis.get_major_formatter()(-2.0, 0) == "2"


@pytest.mark.parametrize(
    ("size", "unit"), [(0, "bytes"), (999, "bytes"), (1_000, "kB"), (10**6, "MB"), (10**9, "GB"), (10**13, "TB")]
)
def test_bytes_are_shown_in_the_largest_unit_that_leaves_a_whole(size: int, unit: str) -> None:
    (axes,) = existing(plots.traffic_figure([{"round": 1, "bytes_up": size}])).axes
    assert axes.get_ylabel() == f"{unit}, up and down"


def test_participation_counts_the_rounds_and_the_exclusions_of_each_client() -> None:
    reports = [
        {"round": 1, "participants": [10, 2], "excluded": [{"client": 2}]},
        {"round": 2, "participants": [2], "excluded": [{"client": 7}]},
    ]
    figure = existing(plots.participation_figure(reports))
    assert bar_heights(figure) == {"took part": [2, 0, 1], "excluded": [1, 1]}
    assert [patch.get_y() for patch in figure.axes[0].containers[1]] == [2, 0]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["2", "7", "10"]


def test_many_clients_become_a_histogram_of_how_often() -> None:
    reports = [{"round": number, "participants": list(range(300 if number == 1 else 100))} for number in (1, 2, 3)]
    (axes,) = existing(plots.participation_figure(reports)).axes
    (step,) = axes.patches
    assert isinstance(step, StepPatch)
    assert step.get_data()[0].tolist() == [0, 200, 0, 100]
    assert "300 clients in 3 rounds" in axes.get_title(loc="left")


def test_a_histogram_of_long_runs_is_binned() -> None:
    reports = [{"round": number, "participants": list(range(201))} for number in range(1, 501)]
    (axes,) = existing(plots.participation_figure(reports)).axes
    (step,) = axes.patches
    assert isinstance(step, StepPatch)
    values, edges, _ = step.get_data()
    assert len(values) <= 61
    assert values.sum() == 201
    assert edges[-2] < 500 < edges[-1]


def test_a_report_that_names_only_some_participants_is_said_to() -> None:
    report = {"round": 1, "participants": [1, 2], "replies": 3}
    assert "as far as reports list them" in " ".join(texts(existing(plots.participation_figure([report]))))
    report["replies"] = 2
    assert "as far as reports list them" not in " ".join(texts(existing(plots.participation_figure([report]))))


def test_the_last_report_of_a_round_counts_and_rounds_are_sorted(tmp_path: Path) -> None:
    newest = draw_all([{"round": 2, "epsilon": 2.0}, {"round": 1, "epsilon": 1.0}], tmp_path / "a")
    double = draw_all(
        [{"round": 1, "epsilon": 9.0}, {"round": 1, "epsilon": 1.0}, {"round": 2, "epsilon": 2.0}], tmp_path / "b"
    )
    assert newest[0].read_bytes() == double[0].read_bytes()


def test_epsilon_is_drawn_from_zero_with_its_last_value_in_the_title() -> None:
    (axes,) = existing(plots_privacy.spent_figure([{"round": 1, "epsilon": 0.5}, {"round": 2, "epsilon": 0.75}])).axes
    assert ordinates(axes.get_lines()[0].get_ydata()) == [0.5, 0.75]
    assert axes.get_ylim()[0] == 0
    assert axes.get_title(loc="left") == "Privacy spent: epsilon 0.7500 after round 2"


def test_few_clients_labels_are_stacked_bars() -> None:
    (axes,) = plots_labels.label_figure([[5, 1], [0, 7], [2, 2]], ["cat", "dog"]).axes
    widths = {str(bars.get_label()): [patch.get_width() for patch in bars] for bars in axes.containers}
    assert widths == {"cat": [5, 0, 2], "dog": [1, 7, 2]}
    assert [patch.get_x() for patch in axes.containers[1]] == [5, 0, 2]


@pytest.mark.parametrize("clients", [41, 400, 5_003])
def test_many_clients_labels_are_a_heat_map_of_shares_sorted_by_largest_class(clients: int) -> None:
    counts = seeded(0, "counts").integers(0, 50, size=(clients, 6)) + np.eye(6, dtype=int)[np.arange(clients) % 6]
    heat, sizes, _ = plots_labels.label_figure(counts).axes
    shares = np.asarray(heat.images[0].get_array())
    assert shares.shape == (min(clients, 400), 6)
    assert shares.sum(axis=1) == pytest.approx(np.full(len(shares), 100.0))
    if clients <= 400:
        assert (np.diff(shares.argmax(axis=1)) >= 0).all()
        expected = counts / counts.sum(axis=1, keepdims=True)
        assert np.sort(shares.max(axis=1)) == pytest.approx(np.sort(100 * expected.max(axis=1)))
    (step,) = sizes.patches
    assert isinstance(step, StepPatch)
    values, edges, _ = step.get_data()
    assert (values * np.diff(edges)).sum() == pytest.approx(counts.sum())


def test_a_few_clients_with_many_classes_keep_their_order() -> None:
    counts = seeded(0, "counts").integers(1, 50, size=(5, 30))
    heat = plots_labels.label_figure(counts).axes[0]
    assert np.asarray(heat.images[0].get_array()) == pytest.approx(100 * counts / counts.sum(axis=1, keepdims=True))


def test_clients_without_examples_are_rows_of_zeros() -> None:
    heat = plots_labels.label_figure(np.eye(50, 4, dtype=int)).axes[0]
    assert np.asarray(heat.images[0].get_array()).sum() == pytest.approx(400)


RUNS: dict[str, Any] = {
    "one round": lambda: history(1),
    "few rounds": lambda: history(9),
    "many rounds": lambda: history(400, clients=190),
    "named clients": lambda: history(40, clients=30, name="hospital-{:02d}"),
    "crowds": lambda: history(400, clients=900),
    "huge round numbers": lambda: [{**report, "round": 10**8 + report["round"]} for report in history(9)],
}
DRAW: dict[str, Any] = {
    "metrics": lambda reports: only(plots.metric_figures(reports, {"loss": 0.1, "accuracy": 0.95})),
    "traffic": plots.traffic_figure,
    "participation": plots.participation_figure,
    "epsilon": plots_privacy.spent_figure,
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", DRAW)
def test_no_text_of_a_runs_plot_overlaps_another_or_leaves_the_figure(run: str, kind: str) -> None:
    assert_readable(DRAW[kind](RUNS[run]()))


@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (3, 10), (40, 10), (41, 10), (30, 62), (2_000, 1_000)])
def test_no_text_of_a_label_plot_overlaps_another_or_leaves_the_figure(clients: int, classes: int) -> None:
    counts = seeded(0, "counts").integers(0, 99, (clients, classes))
    assert_readable(plots_labels.label_figure(counts, LONG_NAMES if classes == 10 else None))


def assert_readable(figure: Figure) -> None:
    figure.draw_without_rendering()
    ticks = {label for axes in figure.axes for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]}
    in_view = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in on_axis(axis)}
    shown = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text().strip()]
    boxes = {text: text.get_window_extent() for text in shown if text.get_visible() and text not in ticks - in_view}
    assert len(boxes) >= 5
    for text, box in boxes.items():
        inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
        assert inside and box.y1 <= figure.bbox.y1, text
    # The box of a slanted name is larger than its letters, so slanted names are not compared.
    level = [(text.get_text(), box) for text, box in boxes.items() if text.get_rotation() in (0.0, 90.0)]
    for (one, left), (other, right) in itertools.combinations(level, 2):
        assert not left.overlaps(right), (one, other)


def on_axis(axis: Any) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def test_a_single_round_has_a_single_tick() -> None:
    figure = only(plots.metric_figures(measured("loss", [1.0]), {}))
    figure.draw_without_rendering()
    assert [label.get_text() for label in on_axis(figure.axes[0].xaxis)] == ["1"]


def test_names_that_look_like_formulas_or_span_lines_are_plain_text(tmp_path: Path) -> None:
    odd = "$\\frac^^$\n_x"
    report = {"round": 1, "metrics": {odd: {odd: 1.0, "_hidden": 2.0}}, "participants": [odd, "", "z" * 300]}
    files = draw_all([report], tmp_path, label_counts=[[1, 2]], class_names=[odd, "_b"])
    assert len(files) == 3
    assert "\\$\\frac^^\\$ _x per round" in texts(only(plots.metric_figures([report], {})))


@pytest.mark.parametrize(
    "bad", [{}, {"round": "1"}, {"round": None}, {"round": True}, {"round": -1}, {"round": 10**30}, 3]
)
def test_a_report_without_a_round_number_is_refused(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"^report 2 needs a whole number below 10\^9 as its round, got "):
        draw_all([{"round": 1}, bad], tmp_path)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (0.9, "baseline must name metrics, such as {'accuracy': 0.9}, got 0.9"),
        ({"loss": "low"}, "the baseline of loss must be a finite number, got 'low'"),
        ({"loss": float("nan")}, "the baseline of loss must be a finite number, got nan"),
    ],
    ids=str,
)
def test_a_baseline_must_be_numbers_by_metric(tmp_path: Path, baseline: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        draw_all([], tmp_path, baseline=baseline)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("counts", "names", "message"),
    [
        ([1, 2], None, "label_counts must have a row per client and a column per class, got shape (2,)"),
        ([[]], None, "label_counts must have a row per client and a column per class, got shape (1, 0)"),
        ([[1, -2]], None, "label_counts holds a count that is negative or not finite; count examples"),
        ([[1, float("nan")]], None, "label_counts holds a count that is negative or not finite; count examples"),
        ([["a"]], None, "label_counts must be a (clients, classes) array of numbers, got something else"),
        ([[1], [1, 2]], None, "label_counts must be a (clients, classes) array of numbers, got something else"),
        ([[1, 2]], ["cat"], "class_names has 1 names for 2 classes; give one for each"),
    ],
    ids=str,
)
def test_label_counts_must_be_a_table(tmp_path: Path, counts: Any, names: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        draw_all([], tmp_path, label_counts=counts, class_names=names)
    assert str(error.value) == message


def test_a_folder_that_cannot_be_written_to_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"^cannot write .*traffic\.png \(File exists\); name a folder that can be "):
        draw_all([{"round": 1, "bytes_up": 1}], tmp_path / "file")


def test_epsilon_of_clients_and_of_examples_are_two_curves_and_of_examples_alone_is_one() -> None:
    client, example = (
        {"unit": "client", "epsilon": 0.5, "delta": 1e-5},
        {"unit": "example", "epsilon": 2.0, "delta": 1e-5},
    )
    both = [{"round": 1, "epsilon": 0.5, "privacy": client, "example_privacy": example}]
    (axes,) = existing(plots_privacy.spent_figure(both)).axes
    assert [float(np.asarray(line.get_ydata())[0]) for line in axes.lines] == [0.5, 2.0]
    assert axes.get_legend_handles_labels()[1] == ["client", "example"]
    (axes,) = existing(plots_privacy.spent_figure([{**both[0], "epsilon": 2.0, "privacy": example}])).axes
    assert len(axes.lines) == 1
