"""Flower messages as a grid inside this process needs them: checked, copied, answered, and never shared.

Private names of flwr 1.41 used here: `TaskIdentity` (without it no `Message` can be made), `make_message`, the write of
`Metadata._message_id` (Flower's own grids do the same), and two constants.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

import fedml_core.engine_guard  # noqa: F401 - switches Flower's calls home off, so it goes before flwr

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fedml_core.errors import RunError, StrategyError

__all__ = [
    "attributed",
    "check_instruction",
    "copy_content",
    "error_reply",
    "expiry",
    "part_from_sender",
    "server_identity",
    "stamp",
    "unknown_reply",
]

_one_run = threading.Lock()


@contextmanager
def server_identity(run_id: int) -> Iterator[None]:
    """Make this process the server of a run, as far as Flower's `Message(...)` is concerned, and undo it at exit.

    Raises: RunError: if it is one's already; Flower's identity of a run is global to the process.
    """
    if not _one_run.acquire(blocking=False):
        raise RunError("this process has a flower run open already; let it end before the next begins")
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    try:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = 1, run_id, SUPERLINK_NODE_ID
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before
        _one_run.release()


def check_instruction(message: Message, run_id: int) -> None:
    """Raise StrategyError if a message is nothing that a server of this run may send."""
    metadata = message.metadata
    where = f"the message to node {metadata.dst_node_id}"
    if not message.has_content():
        raise StrategyError(f"{where} has no content; give it a RecordDict")
    if metadata.reply_to_message_id:
        raise StrategyError(f"{where} is a reply; a server sends instructions only")
    if metadata.run_id != run_id:
        raise StrategyError(f"{where} is of run {metadata.run_id}, not {run_id}; make it in this run")
    if not metadata.ttl > 0:
        raise StrategyError(f"{where} has a ttl of {metadata.ttl} seconds; it must be > 0")


def part_from_sender(message: Message, content: RecordDict) -> Message:
    """Return a message with the metadata of `message`, which its sender may go on to change, and `content`."""
    return make_message(copy(message.metadata), content)


def copy_content(content: RecordDict) -> RecordDict:
    """Return records that share nothing that can be changed; the arrays' bytes cannot be, and are not copied."""
    return RecordDict({name: _copy_record(record) for name, record in content.items()})


def _copy_record(record: ArrayRecord | ConfigRecord | MetricRecord) -> ArrayRecord | ConfigRecord | MetricRecord:
    if isinstance(record, ArrayRecord):
        own = ArrayRecord()
        for key, array in record.items():
            own[key] = Array(
                array.dtype, tuple(array.shape), array.stype, bytes(array.data)
            )  # bytes(bytes) copies none
        return own
    if isinstance(record, MetricRecord):
        return MetricRecord({key: copy(value) for key, value in record.items()})
    return ConfigRecord({key: copy(value) for key, value in record.items()})


def stamp(message: Message, message_id: str) -> None:
    """Give a message its id."""
    message.metadata.__dict__["_message_id"] = message_id


def expiry(message: Message) -> float:
    """Return when a message's time to live is over, in seconds since 1970."""
    return message.metadata.created_at + message.metadata.ttl


def attributed(reply: Message, instruction: Message) -> Message:
    """Return a copy of a client's reply that answers `instruction`, and lives no longer than it."""
    if not isinstance(reply, Message):
        raise TypeError(f"a client app must return a Message, got {type(reply).__name__}")
    if reply.has_error():
        own = Message(Error(reply.error.code, reply.error.reason), reply_to=instruction)
    else:
        own = Message(copy_content(reply.content), reply_to=instruction)
    own.metadata.created_at = reply.metadata.created_at
    own.metadata.ttl = min(expiry(reply), expiry(instruction)) - reply.metadata.created_at
    stamp(own, f"{instruction.metadata.message_id}-reply")
    return own


def error_reply(instruction: Message, code: int, reason: str) -> Message:
    """Return the error that answers `instruction`."""
    reply = Message(Error(code, reason), reply_to=instruction)
    stamp(reply, f"{instruction.metadata.message_id}-reply")
    return reply


def unknown_reply(run_id: int, message_id: str) -> Message:
    """Return Flower's answer to whoever asks for a reply that nobody owes."""
    server = SUPERLINK_NODE_ID
    metadata = Metadata(run_id, "", server, server, message_id, "", time.time(), 0.0, "system")
    return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, f"no message {message_id} awaits a reply"))
