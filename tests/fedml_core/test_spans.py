"""Spans: each nanosecond counted once, nothing recorded unless asked, events bounded."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from fedml_core import spans
from fedml_core.spans import Recorded, Recorder, recorder, recording, span


class Clock:
    """Nanoseconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(spans, "perf_counter_ns", made)
    yield made


def test_nothing_is_recorded_and_nothing_is_made_unless_somebody_asks() -> None:
    assert recorder() is None
    assert span("compute") is span("data")
    with span("compute"):
        pass


def test_a_span_inside_another_counts_for_itself(clock: Clock) -> None:
    chosen = Recorder(keep_events=True)
    with recording(chosen):
        with span("evaluate"):
            clock.now += 5
            with span("data"):
                clock.now += 7
            clock.now += 11
            with span("evaluate"):
                clock.now += 2
        with span("data"):
            clock.now += 1
    found = chosen.drain()
    assert found.own_ns == {"data": 8, "evaluate": 18}
    here = os.getpid()
    assert found.events == (
        ("data", 1005, 7, here),
        ("evaluate", 1023, 2, here),
        ("evaluate", 1000, 25, here),
        ("data", 1025, 1, here),
    )


def test_draining_begins_anew(clock: Clock) -> None:
    chosen = Recorder()
    with recording(chosen):
        with span("data"):
            clock.now += 3
        assert chosen.drain() == Recorded({"data": 3})
        assert chosen.drain() == Recorded({})


def test_a_span_that_fails_is_recorded_and_closed(clock: Clock) -> None:
    chosen = Recorder()
    with recording(chosen):
        with pytest.raises(ValueError, match="oh"), span("outer"), span("inner"):
            clock.now += 3
            raise ValueError("oh")
        with span("after"):
            clock.now += 4
    assert chosen.drain().own_ns == {"inner": 3, "outer": 0, "after": 4}


def test_recording_ends_with_its_body_and_can_be_switched_off_inside() -> None:
    chosen = Recorder()
    with recording(chosen):
        assert recorder() is chosen
        with recording(None):
            assert recorder() is None
    assert recorder() is None


def test_another_thread_is_not_recorded() -> None:
    seen: list[object] = []
    with recording(Recorder()):
        thread = threading.Thread(target=lambda: seen.append(recorder()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_what_workers_did_is_their_mean(clock: Clock) -> None:
    chosen = Recorder(keep_events=True)
    chosen.absorb(Recorded({"compute": 100, "data": 10}, (("compute", 5, 100, 77),), 2), workers=4)
    chosen.absorb(Recorded({"compute": 300}), workers=4)
    assert chosen.workers_ns == {"compute": 100.0, "data": 2.5}
    assert chosen.drain() == Recorded({}, (("compute", 5, 100, 77),), 2)


def test_events_are_bounded_and_the_rest_is_counted(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "MOST_EVENTS", 3)
    chosen = Recorder(keep_events=True)
    with recording(chosen):
        for _ in range(5):
            with span("data"):
                clock.now += 1
    found = chosen.drain()
    assert (len(found.events), found.left_out, found.own_ns) == (3, 2, {"data": 5})


def test_without_a_trace_no_event_is_kept(clock: Clock) -> None:
    chosen = Recorder()
    with recording(chosen), span("data"):
        clock.now += 1
    assert chosen.drain().events == ()
