from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_core.errors import ReplyError
from simulations.flower_grid import LocalGrid
from simulations.flower_nodes import FIRST_NODE_ID
from strategies import (
    FedAdam,
    FedAvg,
    FlowerStrategy,
    Krum,
)
from strategies.flower import _numpy
from tests.strategies.flower_cases import (
    BUT_THE_LAST,
    CLIENTS,
    EVERYBODY,
    EXAMPLES,
    SIZE,
    START,
    Tamper,
    honest,
    last_does,
    moved,
    one_round,
    record_of,
    reply_to,
    vector_of,
)

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict  # isort: skip


def with_arrays(record: ArrayRecord, examples: Any = 40, **metrics: Any) -> Tamper:
    def tamper(message: Message, reply: Message) -> Message:
        report = MetricRecord({"num-examples": examples, "accuracy": 0.3, **metrics})
        return Message(RecordDict({"arrays": record, "metrics": report}), reply_to=message)

    return tamper


def with_records(**records: Any) -> Tamper:
    return lambda message, reply: Message(RecordDict(records), reply_to=message)


def changed(**arrays: np.ndarray[Any, Any] | Array) -> ArrayRecord:
    """Return the honest last reply's arrays with some replaced or added."""
    record = record_of(START + 4)
    for name, array in arrays.items():
        record[name] = array if isinstance(array, Array) else Array(array)
    return record


def without(name: str) -> ArrayRecord:
    record = record_of(START + 4)
    del record[name]
    return record


