"""What nodes of a secure sum inside a Flower app do not do, do wrong, or lack: each is left out with a reason."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedml_core.errors import RunError, StrategyError
from fedml_core.flower_secure import is_secure
from server.flower import SecureFlowerStrategy
from strategies import FedAvg, FlowerStrategy, SecureAggregation
from strategies.secure import SumProtocol
from tests.sources import ROOT
from tests.strategies.flower_cases import (
    BUT_THE_LAST,
    CLIENTS,
    START,
    honest,
    record_of,
    reply_to,
)
from tests.strategies.flower_secure_cases import (
    LAST,
    Train,
    app_of,
    assert_moved,
    excluded,
    run,
    secure,
    strategy_of,
)

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp


def test_what_an_app_raises_stays_at_the_node(caplog: pytest.LogCaptureFixture) -> None:
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == CLIENTS - 1:
            raise ValueError("patient 4711 has no label")
        return honest(message, context)

    strategy = strategy_of()
    with caplog.at_level(logging.WARNING, "server.flower"):
        moved, _ = run(strategy, app_of(train))
    assert_moved(moved, BUT_THE_LAST)
    assert excluded(strategy) == {CLIENTS - 1: ("client-app", "its train function raised ValueError")}
    assert "4711" not in "".join(record.getMessage() for record in caplog.records if record.name == "server.flower")


def bad_reply(change: Callable[[Message, dict[str, Any], dict[str, Any]], None]) -> Train:
    """Return a train function whose last node answers with changed arrays and metrics."""

    def train(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        if context.node_config["partition-id"] != CLIENTS - 1:
            return reply
        arrays = {name: array.numpy() for name, array in reply.content.array_records["arrays"].items()}
        metrics: dict[str, Any] = dict(reply.content.metric_records["metrics"])
        change(message, arrays, metrics)
        records = record_of_arrays(arrays), type(reply.content.metric_records["metrics"])(metrics)
        return Message(RecordDict(dict(zip(("arrays", "metrics"), records, strict=True))), reply_to=message)

    return train


def record_of_arrays(arrays: dict[str, Any]) -> ArrayRecord:
    from flwr.app import Array

    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


@pytest.mark.parametrize(
    ("change", "rule", "said"),
    [
        (lambda m, a, x: a.pop("bias"), "keys", "the trained arrays must have the names of the received ones"),
        (lambda m, a, x: a.update(bias=np.zeros(2, np.float32)), "shape", "must hold floats of shape (3,)"),
        (lambda m, a, x: a.update(bias=np.zeros(3, np.int64)), "shape", "got int64 (3,)"),
        (lambda m, a, x: a.update(bias=np.full(3, np.nan, np.float32)), "diverged", "lower the learning rate"),
        (lambda m, a, x: x.pop("num-examples"), "metrics", "must report 'num-examples' as one finite number"),
        (lambda m, a, x: x.update({"num-examples": 0}), "weight", "'num-examples' must be > 0"),
        (lambda m, a, x: x.update({"num-examples": 101}), "secure-sum", "100"),
        (lambda m, a, x: x.pop("accuracy"), "metrics", "must report 'accuracy' as one finite number"),
        (lambda m, a, x: x.update(accuracy=float("inf")), "metrics", "must report 'accuracy' as one finite number"),
    ],
)
def test_an_answer_that_cannot_be_summed_is_kept_at_the_node_with_the_reason(
    change: Callable[..., None], rule: str, said: str
) -> None:
    strategy = strategy_of(metrics=("accuracy",))
    moved, _ = run(strategy, app_of(bad_reply(change)))
    assert_moved(moved, BUT_THE_LAST)
    found, reason = excluded(strategy)[CLIENTS - 1]
    assert found == rule
    assert said in reason


def test_a_node_without_the_mod_is_left_out_and_never_sees_the_model(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Message] = []
    plain, with_mod = ClientApp(), app_of()

    @plain.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(message)
        return honest(message, context)

    def mixed(message: Message, context: Context) -> Message:
        return (plain if context.node_id == LAST else with_mod)(message, context)

    moved, _ = run(strategy_of(), mixed)
    assert_moved(moved, BUT_THE_LAST)
    assert all(not message.content.array_records for message in seen)
    assert f"node {LAST} takes no part" in caplog.text
    assert "ClientApp(mods=[clients.flower.secure_mod()])" in caplog.text


def test_an_app_without_the_mod_ends_the_run_with_one_sentence_that_says_so() -> None:
    plain = ClientApp()
    plain.train()(honest)
    with pytest.raises(RunError, match=r"none of 4 nodes can take part in a secure sum: .*secure_mod\(\)"):
        run(strategy_of(), plain)


def test_an_answer_of_another_kind_says_that_the_mod_is_missing() -> None:
    def echo(message: Message, context: Context) -> Message:
        return reply_to(message, START, 5)

    with pytest.raises(RunError, match=r"the answer is not one of a secure sum; its app needs ClientApp\(mods="):
        run(strategy_of(), echo)


def test_a_node_with_the_mod_does_not_train_in_the_clear(caplog: pytest.LogCaptureFixture) -> None:
    trained: list[int] = []

    def train(message: Message, context: Context) -> Message:
        trained.append(context.node_id)
        return honest(message, context)

    moved, _ = run(FlowerStrategy(FedAvg(), min_nodes=CLIENTS), app_of(train))
    np.testing.assert_array_equal(moved, 0)
    assert not trained
    assert "this node trains under secure aggregation only" in caplog.text


def test_evaluation_is_answered_only_where_the_node_says_so() -> None:
    settings: dict[str, Any] = {"fraction_evaluate": 1.0}
    _, silent = run(strategy_of(**settings), app_of())
    _, open_ = run(strategy_of(**settings), app_of(evaluates_in_clear=True))
    _, unasked = run(strategy_of(), app_of(evaluates_in_clear=True))
    assert not silent.evaluate_metrics_clientapp
    assert not unasked.evaluate_metrics_clientapp
    assert open_.evaluate_metrics_clientapp[1]["loss"] == 0.5


def test_processes_that_live_for_one_message_only_drop_out_and_say_what_is_needed() -> None:
    strategy = strategy_of()
    moved, _ = run(strategy, lambda message, context: app_of()(message, context))
    np.testing.assert_array_equal(moved, 0)
    rule, reason = excluded(strategy)[0]
    assert rule == "session"
    assert "let clients.secure_keeper hold the sessions" in reason


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: SecureFlowerStrategy(FedAvg()), "takes a SecureAggregation, got FedAvg"),  # type: ignore[arg-type]  # the point
        (lambda: SecureFlowerStrategy(secure(active=True)), "the active mode needs the roster of the members"),
        (lambda: SecureFlowerStrategy(secure(draw_masks=False)), "draw_masks=False protects nothing"),
        (
            lambda: SecureFlowerStrategy(SecureAggregation(FedAvg(), SumProtocol(), max_weight=9)),
            "the protocol must be SecAggPlus, got SumProtocol",
        ),
        (lambda: FlowerStrategy(secure()), "server.SecureFlowerStrategy for secure sums"),
    ],
)
def test_what_cannot_run_inside_a_flower_app_is_refused_when_it_is_made(made: Callable[[], object], said: str) -> None:
    with pytest.raises(StrategyError, match=said):
        made()


def test_only_messages_with_our_record_are_secure() -> None:
    assert not is_secure(RecordDict({"arrays": record_of(START), "config": ConfigRecord()}))


def test_importing_strategies_clients_or_the_keeper_does_not_import_flower() -> None:
    code = (
        "import sys, strategies, clients, server, clients.secure_keeper; strategies.SecureAggregation; "
        "strategies.FedAvg; print(sum(name.partition('.')[0] == 'flwr' for name in sys.modules))"
    )
    command = [sys.executable, "-c", code]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert outcome.stdout == "0\n"
