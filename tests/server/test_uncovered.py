"""Wherever an epsilon is said, one line says which exact numbers of clients it does not cover."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedml_core.errors import ConfigError
from fedml_core.weighting import Uniform
from server.coordinator import Coordinator
from server.history import read_history, summarise
from server.plan import EarlyStopping, EvaluationPlan, Plan
from server.plots_privacy import spent_figure
from server.report import read_run, write_report
from server.round import RoundReport
from server.sampling import EveryClient
from server.summary import summary_rows
from server.uncovered import flagged, over_rounds, uncovered_text
from strategies import CentralDP, FedAvg, LocalDP, SecureAggregation
from strategies.strategy import Strategy
from tests.doubles import PullChannel
from tests.secure_cases import SecureChannel, secure_coordinator
from tests.server.test_distributed import KEYS, PROTOCOL, noised
from tests.server.test_distributed import SIZE as WIDE
from tests.server.test_summary import OK, folder_with, rows_of

SIZE, COUNT = 3, 4
EVENLY = FedAvg(weighting=Uniform())
CENTRAL = CentralDP(EVENLY, clip_norm=1.0, noise_multiplier=2.0, expected_cohort=4.0, delta=1e-5)
CLAIM = {"epsilon": 1.0, "delta": 1e-5, "unit": "client", "adjacency": "replace-one", "sampling": "none"}
SAID = "not covered by epsilon: train.examples, train.loss, clients.examples, clients.loss (seen by the server only)"


def report_of(strategy: Strategy, **evaluation: Any) -> RoundReport:
    channel = PullChannel(COUNT, SIZE)
    plan, spec = Plan(strategy, evaluation=EvaluationPlan(**evaluation)), channel.trainer.spec
    state = Coordinator.begin(plan, spec, torch.zeros(SIZE), "run")
    evaluate = {"examples": 5.0, "loss": 2.5}
    return next(Coordinator(plan, spec, state, evaluate=lambda _: evaluate).rounds(channel, 1))


def uncovered(report: RoundReport) -> list[str] | None:
    assert report.privacy is not None
    found: list[str] | None = report.privacy.get("uncovered")
    return found


def test_what_clients_report_of_their_training_is_named_and_what_the_server_measures_is_not() -> None:
    report = report_of(CENTRAL)
    assert set(report.metrics) == {"train", "server"}
    assert uncovered(report) == ["train.examples", "train.loss"]


def test_what_clients_report_of_an_evaluation_is_named_too() -> None:
    report = report_of(CENTRAL, clients=EveryClient())
    assert uncovered(report) == ["train.examples", "train.loss", "clients.examples", "clients.loss"]
    assert uncovered_text(report.privacy) == SAID


def test_a_round_in_which_clients_say_nothing_names_nothing() -> None:
    strategy = SecureAggregation(noised(noise_multiplier=4.0), PROTOCOL)
    coordinator = secure_coordinator(strategy, channel := SecureChannel(KEYS, WIDE))
    report = next(coordinator.rounds(channel, 1))
    assert report.epsilon is not None and uncovered(report) is None
    assert uncovered(report_of(LocalDP(EVENLY, 1.0, 2.0, 1e-5))) is None
    assert report_of(FedAvg()).privacy is None


def test_of_private_training_the_number_of_examples_is_public_and_an_evaluation_is_not() -> None:
    metrics = {"train": {"examples": 8.0}, "clients": {"examples": 4.0, "loss": 1.0}}
    example = {**CLAIM, "unit": "example"}
    fields = flagged({"protection": "x", "privacy": example, "example_privacy": example}, metrics)
    assert fields["privacy"] == fields["example_privacy"]
    assert fields["privacy"]["uncovered"] == ["clients.examples", "clients.loss"]
    both = flagged({"privacy": CLAIM, "example_privacy": example}, metrics)
    assert both["privacy"]["uncovered"] == ["train.examples", "clients.examples", "clients.loss"]
    assert flagged({"privacy": None, "example_privacy": None}, metrics) == {"privacy": None, "example_privacy": None}


def with_claim(number: int, uncovered: list[str], place: str) -> RoundReport:
    privacy: Mapping[str, Any] = {**CLAIM, "epsilon": float(number), **({"uncovered": uncovered} if uncovered else {})}
    return dataclasses.replace(
        OK, round=number, epsilon=float(number), privacy=privacy, metrics={place: {"examples": 5, "loss": 0.5}}
    )


REPORTS = [
    with_claim(1, ["clients.examples", "clients.loss"], "clients"),
    with_claim(2, ["train.examples", "train.loss"], "train"),
    with_claim(3, [], "server"),
]


def test_the_summary_names_what_any_round_said_in_a_line_of_its_own() -> None:
    summary = summarise(REPORTS)
    assert summary["privacy"]["epsilon"] == 3.0
    assert summary["privacy"]["uncovered"] == ["train.examples", "train.loss", "clients.examples", "clients.loss"]
    rows = summary_rows(summary, REPORTS)
    place = [name for name, _ in rows].index("privacy")
    assert rows[place + 1] == ("beside it", SAID)
    assert "beside it" not in rows_of([OK]) and "beside it" not in rows_of(REPORTS[2:])
    assert over_rounds([None, None]) is None and over_rounds([]) is None


def test_the_history_the_report_and_the_picture_have_it_too(tmp_path: Path) -> None:
    folder_with(tmp_path, REPORTS)
    assert read_history(tmp_path)[0].privacy == REPORTS[0].privacy
    assert f"| beside it | {SAID} |" in write_report(read_run(tmp_path), plots=False).read_text()
    rows = [json.loads(json.dumps(report.to_json())) for report in REPORTS]
    figure = spent_figure(rows)
    assert figure is not None and SAID in figure.axes[0].get_title(loc="left").replace("\n", " ").replace("\\", "")
    quiet = spent_figure(rows[2:])
    assert quiet is not None and "not covered" not in quiet.axes[0].get_title(loc="left")


@pytest.mark.parametrize("metric", ["train.loss", "clients.accuracy"])
def test_an_exact_metric_must_not_decide_how_many_models_are_released(metric: str) -> None:
    with pytest.raises(ConfigError, match=f"must be one of server.* under differential privacy, got '{metric}'"):
        Plan(CENTRAL, early_stopping=EarlyStopping(metric=metric))
    Plan(CENTRAL, early_stopping=EarlyStopping(metric="server.loss"))
    Plan(FedAvg(), early_stopping=EarlyStopping(metric=metric))
