"""A client alone: what it refuses to start with, what it does without a server, and with one that is not ours."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from clients import fleet
from clients.fleet import FleetClient
from fedml_core.errors import ChannelError, ConfigError
from fedml_core.tls import new_authority
from fedml_core.wire import Frame
from server import fleet_listener
from server.fleet import FleetServer
from server.fleet_listener import Endpoint, RequestRefusedError
from tests.fleet_cases import PATIENCE_S, answer, fast_heartbeats, gather, local, online, running, soon, texts

KEY = ec.generate_private_key(ec.SECP384R1())


@contextmanager
def other_server(status: int, **headers: str) -> Iterator[tuple[str, list[str]]]:
    """Run a web server that gives every request the same answer, and writes down the paths."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def free_address() -> str:
    with FleetServer("127.0.0.1", 0, insecure=True) as server:
        return f"127.0.0.1:{server.address[1]}"


@pytest.mark.parametrize(
    ("server", "options", "message"),
    [
        ("fl.example.org:80", {"insecure": True}, "an insecure client uses no TLS and reaches this machine only"),
        ("192.0.2.1:80", {"insecure": True}, "an insecure client uses no TLS and reaches this machine only"),
        ("127.0.0.1:80", {"insecure": True, "tls_ca": Path("ca.pem")}, "an insecure client uses no TLS"),
        ("fl.example.org:80", {}, "a client needs tls_ca and node_key; give both"),
        ("fl.example.org:80", {"node_key": KEY}, "a client needs tls_ca and node_key; give both"),
        ("fl.example.org:80", {"tls_ca": Path("ca.pem")}, "a client needs tls_ca and node_key; give both"),
        ("fl.example.org:80", {"tls_ca": Path("none.pem"), "node_key": KEY}, "certificate none.pem cannot be read"),
        ("127.0.0.1:80", {"insecure": True, "heartbeat_s": 0.0}, "heartbeat_s and longest_wait_s must be > 0, got 0.0"),
        ("127.0.0.1", {"insecure": True}, "server must be host:port"),
    ],
)
def test_a_client_that_must_not_start_says_why(server: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FleetClient(server, **options)  # type: ignore[arg-type]


def test_a_client_waits_for_a_server_that_is_not_there_yet_and_stops_at_once_when_asked() -> None:
    client = FleetClient(free_address(), insecure=True, longest_wait_s=600.0)
    with running(client) as (runner,):
        soon(lambda: len(runner.said) >= 3, "the client says that it waits")
        assert all("cannot be reached (ConnectError); trying again in " in line for line in runner.said)
        runner.end()
    assert runner.said[-1].startswith("left ")
    assert runner.raised == []


def test_a_client_that_waits_for_mail_stops_when_asked_however_long_the_server_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet_listener, "HOLD_S", 600.0)
    monkeypatch.setattr(fleet, "_READ_TIMEOUT_S", 700.0)
    with FleetServer("127.0.0.1", 0, insecure=True) as server, running(local(server)) as (runner,):
        online(server, 1)
        runner.end()
        assert server.nodes() == {}


def test_answers_are_not_held_back_to_be_sent_together() -> None:
    opened = fleet_listener.open_socket("127.0.0.1", 0, only_loopback=True)
    with opened:
        assert opened.proto == socket.IPPROTO_TCP


def test_a_client_that_was_asked_to_stop_before_it_began_asks_nothing() -> None:
    stop = threading.Event()
    stop.set()
    with other_server(200) as (address, asked):
        FleetClient(address, insecure=True).serve(answer, stop, list[str]().append)
    assert asked == []


def test_a_web_server_that_is_not_ours_ends_the_client() -> None:
    for status in (200, 404):
        with other_server(status) as (address, _), pytest.raises(ChannelError, match="not as a fedveil server"):
            FleetClient(address, insecure=True).serve(answer, threading.Event(), list[str]().append)


