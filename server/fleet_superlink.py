"""Flower's SuperLink inside this process: its state, in memory, with one run that never ends.

Nothing else of it is started: there is no Control and no Runtime API, so no port, token or task by which another
process could take the server's place, and no app to ship: the run has no code. With `server/fleet.py` and
`clients/fleet.py` this is one of three files that use Flower's private names.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable

from fedml_core import engine_guard  # noqa: F401 - its import sets Flower's switches, before Flower reads them
from fedml_core.flower_records import unpack
from fedml_core.wire import Frame
from server.fleet_letters import Answer, ClientError

# isort: split
from flwr.app import Message, Metadata, RecordDict
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode, Status
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation import NoOpFederationManager

__all__ = ["SuperLink"]

_TTL_S = 7 * 24 * 3600.0  # a round's own deadline comes first, see `FleetServer.cancel`
_CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,79}")


class SuperLink:
    """Flower's in-memory state with one run that never ends, as a `Mailroom`."""

    def __init__(self) -> None:
        self.store = InMemoryObjectStore()
        self.links = InMemoryLinkState(NoOpFederationManager(), self.store)
        self.run_id = self.links.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        # A run is as its task is. Claiming the task would make a token that expires, and that others could hold.
        with self.links.lock_task_store:
            for task in self.links.task_store.values():
                task.status.status = Status.RUNNING

    def state(self) -> InMemoryLinkState:
        """Return the state: this object stands in for Flower's factory of states."""
        return self.links

    def write(self, node: int, records: RecordDict) -> Message:
        """Return a message whose parts are stored, and which cannot be taken yet."""
        secret = secrets.token_hex(16)  # without it, a node could work out the ids of messages to others
        message = make_message(
            Metadata(self.run_id, "", SUPERLINK_NODE_ID, node, "", secret, time.time(), _TTL_S, "query"), records
        )
        message.metadata.__dict__["_message_id"] = message.object_id
        parts = inflatable_object.get_all_nested_objects(message)
        with self.store.lock_store:  # a part that another message shares must not be deleted half-way through
            missing = self.store.preregister(self.run_id, inflatable_object.get_object_tree(message))
        for part in missing:
            self.store.put(part, parts[part].deflate())
        return remove_content_from_message(message)

    def answers(self, message_ids: set[str]) -> Iterable[Answer]:
        """Yield what is known of those messages that were answered or never will be."""
        for answer in self.links.get_message_res(message_ids, self.run_id):
            message_id, reply = answer.metadata.reply_to_message_id, answer.metadata.message_id
            if answer.metadata.src_node_id == SUPERLINK_NODE_ID:
                self.store.delete(reply)
                silent = answer.error.code == ErrorCode.NODE_UNAVAILABLE
                yield Answer(message_id, failure="unavailable" if silent else "expired")
                continue
            self.forget(message_id, "")
            try:
                tree = inflatable_object.iterate_object_tree(self.store.get_object_tree(reply))
                yield Answer(message_id, reply, tuple(part.object_id for part in tree))
            except NoObjectInStoreError:
                yield Answer(message_id, failure="incomplete")

    def part(self, part: str) -> bytes | None:
        """Return a part of a reply: empty while it has not arrived, None if it never will."""
        return self.links.get_object(self.run_id, part)

    def online(self) -> set[int]:
        """Return the nodes that are online."""
        return self.links.get_nodes(self.run_id)

    def open(self, reply: str, contents: dict[str, bytes]) -> Frame | ClientError:
        """Return what a whole reply holds; may raise anything, for the bytes are a stranger's."""
        message = inflatable_utils.inflate_object_from_contents(reply, contents)
        if not isinstance(message, Message):
            raise TypeError("a reply must be a message")
        if message.has_error():
            name = message.error.reason or ""
            return ClientError(name if _CLASS_NAME.fullmatch(name) else "")
        return unpack(message.content)

    def forget(self, message_id: str, reply: str) -> None:
        """Drop a message and its reply, as far as they are there."""
        self.links.delete_messages({message_id})
        self.store.delete(message_id)
        self.store.delete(reply)
