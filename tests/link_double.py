"""A fleet's link that says what it is told to, and clients for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedml_core.handshake import Greeting, Hello, Introduction, greeting_from_frame, greeting_to_frame
from fedml_core.identity import PublicKeys, Site
from fedml_core.message_frames import assignment_from_frame, assignment_to_frame, reply_to_frame
from fedml_core.messages import Arrival, Assignment, EvaluateWork, Evaluation, Failure, Refusal, Reply
from fedml_core.model import ModelSpec
from fedml_core.wire import Frame
from server.fleet_channel import FleetChannel
from server.fleet_letters import LinkFailure, NodeInfo
from server.reception import Back

SPEC = ModelSpec.of_size(4)
HELLO = Hello("run", 0, SPEC)
WORK = ("train", "evaluate")
Answer = Callable[[int, Frame], Back | None]


@dataclass
class Link:
    """A fleet whose nodes answer by a function each: None keeps a frame for later, see `release`."""

    answers: dict[int, Answer] = field(default_factory=dict)
    sites: dict[int, Site] = field(default_factory=dict)
    kept: dict[str, tuple[int, Frame]] = field(default_factory=dict)
    back: list[tuple[str, Back]] = field(default_factory=list)
    frames: list[tuple[int, Frame]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    ids: itertools.count[int] = field(default_factory=itertools.count)
    on_poll: Callable[[], object] | None = None
    slow: bool = False

    def nodes(self) -> Mapping[int, NodeInfo]:
        return {node: NodeInfo(None, self.sites.get(node)) for node in self.answers}

    def push(self, frames: Mapping[int, Frame]) -> Mapping[str, int]:
        sent = {f"m{next(self.ids)}": node for node in frames}
        for message_id, node in sent.items():
            frame = frames[node]
            self.frames.append((node, frame))
            answer = self.answers[node](node, frame) if node in self.answers else LinkFailure(node, "unavailable")
            if answer is None:
                self.kept[message_id] = (node, frame)
            else:
                self.back.append((message_id, answer))
        return sent

    def poll(self, timeout_s: float = 0.0) -> list[tuple[str, Back]]:
        if self.on_poll is not None:
            self.on_poll()
        if self.slow:
            return []
        back, self.back = self.back, []
        return back

    def cancel(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            self.cancelled.append(message_id)
            self.kept.pop(message_id, None)

    def sent(self) -> list[tuple[int, str]]:
        """Return node and kind of every frame that was pushed."""
        return [(node, frame.kind) for node, frame in self.frames]

    def asked(self) -> list[int]:
        """Return the nodes that were given work, in order."""
        return sorted(node for node, kind in self.sent() if kind in WORK)

    def release(self, answer: Answer) -> None:
        """Let what was kept be answered now."""
        kept, self.kept = self.kept, {}
        self.back += [(message_id, back) for message_id, (node, frame) in kept.items() if (back := answer(node, frame))]


def introduces(number: int, name: str = "", spec: ModelSpec = SPEC) -> Answer:
    """Return a client that introduces itself, and replies to work by an evaluation of `number` examples."""

    def answer(node: int, frame: Frame) -> Back | None:
        if frame.kind in ("train", "evaluate"):
            return reply_frame(frame, number)
        return greeting_to_frame(Introduction(number, name, spec))

    return answer


def working(number: int, work: Answer) -> Answer:
    """Return a client that introduces itself, and does with work what `work` does."""
    greets = introduces(number)
    return lambda node, frame: greets(node, frame) if frame.kind == "hello" else work(node, frame)


def reply_frame(frame: Frame, number: int, body: Any = None) -> Frame:
    asked = assignment_from_frame(frame)
    done = Evaluation({"examples": float(number)}) if body is None else body
    return reply_to_frame(Reply(asked.run, asked.round, number, asked.fingerprint, done))


def keeps(node: int, frame: Frame) -> None:
    """Answer later, or never."""


def assignment(round_number: int = 1) -> Assignment:
    return Assignment("run", round_number, SPEC.fingerprint, torch.zeros(4), EvaluateWork())


def channel_of(link: Link, said: list[str] | None = None, **options: Any) -> FleetChannel:
    said = [] if said is None else said
    return FleetChannel(link, HELLO, say=said.append, **options)


def ready(link: Link, said: list[str] | None = None) -> FleetChannel:
    """Return a channel that has greeted every node of `link`."""
    channel = channel_of(link, said)
    channel.clients(1)
    return channel


def failures(arrivals: Iterable[Arrival]) -> dict[int, tuple[str, str]]:
    found = {arrival.client: arrival.reply.body for arrival in arrivals}
    return {client: (body.rule, body.reason) for client, body in found.items() if isinstance(body, Failure | Refusal)}


def site(number: int, name: str) -> Site:
    return Site(number, name, PublicKeys(b"", b""))


def told(link: Link, node: int) -> list[Greeting]:
    """Return what the channel told a node, work left out."""
    return [greeting_from_frame(frame) for to, frame in link.frames if to == node and frame.kind not in WORK]


def assignment_frame() -> Frame:
    return assignment_to_frame(assignment())
