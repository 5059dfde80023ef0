"""What can go wrong on the way to a server: what ends a session, what ends the client, and what is worth waiting for.

Nothing here knows Flower.
"""

from __future__ import annotations

import ipaddress
import json
import random
import re
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx

from fedml_core.errors import ChannelError, ConfigError

T = TypeVar("T")
_FIRST_WAIT_S = 0.25
_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")
_NOT_ENROLLED = 9001  # ours; the others are Flower's
_KEY_IN_USE, _HEARTBEAT_REFUSED, _NOT_ACTIVATED = 23, 2003, 2004


class SessionOverError(Exception):
    """The server does not know this session: it was started anew, or the clocks disagree."""


class StoppedError(Exception):
    """The site's operator asked to stop while something was being waited for."""


def split_address(server: str) -> tuple[str, int]:
    """Return the host and the port in `host:port` or `[v6 address]:port`.

    Raises: ConfigError: if it is anything else.
    """
    match = _ADDRESS.fullmatch(server)
    if match is None or not 1 <= int(match["port"]) <= 65535:
        raise ConfigError(f"server must be host:port without a scheme, got {server!r}")
    return match["v6"] or match["host"], int(match["port"])


def is_this_machine(host: str) -> bool:
    """Return whether `host` can be no other machine, going by its name alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def trust_only(ca: Path) -> ssl.SSLContext:
    """Return TLS 1.3 settings that believe the authority in `ca`, and no other.

    Raises: ConfigError: if the file is missing or holds no certificate.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError:
        raise ConfigError(f"{ca} does not hold a certificate in PEM form; is it the right file?") from None
    except OSError as error:
        raise ConfigError(f"the authority's certificate {ca} cannot be read: {error.strerror}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def is_registered_already(error: httpx.HTTPStatusError) -> bool:
    """Return whether an insecure server knows this key from before."""
    return _code(error.response) == _KEY_IN_USE


def explain(error: Exception, server: str) -> str:
    """Return why `server` cannot be used now, as the beginning of a sentence.

    Raises: SessionOverError: if only a new session helps. ChannelError: if waiting cannot help.
    """
    if isinstance(error, httpx.HTTPStatusError):
        return _explain_answer(error.response, server)
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            fault = cause.verify_message.lower().rstrip(".")
            raise ChannelError(
                f"{server} is not the server that this site trusts: {fault}; compare its ca.pem with yours"
            ) from None
        if isinstance(cause, ssl.SSLError) and getattr(cause, "reason", None) == "WRONG_VERSION_NUMBER":
            raise ChannelError(f"{server} does not speak TLS; is it the right port?") from None
    if isinstance(error, httpx.TransportError):
        return f"{server} cannot be reached ({type(error).__name__})"
    raise ChannelError(f"{server} answers, but not as a fedveil server; check address and port") from None


class Patience:
    """Asks until there is an answer, waits longer each time up to `longest_wait_s`, and says why."""

    def __init__(
        self, server: str, stop: threading.Event, on_state: Callable[[str], None], longest_wait_s: float
    ) -> None:
        """Begin with the shortest wait; `stop` ends every wait."""
        self._server, self._stop, self._say = server, stop, on_state
        self._longest_wait_s = longest_wait_s
        self._next_wait_s = min(_FIRST_WAIT_S, longest_wait_s)
        self._waited = False
        self._spread = random.Random()  # clients that lost the same server must not all come back at once

    def call(self, ask: Callable[[], T]) -> T:
        """Return what `ask` returns; ask again as long as waiting can help.

        Raises: StoppedError: if asked to stop instead. SessionOverError, ChannelError: see `explain`.
        """
        while True:
            try:
                answer = ask()
            except (httpx.HTTPError, ValueError) as error:
                reason = explain(error, self._server)
            else:
                if self._waited:
                    self._say(f"{self._server} answers again")
                self._waited, self._next_wait_s = False, min(_FIRST_WAIT_S, self._longest_wait_s)
                return answer
            self.wait(reason)

    def wait(self, reason: str) -> None:
        """Wait one step, saying why.

        Raises: StoppedError: if asked to stop before the wait is over.
        """
        if self._stop.is_set():
            raise StoppedError
        wait_s = self._next_wait_s * self._spread.uniform(0.75, 1.0)
        self._say(f"{reason}; trying again in {wait_s:.1f} s")
        self._waited, self._next_wait_s = True, min(2 * self._next_wait_s, self._longest_wait_s)
        if self._stop.wait(wait_s):
            raise StoppedError


def _explain_answer(response: httpx.Response, server: str) -> str:
    status, code = response.status_code, _code(response)
    if code == _NOT_ENROLLED:
        return f"{server} has not enrolled this site's node key; ask its operator"
    if code == _NOT_ACTIVATED:
        return f"{server} still counts the last session of this node key as open"
    if code == _HEARTBEAT_REFUSED:
        raise ChannelError(f"{server} does not admit this heartbeat_s; use 10 to 1800")
    if status == 401:
        raise SessionOverError(f"{server} does not know this session; it was started anew, or the clocks disagree")
    if status == 403:
        raise SessionOverError(f"{server} says that this session is over")
    if status >= 500:
        return f"{server} has trouble of its own (status {status})"
    raise ChannelError(f"{server} answers, but not as a fedveil server (status {status}); check address and version")


def _code(response: httpx.Response) -> int | None:
    try:
        content = json.loads(response.content)
    except (ValueError, RecursionError):
        return None
    code = content.get("code") if isinstance(content, dict) else None
    return code if isinstance(code, int) else None


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain
