"""The sessions of a site in one process: whose they are, and when they end."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from clients.secure_sessions import Caller, SecureSessions
from fedml_core.errors import ConfigError
from fedml_core.messages import Assignment, Body, Failure, Refusal, SecureAnswer, SecureWork
from fedml_core.update import Update
from tests.clients.test_secagg import PARAMETERS

SEMI_HONEST = dataclasses.replace(PARAMETERS, active=False, roster="", minimum=3, corrupt_share=0.1)
NODE, OTHER = Caller("1", "1000", 0, active=False), Caller("1", "1001", 1, active=False)


def advertise(sessions: SecureSessions, caller: Caller = NODE, attempt: int = 1) -> Body:
    parameters = dataclasses.replace(SEMI_HONEST, attempt=attempt)
    work = SecureWork("advertise", {"context": parameters.context, "parameters": parameters.to_text().encode()})
    return sessions.answer(caller, Assignment("a-run", 1, "f", torch.empty(0), work), untouched).body


def untouched(assignment: Assignment) -> Update:
    raise AssertionError("nothing was to be trained")


def test_each_node_of_each_run_has_sessions_of_its_own() -> None:
    sessions = SecureSessions()
    for caller in (NODE, OTHER, dataclasses.replace(NODE, run="2")):
        assert isinstance(advertise(sessions, caller), SecureAnswer)
    assert len(sessions) == 3
    sessions.close()
    assert len(sessions) == 0


def test_an_attempt_is_taken_part_in_once() -> None:
    sessions = SecureSessions()
    assert isinstance(advertise(sessions, attempt=5), SecureAnswer)
    again = advertise(sessions, attempt=5)
    assert isinstance(again, Refusal)
    assert again.rule == "replay"
    assert isinstance(advertise(sessions, attempt=6), SecureAnswer)


def test_a_session_that_nobody_comes_back_to_is_over_after_two_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, began = SecureSessions(), time.monotonic()
    assert isinstance(advertise(sessions), SecureAnswer)
    monkeypatch.setattr("clients.secure_sessions.time.monotonic", lambda: began + 7000.0)
    assert isinstance(advertise(sessions, OTHER), SecureAnswer)
    assert len(sessions) == 2
    monkeypatch.setattr("clients.secure_sessions.time.monotonic", lambda: began + 7300.0)
    share = SecureWork("share", {"context": SEMI_HONEST.context, "bulletin": b""})
    late = sessions.answer(NODE, Assignment("a-run", 1, "f", torch.empty(0), share), untouched).body
    assert isinstance(late, Failure)
    assert late.rule == "session"
    assert len(sessions) == 1


def test_a_node_without_a_site_has_a_floor_too() -> None:
    refused = advertise(SecureSessions(minimum_cohort=4))
    assert isinstance(refused, Refusal)
    assert "this site's minimum_cohort is 4" in refused.reason


def test_a_site_whose_file_is_missing_is_an_error_at_once() -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        SecureSessions(Path("missing.toml"))
