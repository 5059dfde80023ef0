"""The fleet's channel: who is asked, what comes back, whom it is attributed to, what is forgotten."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fedml_core.errors import RunError
from fedml_core.handshake import Goodbye
from fedml_core.messages import Evaluation, Refusal
from fedml_core.update import Update
from fedml_core.wire import Frame
from server.fleet_letters import LinkFailure
from tests.link_double import (
    WORK,
    Link,
    assignment,
    assignment_frame,
    channel_of,
    failures,
    introduces,
    keeps,
    ready,
    reply_frame,
    told,
    working,
)


def test_clients_are_numbers_in_order_whatever_the_order_of_their_nodes() -> None:
    channel = ready(Link({7: introduces(12), 8: introduces(3), 9: introduces(5)}))
    assert channel.clients(1) == [3, 5, 12]


def test_every_client_gets_its_work_once_and_its_reply_is_attributed_to_it() -> None:
    link = Link({7: introduces(12), 8: introduces(3)})
    arrivals = list(ready(link).exchange(assignment(), [3, 12], None))
    assert {arrival.client: arrival.reply.body for arrival in arrivals} == {
        3: Evaluation({"examples": 3.0}),
        12: Evaluation({"examples": 12.0}),
    }
    assert all(arrival.size_bytes > 50 for arrival in arrivals)
    assert link.asked() == [7, 8]


def test_an_assignment_is_encoded_once_for_the_whole_cohort() -> None:
    link = Link({node: introduces(node) for node in range(5)})
    list(ready(link).exchange(assignment(), range(5), None))
    assert len({id(frame) for _, frame in link.frames if frame.kind in WORK}) == 1


def test_only_the_cohort_is_asked() -> None:
    link = Link({7: introduces(1), 8: introduces(2)})
    assert [arrival.client for arrival in ready(link).exchange(assignment(), [2], None)] == [2]
    assert link.asked() == [8]


def test_a_client_that_comes_during_a_round_takes_part_from_the_next() -> None:
    link = Link({7: working(1, keeps)})
    channel = ready(link)
    link.answers[8] = introduces(2)
    link.on_poll = lambda: link.release(introduces(1)) if (8, "hello") in link.sent() else None
    assert [arrival.client for arrival in channel.exchange(assignment(1), [1], None)] == [1]
    assert channel.clients(2) == [1, 2]
    assert link.asked() == [7]


def test_it_waits_for_the_least_number_of_clients_and_says_who_is_there() -> None:
    said: list[str] = []
    link = Link()
    channel = channel_of(link, said, minimum_clients=3)
    arrivals = iter([(7, introduces(5)), (8, introduces(1, "ward-a")), (9, introduces(2))])

    def one_more() -> None:
        link.answers.update(itertools.islice(arrivals, 1))

    link.on_poll = one_more
    assert channel.clients(1) == [1, 2, 5]
    assert [line for line in said if "waiting" in line] == [
        "waiting for clients: 0 of 3",
        "waiting for clients: 1 of 3 (client 5)",
        "waiting for clients: 2 of 3 (ward-a, client 5)",
    ]


def test_too_few_clients_after_the_wait_end_the_run_with_the_remedy() -> None:
    channel = channel_of(Link({7: introduces(1)}), minimum_clients=2, wait_s=0.05)
    expected = r"1 of 2 clients were there after 0.05 s, before round 4; start more, or lower server.minimum_clients"
    with pytest.raises(RunError, match=expected):
        channel.clients(4)


LOST = {
    "unavailable": ("lost", "it fell silent or left while it worked"),
    "restarted": ("lost", "its process began anew while it worked"),
    "expired": ("lost", "it never took its work"),
    "incomplete": ("lost", "it left in the middle of its reply"),
    "malformed": ("malformed", "what came back is not a frame"),
}


@pytest.mark.parametrize("reason", LOST)
def test_a_client_that_is_lost_on_the_way_is_attributed_with_what_is_known(reason: Any) -> None:
    link = Link({7: working(1, lambda node, frame: LinkFailure(node, reason)), 8: introduces(2)})
    arrivals = list(ready(link).exchange(assignment(), [1, 2], None))
    assert failures(arrivals) == {1: LOST[reason]}
    lost = next(arrival for arrival in arrivals if arrival.client == 1)
    assert (lost.reply.run, lost.reply.round, lost.reply.client, lost.size_bytes) == ("run", 1, 1, 0)


def test_of_a_client_whose_process_raised_only_the_class_is_told() -> None:
    link = Link({7: working(1, lambda node, frame: LinkFailure(node, "client-error", "MemoryError"))})
    arrivals = ready(link).exchange(assignment(), [1], None)
    assert failures(arrivals) == {1: ("crashed", "its process raised MemoryError; its own log says more")}


@pytest.mark.parametrize("failure", [("restarted", ""), ("client-error", "NotGreetedError")], ids=lambda row: row[0])
def test_a_client_that_began_anew_is_greeted_again_and_is_there_in_the_next_round(failure: Any) -> None:
    said: list[str] = []
    link = Link({7: working(1, lambda node, frame: LinkFailure(node, *failure))})
    channel = ready(link, said)
    (body,) = failures(channel.exchange(assignment(), [1], None)).values()
    assert body[0] == "lost" and "began anew" in body[1]
    link.answers[7] = introduces(1)
    assert channel.clients(2) == [1]
    assert said[-2:] == ["client 1 began anew", "client 1 joined"]


def test_a_client_that_left_before_it_was_asked_is_attributed_too() -> None:
    link = Link({7: introduces(1), 8: introduces(2)})
    channel = ready(link)
    del link.answers[7]
    assert channel.clients(1) == [2]
    assert failures(channel.exchange(assignment(), [1, 2], None)) == {1: ("lost", "it left before it was asked")}


def test_a_reply_that_is_none_is_excluded_as_malformed_and_its_bytes_count() -> None:
    sums = reply_frame(assignment_frame(), 1).header.replace('{"examples":1.0}', "[1]")
    assert "[1]" in sums
    for frame in (Frame("evaluation", "{"), Frame("evaluation", "{}"), Frame("greeting", "[]"), Frame("update", sums)):
        link = Link({7: working(1, lambda node, asked, frame=frame: frame), 8: introduces(2)})  # type: ignore[misc]
        arrivals = list(ready(link).exchange(assignment(), [1, 2], None))
        assert {client: rule for client, (rule, _) in failures(arrivals).items()} == {1: "malformed"}
        assert sum(arrival.size_bytes for arrival in arrivals if arrival.client == 1) == frame.size_bytes


def test_a_clients_refusal_passes_and_does_nothing_to_a_terminal() -> None:
    refusal = Refusal("floor", "noise 0.3 is below\x1b[31m 0.8")
    link = Link({7: working(1, lambda node, frame: reply_frame(frame, 1, refusal))})
    assert failures(ready(link).exchange(assignment(), [1], None)) == {1: ("floor", "noise 0.3 is below?[31m 0.8")}


def test_an_updates_numbers_arrive_exactly() -> None:
    values = torch.tensor([0.1, -0.0, 3e-39, 7.0])
    link = Link({7: working(1, lambda node, frame: reply_frame(frame, 1, Update.of(values, 5.0, examples=5.0)))})
    (arrival,) = ready(link).exchange(assignment(), [1], None)
    assert isinstance(arrival.reply.body, Update)
    assert torch.equal(arrival.reply.body.values, values)
    assert float(arrival.reply.body.weight) == 5.0


def test_the_deadline_ends_an_exchange_and_cancels_what_is_under_way() -> None:
    link = Link({7: introduces(1), 8: working(2, keeps)})
    channel = ready(link)
    assert [arrival.client for arrival in channel.exchange(assignment(), [1, 2], 0.05)] == [1]
    assert len(link.cancelled) == 1 and not link.kept


def test_an_exchange_that_is_left_early_cancels_what_is_under_way() -> None:
    link = Link({7: introduces(1), 8: working(2, keeps)})
    exchange = iter(ready(link).exchange(assignment(), [1, 2], None))
    assert next(exchange).client == 1
    exchange.close()  # type: ignore[attr-defined]  # a generator
    assert len(link.cancelled) == 1 and not link.kept


def test_a_reply_to_an_older_exchange_never_reaches_the_next() -> None:
    link = Link({7: working(1, keeps)})
    channel = ready(link)
    first = list(channel.exchange(assignment(1), [1], 0.05))
    late = [(message_id, reply_frame(assignment_frame(), 1)) for message_id in link.cancelled]
    link.answers[7] = working(1, lambda node, frame: reply_frame(frame, 1))
    link.back += late
    second = list(channel.exchange(assignment(2), [1], None))
    assert first == [] and len(late) == 1
    assert [(arrival.client, arrival.reply.round) for arrival in second] == [(1, 2)]


def test_a_farewell_reaches_everybody_who_is_connected_and_names_who_did_not_hear_it() -> None:
    said: list[str] = []
    link = Link({7: introduces(1), 8: introduces(1), 9: introduces(2, "ward-b")})
    channel = ready(link, said)
    link.answers[9] = keeps
    channel.farewell("the run is done", 0.05)
    for node in (7, 8, 9):
        assert told(link, node)[-1] == Goodbye("the run is done")
    assert said[-1] == "client 2 (ward-b) still works and does not know yet that the run is over"
    assert len(link.cancelled) == 1


def test_on_turn_is_called_while_it_waits() -> None:
    link = Link()

    def arrive() -> None:
        link.answers[7] = introduces(1)

    assert channel_of(link, on_turn=arrive).clients(1) == [1]
