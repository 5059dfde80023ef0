"""Who is in the fleet: every node is greeted once, and taken in, turned away or asked to wait, aloud.

A node is a connection; a client is a number of the federation. With a roster the number is the one that the node's key
was enrolled for, and who claims another is turned away. Without, it is what the node claims, and the first who claims a
number has it until it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedml_core.errors import ChannelError, ConfigError, FedveilError
from fedml_core.handshake import (
    Hello,
    Introduction,
    Refused,
    greeting_from_frame,
    greeting_to_frame,
)
from fedml_core.identity import Site
from fedml_core.wire import Frame
from server.fleet_letters import LinkFailure, NodeInfo

__all__ = ["FleetLink", "Member", "Reception", "say_nothing"]

Say = Callable[[str], object]
Back = Frame | LinkFailure


class FleetLink(Protocol):
    """What is needed of a `server.fleet.FleetServer`."""

    def nodes(self) -> Mapping[int, NodeInfo]:
        """Return the nodes that are online now, by node id."""
        ...

    def push(self, frames: Mapping[int, Frame]) -> Mapping[str, int]:
        """Send each node its frame; return the node of each new message id."""
        ...

    def poll(self, timeout_s: float = ...) -> list[tuple[str, Back]]:
        """Return what came back since the last call, each message id once."""
        ...

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Forget these messages."""
        ...


@dataclass(frozen=True)
class Member:
    """A client that takes part: its number, its node, and its name for people (or "")."""

    number: int
    node: int
    name: str

    def __str__(self) -> str:
        """Return how people are told who it is."""
        return f"client {self.number} ({self.name})" if self.name else f"client {self.number}"


class Reception:
    """Keeps the list of members. `look` and `take` are called again and again, by one thread."""

    def __init__(self, link: FleetLink, hello: Hello, say: Say) -> None:
        """Begin with nobody; `say` is told in one line who comes and goes."""
        self._link, self._hello, self._say = link, hello, say
        self._greeted: dict[str, tuple[int, Site | None]] = {}  # greetings under way: the node of each, and its site
        self._notices: set[str] = set()  # refusals under way; nobody waits for an answer
        self._known: set[int] = set()
        self._queue: list[Member] = []  # their number is taken; in order of arrival
        self._members: dict[int, Member] = {}

    @property
    def members(self) -> Mapping[int, Member]:
        """Return who takes part, by client number."""
        return self._members

    def look(self) -> None:
        """Greet the nodes that are new, and take note of those that left."""
        nodes = self._link.nodes()
        for gone in self._known - nodes.keys():
            self._leave(gone)
        new = sorted(nodes.keys() - self._known)
        if new:
            self._known.update(new)
            sent = self._link.push(dict.fromkeys(new, greeting_to_frame(self._hello)))
            self._greeted.update({message_id: (node, nodes[node].site) for message_id, node in sent.items()})

    def greet_again(self, node: int) -> None:
        """Take the node out of the list and greet it at the next look: its process is not the one that was greeted."""
        self._leave(node, "began anew")

    def take(self, message_id: str, back: Back) -> bool:
        """Handle what came back, if it belongs here; return whether it does."""
        if message_id in self._notices:
            self._notices.remove(message_id)
            return True
        if message_id not in self._greeted:
            return False
        self._answered(*self._greeted.pop(message_id), back)
        return True

    def _answered(self, node: int, site: Site | None, back: Back) -> None:
        """Judge an introduction; also that of a client which found out first that it cannot take part, and left."""
        if isinstance(back, LinkFailure) and back.reason in ("restarted", "unavailable", "incomplete"):
            self._known.discard(node)  # greeted anew, if it is still there
            return
        who = "a client" if site is None else f"client {site.client_id} ({site.name})"
        try:
            introduced = _introduction(back)
            member = Member(introduced.client, node, introduced.name)
            if site is None:
                who = f"{member}"
            elif introduced.client == site.client_id:
                member = Member(site.client_id, node, site.name)
            else:
                raise ConfigError(
                    f"its key is enrolled for client {site.client_id} and its site.toml says id = "
                    f"{introduced.client}; correct the id"
                )
            self._hello.spec.require_equal(introduced.spec)
        except FedveilError as error:
            self._say(f"{who} cannot take part: {error}")
            if node in self._known:
                self._notify(node, Refused(f"{error}"))
        else:
            if node in self._known:
                self._admit(member)

    def _admit(self, member: Member) -> None:
        holder = self._members.get(member.number)
        if holder is None:
            self._members[member.number] = member
            self._say(f"{member} joined")
            return
        self._queue.append(member)
        self._say(f"{member} cannot take part: {holder} is connected and has this number; it waits until that leaves")
        reason = f"another client that is connected has the number {member.number}; give each site an id of its own"
        self._notify(member.node, Refused(reason, final=False))

    def _leave(self, node: int, how: str = "left") -> None:
        self._known.discard(node)
        self._queue = [waiting for waiting in self._queue if waiting.node != node]
        for member in [member for member in self._members.values() if member.node == node]:
            del self._members[member.number]
            self._say(f"{member} {how}")
            heirs = [waiting for waiting in self._queue if waiting.number == member.number]
            for heir in heirs[:1]:
                self._queue.remove(heir)
                self._known.discard(heir.node)  # greeted anew, so that it learns that it is taken in

    def _notify(self, node: int, refused: Refused) -> None:
        self._notices.update(self._link.push({node: greeting_to_frame(refused)}))


def say_nothing(line: str) -> None:
    """Keep a line to oneself."""


def _introduction(back: Back) -> Introduction:
    if isinstance(back, LinkFailure):
        detail = f", {back.detail}" if back.detail else ""
        raise ChannelError(f"it could not answer the greeting ({back.reason}{detail}); its own log says more")
    greeting = greeting_from_frame(back)
    if isinstance(greeting, Refused):
        raise ChannelError(f"it declines: {greeting.reason}")
    if not isinstance(greeting, Introduction):
        raise ChannelError(f"it answered the greeting by a {type(greeting).__name__.lower()}; is it fedveil?")
    return greeting