def test_a_redirect_is_not_followed() -> None:
    with (
        other_server(200) as (elsewhere, asked),
        other_server(307, location=f"http://{elsewhere}/internal") as (address, _),
        pytest.raises(ChannelError, match="status 307"),
    ):
        FleetClient(address, insecure=True).serve(answer, threading.Event(), list[str]().append)
    assert asked == []


def test_a_proxy_has_no_part_in_what_stays_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with FleetServer("127.0.0.1", 0, insecure=True) as server, other_server(200) as (proxy, asked):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy}")
        with running(local(server)):
            online(server, 1)
    assert asked == []


def test_a_frame_that_is_being_handled_is_finished_and_answered_before_the_client_leaves() -> None:
    began, release = threading.Event(), threading.Event()

    def slow(frame: Frame) -> Frame:
        began.set()
        assert release.wait(PATIENCE_S)
        return frame

    with FleetServer("127.0.0.1", 0, insecure=True) as server, running(local(server), handler=slow) as (runner,):
        (node,) = online(server, 1)
        sent = server.push({node: Frame("train", "{}")})
        assert began.wait(PATIENCE_S)
        runner.stop.set()
        release.set()
        runner.end()
        assert server.nodes() == {}
        assert texts(gather(server, sent)) == {node: ("train", "{}")}


def sometimes_refusing(endpoint: Endpoint, times: int) -> Endpoint:
    left = iter(range(times))

    def answer_or_refuse(message: object) -> bytes:
        if next(left, None) is not None:
            raise RequestRefusedError(503, 0, "not now")
        return endpoint.answer(message)

    return replace(endpoint, answer=answer_or_refuse)


@pytest.mark.parametrize("path", ["pull-messages", "pull-object", "confirm-message-received", "push-object"])
def test_nothing_is_lost_when_the_server_refuses_for_a_moment(path: str) -> None:
    frame = Frame("train", "{}", {"/x": np.arange(3.0)})
    with FleetServer("127.0.0.1", 0, insecure=True) as server:
        endpoints = server._listener._endpoints
        endpoints[f"/v1/fleet/{path}"] = sometimes_refusing(endpoints[f"/v1/fleet/{path}"], 2)
        with running(local(server)) as (runner,):
            (node,) = online(server, 1)
            back = gather(server, server.push({node: frame}))[node]
            assert isinstance(back, Frame)
            assert back.arrays["/x"].tolist() == [0.0, 1.0, 2.0]
        runner.hears("has trouble of its own (status 503); trying again in ")
        runner.hears("answers again")


def test_signs_of_life_go_on_while_a_frame_is_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    began, release, beats = threading.Event(), threading.Event(), list[bytes]()

    def slow(frame: Frame) -> Frame:
        began.set()
        assert release.wait(PATIENCE_S)
        return frame

    with fast_heartbeats(monkeypatch) as heartbeat_s, FleetServer("127.0.0.1", 0, insecure=True) as server:
        endpoints = server._listener._endpoints
        beat = endpoints["/v1/fleet/send-node-heartbeat"]

        def counted(message: object) -> bytes:
            beats.append(beat.answer(message))
            return beats[-1]

        endpoints["/v1/fleet/send-node-heartbeat"] = replace(beat, answer=counted)
        with running(local(server, heartbeat_s=heartbeat_s), handler=slow):
            (node,) = online(server, 1)
            sent = server.push({node: Frame("train", "{}")})
            assert began.wait(PATIENCE_S)
            beats.clear()
            soon(lambda: len(beats) >= 2, "the busy client gives signs of life")
            release.set()
            assert texts(gather(server, sent)) == {node: ("train", "{}")}


def test_the_client_trusts_the_file_that_it_was_given_and_nothing_else(tmp_path: Path) -> None:
    tls = new_authority(tmp_path / "ca", ["fl.example.org"])
    client = FleetClient("fl.example.org:8443", tls_ca=tls.ca, node_key=KEY)
    assert client._trust is not None
    (only,) = client._trust.get_ca_certs()
    assert only["subject"] == ((("commonName", "fedveil authority"),),)
