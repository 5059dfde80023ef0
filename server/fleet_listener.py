"""The one port of a fleet server: a socket, TLS, a thread that serves a fixed table of paths, and doorbells.

Nothing here knows Flower: `server.fleet` says what stands behind a path. A path that is not in the table is answered
by 404 before anything of the request but its first line is looked at.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fedml_core.errors import ConfigError
from fedml_core.tls import ServerTls, check_server_tls

T = TypeVar("T")

HOLD_S = 10.0  # how long a request for mail waits for some; a client's read timeout must be longer
MAX_BODY_BYTES = 64 << 20  # Flower's chunks are 5 MiB; a frame's header travels whole
START_TIMEOUT_S = 30.0
_THREADS = 8
_log = logging.getLogger(__name__)


class RequestRefusedError(Exception):
    """An endpoint says no: a status, Flower's number for it, and a line without anything secret."""

    def __init__(self, status: int, code: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail


@dataclass(frozen=True)
class Endpoint:
    """What stands behind a path: functions that may take time, run in threads.

    `read` understands and admits a request, `answer` does what it asks. Where `waits_for` names a node, an empty answer
    is held back until the node has mail, see `Doorbells`.
    """

    read: Callable[[Request, bytes], Any]
    answer: Callable[[Any], bytes]
    waits_for: Callable[[Any], int] | None = None


def open_socket(host: str, port: int, *, only_loopback: bool) -> socket.socket:
    """Return a bound socket; port 0 takes a free one.

    Raises: ConfigError: if the address is not this machine's, is taken, or is not loopback where it must be.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be between 0 and 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"host {host!r} is not known here; use an address of this machine") from error
    if only_loopback and not ipaddress.ip_address(str(address[0])).is_loopback:
        raise ConfigError(f"an insecure server listens on 127.0.0.1 only, got {host!r}; give it TLS to be reached")
    # TCP by name: asyncio switches off Nagle's algorithm, 40 ms for each answer, only where it reads that name.
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(256)  # from here on the port is ours
    except OSError as error:
        opened.close()
        reason = (error.strerror or "it cannot be used").lower()
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}; choose another port or host") from error
    return opened


class Doorbells:
    """Wakes the one request that waits for mail to a node; a newer request of the node takes the older one's place."""

    def __init__(self) -> None:
        self._bells: dict[int, asyncio.Event] = {}
        self._closing = False

    def ring(self, nodes: Iterable[int]) -> None:
        """Wake who waits for `nodes`. In the loop's thread only."""
        for node in nodes:
            if node in self._bells:
                self._bells[node].set()

    def dismiss(self, node: int) -> None:
        """Let who waits for `node` go without mail. In the loop's thread only."""
        if node in self._bells:
            self._bells.pop(node).set()

    def close(self) -> None:
        """Wake everybody, and let nobody wait again. In the loop's thread only."""
        self._closing = True
        self.ring(list(self._bells))

    async def wait(self, node: int, timeout_s: float, attempt: Callable[[], Awaitable[T | None]]) -> T | None:
        """Return what `attempt` returns as soon as it is something; None after `timeout_s`, or when sent away."""
        bell = asyncio.Event()
        self.dismiss(node)
        self._bells[node] = bell
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            while self._bells.get(node) is bell:
                bell.clear()
                found = await attempt()
                left = deadline - asyncio.get_running_loop().time()
                if found is not None or left <= 0 or self._closing:
                    return found
                try:
                    await asyncio.wait_for(bell.wait(), left)
                except TimeoutError:
                    return None
            return None
        finally:
            if self._bells.get(node) is bell:
                del self._bells[node]


class Listener:
    """Serves `endpoints` (path to function) by POST on `opened` until it is closed; owns the socket and its threads."""

    def __init__(self, opened: socket.socket, endpoints: Mapping[str, Endpoint], tls: ServerTls | None) -> None:
        """Raises: ConfigError: if the TLS files are missing, damaged or do not belong together."""
        self.host, self.port = opened.getsockname()[:2]
        self.doorbells = Doorbells()
        self._socket, self._endpoints = opened, dict(endpoints)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="fedveil-fleet")
        self._server = uvicorn.Server(_settings(self._answer, tls))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedveil-fleet-listener", daemon=True)

    def start(self) -> None:
        """Serve; return when requests are accepted."""
        self._thread.start()
        if not self._started.wait(START_TIMEOUT_S):
            raise ConfigError(f"the server did not start within {START_TIMEOUT_S:.0f} s; is the machine overloaded?")

    def ring(self, nodes: Iterable[int]) -> None:
        """Wake the requests that wait for mail to `nodes`; from any thread, also after `close`."""
        self._soon(self.doorbells.ring, list(nodes))

    def dismiss(self, node: int) -> None:
        """Let the request that waits for mail to `node` go without; from any thread."""
        self._soon(self.doorbells.dismiss, node)

    def close(self) -> None:
        """Answer what is in flight, then stop: no thread and no socket is left. Any number of times."""
        self._server.should_exit = True
        self._soon(self.doorbells.close)
        if self._thread.is_alive():
            self._thread.join()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._socket.close()

    async def _content(self, endpoint: Endpoint, request: Request, body: bytes) -> bytes:
        message = await self._in_thread(partial(endpoint.read, request, body))
        answer = partial(self._in_thread, partial(endpoint.answer, message))
        if endpoint.waits_for is None:
            return await answer()

        async def attempt() -> bytes | None:
            if await request.is_disconnected():  # mail is handed out once: keep it for a caller who is still there
                return b""
            return await answer() or None

        return await self.doorbells.wait(endpoint.waits_for(message), HOLD_S, attempt) or b""

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    def _soon(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has ended: nobody waits there any more
            return

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._started.set)
        await self._server.serve(sockets=[self._socket])

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        endpoint = self._endpoints.get(scope["path"]) if scope["method"] == "POST" else None
        response = await self._respond(endpoint, Request(scope, receive)) if endpoint else _problem(404, 0, "not found")
        await response(scope, receive, send)

    async def _respond(self, endpoint: Endpoint, request: Request) -> Response:
        try:
            content = await self._content(endpoint, request, await _body(request))
            return Response(content, media_type="application/protobuf")
        except RequestRefusedError as refused:
            return _problem(refused.status, refused.code, refused.detail)
        except Exception as error:  # noqa: BLE001 - bytes from outside must not stop the server, nor be echoed
            _log.warning("a request to %s failed: %s", request.scope["path"], type(error).__name__)
            return _problem(500, 0, "the server could not answer")


def _settings(app: Callable[..., Awaitable[None]], tls: ServerTls | None) -> uvicorn.Config:
    if tls is not None:
        check_server_tls(tls)
    settings = uvicorn.Config(
        app,
        interface="asgi3",
        proxy_headers=False,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        loop="asyncio",
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        ssl_certfile=None if tls is None else tls.certificate,
        ssl_keyfile=None if tls is None else str(tls.key),
    )
    settings.load()
    if settings.ssl is not None:
        settings.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    return settings


async def _body(request: Request) -> bytes:
    parts: list[bytes] = []
    size_bytes = 0
    async for part in request.stream():
        size_bytes += len(part)
        if size_bytes > MAX_BODY_BYTES:
            raise RequestRefusedError(413, 0, f"a request must be at most {MAX_BODY_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


def _problem(status: int, code: int, detail: str) -> Response:
    return Response(json.dumps({"code": code, "detail": detail}), status, media_type="application/json")
