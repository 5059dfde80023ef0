"""Frames under way: who took them, what came back, what never will. Nothing here knows Flower.

`server.fleet_superlink` is the `Mailroom` that moves bytes; `Letters` remembers to whom each frame went, because the
SuperLink reports every failure as its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from fedml_core.identity import Site
from fedml_core.wire import Frame

FailureReason = Literal["unavailable", "restarted", "expired", "incomplete", "malformed", "client-error"]
_SURVEY_S = 0.5  # how often `poll` looks for nodes that fell silent: that takes time in proportion to all frames


@dataclass(frozen=True)
class NodeInfo:
    """A node that is online: its enrolled public key (PEM) and its roster line, both None on an insecure server."""

    node_key: bytes | None
    site: Site | None


@dataclass(frozen=True)
class LinkFailure:
    """No reply will come from `node`: why, and for `client-error` the class name of the client's exception.

    `unavailable`: it fell silent or left; `restarted`: its process began anew after it took the frame; `expired`: a
    week went by; `incomplete`: it stopped in the middle of its reply; `malformed`: what it sent is not a frame.
    """

    node: int
    reason: FailureReason
    detail: str = ""


@dataclass(frozen=True)
class Answer:
    """What the mailroom knows of a message: the reply's id and parts, or why there will be none."""

    message_id: str
    reply: str = ""
    parts: tuple[str, ...] = ()
    failure: FailureReason | None = None


@dataclass(frozen=True)
class ClientError:
    """A reply that says that the client's handler raised, and of which class."""

    class_name: str


class Mailroom(Protocol):
    """What moves and keeps the bytes."""

    def answers(self, message_ids: set[str]) -> Iterable[Answer]:
        """Return what is known of those of `message_ids` that were answered or never will be."""
        ...

    def part(self, part: str) -> bytes | None:
        """Return a part of a reply: empty while it has not arrived, None if it never will."""
        ...

    def online(self) -> set[int]:
        """Return the nodes that are online."""
        ...

    def open(self, reply: str, contents: dict[str, bytes]) -> Frame | ClientError:
        """Return what a whole reply holds; may raise anything, for the bytes are a stranger's."""
        ...

    def forget(self, message_id: str, reply: str) -> None:
        """Drop a message and its reply, as far as they are there."""
        ...


@dataclass
class _Letter:
    node: int
    taken: bool = False
    answer: Answer | None = None
    missing: tuple[str, ...] = ()


class Letters:
    """The frames under way. Thread-safe: pushes, polls and the port's threads meet here."""

    def __init__(self, room: Mailroom) -> None:
        """Begin with none."""
        self._room = room
        self._news = threading.Condition()
        self._under_way: dict[str, _Letter] = {}
        self._failures: dict[str, LinkFailure] = {}
        self._survey_due = 0.0
        self._closed = False

    def add(self, message_id: str, node: int) -> None:
        """Remember that `message_id` goes to `node`; before the node can take it."""
        with self._news:
            self._under_way[message_id] = _Letter(node)

    def took(self, message_ids: Iterable[str]) -> None:
        """Note that a node has taken these messages."""
        with self._news:
            for message_id in message_ids:
                if message_id in self._under_way:
                    self._under_way[message_id].taken = True

    def restarted(self, node: int) -> None:
        """Note that a node's process began anew: what it took and did not answer whole is lost."""
        with self._news:
            for message_id, letter in list(self._under_way.items()):
                if letter.node == node and letter.taken and not self._is_whole(letter):
                    self._fail(message_id, "restarted")
            self._news.notify_all()

    def undeliverable(self, message_id: str) -> None:
        """Note that nobody takes this message."""
        with self._news:
            self._fail(message_id, "unavailable")
            self._news.notify_all()

    def collect(self, message_ids: Iterable[str]) -> None:
        """Fetch the answers to these messages now, while their sender is surely online."""
        with self._news:
            self._collect(set(message_ids) & self._under_way.keys())
            self._news.notify_all()

    def part_came(self) -> None:
        """Let who polls see whether a reply is whole now."""
        with self._news:
            self._news.notify_all()

    def somebody_left(self) -> None:
        """Let who polls see at once which frames will not be answered."""
        with self._news:
            self._survey_due = 0.0
            self._news.notify_all()

    def poll(self, timeout_s: float) -> list[tuple[str, Frame | LinkFailure]]:
        """Return what came back or failed since the last call; wait up to `timeout_s` for something."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            while True:
                if time.monotonic() >= self._survey_due:
                    self._survey()
                    self._survey_due = time.monotonic() + _SURVEY_S
                whole = self._take_whole()
                left = deadline - time.monotonic()
                if self._failures or whole or left <= 0 or self._closed:
                    break
                self._news.wait(min(left, _SURVEY_S))
            failures, self._failures = self._failures, {}
        return [*failures.items(), *((message_id, self._open(letter)) for message_id, letter in whole.items())]

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Forget these messages and whatever came back or still comes for them."""
        with self._news:
            for message_id in message_ids:
                self._failures.pop(message_id, None)
                if message_id in self._under_way:
                    self._drop(message_id)

    def close(self) -> None:
        """Forget everything and let nobody wait any more."""
        with self._news:
            self._closed = True
            self._under_way.clear()
            self._failures.clear()
            self._news.notify_all()

    def _collect(self, message_ids: set[str]) -> None:
        for answer in self._room.answers(message_ids) if message_ids else ():
            letter = self._under_way[answer.message_id]
            letter.answer, letter.missing = answer, answer.parts
            if answer.failure is not None:
                self._fail(answer.message_id, answer.failure)

    def _survey(self) -> None:
        """Find the frames that will not be answered, or not to the end."""
        self._collect({message_id for message_id, letter in self._under_way.items() if letter.answer is None})
        online = self._room.online()
        for message_id, letter in list(self._under_way.items()):
            if letter.answer is not None and letter.node not in online and not self._is_whole(letter):
                self._fail(message_id, "incomplete")

    def _take_whole(self) -> Mapping[str, _Letter]:
        answered = [message_id for message_id, letter in self._under_way.items() if letter.answer is not None]
        return {key: self._under_way.pop(key) for key in answered if self._is_whole(self._under_way[key])}

    def _is_whole(self, letter: _Letter) -> bool:
        """Return whether every part of the reply is there; one that was thrown away counts as there, see `_open`."""
        letter.missing = tuple(part for part in letter.missing if self._room.part(part) == b"")
        return letter.answer is not None and not letter.missing

    def _open(self, letter: _Letter) -> Frame | LinkFailure:
        assert letter.answer is not None
        found = {part: self._room.part(part) for part in letter.answer.parts}
        contents = {part: content for part, content in found.items() if content is not None}
        self._room.forget(letter.answer.message_id, letter.answer.reply)
        if len(contents) < len(found):
            return LinkFailure(letter.node, "incomplete")
        try:
            opened = self._room.open(letter.answer.reply, contents)
        except Exception:  # noqa: BLE001 - a stranger's bytes: whatever they break is the sender's failure, not ours
            return LinkFailure(letter.node, "malformed")
        return opened if isinstance(opened, Frame) else LinkFailure(letter.node, "client-error", opened.class_name)

    def _fail(self, message_id: str, reason: FailureReason) -> None:
        self._failures[message_id] = LinkFailure(self._under_way[message_id].node, reason)
        self._drop(message_id)

    def _drop(self, message_id: str) -> None:
        letter = self._under_way.pop(message_id)
        self._room.forget(message_id, "" if letter.answer is None else letter.answer.reply)