def raw(data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array("float32", (3,), stype, data)


def npz_of(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


METRICS = MetricRecord({"num-examples": 40, "accuracy": 0.3})
HUGE_HEADER = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
HUGE_HEADER += b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n"

BAD_REPLIES: dict[str, tuple[Tamper, str]] = {
    "NaN arrays": (with_arrays(changed(bias=np.full(3, np.nan, np.float32))), "non-finite"),
    "infinite arrays": (with_arrays(changed(bias=np.full(3, np.inf, np.float32))), "non-finite"),
    "numbers beyond float32": (with_arrays(changed(bias=np.full(3, 1e300))), "non-finite"),
    "NaN weight": (with_arrays(changed(), float("nan")), "weight"),
    "infinite weight": (with_arrays(changed(), float("inf")), "weight"),
    "weight of 10^12": (with_arrays(changed(), 10**12), "weight"),
    "weight beyond every float": (with_arrays(changed(), 10**400), "weight"),
    "negative weight": (with_arrays(changed(), -5), "weight"),
    "weight of zero": (with_arrays(changed(), 0), "weight"),
    "weight that is a list": (with_arrays(changed(), [1, 2]), "weight"),
    "NaN metric": (with_arrays(changed(), loss=float("nan")), "non-finite"),
    "wrong shape": (with_arrays(changed(weight=np.zeros((9, 9), np.float32))), "shape"),
    "broadcastable shape (1, 4)": (with_arrays(changed(weight=np.zeros((1, 4), np.float32))), "shape"),
    "broadcastable shape (4,)": (with_arrays(changed(weight=np.zeros(4, np.float32))), "shape"),
    "broadcastable shape ()": (with_arrays(changed(bias=np.array(0.0, np.float32))), "shape"),
    "integers": (with_arrays(changed(bias=np.zeros(3, np.int64))), "dtype"),
    "complex numbers": (with_arrays(changed(bias=np.zeros(3, np.complex64))), "dtype"),
    "text": (with_arrays(changed(bias=np.array(["a", "b", "c"]))), "dtype"),
    "missing array": (with_arrays(without("bias")), "keys"),
    "extra array": (with_arrays(changed(extra=np.zeros(2, np.float32))), "keys"),
    "no array": (with_arrays(ArrayRecord()), "keys"),
    "no MetricRecord": (with_records(arrays=record_of(START)), "metrics"),
    "two MetricRecords": (with_records(arrays=record_of(START), a=METRICS, b=METRICS), "metrics"),
    "no ArrayRecord": (with_records(metrics=METRICS), "arrays"),
    "two ArrayRecords": (with_records(a=record_of(START), b=record_of(START), metrics=METRICS), "arrays"),
    "no weight key": (with_records(arrays=record_of(START), metrics=MetricRecord({"accuracy": 1.0})), "weight"),
    "nothing at all": (with_records(), "arrays"),
    "bytes that are no array": (with_arrays(changed(bias=raw(b"\x00" * 40))), "malformed"),
    "no bytes": (with_arrays(changed(bias=raw(b""))), "malformed"),
    "a zip file": (with_arrays(changed(bias=raw(npz_of(np.zeros(3))))), "malformed"),
    "pickled objects": (with_arrays(changed(bias=raw(np.array([None] * 3, object).dumps()))), "malformed"),
    "a header of 4 petabytes": (with_arrays(changed(bias=raw(HUGE_HEADER))), "malformed"),
    "another serialisation": (with_arrays(changed(bias=raw(b"", stype="torch.tensor"))), "malformed"),
}


@pytest.mark.parametrize(("tamper", "rule"), BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_a_bad_reply_neither_counts_nor_stops_the_round_and_is_logged(
    tamper: Tamper, rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    outcome, metrics = one_round(FlowerStrategy(FedAvg()), last_does(tamper))
    np.testing.assert_allclose(moved(outcome), BUT_THE_LAST, rtol=0, atol=1e-6)
    assert dict(metrics or {}) == {"accuracy": pytest.approx((0.0 * 10 + 0.1 * 20 + 0.2 * 30) / 60)}
    assert [record.getMessage().split(": ")[:2] for record in caplog.records if record.name == "strategies.flower"] == [
        ["round 1", f"the reply of node {FIRST_NODE_ID + 3} does not count ({rule})"]
    ]


@pytest.mark.parametrize(("tamper", "rule"), BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_if_every_reply_is_bad_the_model_stays_as_it_was(tamper: Tamper, rule: str) -> None:
    strategy = FlowerStrategy(FedAdam())
    outcome, metrics = one_round(strategy, lambda message, context: tamper(message, honest(message, context)))
    assert vector_of(outcome).tolist() == START.tolist()
    assert metrics is None


def test_honest_replies_are_averaged_by_examples() -> None:
    outcome, metrics = one_round(FlowerStrategy(FedAvg()))
    np.testing.assert_allclose(moved(outcome), EVERYBODY, rtol=0, atol=1e-6)
    assert dict(metrics or {}) == {"accuracy": pytest.approx(0.2)}


@pytest.mark.parametrize("tamper", [with_arrays(changed(), extra=1.0), with_arrays(changed(), extra=[1.0, 2.0])])
def test_a_metric_that_only_one_client_reports_stops_nothing(tamper: Tamper) -> None:
    outcome, metrics = one_round(FlowerStrategy(FedAvg()), last_does(tamper))
    np.testing.assert_allclose(moved(outcome), EVERYBODY, rtol=0, atol=1e-6)
    assert metrics is not None
    assert set(metrics) == {"accuracy", "extra"}


def test_floats_of_another_size_are_as_good() -> None:
    tamper = with_arrays(changed(bias=(START[12:] + 4).astype(np.float64)))
    outcome, _ = one_round(FlowerStrategy(FedAvg()), last_does(tamper))
    np.testing.assert_allclose(moved(outcome), EVERYBODY, rtol=0, atol=1e-6)
    assert outcome["bias"].numpy().dtype == np.float32


def test_a_client_that_raises_is_named_and_the_others_are_averaged(caplog: pytest.LogCaptureFixture) -> None:
    def raising(message: Message, reply: Message) -> Message:
        raise ValueError("secret")

    outcome, _ = one_round(FlowerStrategy(FedAvg()), last_does(raising))
    np.testing.assert_allclose(moved(outcome), BUT_THE_LAST, rtol=0, atol=1e-6)
    assert f"round 1: the reply of node {FIRST_NODE_ID + 3} does not count (error)" in caplog.text


def test_the_second_reply_of_a_node_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    outcome, _ = one_round(FlowerStrategy(FedAvg()), more=lambda replies: [*replies, replies[0], replies[0]])
    np.testing.assert_allclose(moved(outcome), EVERYBODY, rtol=0, atol=1e-6)
    assert caplog.text.count("(duplicate): it replied before") == 2


def test_a_reply_of_a_node_that_was_not_asked_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    strategy = FlowerStrategy(FedAvg(), fraction_train=0.5)
    with LocalGrid(honest, clients=CLIENTS) as grid:
        asked = list(strategy.configure_train(1, record_of(START), ConfigRecord(), grid))
        nodes = {message.metadata.dst_node_id for message in asked}
        other = next(node for node in grid.get_node_ids() if node not in nodes)
        uninvited = Message(asked[0].content, other, "train")
        replies = grid.send_and_receive([*asked, uninvited])
        outcome, _ = strategy.aggregate_train(1, replies)
    assert outcome is not None
    places = [node - FIRST_NODE_ID for node in nodes]
    expected = sum((place + 1) * EXAMPLES[place] for place in places) / sum(EXAMPLES[place] for place in places)
    np.testing.assert_allclose(moved(outcome), expected, rtol=0, atol=1e-6)
    assert f"node {other} does not count (unknown)" in caplog.text


def test_an_error_that_flower_reports_names_the_node_and_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
    strategy = FlowerStrategy(FedAvg())
    with LocalGrid(honest, clients=CLIENTS) as grid:
        asked = list(strategy.configure_train(1, record_of(START), ConfigRecord(), grid))
        replies: list[Any] = list(grid.send_and_receive(asked))
        # What a SuperLink says of a node that went away: the source is the SuperLink itself, node 1.
        envelope = SimpleNamespace(src_node_id=1, reply_to_message_id=asked[3].metadata.message_id)
        error = SimpleNamespace(reason="node unavailable")
        replies[3] = SimpleNamespace(metadata=envelope, has_error=lambda: True, error=error)
        outcome, _ = strategy.aggregate_train(1, replies)
    assert outcome is not None
    np.testing.assert_allclose(moved(outcome), BUT_THE_LAST, rtol=0, atol=1e-6)
    node = asked[3].metadata.dst_node_id
    assert f"node {node} does not count (error): it failed: 'node unavailable'" in caplog.text


def test_a_step_that_overflows_leaves_the_model_and_the_state_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    def client(message: Message, context: Context) -> Message:
        return reply_to(message, np.full(SIZE, 3e38, np.float32), 1)

    strategy = FlowerStrategy(FedAdam())
    outcome, _ = one_round(strategy, client)
    assert vector_of(outcome).tolist() == START.tolist()
    assert strategy.state is None
    assert "round 1 changed nothing: FedAdam's step is not finite" in caplog.text


def test_a_cohort_too_small_for_the_rule_leaves_the_model_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    outcome, _ = one_round(FlowerStrategy(Krum(malicious=2)))
    assert vector_of(outcome).tolist() == START.tolist()
    assert "round 1 changed nothing: Krum needs a cohort of at least" in caplog.text


@settings(max_examples=150)
@given(st.data())
def test_no_bytes_of_a_client_raise_anything_but_a_reply_error(data: st.DataObject) -> None:
    good = Array(np.arange(6, dtype=np.float32)).data
    broken = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    try:
        assert isinstance(_numpy(raw(bytes(broken[:cut]))), np.ndarray)
    except ReplyError as error:
        assert error.rule == "malformed"


def test_a_metric_whose_name_our_reports_cannot_hold_stops_nothing() -> None:
    def client(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        reply.content.metric_records["metrics"]["train/loss"] = 0.5
        return reply

    outcome, metrics = one_round(FlowerStrategy(FedAvg()), client)
    expected, _ = one_round(FlowerStrategy(FedAvg()))
    assert np.array_equal(vector_of(outcome), vector_of(expected))
    assert metrics is not None and metrics["train/loss"] == pytest.approx(0.5)
