"""The exchanges of a secure sum over Flower's grid: a `Channel` whose replies are Flower's messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from fedml_core import engine_guard  # noqa: F401 - its import sets Flower's switches, before Flower reads them
from fedml_core.errors import ReplyError
from fedml_core.flower_secure import WITHOUT_MOD, Lesson, Packed, answered
from fedml_core.message_frames import assignment_to_frame, reply_from_frame
from fedml_core.messages import Arrival, Assignment, Failure, Reply, SecureWork
from fedml_core.untrusted import printable
from fedml_core.wire import Frame

# isort: split
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

__all__ = ["GridChannel", "answers", "number_in"]

Answer = Callable[[], int | Frame]
"""Returns what a node answered; raises ReplyError if that is nothing to use."""


class GridChannel:
    """Carries the exchanges of one round over Flower's grid.

    `send_and_receive` holds all replies of an exchange at once: O(n d), as under Flower's own strategies.
    """

    def __init__(self, grid: Grid, nodes: Mapping[int, int], lesson: Lesson, active: bool) -> None:
        self._grid, self._nodes, self._lesson, self._active = grid, nodes, lesson, active
        self.model_bytes = 0
        """What the models weighed that were sent so far; they are no part of any frame."""

    def clients(self, round_number: int) -> Sequence[int]:
        """Return the members of the round."""
        return sorted(self._nodes)

    def exchange(self, assignment: Assignment, cohort: Sequence[int], timeout_s: float | None) -> Iterator[Arrival]:
        """Send the same to each member."""
        return self.deliver(dict.fromkeys(cohort, assignment), timeout_s)

    def deliver(self, assignments: Mapping[int, Assignment], timeout_s: float | None) -> Iterator[Arrival]:
        """Send each member its part and yield what came back in time."""
        packed: dict[int, Packed] = {}
        messages = []
        for member, assignment in assignments.items():
            trains = isinstance(assignment.work, SecureWork) and assignment.work.train is not None
            if id(assignment) not in packed:
                packed[id(assignment)] = Packed.of(assignment_to_frame(assignment), self._lesson if trains else None)
            if trains:
                self.model_bytes += sum(len(array.data) for array in self._lesson.arrays.values())
            content = packed[id(assignment)].to(member, self._active)
            group = str(assignment.round)
            messages.append(Message(content, self._nodes[member], MessageType.TRAIN, group_id=group))
        members = {node: member for member, node in self._nodes.items()}
        for node, answer in answers(self._grid, messages, timeout_s):
            member = members[node]
            yield _arrival(member, assignments[member], answer)


def answers(grid: Grid, messages: Sequence[Message], timeout_s: float | None) -> Iterator[tuple[int, Answer]]:
    """Yield each node's first answer, to be read by whoever can say what is wrong with it; ignore strangers."""
    if not messages:
        return
    replies = list(grid.send_and_receive(messages, timeout=timeout_s))
    # An error that Flower itself reports names the server as its source; the message's id tells the node.
    by_id = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    waiting = set(by_id.values())
    for reply in replies:
        node = by_id.get(reply.metadata.reply_to_message_id)
        if node is not None and node in waiting:
            waiting.discard(node)
            yield node, _reader(reply)


def _reader(reply: Message) -> Answer:
    def read() -> int | Frame:
        if reply.has_error():
            why = printable(str(reply.error.reason), 300)
            raise ReplyError("error", f"it failed: {why!r}; if it has no part in secure sums at all, {WITHOUT_MOD}")
        content: RecordDict = reply.content
        return answered(content)

    return read


def number_in(answer: Answer) -> int:
    """Return the number under which a node takes part; ReplyError if it did not say one."""
    number = answer()
    if not isinstance(number, int):
        raise ReplyError("malformed", "it answered an introduction with something else")
    return number


def _arrival(member: int, assignment: Assignment, answer: Answer) -> Arrival:
    try:
        frame = answer()
        if isinstance(frame, int):
            raise ReplyError("malformed", "it answered an exchange with an introduction")
        return Arrival(member, reply_from_frame(frame), frame.size_bytes)
    except ReplyError as error:
        failure = Failure(error.rule, str(error))
        return Arrival(member, Reply(assignment.run, assignment.round, member, assignment.fingerprint, failure), 0)
