"""The books of the fleet: every frame that goes out comes back once, as a reply or as a failure of its own node."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from fedml_core.wire import Frame
from server import fleet_letters
from server.fleet_letters import Answer, ClientError, FailureReason, Letters, LinkFailure

REPLY = Frame("update", "{}")


@dataclass
class Room:
    """A mailroom without a network."""

    known: dict[str, Answer] = field(default_factory=dict)
    parts: dict[str, bytes] = field(default_factory=dict)
    nodes: set[int] = field(default_factory=lambda: {1, 2})
    content: Frame | ClientError | Exception = REPLY
    forgotten: list[tuple[str, str]] = field(default_factory=list)

    def answers(self, message_ids: set[str]) -> Iterable[Answer]:
        return [self.known.pop(message_id) for message_id in sorted(message_ids & self.known.keys())]

    def part(self, part: str) -> bytes | None:
        return self.parts.get(part)

    def online(self) -> set[int]:
        return self.nodes

    def open(self, reply: str, contents: dict[str, bytes]) -> Frame | ClientError:
        assert all(contents.values())
        if isinstance(self.content, Exception):
            raise self.content
        return self.content

    def forget(self, message_id: str, reply: str) -> None:
        self.forgotten.append((message_id, reply))


@pytest.fixture
def room() -> Room:
    return Room(parts={"head": b"h", "body": b"b"})


@pytest.fixture
def letters(room: Room) -> Letters:
    made = Letters(room)
    made.add("m1", 1)
    made.add("m2", 2)
    return made


def reply_to(message_id: str) -> Answer:
    return Answer(message_id, f"reply to {message_id}", ("head", "body"))


def test_a_whole_reply_is_handed_out_once_and_forgotten(room: Room, letters: Letters) -> None:
    room.known["m1"] = reply_to("m1")
    assert letters.poll(0) == [("m1", REPLY)]
    assert letters.poll(0) == []
    assert room.forgotten == [("m1", "reply to m1")]


def test_a_part_that_comes_wakes_who_waits_for_the_whole(
    room: Room, letters: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_letters, "_SURVEY_S", 600.0)
    found: list[list[tuple[str, Frame | LinkFailure]]] = []
    room.parts["body"] = b""
    room.known["m1"] = reply_to("m1")
    letters.collect(["m1"])
    poller = threading.Thread(target=lambda: found.append(letters.poll(600.0)))
    poller.start()
    letters.part_came()
    room.parts["body"] = b"b"
    letters.part_came()
    poller.join(60)
    assert found == [[("m1", REPLY)]]


def test_a_reply_is_held_back_until_its_last_part_is_there(room: Room, letters: Letters) -> None:
    room.known["m1"] = reply_to("m1")
    room.parts["body"] = b""
    assert letters.poll(0) == []
    room.parts["body"] = b"b"
    assert letters.poll(0) == [("m1", REPLY)]


def test_a_reply_that_stops_half_way_is_the_senders_failure(room: Room, letters: Letters) -> None:
    room.known["m1"] = reply_to("m1")
    room.parts["body"] = b""
    room.nodes = {2}
    assert letters.poll(0) == [("m1", LinkFailure(1, "incomplete"))]
    assert room.forgotten == [("m1", "reply to m1")]


def test_a_reply_whose_parts_were_thrown_away_is_incomplete(room: Room, letters: Letters) -> None:
    room.known["m2"] = reply_to("m2")
    del room.parts["head"]
    assert letters.poll(0) == [("m2", LinkFailure(2, "incomplete"))]


@pytest.mark.parametrize("reason", ["unavailable", "expired", "incomplete"])
def test_what_the_mailroom_gives_up_names_the_node_it_was_for(
    room: Room, letters: Letters, reason: FailureReason
) -> None:
    room.known["m2"] = Answer("m2", failure=reason)
    assert letters.poll(0) == [("m2", LinkFailure(2, reason))]


@pytest.mark.parametrize("error", [ValueError("x"), RecursionError(), KeyError("x"), MemoryError()])
def test_whatever_a_strangers_bytes_break_is_malformed(room: Room, letters: Letters, error: Exception) -> None:
    room.known["m1"], room.content = reply_to("m1"), error
    assert letters.poll(0) == [("m1", LinkFailure(1, "malformed"))]
    assert room.forgotten == [("m1", "reply to m1")]


def test_a_client_error_keeps_its_class_name(room: Room, letters: Letters) -> None:
    room.known["m1"], room.content = reply_to("m1"), ClientError("ValueError")
    assert letters.poll(0) == [("m1", LinkFailure(1, "client-error", "ValueError"))]


def test_a_restart_loses_what_was_taken_and_nothing_else(room: Room, letters: Letters) -> None:
    letters.add("m3", 1)
    letters.took(["m1", "m2"])
    letters.restarted(1)
    assert letters.poll(0) == [("m1", LinkFailure(1, "restarted"))]
    assert room.forgotten == [("m1", "")]


def test_a_restart_after_the_whole_reply_arrived_loses_nothing(room: Room, letters: Letters) -> None:
    letters.took(["m1"])
    room.known["m1"] = reply_to("m1")
    letters.collect(["m1"])
    letters.restarted(1)
    assert letters.poll(0) == [("m1", REPLY)]


def test_a_restart_in_the_middle_of_a_reply_loses_it(room: Room, letters: Letters) -> None:
    letters.took(["m1"])
    room.known["m1"] = reply_to("m1")
    room.parts["body"] = b""
    letters.collect(["m1"])
    letters.restarted(1)
    assert letters.poll(0) == [("m1", LinkFailure(1, "restarted"))]
    assert room.forgotten == [("m1", "reply to m1")]


def test_a_reply_that_was_collected_survives_its_senders_leave(room: Room, letters: Letters) -> None:
    room.known["m1"] = reply_to("m1")
    letters.collect(["m1", "unknown"])
    room.nodes = set()
    assert letters.poll(0) == [("m1", REPLY)]


def test_cancelled_messages_give_nothing_any_more(room: Room, letters: Letters) -> None:
    letters.undeliverable("m2")
    letters.cancel(["m1", "m2", "unknown"])
    room.known["m1"] = reply_to("m1")
    assert letters.poll(0) == []
    assert room.forgotten == [("m2", ""), ("m1", "")]


@pytest.mark.parametrize("event", ["collect", "undeliverable", "restarted", "somebody_left", "close"])
def test_who_waits_is_woken(room: Room, letters: Letters, event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_letters, "_SURVEY_S", 600.0)
    found: list[list[tuple[str, Frame | LinkFailure]]] = []
    poller = threading.Thread(target=lambda: found.append(letters.poll(600.0)))
    poller.start()
    letters.took(["m1"])
    if event in ("collect", "somebody_left"):
        room.known["m1"] = reply_to("m1")
    argument = {"collect": (["m1"],), "undeliverable": ("m1",), "restarted": (1,)}.get(event, ())
    getattr(letters, event)(*argument)
    poller.join(60)
    assert not poller.is_alive()
    expected = {"undeliverable": LinkFailure(1, "unavailable"), "restarted": LinkFailure(1, "restarted")}
    assert found == [[] if event == "close" else [("m1", expected.get(event, REPLY))]]
