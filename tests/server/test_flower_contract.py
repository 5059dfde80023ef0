"""What the three fleet files take from inside Flower: listed here, and checked against the installed version.

A name that Flower drops, moves or gives another shape fails here first, and says which.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from clients import fleet, fleet_trouble
from server.fleet import _API, _INSECURE_ONLY, _WITH_STORE, NOT_ENROLLED
from server.fleet_listener import MAX_BODY_BYTES
from server.fleet_superlink import SuperLink
from tests.sources import ROOT

# isort: split
from flwr.app import Metadata
from flwr.common import constant
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode.fleet_http_client import FleetHttpClient

IMPORTED = {
    "server/fleet.py": {
        "flwr.app": {"Array"},
        "flwr.common.constant": {"NOOP_ACCOUNT_NAME", "NOOP_FLWR_AID"},
        "flwr.proto": {"fleet_pb2", "heartbeat_pb2", "message_pb2"},
        "flwr.supercore.constant": {"FLEET_HTTP_PUBLIC_KEY_HEADER"},
        "flwr.supercore.error": {"FlowerError"},
        "flwr.supercore.error.catalog": {"API_ERROR_MAP"},
        "flwr.supercore.inflatable": {"inflatable_object"},
        "flwr.superlink.routers.fleet.node_auth": {"authenticate_node"},
        "flwr.superlink.servicer.fleet": {"fleet_handlers"},
    },
    "server/fleet_superlink.py": {
        "flwr.app": {"Message", "Metadata", "RecordDict"},
        "flwr.app.message.message": {"make_message", "remove_content_from_message"},
        "flwr.common.constant": {"NOOP_FLWR_AID", "SUPERLINK_NODE_ID", "ErrorCode", "Status"},
        "flwr.server.superlink.linkstate.in_memory_linkstate": {"InMemoryLinkState"},
        "flwr.supercore.constant": {"NOOP_FEDERATION_ID", "TaskType"},
        "flwr.supercore.inflatable": {"inflatable_object", "inflatable_utils"},
        "flwr.supercore.object_store": {"NoObjectInStoreError"},
        "flwr.supercore.object_store.in_memory_object_store": {"InMemoryObjectStore"},
        "flwr.superlink.federation": {"NoOpFederationManager"},
    },
    "clients/fleet.py": {
        "flwr.app": {"Error", "Message", "RecordDict"},
        "flwr.app.message.message": {"remove_content_from_message"},
        "flwr.common.constant": {"ErrorCode"},
        "flwr.common.serde": {"message_from_proto", "message_to_proto"},
        "flwr.proto": {"fleet_pb2", "heartbeat_pb2", "message_pb2"},
        "flwr.proto.node_pb2": {"Node"},
        "flwr.supercore.inflatable": {"inflatable_object", "inflatable_utils"},
        "flwr.supernode.fleet_http_client": {"FleetHttpClient"},
        "flwr.supernode.node_auth_http_interceptor": {"NodeAuthHttpInterceptor"},
    },
}
STATE_METHODS = {
    "create_node": ["owner_aid", "owner_name", "public_key", "heartbeat_interval"],
    "deactivate_node": ["node_id"],
    "delete_messages": ["message_ins_ids"],
    "get_message_res": ["message_ids", "run_id"],
    "get_node_id_by_public_key": ["public_key"],
    "get_node_info": ["node_ids"],
    "get_nodes": ["run_id"],
    "get_object": ["run_id", "object_id"],
    "store_message_ins": ["message"],
}
STORE_METHODS = {
    "clear": [],
    "delete": ["object_id"],
    "get_object_tree": ["object_id"],
    "preregister": ["run_id", "object_tree"],
    "put": ["object_id", "object_content"],
}
CLIENT_METHODS = (
    *("RegisterNode", "ActivateNode", "DeactivateNode", "SendNodeHeartbeat", "PullMessages", "PushMessages"),
    *("PullObject", "PushObject", "ConfirmMessageReceived"),
)


def parameters_of(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize("file", IMPORTED)
def test_the_fleet_imports_exactly_what_is_listed_here_and_all_of_it_exists(file: str) -> None:
    imported: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
            imported.setdefault(node.module or "", set()).update(alias.name for alias in node.names)
        assert not (isinstance(node, ast.Import) and any(alias.name.startswith("flwr") for alias in node.names))
    assert imported == IMPORTED[file]
    for module, names in imported.items():
        assert names <= set(dir(importlib.import_module(module)))


def test_flowers_state_and_store_have_the_methods_that_are_called() -> None:
    link = SuperLink()
    for target, methods in ((link.links, STATE_METHODS), (link.store, STORE_METHODS)):
        for name, expected in methods.items():
            assert parameters_of(getattr(target, name))[: len(expected)] == expected, name
    assert callable(link.links.lock_task_store.acquire)
    assert callable(link.store.lock_store.acquire)


def test_the_run_has_no_code_no_token_and_is_running() -> None:
    link = SuperLink()
    (run,) = link.links.get_run_info()
    assert (run.run_id, run.status.status) == (link.run_id, constant.Status.RUNNING)
    assert (run.fab_id, run.fab_hash, run.fab_version) == ("", "", "")
    assert link.links.task_token_store == {}


def test_flowers_handlers_take_what_they_are_given() -> None:
    for path, request in _API.items():
        more = ["store"] * (path in _WITH_STORE) + ["enable_supernode_auth"] * (path in _INSECURE_ONLY)
        assert parameters_of(getattr(fleet_handlers, path.replace("-", "_"))) == ["request", "state", *more], path
        assert request.FromString(b"").SerializeToString() == b""


def test_flowers_client_has_the_calls_that_are_made_and_one_http_client_to_replace() -> None:
    for name in CLIENT_METHODS:
        assert parameters_of(getattr(FleetHttpClient, name)) == ["self", "request"]
    with fleet._Wire("http://127.0.0.1:1", ec.generate_private_key(ec.SECP384R1()), None) as wire:
        assert set(vars(wire)) == {"_base_url", "_interceptors", "_retry_invoker", "_client"}
        assert wire._retry_invoker is None
        assert not wire._client.follow_redirects
        assert not wire._client.trust_env


def test_metadata_are_given_by_position() -> None:
    expected = ["run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id"]
    assert parameters_of(Metadata)[:9] == [*expected, "group_id", "created_at", "ttl", "message_type"]


def test_the_numbers_that_we_know_by_heart_are_flowers() -> None:
    assert ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE == fleet_trouble._KEY_IN_USE
    assert ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED == fleet_trouble._NOT_ACTIVATED
    assert ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL == fleet_trouble._HEARTBEAT_REFUSED
    assert set(ApiErrorCode) <= set(API_ERROR_MAP)
    assert fleet_trouble._NOT_ENROLLED == NOT_ENROLLED
    assert NOT_ENROLLED not in API_ERROR_MAP
    assert (constant.HEARTBEAT_MIN_INTERVAL, constant.HEARTBEAT_MAX_INTERVAL) == (10, 1800)
    assert constant.HEARTBEAT_PATIENCE == 2
    assert 2 * constant.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE < MAX_BODY_BYTES


def test_flowers_calls_home_are_off_when_the_fleet_is_imported_whatever_the_environment_says() -> None:
    program = (
        "import clients.fleet, server.fleet, os, logging\n"
        "from flwr.supercore import telemetry\n"
        "names = ('FLWR_DISABLE_UPDATE_CHECK', 'FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION')\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED, *(os.environ[name] for name in names), end=' ')\n"
        "print(logging.getLogger('flwr').level == logging.CRITICAL)\n"
    )
    asked = {"FLWR_TELEMETRY_ENABLED": "1", "FLWR_DISABLE_UPDATE_CHECK": "0"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **asked, "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["0", "1", "1", "True"]
