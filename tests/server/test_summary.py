"""What people read of a run: rows, words, report.md, and the progress on the way."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console as Screen

from fedml_core.console import Console
from fedml_core.errors import ConfigError
from fedml_core.storage import write_json
from server.history import HISTORY, SUMMARY, summarise
from server.progress import Progress
from server.report import LABELS, read_run, write_labels, write_report
from server.round import RoundReport
from server.summary import excluded_by_rule, summary_rows
from server.validation import Exclusion
from server.wording import bytes_text, headline, seconds_text, server_saw

OK = RoundReport(
    round=1,
    status="ok",
    why="",
    cohort=4,
    replies=2,
    participants=(0, 1),
    missing=(2,),
    excluded=(Exclusion(3, "non-finite", "values | hold NaN"),),
    metrics={"train": {"examples": 10, "loss": 0.5}, "server": {"examples": 20, "loss": 0.25, "accuracy": 0.75}},
    bytes_up=1500,
    bytes_down=2_500_000,
    seconds=2.0,
    protection="none",
)
VOID = dataclasses.replace(
    OK, round=2, status="void", why="0 good replies arrived, the minimum is 1", replies=0, metrics={}, excluded=()
)


def folder_with(folder: Path, reports: Sequence[RoundReport]) -> Path:
    lines = [json.dumps(report.to_json()) + "\n" for report in reports]
    (folder / HISTORY).write_text("".join(lines))
    return folder


def rows_of(reports: Sequence[RoundReport], **facts: object) -> Mapping[str, str]:
    return dict(summary_rows(summarise(reports, **facts), reports))


def test_a_summary_says_what_came_out_and_what_it_cost() -> None:
    assert rows_of([OK]) == {
        "rounds": "1",
        "test data": "loss 0.2500, accuracy 0.7500",
        "training": "loss 0.5000",
        "traffic": "1.5 kB up, 2.5 MB down",
        "replies": "2 of 4 counted, 1 missing, 1 excluded (non-finite 1)",
        "server saw": "every update of every participant; nothing was hidden from it",
        "privacy": "no differential privacy: epsilon has no bound",
        "time": "2.0 s",
    }


def test_void_rounds_are_told_with_their_reason() -> None:
    assert rows_of([OK, VOID])["rounds"] == (
        "2, 1 of them void; the last because 0 good replies arrived, the minimum is 1"
    )


def test_early_stopping_is_told() -> None:
    assert rows_of([OK], stopped_early=True)["rounds"] == "1, stopped early"


def test_the_federated_run_is_held_against_the_central_one() -> None:
    central = {"examples": 20.0, "loss": 0.125, "accuracy": 1.0, "other": 3.0}
    assert rows_of([OK], central=central)["central baseline"] == (
        "loss 0.1250, accuracy 1.0000, other 3.0000; federated against central: loss +0.1250, accuracy -0.2500"
    )


def test_an_epsilon_is_told() -> None:
    assert rows_of([dataclasses.replace(OK, epsilon=1.23451)])["privacy"] == "epsilon 1.2346 so far"


def test_exclusions_are_counted_by_rule_the_most_frequent_first() -> None:
    rare, frequent = Exclusion(1, "shape", ""), Exclusion(2, "weight", "")
    reports = [dataclasses.replace(OK, excluded=(rare, frequent, frequent))]
    assert list(excluded_by_rule(reports).items()) == [("weight", 2), ("shape", 1)]


def test_the_most_telling_metrics_are_those_of_the_server() -> None:
    assert headline(OK) == ("server", {"loss": 0.25, "accuracy": 0.75})
    only_training = dataclasses.replace(OK, metrics={"train": OK.metrics["train"]})
    assert headline(only_training) == ("train", {"loss": 0.5})
    assert headline(VOID) == ("", {})


def test_an_unknown_protection_is_named_as_it_is() -> None:
    assert server_saw("SomethingNew") == "SomethingNew"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_951, "1.0 MB"), (2.5e13, "25.0 TB")],
)
def test_bytes_are_told_in_units_that_fit(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"), (3599.6, "1 h 0 min"), (90, "1 min 30 s")],
)
def test_durations_are_told_in_units_that_fit(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_a_finished_run_is_read_with_its_facts(tmp_path: Path) -> None:
    folder_with(tmp_path, [OK])
    write_json(tmp_path / SUMMARY, summarise([OK], clients=7, engine="sequential", central={"loss": 0.1}))
    run = read_run(tmp_path)
    assert run.finished
    assert (run.summary["clients"], run.summary["central"]) == (7, {"loss": 0.1})


def test_a_run_that_went_on_since_its_summary_is_not_finished(tmp_path: Path) -> None:
    write_json(tmp_path / SUMMARY, summarise([OK], clients=7, central={"loss": 0.1}))
    run = read_run(folder_with(tmp_path, [OK, VOID]))
    assert not run.finished
    assert (run.summary["rounds"], run.summary["clients"]) == (2, 7)
    assert "central" not in run.summary
    assert "has not finished: this is its state after round 2" in write_report(run, plots=False).read_text()


def test_a_folder_without_a_round_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has not finished a round yet"):
        read_run(folder_with(tmp_path, []))


def test_a_damaged_summary_is_told(tmp_path: Path) -> None:
    folder_with(tmp_path, [OK])
    (tmp_path / SUMMARY).write_text("{")
    with pytest.raises(ConfigError, match=r"summary\.json is damaged"):
        read_run(tmp_path)


def test_a_report_holds_every_row_plot_and_round(tmp_path: Path) -> None:
    run = read_run(folder_with(tmp_path, [OK, VOID]))
    write_labels(tmp_path, torch.tensor([[3, 1], [0, 2]]).numpy(), ("cat", "dog"))
    text = write_report(run).read_text()
    assert all(f"| {name} | {said} |" in text for name, said in run.rows)
    for name in ("metrics", "traffic", "participation", "labels"):
        assert f"](plots/{name}.png)" in text
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| 1 | ok | loss 0.2500, accuracy 0.7500 (server) | 2 of 4 | 1 | 1.5 kB | 2.5 MB |" in text
    assert "| 2 | void: 0 good replies arrived" in text


def test_a_report_without_plots_names_none(tmp_path: Path) -> None:
    run = read_run(folder_with(tmp_path, [OK]))
    assert "](plots/" not in write_report(run, plots=False).read_text()
    assert not (tmp_path / "plots").exists()
    assert not (tmp_path / LABELS).exists()


def test_a_long_report_shows_the_last_rounds_and_says_so(tmp_path: Path) -> None:
    run = read_run(folder_with(tmp_path, [dataclasses.replace(OK, round=number) for number in range(1, 251)]))
    text = write_report(run, plots=False).read_text()
    assert "\n| 50 | ok" not in text
    assert "\n| 51 | ok" in text
    assert "The last 200 of 250 rounds" in text


def test_progress_is_a_line_a_round_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(Console(), 4) as progress:
        progress(OK)
        progress(VOID)
        progress(dataclasses.replace(OK, round=4))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "round 1/4: loss 0.2500, accuracy 0.7500 (server); 2 of 4 replies; 1.5 kB up, 2.5 MB down; 6.0 s left",
        "round 2/4: void: 0 good replies arrived, the minimum is 1; 0 of 4 replies; 1.5 kB up, 2.5 MB down; 4.0 s left",
        "round 4/4: loss 0.2500, accuracy 0.7500 (server); 2 of 4 replies; 1.5 kB up, 2.5 MB down",
    ]


def test_progress_on_a_terminal_redraws_and_keeps_void_rounds_in_view() -> None:
    drawn = io.StringIO()
    screen = Screen(file=drawn, force_terminal=True, width=100, no_color=True)
    with Progress(Console(), 2, screen=screen) as progress:
        progress(OK)
        progress(VOID)
    text = drawn.getvalue()
    assert "first round" in text
    assert "round 2 is void: 0 good replies arrived, the minimum is 1" in text
    assert "2/2" in text
    assert progress.last is VOID


def test_quiet_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(Console(quiet=True), 1) as progress:
        progress(OK)
    assert capsys.readouterr() == ("", "")
