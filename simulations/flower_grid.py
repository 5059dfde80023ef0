"""Runs an ordinary Flower app, ServerApp and ClientApp unchanged, inside this process: no Ray, no socket, no file.

`run_flower_apps` is all that most callers need. `LocalGrid` is for those who drive a Flower strategy themselves:

    with LocalGrid(client_app, clients=10) as grid:
        FedAvg().start(grid, initial_arrays, num_rounds=3)

Private names of flwr 1.41 used here: `TaskIdentity` (without it no `Message` can be made), `make_message`, the write of
`Metadata._message_id` (Flower's own grids do the same), `Run`, and two constants.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType, TracebackType
from typing import Self

import fedml_core.engine_guard  # noqa: F401 - switches Flower's calls home off, so it goes before flwr

# isort: split
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
    UserConfig,
    UserConfigValue,
)
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedml_core.errors import ConfigError, RunError, StrategyError

FIRST_NODE_ID = 1000
"""Node ids count up from here: the client of partition 7 is node 1007 (Flower keeps 1 for the server)."""

Clients = int | Sequence[Mapping[str, UserConfigValue]]
ClientCallable = Callable[[Message, Context], Message]

_PATIENT_ASKS = 6  # Flower's strategies ask twice for each batch that they send

_log = logging.getLogger(__name__)
_one_run = threading.Lock()


class Fault(Enum):
    """What may go wrong with one message, for tests of a strategy's patience."""

    DROP = "the client never sees the message, and no reply ever comes"
    LATE = "the client does its work and keeps its new state, but its reply never comes"
    ERROR = "the client is not run; the server gets an error reply with the reason InjectedFault"


FaultHook = Callable[[int, Message], Fault | None]


@dataclass(frozen=True)
class _Sent:
    """A message on its way, what will go wrong with it, and its reply to come."""

    instruction: Message
    fault: Fault | None = None
    reply: Future[Message] = field(default_factory=Future)


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
        count, self._node_configs = _checked_clients(clients)
        self._node_ids = range(FIRST_NODE_ID, FIRST_NODE_ID + count)
        self._threads = _at_least_one("threads", threads)
        self._faults = faults
        self._run = replace(Run.create_empty(1), override_config=_checked_config("run_config", run_config or {}))
        self._contexts: dict[int, Context] = {}
        self._sent: dict[str, _Sent] = {}
        self._lines: dict[int, deque[_Sent]] = {}
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
            stack.enter_context(_server_identity(self._run.run_id))
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
        return MappingProxyType(self._contexts)

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
                len(self._node_ids),
            )
        return list(self._node_ids)

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
            self._check(message)
        self._asked = 0 if batch else self._asked
        # One copy per content is enough to part it from the server; each client copies again when its turn comes.
        snapshots = {id(message.content): _copy_content(message.content) for message in batch}
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
        _wait_for(awaited, math.inf if timeout is None else timeout)
        replies = self.pull_messages(ids)
        with self._lock:
            for message_id in ids:
                self._sent.pop(message_id, None)
        if errors := Counter(reply.error.reason for reply in replies if reply.has_error()):
            _log.warning("%d of %d messages failed: %s", errors.total(), len(ids), dict(errors))
        return replies

    def _check(self, message: Message) -> None:
        metadata = message.metadata
        where = f"the message to node {metadata.dst_node_id}"
        if not message.has_content():
            raise StrategyError(f"{where} has no content; give it a RecordDict")
        if metadata.reply_to_message_id:
            raise StrategyError(f"{where} is a reply; a server sends instructions only")
        if metadata.run_id != self._run.run_id:
            raise StrategyError(f"{where} is of run {metadata.run_id}, not {self._run.run_id}; make it in this run")
        if not metadata.ttl > 0:
            raise StrategyError(f"{where} has a ttl of {metadata.ttl} seconds; it must be > 0")

    def _push(self, message: Message, content: RecordDict) -> str:
        node_id = message.metadata.dst_node_id
        with self._lock:
            self._count += 1
            message_id = f"{self._run.run_id}-{self._count}"
        _stamp(message, message_id)
        fault = self._faults(node_id, message) if self._faults else None
        if fault is not None and not isinstance(fault, Fault):
            raise ConfigError(f"a fault hook must return a Fault or None, got {type(fault).__name__}")
        sent = _Sent(make_message(copy(message.metadata), content), fault)
        with self._lock:
            self._sent[message_id] = sent
        if node_id not in self._node_ids:
            sent.reply.set_result(_error(sent.instruction, ErrorCode.NODE_UNAVAILABLE, "there is no such node"))
        elif fault is Fault.ERROR:
            sent.reply.set_result(_error(sent.instruction, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "InjectedFault"))
        elif fault is not Fault.DROP:
            self._enqueue(node_id, sent)
        return message_id

    def _pull(self, message_id: str) -> Message | None:
        with self._lock:
            sent = self._sent.get(message_id)
            if sent is None:
                return _unknown(self._run.run_id, message_id)
            expired = _expiry(sent.instruction) < time.time()
            lost = sent.fault in (Fault.DROP, Fault.LATE) or not sent.reply.done()
            if lost and not expired:
                return None
            del self._sent[message_id]
        if expired:
            return _error(sent.instruction, ErrorCode.MESSAGE_UNAVAILABLE, "the message outlived its ttl")
        reply = sent.reply.result()
        if _expiry(reply) < time.time():
            return _error(sent.instruction, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "the reply outlived its ttl")
        return reply

    def _enqueue(self, node_id: int, sent: _Sent) -> None:
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
        if _expiry(instruction) < time.time():
            return _error(instruction, ErrorCode.MESSAGE_UNAVAILABLE, "the message outlived its ttl")
        try:
            message = make_message(copy(instruction.metadata), _copy_content(instruction.content))
            return _attributed(self._client_app(message, self._context(node_id)), instruction)
        except BaseException as error:  # noqa: BLE001 - whatever a client raises, even SystemExit, is its own failure
            _log.debug("client %d failed", node_id, exc_info=error)
            return _error(instruction, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__)

    def _context(self, node_id: int) -> Context:
        with self._lock:
            if node_id not in self._contexts:
                index = node_id - FIRST_NODE_ID
                config: UserConfig = {"partition-id": index, "num-partitions": len(self._node_ids)}
                if self._node_configs is not None:
                    config = self._node_configs[index]
                run_config = dict(self._run.override_config)
                self._contexts[node_id] = Context(self._run.run_id, node_id, config, RecordDict(), run_config)
            return self._contexts[node_id]

    def _close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._lines.clear()
            self._sent.clear()


