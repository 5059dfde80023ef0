"""Who gets in, and what is there: enrolled nodes, the Fleet API, and nothing else."""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from clients.fleet import FleetClient, _Wire
from clients.fleet_trouble import trust_only
from fedml_core.errors import ChannelError, ConfigError
from fedml_core.identity import (
    PublicKeys,
    Roster,
    Site,
    SiteKeys,
    enrol,
    new_site_keys,
    node_key_bytes,
    read_roster,
    read_site_keys,
    revoke,
)
from fedml_core.tls import ServerTls, new_authority
from fedml_core.wire import Frame
from server.fleet import FleetServer
from server.fleet_listener import MAX_BODY_BYTES
from tests.fleet_cases import PATIENCE_S, gather, online, raw_node, running, soon, texts

# isort: split
from flwr.app import Error, Message, Metadata
from flwr.app.message.message import make_message
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.node_pb2 import Node

PATHS = (
    *("/", "/docs", "/openapi.json", "/redoc", "/health", "/v1", "/v1/fleet", "/v1/fleet/", "/v2/fleet/pull-messages"),
    *("/v1/control/start-run", "/v1/control/list-runs", "/v1/control/register-node"),
    *("/v1/runtime/acquire-task", "/v1/runtime/push-messages", "/v1/runtime/get-nodes"),
    *("/v1/fleet/get-run", "/v1/fleet/get-fab", "/v1/fleet/unregister-node", "/v1/fleet/pull-messages/"),
    *("/v1/fleet/../runtime/acquire-task", "/v1/fleet/%2e%2e/runtime/acquire-task", "/v1/fleet/..%2fcontrol/list-runs"),
    *(
        "//v1/runtime/acquire-task",
        "/v1//runtime/acquire-task",
        "/v1/fleet/..;/runtime/acquire-task",
        "/V1/RUNTIME/acquire-task",
    ),
    *("/v1/fleet/pull-messages/../../runtime/acquire-task", "/v1/runtime/acquire-task?/v1/fleet/pull-messages"),
    *("/v1/fleet/pull-messages%00", "/v1/fleet/pull-messages%2f..", "/v1/fleet\\..\\runtime", "*"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[FleetServer]:
    with FleetServer("127.0.0.1", 0, insecure=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ServerTls:
    return new_authority(tmp_path_factory.mktemp("authority"), ["127.0.0.1", "localhost"])


@pytest.fixture(scope="module")
def north(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("north")
    new_site_keys(made)
    return made


@pytest.fixture
def roster_file(tmp_path: Path, north: Path) -> Path:
    roster = tmp_path / "roster.json"
    enrol(roster, north / "site-public.json", name="north", client_id=3)
    return roster


@pytest.fixture
def secured(tls: ServerTls, roster_file: Path) -> Iterator[FleetServer]:
    with FleetServer("127.0.0.1", 0, tls=tls, roster=read_roster(roster_file)) as opened:
        yield opened


def client_of(server: FleetServer, tls: ServerTls, keys: SiteKeys | Path, host: str = "127.0.0.1") -> FleetClient:
    node_key = read_site_keys(keys).node if isinstance(keys, Path) else keys.node
    return FleetClient(f"{host}:{server.address[1]}", tls_ca=tls.ca, node_key=node_key, longest_wait_s=0.3)


def status_of(server: FleetServer, method: str, path: str, body: bytes = b"") -> int:
    connection = http.client.HTTPConnection(*server.address, timeout=PATIENCE_S)
    try:
        connection.putrequest(method, path, skip_host=False)
        connection.putheader("content-length", str(len(body)))
        connection.putheader("content-type", "application/protobuf")
        connection.endheaders(body)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_but_the_fleet_api_is_there(server: FleetServer, method: str, path: str) -> None:
    assert status_of(server, method, path) in (400, 404)  # 400: the HTTP parser's, for what is not a path at all
    assert status_of(server, method, f"http://somewhere{path}" if path.startswith("/") else path) in (400, 404)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_the_fleet_api_answers_only_to_post(server: FleetServer, method: str) -> None:
    assert status_of(server, method, "/v1/fleet/pull-messages") == 404
    assert status_of(server, "POST", "/v1/fleet/pull-messages") == 401


def test_a_request_without_signature_or_with_rubbish_is_refused(server: FleetServer) -> None:
    assert status_of(server, "POST", "/v1/fleet/activate-node") == 401
    assert status_of(server, "POST", "/v1/fleet/activate-node", b"\xff\xff\xff") == 400


def test_a_request_that_is_too_long_is_refused_before_it_is_kept(server: FleetServer) -> None:
    assert status_of(server, "POST", "/v1/fleet/push-object", bytes(MAX_BODY_BYTES + 1)) == 413


def test_an_insecure_server_listens_on_loopback_only(server: FleetServer) -> None:
    assert server.address[0] == "127.0.0.1"


def refused(call: object, request: object) -> int:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        call(request)  # type: ignore[operator]
    return caught.value.response.status_code


def test_a_node_cannot_act_for_another(server: FleetServer) -> None:
    with raw_node(server) as (_, north, _), raw_node(server) as (south, _, _):
        assert refused(south.PullMessages, fleet_pb2.PullMessagesRequest(node=north)) == 401
        assert refused(south.DeactivateNode, fleet_pb2.DeactivateNodeRequest(node_id=north.node_id)) == 401
        assert len(server.nodes()) == 2


def reply_in_the_name_of(node: int, run_id: int, message_id: str) -> Message:
    metadata = Metadata(run_id, "", node, 1, message_id, "", time.time(), 3600.0, "query")
    reply = make_message(metadata, error=Error(2, "Forged"))
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return reply


def announced(sender: Node, reply: Message, object_id: str = "") -> fleet_pb2.PushMessagesRequest:
    tree = message_pb2.ObjectTree(object_id=object_id or reply.object_id)
    messages = [message_to_proto(reply)]
    return fleet_pb2.PushMessagesRequest(node=sender, messages_list=messages, message_object_trees=[tree])


def test_a_reply_in_anothers_name_to_another_run_or_under_a_false_id_is_refused(server: FleetServer) -> None:
    run_id = server._link.run_id
    with raw_node(server) as (_, north, _), raw_node(server) as (wire, south, _):
        sent = server.push({north.node_id: Frame("ask", "{}")})
        (message_id,) = sent
        forged = reply_in_the_name_of(north.node_id, run_id, message_id)
        assert refused(wire.PushMessages, announced(south, forged)) == 403
        honest = reply_in_the_name_of(south.node_id, run_id, message_id)
        assert refused(wire.PushMessages, announced(south, honest, object_id="0" * 64)) == 403
        other_run = reply_in_the_name_of(south.node_id, run_id + 1, message_id)
        assert refused(wire.PushMessages, announced(south, other_run)) == 403
        assert refused(wire.PushMessages, fleet_pb2.PushMessagesRequest(node=south)) == 403
        assert list(wire.PushMessages(announced(south, honest)).objects_to_push) == []  # not its message: dropped
        assert server.poll() == []
        server.cancel(sent)


def test_an_enrolled_node_is_admitted_and_known_by_name(secured: FleetServer, tls: ServerTls, north: Path) -> None:
    with running(client_of(secured, tls, north)):
        (node,) = online(secured, 1)
        info = secured.nodes()[node]
        assert info.node_key == node_key_bytes(read_site_keys(north).node.public_key())
        assert info.site is not None
        assert (info.site.name, info.site.client_id) == ("north", 3)
        assert texts(gather(secured, secured.push({node: Frame("ask", "{}")}))) == {node: ("echo", "{}")}


def test_an_unenrolled_node_is_refused_until_it_is_enrolled(
    secured: FleetServer, tls: ServerTls, roster_file: Path, tmp_path: Path
) -> None:
    new_site_keys(tmp_path / "south")
    with running(client_of(secured, tls, tmp_path / "south")) as (runner,):
        runner.hears("has not enrolled this site's node key")
        assert secured.nodes() == {}
        enrol(roster_file, tmp_path / "south" / "site-public.json", name="south", client_id=4)
        secured.set_roster(read_roster(roster_file))
        online(secured, 1)
        runner.said.clear()
        revoke(roster_file, "south")
        secured.set_roster(read_roster(roster_file))
        assert secured.nodes() == {}
        runner.hears("has not enrolled this site's node key")


def test_a_node_cannot_register_itself_with_a_roster(secured: FleetServer, tls: ServerTls) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    public = node_key_bytes(key.public_key())
    with _Wire(f"https://127.0.0.1:{secured.address[1]}", key, trust_only(tls.ca)) as wire:
        assert refused(wire.RegisterNode, fleet_pb2.RegisterNodeFleetRequest(public_key=public)) == 404
        assert refused(wire.ActivateNode, fleet_pb2.ActivateNodeRequest(public_key=public)) == 403


def test_a_second_process_with_the_same_key_waits_for_the_first(
    secured: FleetServer, tls: ServerTls, north: Path
) -> None:
    with running(client_of(secured, tls, north)) as (first,):
        nodes = online(secured, 1)
        with running(client_of(secured, tls, north)) as (second,):
            second.hears("still counts the last session of this node key as open")
            first.end()
            second.hears("connected to")
            assert online(secured, 1) == nodes


def test_the_wrong_authority_ends_the_client_with_one_clear_line(
    secured: FleetServer, tmp_path: Path, north: Path
) -> None:
    other = new_authority(tmp_path / "other", ["127.0.0.1"])
    with running(client_of(secured, other, north)) as (runner,):
        soon(lambda: len(runner.raised) == 1, "the client gives up")
    (error,) = runner.raised
    assert isinstance(error, ChannelError)
    assert "is not the server that this site trusts: " in str(error)
    assert "compare its ca.pem with yours" in str(error)
    assert runner.said == []
    assert secured.nodes() == {}


def test_a_certificate_for_another_host_is_refused(tmp_path: Path, north: Path, roster_file: Path) -> None:
    tls = new_authority(tmp_path / "elsewhere", ["fl.example.org"])
    with (
        FleetServer("127.0.0.1", 0, tls=tls, roster=read_roster(roster_file)) as server,
        running(client_of(server, tls, north)) as (runner,),
    ):
        soon(lambda: len(runner.raised) == 1, "the client gives up")
    assert isinstance(runner.raised[0], ChannelError)
    assert "127.0.0.1" in str(runner.raised[0])


def test_a_name_in_the_certificate_is_as_good_as_an_address(secured: FleetServer, tls: ServerTls, north: Path) -> None:
    with running(client_of(secured, tls, north, host="localhost")):
        online(secured, 1)


def test_a_tls_client_says_when_the_port_does_not_speak_tls(server: FleetServer, tls: ServerTls, north: Path) -> None:
    with running(client_of(server, tls, north)) as (runner,):
        soon(lambda: len(runner.raised) == 1, "the client gives up")
    assert "does not speak TLS; is it the right port?" in str(runner.raised[0])


def test_old_versions_of_tls_are_refused(secured: FleetServer, tls: ServerTls) -> None:
    old = ssl.create_default_context(cafile=tls.ca)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with httpx.Client(verify=old, trust_env=False) as client, pytest.raises(httpx.ConnectError):
        client.post(f"https://127.0.0.1:{secured.address[1]}/v1/fleet/pull-messages")


def test_an_insecure_server_takes_no_roster(server: FleetServer, tls: ServerTls) -> None:
    with pytest.raises(ConfigError, match="an insecure server admits everybody"):
        server.set_roster(Roster())
    with pytest.raises(ConfigError, match="a server needs TLS files and a roster, or to be insecure"):
        FleetServer("127.0.0.1", 0, tls=tls, insecure=True)
    with pytest.raises(ConfigError, match="a server needs TLS files and a roster, or to be insecure"):
        FleetServer("127.0.0.1", 0, tls=tls)


def test_unusable_tls_files_are_found_before_anybody_connects(tls: ServerTls, tmp_path: Path) -> None:
    missing = ServerTls(tmp_path / "none.pem", tls.key, tls.ca)
    with pytest.raises(ConfigError, match="none.pem cannot be read"):
        FleetServer("127.0.0.1", 0, tls=missing, roster=Roster())
    other = new_authority(tmp_path / "other", ["127.0.0.1"])
    with pytest.raises(ConfigError, match="is not the key of"):
        FleetServer("127.0.0.1", 0, tls=ServerTls(tls.certificate, other.key, tls.ca), roster=Roster())


def test_the_roster_line_of_a_node_never_comes_from_the_node() -> None:
    site = Site(1, "north", PublicKeys(b"i" * 32, b"n"))
    assert Roster((site,)).by_node_key() == {b"n": site}
    assert Roster((Site(1, "north", site.keys, revoked=True),)).by_node_key() == {}
