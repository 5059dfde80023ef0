"""The server's end of the fleet: Flower's Fleet API over the SuperLink in this process, as a mailbox for frames.

What is behind the API is `server.fleet_superlink`. With it and `clients/fleet.py` this is one of three files that use
Flower's private names.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, Self

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types
from starlette.exceptions import HTTPException
from starlette.requests import Request

from fedml_core import engine_guard  # noqa: F401 - its import sets Flower's switches, before Flower reads them
from fedml_core.errors import ChannelError, ConfigError
from fedml_core.flower_records import pack
from fedml_core.identity import Roster, Site
from fedml_core.tls import ServerTls
from fedml_core.wire import Frame
from server.fleet_letters import Letters, LinkFailure, NodeInfo
from server.fleet_listener import Endpoint, Listener, RequestRefusedError, open_socket
from server.fleet_superlink import SuperLink

# isort: split
from flwr.app import Array
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.error import FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.inflatable import inflatable_object
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers

NOT_ENROLLED = 9001  # beyond Flower's own error numbers
_API: dict[str, Any] = {  # path: its request; Flower's handler for it has the same name
    "activate-node": fleet_pb2.ActivateNodeRequest,
    "deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "pull-messages": fleet_pb2.PullMessagesRequest,
    "push-messages": fleet_pb2.PushMessagesRequest,
    "pull-object": message_pb2.PullObjectRequest,
    "push-object": message_pb2.PushObjectRequest,
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
    "register-node": fleet_pb2.RegisterNodeFleetRequest,
}
_WITH_STORE = {"pull-messages", "confirm-message-received"}
_INSECURE_ONLY = {"register-node"}  # elsewhere the roster says who exists


class FleetServer:
    """Listens for clients and exchanges frames with them; use it in a `with` statement. Thread-safe.

    Guarantees: with TLS only nodes whose key is on the roster are admitted; without it only this machine is served;
    nothing but the Fleet API can be reached from outside; nothing is written to disk.
    Trust: the server sees every frame; a node sees only frames addressed to it.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: ServerTls | None = None,
        roster: Roster | None = None,
        insecure: bool = False,
    ) -> None:
        """Start to listen; port 0 takes a free one.

        Raises: ConfigError: if the port is taken, the TLS files are unusable, TLS or the roster is missing, or an
        insecure server would be reachable from another machine.
        """
        if insecure == (tls is not None) or insecure == (roster is not None):
            raise ConfigError("a server needs TLS files and a roster, or to be insecure; give it one of the two")
        self._link = SuperLink()
        self._letters = Letters(self._link)
        self._closed = False
        self._sites = None if roster is None else self._admit(roster)
        opened = open_socket(host, port, only_loopback=insecure)
        try:
            self._listener = Listener(opened, self._endpoints(), tls)
        except BaseException:
            opened.close()
            raise
        self._listener.start()

    @property
    def address(self) -> tuple[str, int]:
        """Return the host and port that it listens on."""
        return self._listener.host, self._listener.port

    def __enter__(self) -> Self:
        """Return the server itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Stop listening and forget everything: no thread or socket is left. Any number of times."""
        self._closed = True
        self._letters.close()
        self._listener.close()
        self._link.store.clear()

    def set_roster(self, roster: Roster) -> None:
        """Admit exactly the sites of `roster` from now on: the next request of any other is refused.

        Raises: ConfigError: if the server is insecure.
        """
        if self._sites is None:
            raise ConfigError("an insecure server admits everybody on this machine; start it with TLS to use a roster")
        dropped = self._sites.keys() - roster.by_node_key().keys()
        self._sites = self._admit(roster)
        for key in dropped:
            if (node := self._link.links.get_node_id_by_public_key(key)) is not None:
                self._link.links.deactivate_node(node)
                self._listener.dismiss(node)
        self._letters.somebody_left()

    def nodes(self) -> Mapping[int, NodeInfo]:
        """Return the nodes that are online now, by node id; an id lasts until the server stops."""
        online = self._link.links.get_node_info(node_ids=sorted(self._link.online()))
        if self._sites is None:
            return {info.node_id: NodeInfo(None, None) for info in online}
        known = [(info.node_id, info.public_key, self._sites.get(info.public_key)) for info in online]
        return {node: NodeInfo(key, site) for node, key, site in known if site is not None}

    def push(self, frames: Mapping[int, Frame]) -> Mapping[str, int]:
        """Send each node its frame; return the node of each new message id. Equal frames and arrays are stored once.

        A node that cannot be reached gives a `LinkFailure` at the next `poll`.
        Raises: StrategyError: if an array cannot be sent. ChannelError: if the server is closed.
        """
        if self._closed:
            raise ChannelError("the server is closed and sends nothing; start a new one")
        shared: dict[int, Array] = {}
        packed = {id(frame): pack(frame, shared=shared) for frame in frames.values()}
        sent: dict[str, int] = {}
        with inflatable_object.no_object_id_recompute():
            for node, frame in frames.items():
                message = self._link.write(node, packed[id(frame)])
                message_id = message.metadata.message_id
                sent[message_id] = node
                self._letters.add(message_id, node)
                if self._link.links.store_message_ins(message) is None:
                    self._letters.undeliverable(message_id)
                self._listener.ring([node])
        return sent

    def poll(self, timeout_s: float = 0.0) -> list[tuple[str, Frame | LinkFailure]]:
        """Return what came back since the last call, each message id once; wait up to `timeout_s` for something."""
        return self._letters.poll(timeout_s)

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Forget these messages: they are not delivered any more, and a reply that comes is dropped."""
        self._letters.cancel(message_ids)

    def _admit(self, roster: Roster) -> Mapping[bytes, Site]:
        sites = roster.by_node_key()
        for key in sites:
            if self._link.links.get_node_id_by_public_key(key) is None:
                self._link.links.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0)
        return sites

    def _endpoints(self) -> dict[str, Endpoint]:
        paths = _API.keys() if self._sites is None else _API.keys() - _INSECURE_ONLY
        waits = {"pull-messages": lambda message: message.node.node_id}
        return {
            f"/v1/fleet/{path}": Endpoint(partial(self._read, path), partial(self._answer, path), waits.get(path))
            for path in paths
        }

    def _read(self, path: str, request: Request, body: bytes) -> Any:
        """Return the request of a node that proved to be who it says."""
        try:
            message = _API[path].FromString(body)
            request.scope["app"] = SimpleNamespace(state=SimpleNamespace(linkstate_factory=self._link))
            request.state.protobuf_request = message
            authenticate_node(request)
        except DecodeError:
            raise RequestRefusedError(400, 0, "the request is not the expected one") from None
        except HTTPException:
            raise RequestRefusedError(401, 0, "the signature, its time or the node id is not valid") from None
        key = base64.b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER])
        if self._sites is not None and key not in self._sites:
            raise RequestRefusedError(403, NOT_ENROLLED, "the node key is not enrolled")
        return message

    def _answer(self, path: str, message: Any) -> bytes:
        self._check(message)
        more: dict[str, Any] = {"store": self._link.store} if path in _WITH_STORE else {}
        if path in _INSECURE_ONLY:
            more["enable_supernode_auth"] = False
        try:
            done = getattr(fleet_handlers, path.replace("-", "_"))(message, self._link.links, **more)
        except FlowerError as error:
            known = API_ERROR_MAP[error.code]
            raise RequestRefusedError(known.http_status_code, error.code, known.public_message) from None
        self._note(message, done)
        return bytes(done.SerializeToString())

    def _check(self, message: Any) -> None:
        """Refuse what Flower lets pass: a reply in another's name, a name that is not the content's, another run."""
        about, fits = message, True
        if isinstance(message, fleet_pb2.PushMessagesRequest):
            fits = len(message.messages_list) == len(message.message_object_trees) == 1
            about = message.messages_list[0].metadata if fits else message
            fits = fits and about.src_node_id == message.node.node_id
            fits = fits and about.message_id == message.message_object_trees[0].object_id
        if not fits or getattr(about, "run_id", self._link.run_id) != self._link.run_id:
            raise RequestRefusedError(403, 0, "the request does not fit the session")

    def _note(self, message: Any, done: Any) -> None:
        """Tell the letters what a request of a node means for them."""
        match message:
            case fleet_pb2.ActivateNodeRequest():
                self._letters.restarted(done.node_id)
            case fleet_pb2.DeactivateNodeRequest():
                self._listener.dismiss(message.node_id)
                self._letters.somebody_left()
            case fleet_pb2.PullMessagesRequest():
                self._letters.took(one.metadata.message_id for one in done.messages_list)
            case fleet_pb2.PushMessagesRequest():
                self._letters.collect([message.messages_list[0].metadata.reply_to_message_id])
            case message_pb2.PushObjectRequest():
                self._letters.part_came()
