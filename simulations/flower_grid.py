"""A Flower grid whose nodes live in this process: no Ray, no socket, no file. `flower_apps` runs whole apps on it.

For those who drive a Flower strategy themselves:

    with LocalGrid(client_app, clients=10) as grid:
        FedAvg().start(grid, initial_arrays, num_rounds=3)

Private names of flwr 1.41 used here: `Run` and a constant; see also `flower_messages`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Self

import fedml_core.engine_guard  # noqa: F401 - switches Flower's calls home off, so it goes before flwr

# isort: split
from flwr.app import Context, Message, RecordDict, UserConfigValue
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedml_core.checks import require_whole
from fedml_core.errors import ConfigError, StrategyError
from simulations.flower_mail import Fault, FaultHook, Sent, wait_for
from simulations.flower_messages import (
    attributed,
    check_instruction,
    copy_content,
    error_reply,
    expiry,
    part_from_sender,
    server_identity,
    stamp,
    unknown_reply,
)
from simulations.flower_nodes import Clients, Nodes, checked_config

__all__ = ["ClientCallable", "Fault", "FaultHook", "LocalGrid"]

ClientCallable = Callable[[Message, Context], Message]

_PATIENT_ASKS = 6  # Flower's strategies ask twice for each batch that they send

_log = logging.getLogger(__name__)


class LocalGrid(Grid):
    """A Flower grid whose nodes live in this process; open it with `with`.

    Guarantees: each node keeps its own `context.state` as long as the grid lives, and costs nothing until its first
    message. A node handles one message at a time, in the order sent. Replies come back in the order of the messages,
    so the thread count changes no sum. Server and clients share no record: what one changes, the other never sees
    (the arrays' bytes are immutable and are not copied). A reply is attributed to the node that was asked, whatever
    the client wrote in its metadata.
    Args: client_app: a `ClientApp`, or any callable that takes its arguments. clients: how many nodes, each with
        Flower's `partition-id` and `num-partitions` as its node config, or one node config per node.
        run_config: what apps find in `context.run_config`. threads: clients that may run at once; a client app that
        uses global state (seeds, global variables) needs 1. faults: called for every message as it is sent, in order,
        with the node id and the message.
    Raises: ConfigError: if there is no client or no thread, or a config holds what Flower cannot.
    """

    def __init__(
        self,
        client_app: ClientCallable,
        *,
        clients: Clients,
        run_config: Mapping[str, UserConfigValue] | None = None,
        threads: int = 1,
        faults: FaultHook | None = None,
    ) -> None:
        self._client_app = client_app
        self._nodes = Nodes(clients)
        require_whole("threads", threads, at_least=1)
        self._threads = threads
        self._faults = faults
        self._run = replace(Run.create_empty(1), override_config=checked_config("run_config", run_config or {}))
        self._sent: dict[str, Sent] = {}
        self._lines: dict[int, deque[Sent]] = {}
        self._count = 0
        self._asked = 0
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        """Take the process's one Flower run.

        Raises: RunError: if another one is open; Flower's identity of a run is global to the process.
        """
        with ExitStack() as stack:
            stack.enter_context(server_identity(self._run.run_id))
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="flower-client")
            stack.callback(self._close)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop messages that no client has begun, wait for those at work, and give the process back as it was."""
        self._cleanup.close()

    @property
    def contexts(self) -> Mapping[int, Context]:
        """The contexts of the nodes that were messaged so far, by node id; read them between exchanges."""
        return self._nodes.contexts

    @property
    def run(self) -> Run:
        """A copy of the run's description."""
        return replace(self._run, override_config=dict(self._run.override_config))

    def set_run(self, run: Run) -> None:
        """Replace the run's description.

        Raises: StrategyError: if it has another run id.
        """
        if run.run_id != self._run.run_id:
            raise StrategyError(f"this grid serves run {self._run.run_id}, got run {run.run_id}; make a new grid")
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a new message; Flower prefers `Message(...)` today."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return every node's id, the same ids always; warn, once, a server app that seems to wait for more."""
        self._asked += 1
        if self._asked == _PATIENT_ASKS:
            _log.warning(
                "the server app keeps asking for nodes and sends nothing; this run has %d and never gets more: "
                "lower what it waits for (min_available_nodes, min_train_nodes, min_evaluate_nodes)",
                len(self._nodes.ids),
            )
        return list(self._nodes.ids)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Start the clients' work and return the messages' ids, in order, which are also written into the messages.

        A message to a node that does not exist gets an error reply (NODE_UNAVAILABLE).
        Raises: StrategyError: if a message has no content, is itself a reply, is of another run, or has a time to
            live that is not > 0 seconds, or if the grid is not open; then none was sent. ConfigError: if the fault
            hook returns something else than a `Fault` or None.
        """
        if self._pool is None:
            raise StrategyError("this grid is not open; use it inside `with LocalGrid(...) as grid`")
        batch = list(messages)
        for message in batch:
            check_instruction(message, self._run.run_id)
        self._asked = 0 if batch else self._asked
        # One copy per content is enough to part it from the server; each client copies again when its turn comes.
        snapshots = {id(message.content): copy_content(message.content) for message in batch}
        return [self._push(message, snapshots[id(message.content)]) for message in batch]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have come, in the order of the ids; what is still awaited is absent.

        Like Flower, answers for an id that is unknown or was pulled before, and for a message or reply whose time to
        live is over, with an error reply (MESSAGE_UNAVAILABLE, REPLY_MESSAGE_UNAVAILABLE).
        """
        replies = (self._pull(message_id) for message_id in message_ids)
        return [reply for reply in replies if reply is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return the replies that came within `timeout` seconds (None: as long as messages live), in message order.

        Late replies are absent and are thrown away when they come; their clients' states keep what they did. A dropped
        message is not waited for, and an injected late one for no longer than its client works. Failures are logged.
        Raises: StrategyError: as `push_messages`, and if timeout is negative.
        """
        if timeout is not None and not timeout >= 0:
            raise StrategyError(f"timeout must be >= 0 seconds, got {timeout}")
        ids = self.push_messages(messages)
        with self._lock:
            sent = [self._sent[message_id] for message_id in ids]
        awaited = [one for one in sent if one.fault is not Fault.DROP]
        wait_for(awaited, math.inf if timeout is None else timeout)
        replies = self.pull_messages(ids)
        with self._lock:
            for message_id in ids:
                self._sent.pop(message_id, None)
        if errors := Counter(reply.error.reason for reply in replies if reply.has_error()):
            _log.warning("%d of %d messages failed: %s", errors.total(), len(ids), dict(errors))
        return replies

    def _push(self, message: Message, content: RecordDict) -> str:
        node_id = message.metadata.dst_node_id
        with self._lock:
            self._count += 1
            message_id = f"{self._run.run_id}-{self._count}"
        stamp(message, message_id)
        fault = self._faults(node_id, message) if self._faults else None
        if fault is not None and not isinstance(fault, Fault):
            raise ConfigError(f"a fault hook must return a Fault or None, got {type(fault).__name__}")
        sent = Sent(part_from_sender(message, content), fault)
        with self._lock:
            self._sent[message_id] = sent
        if node_id not in self._nodes.ids:
            sent.reply.set_result(error_reply(sent.instruction, ErrorCode.NODE_UNAVAILABLE, "there is no such node"))
        elif fault is Fault.ERROR:
            sent.reply.set_result(error_reply(sent.instruction, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "InjectedFault"))
        elif fault is not Fault.DROP:
            self._enqueue(node_id, sent)
        return message_id

    def _pull(self, message_id: str) -> Message | None:
        with self._lock:
            sent = self._sent.get(message_id)
            if sent is None:
                return unknown_reply(self._run.run_id, message_id)
            expired = expiry(sent.instruction) < time.time()
            lost = sent.fault in (Fault.DROP, Fault.LATE) or not sent.reply.done()
            if lost and not expired:
                return None
            del self._sent[message_id]
        if expired:
            return error_reply(sent.instruction, ErrorCode.MESSAGE_UNAVAILABLE, "the message outlived its ttl")
        reply = sent.reply.result()
        if expiry(reply) < time.time():
            return error_reply(sent.instruction, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "the reply outlived its ttl")
        return reply

    def _enqueue(self, node_id: int, sent: Sent) -> None:
        with self._lock:
            line = self._lines.setdefault(node_id, deque())
            line.append(sent)
            if len(line) == 1 and self._pool is not None:
                self._pool.submit(self._serve_first, node_id)

    def _serve_first(self, node_id: int) -> None:
        """Serve the head of a node's line; the head stays in line while it is served, so that no other begins."""
        sent = self._lines[node_id][0]
        sent.reply.set_result(self._answer(node_id, sent.instruction))
        with self._lock:
            line = self._lines[node_id]
            line.popleft()
            if not line:
                del self._lines[node_id]
            elif self._pool is not None:
                self._pool.submit(self._serve_first, node_id)

    def _answer(self, node_id: int, instruction: Message) -> Message:
        if expiry(instruction) < time.time():
            return error_reply(instruction, ErrorCode.MESSAGE_UNAVAILABLE, "the message outlived its ttl")
        try:
            context = self._nodes.context(node_id, self._run.run_id, self._run.override_config)
            message = part_from_sender(instruction, copy_content(instruction.content))
            return attributed(self._client_app(message, context), instruction)
        except BaseException as error:  # noqa: BLE001 - whatever a client raises, even SystemExit, is its own failure
            _log.debug("client %d failed", node_id, exc_info=error)
            return error_reply(instruction, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__)

    def _close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._lines.clear()
            self._sent.clear()
