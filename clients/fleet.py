"""A client's end of the fleet: Flower's Fleet API, spoken without the parts of Flower that end or signal the process.

Flower's own connection calls `exit` when a server refuses it, sends SIGINT to its own process when a session is over,
fetches code, follows redirects, and reports exceptions in full. Here a server that is away or refuses is asked again,
a frame goes to one function of the site's own, and of an exception only the name of its class leaves. With
`server/fleet.py` and `server/fleet_superlink.py` this is one of three files that use Flower's private names.
"""

from __future__ import annotations

import contextlib
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from clients.fleet_trouble import (
    Patience,
    SessionOverError,
    StoppedError,
    is_registered_already,
    is_this_machine,
    split_address,
    trust_only,
)
from fedml_core import engine_guard  # noqa: F401 - its import sets Flower's switches, before Flower reads them
from fedml_core.errors import ConfigError
from fedml_core.flower_records import pack, unpack
from fedml_core.identity import node_key_bytes
from fedml_core.wire import Frame

# isort: split
from flwr.app import Error, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

Handler = Callable[[Frame], Frame]
OnState = Callable[[str], None]

_AT_ONCE = 4  # parts of a frame under way at the same time
_READ_TIMEOUT_S = 30.0  # longer than the server holds a request for mail
_GLANCE_S = 0.1  # how soon a wish to stop is noticed while the server holds such a request
_SALT_BYTES = 16
_BROKEN = (httpx.HTTPError, ValueError)


class _Wire(FleetHttpClient):
    """Flower's HTTP calls, signed, without redirects: a redirected update could go anywhere in the site's network."""

    def __init__(self, url: str, key: ec.EllipticCurvePrivateKey, trust: ssl.SSLContext | None) -> None:
        super().__init__(url, interceptors=[NodeAuthHttpInterceptor(key, key.public_key())], verify=False)
        self._client.close()
        self._client = httpx.Client(
            verify=True if trust is None else trust,
            timeout=_READ_TIMEOUT_S,
            follow_redirects=False,
            trust_env=trust is not None,  # a proxy has no part in what stays on this machine
        )


class FleetClient:
    """Connects to a server, hands each frame that it sends to a function, and sends back what that returns."""

    def __init__(
        self,
        server: str,
        *,
        tls_ca: Path | None = None,
        node_key: ec.EllipticCurvePrivateKey | None = None,
        insecure: bool = False,
        heartbeat_s: float = 10.0,
        longest_wait_s: float = 30.0,
    ) -> None:
        """Remember how to connect; nothing is sent yet.

        Args: server: host:port. node_key: may be left out when insecure. heartbeat_s: the server counts this client as
        gone after twice as long without a sign of life; Flower's servers take 10 to 1800. longest_wait_s: between
        attempts to reach a server that is away.
        Raises: ConfigError: if an argument is unusable, or an insecure server would be on another machine.
        """
        host, _ = split_address(server)
        if insecure and (tls_ca is not None or not is_this_machine(host)):
            raise ConfigError(f"an insecure client uses no TLS and reaches this machine only, got {server!r}; use TLS")
        if not insecure and (tls_ca is None or node_key is None):
            raise ConfigError("a client needs tls_ca and node_key; give both, or insecure for a server on this machine")
        if heartbeat_s <= 0 or longest_wait_s <= 0:
            raise ConfigError(f"heartbeat_s and longest_wait_s must be > 0, got {heartbeat_s} and {longest_wait_s}")
        self._server, self._node_key = server, node_key
        self._trust = None if tls_ca is None else trust_only(tls_ca)
        self._heartbeat_s, self._longest_wait_s = heartbeat_s, longest_wait_s

    def serve(self, handler: Handler, stop: threading.Event, on_state: OnState) -> None:
        """Serve until `stop` is set; a frame that is being handled then is finished and answered first.

        A server that is away, restarts or refuses is asked again. If `handler` raises, the server is told the name of
        the exception's class. KeyboardInterrupt takes leave of the server and is raised again. `on_state` is told in
        one line what happens to the connection, in the thread that called.
        Guarantees: returns or raises without a thread or socket left, and without having touched signals or `exit`.
        Raises: ChannelError: if the server is not the trusted one, or not a fedveil server.
        """
        key = self._node_key or ec.generate_private_key(ec.SECP384R1())
        patience = Patience(self._server, stop, on_state, self._longest_wait_s)
        url = f"{'http' if self._trust is None else 'https'}://{self._server}"
        with (
            contextlib.suppress(StoppedError),
            _Wire(url, key, self._trust) as wire,
            ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fedveil-parts") as pool,
        ):
            session = _Session(wire, key, patience, pool, stop, on_state)
            while not stop.is_set():
                try:
                    with session.held(self._heartbeat_s, registers=self._trust is None):
                        on_state(f"connected to {self._server}")
                        session.work(handler)
                except SessionOverError as over:
                    patience.wait(str(over))
        on_state(f"left {self._server}")


@dataclass
class _Session:
    """One connection: who we are to the server, and the frames that we take and answer."""

    wire: _Wire
    key: ec.EllipticCurvePrivateKey
    patience: Patience
    pool: ThreadPoolExecutor
    stop: threading.Event
    on_state: OnState
    idle: threading.Event = field(default_factory=threading.Event)
    node: Node = field(default_factory=Node)

    @contextlib.contextmanager
    def held(self, heartbeat_s: float, *, registers: bool) -> Iterator[None]:
        """Be known to the server as online; take leave at the end, however it comes."""
        public = node_key_bytes(self.key.public_key())
        if registers:
            self.patience.call(lambda: self._register(public))
        hello = fleet_pb2.ActivateNodeRequest(public_key=public, heartbeat_interval=heartbeat_s)
        self.node = Node(node_id=self.patience.call(lambda: self.wire.ActivateNode(hello)).node_id)
        over = threading.Event()
        beat = threading.Thread(target=self._beat, args=(heartbeat_s, over), name="fedveil-heartbeat", daemon=True)
        beat.start()
        try:
            yield
        finally:
            over.set()
            beat.join()
            self._leave()

    def work(self, handler: Handler) -> None:
        """Take frames and answer them until asked to stop."""
        request = fleet_pb2.PullMessagesRequest(node=self.node)
        while not self.stop.is_set():
            self.idle.set()
            mail = self.patience.call(lambda: self._take(request))
            self.idle.clear()
            if self.stop.is_set():
                return
            for instruction, tree in mail:
                self._handle(instruction, tree, handler)
            if not mail:
                self.stop.wait(0.05)  # a server that does not hold requests must not be flooded

    def _take(self, request: fleet_pb2.PullMessagesRequest) -> list[tuple[Message, message_pb2.ObjectTree]]:
        mail = self.wire.PullMessages(request)
        return [
            (message_from_proto(proto), tree)
            for proto, tree in zip(mail.messages_list, mail.message_object_trees, strict=True)
        ]

    def _handle(self, instruction: Message, tree: message_pb2.ObjectTree, handler: Handler) -> None:
        about: dict[str, Any] = {"node": self.node, "run_id": instruction.metadata.run_id}
        contents = self._fetch(tree, about)
        if contents is None:
            self.on_state("the server withdrew a frame before it was here")
            return
        received = message_pb2.ConfirmMessageReceivedRequest(message_object_id=tree.object_id, **about)
        self.patience.call(lambda: self.wire.ConfirmMessageReceived(received))
        reply = Message(self._answer(tree.object_id, contents, handler), reply_to=instruction)
        with inflatable_object.no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            self._send(reply, about)

    def _fetch(self, tree: message_pb2.ObjectTree, about: dict[str, Any]) -> dict[str, bytes] | None:
        parts = dict.fromkeys(part.object_id for part in inflatable_object.iterate_object_tree(tree))
        contents: dict[str, bytes] = {}

        def fetch(part: str) -> bool:
            answer = self.wire.PullObject(message_pb2.PullObjectRequest(object_id=part, **about))
            if answer.object_available:
                contents[part] = answer.object_content
            return bool(answer.object_available)

        def fetch_rest() -> bool:
            return all(self.pool.map(fetch, [part for part in parts if part not in contents]))

        return contents if self.patience.call(fetch_rest) else None

    def _answer(self, root: str, contents: dict[str, bytes], handler: Handler) -> RecordDict | Error:
        try:
            instruction = inflatable_utils.inflate_object_from_contents(root, contents)
            if not isinstance(instruction, Message):
                raise TypeError("an instruction must be a message")
            return pack(handler(unpack(instruction.content)), salt=secrets.token_bytes(_SALT_BYTES))
        except Exception as error:  # noqa: BLE001 - the site's own code may raise anything, and only its class name leaves
            self.on_state(f"a frame could not be answered: {type(error).__name__}")
            return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__)

    def _send(self, reply: Message, about: dict[str, Any]) -> None:
        parts = inflatable_object.get_all_nested_objects(reply)
        announced = fleet_pb2.PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[inflatable_object.get_object_tree(reply)],
        )
        wanted = self.patience.call(lambda: self.wire.PushMessages(announced))
        missing = list(wanted.objects_to_push)
        for start in range(0, len(missing), _AT_ONCE):  # not all at once: each part is a copy
            batch = {part: parts[part].deflate() for part in missing[start : start + _AT_ONCE]}
            self._send_batch(batch, {**about, "session_id": wanted.session_id})

    def _send_batch(self, contents: dict[str, bytes], about: dict[str, Any]) -> None:
        def send(part: str) -> None:
            request = message_pb2.PushObjectRequest(object_id=part, object_content=contents[part], **about)
            self.wire.PushObject(request)
            del contents[part]

        self.patience.call(lambda: list(self.pool.map(send, list(contents))))

    def _register(self, public: bytes) -> None:
        try:
            self.wire.RegisterNode(fleet_pb2.RegisterNodeFleetRequest(public_key=public))
        except httpx.HTTPStatusError as error:
            if not is_registered_already(error):
                raise

    def _beat(self, heartbeat_s: float, over: threading.Event) -> None:
        """Give signs of life; take leave when asked to stop while the server holds our request, which ends it."""
        request = heartbeat_pb2.SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=heartbeat_s)
        due = time.monotonic() + heartbeat_s / 2
        while not over.wait(_GLANCE_S):
            if self.stop.is_set() and self.idle.is_set():
                self._leave()
                return
            if time.monotonic() >= due:
                with contextlib.suppress(*_BROKEN):  # the requests for mail meet the same trouble, and report it
                    self.wire.SendNodeHeartbeat(request)
                due = time.monotonic() + heartbeat_s / 2

    def _leave(self) -> None:
        with contextlib.suppress(*_BROKEN):  # a server that is gone needs no farewell
            self.wire.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=self.node.node_id))
