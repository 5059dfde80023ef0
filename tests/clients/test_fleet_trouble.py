"""What a client makes of trouble on the way: wait, begin a new session, or give up with one clear line."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from clients.fleet_trouble import (
    Patience,
    SessionOverError,
    StoppedError,
    explain,
    is_registered_already,
    is_this_machine,
    split_address,
    trust_only,
)
from fedml_core.errors import ChannelError, ConfigError

SERVER = "fl.example.org:8443"


def answered(status: int, body: bytes = b"") -> httpx.HTTPStatusError:
    request = httpx.Request("POST", f"https://{SERVER}/v1/fleet/pull-messages")
    return httpx.HTTPStatusError("x", request=request, response=httpx.Response(status, content=body, request=request))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class Clock(threading.Event):
    """A stop event that never waits: it writes down for how long it was asked to."""

    def __init__(self, stops_after: int = 1000) -> None:
        super().__init__()
        self.waits: list[float] = []
        self._stops_after = stops_after

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        if len(self.waits) >= self._stops_after:
            self.set()
        return self.is_set()


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = iter(range(times))

    def ask() -> str:
        if next(left, None) is None:
            return "answer"
        raise error

    return ask


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("fl.example.org:8443", ("fl.example.org", 8443)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_an_address_is_split(server: str, expected: tuple[str, int]) -> None:
    assert split_address(server) == expected


@pytest.mark.parametrize(
    "server", ["", "host", "host:", ":80", "host:0", "host:65536", "https://host:80", "host:80/x", "::1:80", "a b:80"]
)
def test_anything_else_is_not_an_address(server: str) -> None:
    with pytest.raises(ConfigError, match="server must be host:port without a scheme, got "):
        split_address(server)


def test_only_loopback_is_this_machine() -> None:
    assert all(map(is_this_machine, ("127.0.0.1", "127.8.9.1", "::1", "localhost", "LOCALHOST")))
    assert not any(map(is_this_machine, ("0.0.0.0", "::", "192.0.2.1", "localhost.example.org", "fl.example.org", "")))


def test_an_authority_file_that_is_missing_or_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the authority's certificate .*ca.pem cannot be read: No such file"):
        trust_only(tmp_path / "ca.pem")
    (tmp_path / "ca.pem").write_text("rubbish")
    with pytest.raises(ConfigError, match="ca.pem does not hold a certificate in PEM form"):
        trust_only(tmp_path / "ca.pem")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (answered(403, b'{"code": 9001}'), f"{SERVER} has not enrolled this site's node key; ask its operator"),
        (answered(412, b'{"code": 2004}'), f"{SERVER} still counts the last session of this node key as open"),
        (answered(503), f"{SERVER} has trouble of its own (status 503)"),
        (answered(500, b"[]"), f"{SERVER} has trouble of its own (status 500)"),
        (httpx.ConnectError("refused"), f"{SERVER} cannot be reached (ConnectError)"),
        (httpx.ReadTimeout("slow"), f"{SERVER} cannot be reached (ReadTimeout)"),
        (caused(httpx.ConnectError("x"), ssl.SSLEOFError()), f"{SERVER} cannot be reached (ConnectError)"),
    ],
)
def test_some_trouble_is_worth_waiting_for(error: Exception, reason: str) -> None:
    assert explain(error, SERVER) == reason


@pytest.mark.parametrize("error", [answered(401), answered(403), answered(403, b'{"code": "9001"}')])
def test_some_trouble_needs_a_new_session(error: Exception) -> None:
    with pytest.raises(SessionOverError, match=SERVER):
        explain(error, SERVER)


@pytest.mark.parametrize(
    "error",
    [answered(404), answered(400), answered(302), answered(413), answered(200), ValueError("not protobuf")],
)
def test_a_server_of_another_kind_ends_the_client(error: Exception) -> None:
    with pytest.raises(ChannelError, match=f"{SERVER} answers, but not as a fedveil server"):
        explain(error, SERVER)


def test_a_certificate_that_does_not_fit_ends_the_client() -> None:
    bad = ssl.SSLCertVerificationError(1, "x")
    bad.verify_message = "Self-signed certificate"
    with pytest.raises(
        ChannelError, match=f"{SERVER} is not the server that this site trusts: self-signed certificate"
    ):
        explain(caused(httpx.ConnectError("x"), caused(OSError("x"), bad)), SERVER)


def test_a_heartbeat_that_the_server_does_not_admit_is_named() -> None:
    with pytest.raises(ChannelError, match="does not admit this heartbeat_s; use 10 to 1800"):
        explain(answered(400, b'{"code": 2003}'), SERVER)


def test_an_endless_chain_of_causes_is_followed_once() -> None:
    first, second = httpx.ConnectError("a"), OSError("b")
    first.__cause__, second.__cause__ = second, first
    assert explain(first, SERVER) == f"{SERVER} cannot be reached (ConnectError)"


def test_only_one_answer_means_that_the_key_is_known() -> None:
    assert is_registered_already(answered(409, b'{"code": 23}'))
    assert not is_registered_already(answered(409, b'{"code": true}'))
    assert not is_registered_already(answered(409, b"23"))


def test_patience_doubles_its_waits_up_to_the_longest_and_begins_anew_after_an_answer() -> None:
    clock, said = Clock(), list[str]()
    patience = Patience(SERVER, clock, said.append, 2.0)
    assert patience.call(failing(6, httpx.ConnectError("x"))) == "answer"
    for waited, most in zip(clock.waits, (0.25, 0.5, 1.0, 2.0, 2.0, 2.0), strict=True):
        assert 0.75 * most <= waited <= most
    assert said[0].startswith(f"{SERVER} cannot be reached (ConnectError); trying again in 0.")
    assert said[-1] == f"{SERVER} answers again"
    assert patience.call(failing(1, httpx.ConnectError("x"))) == "answer"
    assert clock.waits[-1] <= 0.25


def test_patience_says_nothing_where_there_is_no_trouble() -> None:
    said: list[str] = []
    assert Patience(SERVER, Clock(), said.append, 2.0).call(lambda: 5) == 5
    assert said == []


def test_patience_ends_when_asked_to_stop() -> None:
    with pytest.raises(StoppedError):
        Patience(SERVER, Clock(stops_after=3), list[str]().append, 2.0).call(failing(99, httpx.ConnectError("x")))


def test_after_a_wish_to_stop_there_is_one_attempt_and_no_wait() -> None:
    clock, said = Clock(), list[str]()
    clock.set()
    patience = Patience(SERVER, clock, said.append, 2.0)
    assert patience.call(failing(0, ValueError())) == "answer"
    with pytest.raises(StoppedError):
        patience.call(failing(1, httpx.ConnectError("x")))
    assert (clock.waits, said) == ([], [])


def test_what_the_question_itself_gets_wrong_is_not_swallowed() -> None:
    with pytest.raises(KeyError):
        Patience(SERVER, Clock(), list[str]().append, 2.0).call(failing(1, KeyError("bug")))
