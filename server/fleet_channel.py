"""The fleet's side of the one seam: a channel whose clients are processes on other machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from fedml_core.errors import ReplyError, RunError
from fedml_core.handshake import Goodbye, Hello, NotGreetedError, greeting_to_frame
from fedml_core.message_frames import assignment_to_frame, reply_from_frame
from fedml_core.messages import Arrival, Assignment, Failure, Reply
from server.fleet_letters import LinkFailure
from server.reception import Back, FleetLink, Reception, say_nothing

_TICK_S = 0.2  # how often newcomers are looked for while nothing else happens
_FAREWELL_S = 30.0
_LOST = {
    "unavailable": "it fell silent or left while it worked",
    "restarted": "its process began anew while it worked",
    "expired": "it never took its work",
    "incomplete": "it left in the middle of its reply",
}


class FleetChannel:
    """Carries assignments to the clients of a fleet and their replies back. For one thread.

    Newcomers are greeted whenever the channel is used, and take part from the next round.

    Args: link: a `FleetServer`. hello: what every client is told first; its run and spec are those of the assignments.
        minimum_clients: a round begins when so many are there. wait_s: how long to wait for them; by default for ever.
        say: told in one line who comes and goes, and who is waited for. on_turn: called again and again while the
        channel is used.
    """

    def __init__(
        self,
        link: FleetLink,
        hello: Hello,
        *,
        minimum_clients: int = 1,
        wait_s: float | None = None,
        say: Callable[[str], object] = say_nothing,
        on_turn: Callable[[], object] | None = None,
    ) -> None:
        self._link, self._say, self._on_turn = link, say, on_turn
        self._spec = hello.spec
        self._minimum, self._wait_s = minimum_clients, wait_s
        self._reception = Reception(link, hello, say)

    def clients(self, round_number: int) -> Sequence[int]:
        """Return, sorted, the numbers of the clients that take part now, as soon as there are `minimum_clients`.

        Raises: RunError: if there are too few after `wait_s` seconds.
        """
        deadline = None if self._wait_s is None else time.monotonic() + self._wait_s
        members, said = self._reception.members, ""
        self._turn(0.0)
        while len(members) < self._minimum:
            names = ", ".join(member.name or f"client {number}" for number, member in sorted(members.items()))
            line = f"waiting for clients: {len(members)} of {self._minimum}{f' ({names})' if names else ''}"
            if line != said:
                self._say(line)
                said = line
            if deadline is not None and time.monotonic() >= deadline:
                raise RunError(
                    f"{len(members)} of {self._minimum} clients were there after {self._wait_s:g} s, before round "
                    f"{round_number}; start more, or lower server.minimum_clients"
                )
            self._turn(_TICK_S)
        return sorted(members)

    def exchange(self, assignment: Assignment, cohort: Sequence[int], timeout_s: float | None) -> Iterator[Arrival]:
        """Send `assignment` to each client of `cohort` and yield replies as they arrive, as `deliver` does."""
        return self.deliver(dict.fromkeys(cohort, assignment), timeout_s)

    def deliver(self, assignments: Mapping[int, Assignment], timeout_s: float | None) -> Iterator[Arrival]:
        """Send each client its assignment and yield replies as they arrive, until all did or time is up.

        A client that is lost on the way yields a `Failure` with rule `lost`; one whose reply is none, `malformed`; one
        whose process raised, `crashed`. What is not answered in time is cancelled, and never seen again.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        here = {number: self._reception.members.get(number) for number in assignments}
        numbers = {member.node: number for number, member in here.items() if member is not None}
        # Clients with one and the same assignment are sent one and the same frame.
        frames = {id(assignment): assignment_to_frame(assignment) for assignment in assignments.values()}
        letters = {node: frames[id(assignments[number])] for node, number in numbers.items()}
        waiting = {message_id: numbers[node] for message_id, node in self._link.push(letters).items()}
        try:
            for number in [number for number, member in here.items() if member is None]:
                yield self._failed(assignments[number], number, Failure("lost", "it left before it was asked"))
            while waiting:
                left_s = _TICK_S if deadline is None else min(_TICK_S, deadline - time.monotonic())
                if left_s <= 0:
                    break
                for message_id, back in self._turn(left_s):
                    if message_id in waiting:
                        number = waiting.pop(message_id)
                        yield self._arrived(assignments[number], number, back)
        finally:
            self._link.cancel(list(waiting))

    def farewell(self, reason: str, timeout_s: float = _FAREWELL_S) -> None:
        """Tell every client that is connected that the run is over, and wait until all have heard it or time is up."""
        members = {member.node: member for member in self._reception.members.values()}
        waiting = dict(self._link.push(dict.fromkeys(self._link.nodes(), greeting_to_frame(Goodbye(reason)))))
        deadline = time.monotonic() + timeout_s
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            for message_id, _ in self._link.poll(min(_TICK_S, left_s)):
                waiting.pop(message_id, None)
        self._link.cancel(list(waiting))
        for node in waiting.values():
            self._say(f"{members.get(node, 'a client')} still works and does not know yet that the run is over")

    def _turn(self, timeout_s: float) -> list[tuple[str, Back]]:
        """Greet newcomers, wait up to `timeout_s` for something, and return what belongs to nobody's greeting."""
        if self._on_turn is not None:
            self._on_turn()
        self._reception.look()
        return [
            (message_id, back)
            for message_id, back in self._link.poll(timeout_s)
            if not self._reception.take(message_id, back)
        ]

    def _arrived(self, assignment: Assignment, number: int, back: Back) -> Arrival:
        if isinstance(back, LinkFailure):
            if back.reason == "restarted" or back.detail == NotGreetedError.__name__:
                self._reception.greet_again(back.node)
            return self._failed(assignment, number, _failure(back))
        try:
            reply = reply_from_frame(back)
        except ReplyError as error:
            return self._failed(assignment, number, Failure(error.rule, str(error)), back.size_bytes)
        return Arrival(number, reply, back.size_bytes)

    def _failed(self, assignment: Assignment, number: int, body: Failure, size_bytes: int = 0) -> Arrival:
        reply = Reply(assignment.run, assignment.round, number, self._spec.fingerprint, body)
        return Arrival(number, reply, size_bytes)


def _failure(lost: LinkFailure) -> Failure:
    if lost.reason == "malformed":
        return Failure("malformed", "what came back is not a frame")
    if lost.detail == NotGreetedError.__name__:
        return Failure("lost", "its process began anew before it was asked")
    if lost.reason == "client-error":
        return Failure("crashed", f"its process raised {lost.detail or 'an exception'}; its own log says more")
    return Failure("lost", _LOST[lost.reason])
