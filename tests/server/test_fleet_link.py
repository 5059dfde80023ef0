"""The fleet over loopback: frames survive, nodes come and go, and every failure names the right node."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fedml_core.errors import ChannelError, ConfigError, StrategyError
from fedml_core.wire import Frame
from server.fleet import FleetServer
from server.fleet_letters import LinkFailure, NodeInfo
from tests.fleet_cases import (
    fast_heartbeats,
    gather,
    is_empty,
    local,
    online,
    processes,
    raw_node,
    running,
    soon,
    texts,
)

# isort: split
from flwr.proto import fleet_pb2
from flwr.proto.node_pb2 import Node
from flwr.supernode.fleet_http_client import FleetHttpClient

HELLO = Frame("hello", '{"round":1}')
ECHO = ("echo", HELLO.header)


@pytest.fixture(scope="module")
def server() -> Iterator[FleetServer]:
    with FleetServer("127.0.0.1", 0, insecure=True) as opened:
        yield opened
        assert is_empty(opened), "the tests left something in the server"


def mail(wire: FleetHttpClient, node: Node) -> Sequence[object]:
    return list(wire.PullMessages(fleet_pb2.PullMessagesRequest(node=node)).messages_list)


def test_frames_survive_the_way_there_and_back_exactly(server: FleetServer) -> None:
    rng = np.random.default_rng(7)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "/update": rng.normal(size=(3, 4)).astype(np.float32),
        "/exact": rng.normal(size=5),
        "/masked": rng.integers(0, 2**32, size=7, dtype=np.uint32),
        "/bytes": rng.integers(0, 256, size=(2, 3), dtype=np.uint8),
        "/counts": rng.integers(-(2**63), 2**63 - 1, size=3, dtype=np.int64),
        "/scalar": np.array(2.5, dtype=np.float32),
        "/empty": np.zeros((0, 4), dtype=np.float32),
        "/not finite": np.array([np.nan, np.inf, -0.0]),
        "/twice": np.zeros(4),
        "/twice again": np.zeros(4),
    }
    frame = Frame("train", '{"text":"Grüße ☃","nan":NaN}', arrays)
    with running(local(server)):
        back = gather(server, server.push(dict.fromkeys(online(server, 1), frame)))
    (reply,) = back.values()
    assert isinstance(reply, Frame)
    assert (reply.kind, reply.header, list(reply.arrays)) == ("echo", frame.header, list(arrays))
    for name, array in arrays.items():
        assert reply.arrays[name].dtype == array.dtype
        assert reply.arrays[name].shape == array.shape
        assert reply.arrays[name].tobytes() == array.tobytes()
    assert is_empty(server)


def test_a_message_of_40_megabytes_arrives(server: FleetServer) -> None:
    vector = np.random.default_rng(1).normal(size=10_000_000).astype(np.float32)
    with running(local(server)):
        back = gather(server, server.push(dict.fromkeys(online(server, 1), Frame("train", "{}", {"/x": vector}))))
    (reply,) = back.values()
    assert isinstance(reply, Frame)
    assert np.array_equal(reply.arrays["/x"], vector)


def test_each_of_three_nodes_gets_its_own_frame_and_a_late_one_joins(server: FleetServer) -> None:
    with running(local(server), local(server)):
        first = online(server, 2)
        with running(local(server)):
            nodes = online(server, 3)
            assert set(first) < set(nodes)
            assert set(server.nodes().values()) == {NodeInfo(None, None)}
            back = gather(server, server.push({node: Frame("ask", f'{{"to":{node}}}') for node in nodes}))
            assert texts(back) == {node: ("echo", f'{{"to":{node}}}') for node in nodes}
        assert set(online(server, 2)) == set(first)


def test_several_exchanges_may_be_under_way_at_once(server: FleetServer) -> None:
    with running(local(server)):
        (node,) = online(server, 1)
        sent = [server.push({node: Frame("ask", str(number))}) for number in range(3)]
        order = {message_id: str(number) for number, one in enumerate(sent) for message_id in one}
        found: dict[str, str] = {}
        while len(found) < 3:
            found.update((key, back.header) for key, back in server.poll(30.0) if isinstance(back, Frame))
    assert found == order


def test_when_a_handler_raises_only_the_class_name_leaves_the_client(server: FleetServer) -> None:
    with running(local(server)) as (runner,):
        (node,) = online(server, 1)
        back = gather(server, server.push({node: Frame("raise", "{}")}))
        assert texts(back) == {node: LinkFailure(node, "client-error", "LookupError")}
        assert texts(gather(server, server.push({node: HELLO}))) == {node: ECHO}
    assert not any("4711" in line for line in runner.said)
    assert any("LookupError" in line for line in runner.said)


def test_a_reply_that_cannot_be_sent_is_a_client_error(server: FleetServer) -> None:
    with running(local(server), handler=lambda frame: Frame("bad", "{}", {"/x": np.array(["text"])})):
        (node,) = online(server, 1)
        assert gather(server, server.push({node: HELLO})) == {node: LinkFailure(node, "client-error", "StrategyError")}


def test_a_frame_that_cannot_be_sent_is_refused_before_anything_is_sent(server: FleetServer) -> None:
    with pytest.raises(StrategyError, match="array '/x' of type complex128 cannot be sent"):
        server.push({5: HELLO, 6: Frame("bad", "{}", {"/x": np.zeros(2, dtype=np.complex128)})})
    assert server.poll() == []


def test_a_node_that_does_not_exist_is_reported_by_its_own_id(server: FleetServer) -> None:
    assert gather(server, server.push({12345: HELLO})) == {12345: LinkFailure(12345, "unavailable")}


def test_a_node_that_leaves_while_it_works_is_reported_at_once(server: FleetServer) -> None:
    with raw_node(server) as (wire, node, _):
        sent = server.push({node.node_id: HELLO})
        assert len(mail(wire, node)) == 1
        wire.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=node.node_id))
        assert gather(server, sent) == {node.node_id: LinkFailure(node.node_id, "unavailable")}


def test_a_process_that_began_anew_has_lost_what_it_took_but_not_what_waits(server: FleetServer) -> None:
    with raw_node(server) as (wire, node, activate):
        taken = server.push({node.node_id: HELLO})
        assert len(mail(wire, node)) == 1
        waiting = server.push({node.node_id: HELLO})
        wire.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=node.node_id))
        activate()
        assert gather(server, taken) == {node.node_id: LinkFailure(node.node_id, "restarted")}
        assert len(mail(wire, node)) == 1
        server.cancel(waiting)


def test_a_cancelled_message_is_not_delivered_and_a_late_reply_is_dropped(server: FleetServer) -> None:
    release = threading.Event()
    taken = threading.Event()

    def slow(frame: Frame) -> Frame:
        taken.set()
        release.wait(60)
        return frame

    with running(local(server), handler=slow) as (runner,):
        (node,) = online(server, 1)
        sent = [*server.push({node: HELLO}), *server.push({node: HELLO})]
        assert taken.wait(60)
        server.cancel(sent)
        release.set()
        again = server.push({node: Frame("next", "{}")})
        assert texts(gather(server, again)) == {node: ("next", "{}")}
        assert not any("could not" in line for line in runner.said)
    assert server.poll() == []
    assert is_empty(server)


def test_mail_is_not_lost_on_a_caller_who_has_hung_up(server: FleetServer) -> None:
    with raw_node(server) as (wire, node, _):
        wire._client.timeout = 0.2
        with pytest.raises(httpx.ReadTimeout):
            mail(wire, node)
        wire._client.timeout = 30
        sent = server.push({node.node_id: HELLO})
        assert len(mail(wire, node)) == 1
        server.cancel(sent)


def test_polling_returns_in_time_when_there_is_nothing(server: FleetServer) -> None:
    assert server.poll() == []
    assert server.poll(0.05) == []


def test_real_processes_echo_stop_cleanly_and_a_killed_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flower_home = Path(os.environ["FLWR_HOME"])
    before = set(flower_home.rglob("*"))
    with (
        fast_heartbeats(monkeypatch) as heartbeat_s,
        FleetServer("127.0.0.1", 0, insecure=True) as server,
        processes(server, tmp_path, 3, heartbeat_s) as clients,
    ):
        nodes = online(server, 3)
        vector = np.arange(6, dtype=np.float32)
        back = gather(server, server.push(dict.fromkeys(nodes, Frame("ask", "{}", {"/x": vector}))))
        assert all(isinstance(reply, Frame) and np.array_equal(reply.arrays["/x"], vector) for reply in back.values())

        sent = server.push({nodes[0]: Frame("hang", "{}"), nodes[1]: HELLO})
        soon(lambda: any(line.get("took") == "hang" for client in clients for line in client.lines), "it hangs")
        (hanging,) = [client for client in clients if any(line.get("took") == "hang" for line in client.lines)]
        hanging.send(signal.SIGKILL)
        back = gather(server, sent)
        assert texts(back) == {nodes[0]: LinkFailure(nodes[0], "unavailable"), nodes[1]: ECHO}
        assert set(online(server, 2)) == set(nodes[1:])

        idle, busy = [client for client in clients if client is not hanging]
        idle.send(signal.SIGINT)
        (left,) = online(server, 1)
        sent = server.push({left: Frame("hang", "{}")})
        soon(lambda: any(line.get("took") == "hang" for line in busy.lines), "the other hangs")
        busy.send(signal.SIGINT)
        assert gather(server, sent) == {left: LinkFailure(left, "unavailable")}
        for client in (idle, busy):
            assert client.says("interrupted")
            assert client.says("threads") == []
            assert client.says("broken") == []
            assert client.says("telemetry") == "0"
            assert client.end() == 0
    assert list(tmp_path.iterdir()) == []
    assert set(flower_home.rglob("*")) == before


def test_clients_come_back_to_a_server_that_was_started_anew() -> None:
    with FleetServer("127.0.0.1", 0, insecure=True) as first:
        port = first.address[1]
        client = local(first)
        with running(client) as (runner,):
            online(first, 1)
            first.close()
            runner.hears("cannot be reached")
            with FleetServer("127.0.0.1", port, insecure=True) as second:
                nodes = online(second, 1)
                assert texts(gather(second, second.push(dict.fromkeys(nodes, HELLO)))) == {nodes[0]: ECHO}


def test_a_server_leaves_no_thread_and_can_be_closed_again_and_again() -> None:
    before = set(threading.enumerate())
    server = FleetServer("127.0.0.1", 0, insecure=True)
    with running(local(server)):
        online(server, 1)
        server.close()
        server.close()
        assert server.poll(30.0) == []
        with pytest.raises(ChannelError, match="the server is closed"):
            server.push({1: HELLO})
    assert set(threading.enumerate()) == before


def test_closing_wakes_who_polls() -> None:
    server = FleetServer("127.0.0.1", 0, insecure=True)
    found: list[object] = []
    poller = threading.Thread(target=lambda: found.append(server.poll(600.0)))
    poller.start()
    server.close()
    poller.join(60)
    assert found == [[]]


def test_a_taken_port_is_one_clear_line() -> None:
    with FleetServer("127.0.0.1", 0, insecure=True) as server:
        port = server.address[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: address already in use"):
            FleetServer("127.0.0.1", port, insecure=True)


@pytest.mark.parametrize(
    ("host", "port", "options", "message"),
    [
        ("0.0.0.0", 0, {"insecure": True}, "an insecure server listens on 127.0.0.1 only, got '0.0.0.0'"),
        ("::", 0, {"insecure": True}, "an insecure server listens on 127.0.0.1 only, got '::'"),
        ("127.0.0.1", 0, {}, "a server needs TLS files and a roster, or to be insecure"),
        ("127.0.0.1", 65536, {"insecure": True}, "port must be between 0 and 65535, got 65536"),
    ],
)
def test_a_server_that_must_not_start_says_why(host: str, port: int, options: dict[str, bool], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FleetServer(host, port, **options)  # type: ignore[arg-type]


def test_a_host_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> list[object]:
        raise socket.gaierror("name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match="host 'nowhere.invalid' is not known here"):
        FleetServer("nowhere.invalid", 0, insecure=True)