def run_flower_apps(
    server_app: ServerApp,
    client_app: ClientCallable,
    *,
    clients: Clients,
    run_config: Mapping[str, UserConfigValue] | None = None,
    threads: int = 1,
    faults: FaultHook | None = None,
) -> Context:
    """Run a Flower app to its end in this process and return the server's context, with what it left in `state`.

    A strategy that wants more nodes than there are clients (Flower's default is two) waits for ever, as in a fleet; a
    warning says so.
    The exceptions of the server app come out as they are; those of clients are error replies with the class name only
    (their tracebacks go to this module's logger, at level DEBUG).
    Args: as `LocalGrid`.
    Raises: ConfigError: as `LocalGrid`. RunError: if this process has a Flower run open already.
    """
    grid = LocalGrid(client_app, clients=clients, run_config=run_config, threads=threads, faults=faults)
    run = grid.run
    context = Context(run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), run.override_config)
    with grid:
        server_app(grid, context)
    return context


@contextmanager
def _server_identity(run_id: int) -> Iterator[None]:
    """Make this process the server of a run, as far as Flower's `Message(...)` is concerned, and undo it at exit."""
    if not _one_run.acquire(blocking=False):
        raise RunError("this process has a flower run open already; let it end before the next begins")
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    try:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = 1, run_id, SUPERLINK_NODE_ID
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before
        _one_run.release()


def _checked_clients(clients: Clients) -> tuple[int, list[UserConfig] | None]:
    """Return how many nodes there are, and their configs where they were named."""
    if isinstance(clients, int):
        return _at_least_one("clients", clients), None
    if not isinstance(clients, list | tuple) or not clients:
        raise ConfigError(f"clients must be a number or a list of node configs, got {clients!r}; name one at least")
    return len(clients), [_checked_config(f"node config {index}", config) for index, config in enumerate(clients)]


def _checked_config(name: str, config: Mapping[str, UserConfigValue]) -> UserConfig:
    if not isinstance(config, Mapping):
        raise ConfigError(f"{name} must be a mapping, got {type(config).__name__}")
    for key, value in config.items():
        if not isinstance(key, str) or not isinstance(value, bool | int | float | str):
            raise ConfigError(f"{name} maps {key!r} to a {type(value).__name__}; use text keys, and numbers or text")
    return dict(config)


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")
    return value


def _copy_content(content: RecordDict) -> RecordDict:
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


def _stamp(message: Message, message_id: str) -> None:
    message.metadata.__dict__["_message_id"] = message_id


def _wait_for(awaited: Sequence[_Sent], patience_s: float) -> None:
    """Return when each reply is there or its message's time to live is over, or when patience ends."""
    deadline_s = time.monotonic() + patience_s
    while True:
        now = time.time()
        waiting = [sent for sent in awaited if not sent.reply.done() and _expiry(sent.instruction) >= now]
        left_s = min(deadline_s - time.monotonic(), max((_expiry(s.instruction) - now for s in waiting), default=0.0))
        if not waiting or left_s < 0:
            return
        wait([sent.reply for sent in waiting], timeout=min(left_s, threading.TIMEOUT_MAX))


def _expiry(message: Message) -> float:
    return message.metadata.created_at + message.metadata.ttl


def _attributed(reply: Message, instruction: Message) -> Message:
    """Return a copy of a client's reply that answers `instruction`, and lives no longer than it."""
    if not isinstance(reply, Message):
        raise TypeError(f"a client app must return a Message, got {type(reply).__name__}")
    if reply.has_error():
        own = Message(Error(reply.error.code, reply.error.reason), reply_to=instruction)
    else:
        own = Message(_copy_content(reply.content), reply_to=instruction)
    own.metadata.created_at = reply.metadata.created_at
    own.metadata.ttl = min(_expiry(reply), _expiry(instruction)) - reply.metadata.created_at
    _stamp(own, f"{instruction.metadata.message_id}-reply")
    return own


def _error(instruction: Message, code: int, reason: str) -> Message:
    reply = Message(Error(code, reason), reply_to=instruction)
    _stamp(reply, f"{instruction.metadata.message_id}-reply")
    return reply


def _unknown(run_id: int, message_id: str) -> Message:
    server = SUPERLINK_NODE_ID
    metadata = Metadata(run_id, "", server, server, message_id, "", time.time(), 0.0, "system")
    return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, f"no message {message_id} awaits a reply"))
