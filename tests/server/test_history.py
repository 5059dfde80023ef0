"""A run's folder: whole lines whenever it is killed, and a history with each round once after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedml_core.errors import CheckpointError, ConfigError
from server.checkpoint import FILE_NAME, RunState
from server.coordinator import Coordinator
from server.history import HISTORY, RunFolder, read_history, summarise
from server.plan import Plan
from server.round import RoundReport
from strategies import FedAvg
from tests.doubles import PullChannel

SIZE = 4
PLAN = Plan(FedAvg())


def run(folder: Path, rounds: int, *, resume: bool = False, overwrite: bool = False) -> Coordinator:
    channel = PullChannel(3, SIZE)
    spec = channel.trainer.spec
    recorder = RunFolder(folder, PLAN)

    def fresh() -> RunState:
        return Coordinator.begin(PLAN, spec, torch.zeros(SIZE), "run")

    state = recorder.begin(fresh, spec, resume=resume, overwrite=overwrite)
    coordinator = Coordinator(PLAN, spec, state)
    for _ in coordinator.rounds(channel, rounds):
        recorder.record(coordinator.state)
    return coordinator


def rounds_in(folder: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (folder / HISTORY).read_text().splitlines()]


def test_each_round_leaves_one_line_and_a_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, 3)
    assert rounds_in(tmp_path) == [1, 2, 3] and (tmp_path / FILE_NAME).exists()
    reports = read_history(tmp_path)
    assert [report.round for report in reports] == [1, 2, 3] and reports[0].participants == [0, 1, 2]


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(lambda text: text, id="whole"),
        pytest.param(lambda text: text[:-20], id="last line cut short"),
        pytest.param(lambda text: "".join(text.splitlines(keepends=True)[:-1]), id="last line missing"),
        pytest.param(lambda text: text + text.splitlines(True)[-1].replace('"round":3', '"round":4'), id="ahead"),
    ],
)
def test_a_resumed_run_has_every_round_once_however_its_history_was_cut(tmp_path: Path, cut) -> None:  # type: ignore[no-untyped-def]
    run(tmp_path, 3)
    history = tmp_path / HISTORY
    history.write_text(cut(history.read_text()))
    run(tmp_path, 5, resume=True)
    assert rounds_in(tmp_path) == [1, 2, 3, 4, 5]


def test_a_history_cut_short_is_readable(tmp_path: Path) -> None:
    run(tmp_path, 3)
    history = tmp_path / HISTORY
    history.write_text(history.read_text()[:-20])
    assert [report.round for report in read_history(tmp_path)] == [1, 2]


def test_a_folder_with_a_run_is_neither_overwritten_nor_mixed(tmp_path: Path) -> None:
    run(tmp_path, 3)
    with pytest.raises(ConfigError, match="holds a run; go on with --resume, replace it with --overwrite"):
        run(tmp_path, 3)
    run(tmp_path, 2, overwrite=True)
    assert rounds_in(tmp_path) == [1, 2]


def test_resuming_nothing_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; start without --resume"):
        run(tmp_path, 3, resume=True)
    with pytest.raises(ConfigError, match="holds no run"):
        read_history(tmp_path)


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    run(tmp_path, 1)
    with (tmp_path / HISTORY).open("a") as file:
        file.write('{"something": "else"}\n')
    with pytest.raises(ConfigError, match=r"history.jsonl, line 2: not a round report"):
        read_history(tmp_path)


@pytest.mark.parametrize("numbers", [[1 << 70], ["site"], 7, {"0": 1}])
def test_a_line_with_impossible_client_numbers_is_named(tmp_path: Path, numbers: object) -> None:
    run(tmp_path, 1)
    line = json.loads((tmp_path / HISTORY).read_text())
    (tmp_path / HISTORY).write_text(json.dumps({**line, "participants": numbers}) + "\n")
    with pytest.raises(ConfigError, match=r"history.jsonl, line 1: not a round report"):
        read_history(tmp_path)


def test_a_summary_adds_up_the_rounds(tmp_path: Path) -> None:
    run(tmp_path, 3)
    reports = read_history(tmp_path)
    summary = summarise(reports, engine="none")
    assert summary["rounds"] == 3 and summary["void_rounds"] == 0 and summary["engine"] == "none"
    assert summary["bytes_up"] == sum(report.bytes_up for report in reports) > 0
    assert summary["epsilon"] is None and summary["protection"] == "none"
    assert summary["metrics"]["train"]["examples"] == 6


def test_a_history_is_strict_json_even_where_a_metric_diverged(tmp_path: Path) -> None:
    channel = PullChannel(2, SIZE)
    recorder = RunFolder(tmp_path, PLAN)
    spec = channel.trainer.spec
    state = recorder.begin(
        lambda: Coordinator.begin(PLAN, spec, torch.zeros(SIZE), "run"), spec, resume=False, overwrite=False
    )
    coordinator = Coordinator(PLAN, spec, state, evaluate=lambda _: {"examples": 1.0, "loss": float("nan")})
    next(coordinator.rounds(channel, 2))
    recorder.record(coordinator.state)
    recorder.finish(summarise([RoundReport.from_json(coordinator.state.report or {})]))

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    line = json.loads((tmp_path / HISTORY).read_text(), parse_constant=refuse)
    assert line["metrics"]["server"]["loss"] is None
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert read_history(tmp_path)[0].metric("server.loss") is None
