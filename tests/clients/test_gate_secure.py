"""A site's gate in a secure sum: what it lets through is masked, what it withholds adds nothing, its no is heard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clients.asked import Sum
from clients.gate import Gate
from clients.ledger import ledger_of
from fedml_core.config import SiteConfig
from fedml_core.errors import SecureAggregationError
from fedml_core.messages import Refusal
from tests.secure_cases import SecureChannel, secure_coordinator
from tests.server.test_secagg import COUNT, KEYS, SIZE, secure


def gated(folder: Path, channel: SecureChannel, number: int, **policy: Any) -> SiteConfig:
    table = {"id": number, "task": "task.py", "memory": str(folder / f"memory-{number}"), "policy": policy}
    config = SiteConfig.model_validate(table, strict=True)
    channel.members[number]._gate = Gate(config, server="fl.example.org:8443")
    return config


def test_a_site_that_wants_a_secure_sum_trains_in_one_and_writes_it_down(tmp_path: Path) -> None:
    channel = SecureChannel(KEYS, SIZE)
    config = gated(tmp_path, channel, 1, accept=["secure-aggregation"])
    report = next(secure_coordinator(secure(), channel).rounds(channel, 1))
    assert len(report.participants) == COUNT
    (entry,) = ledger_of(config).entries()
    assert (entry.event, entry.protection, entry.round) == (None, "secure-aggregation", 1)


def test_what_a_site_withholds_adds_nothing_to_a_secure_sum(tmp_path: Path) -> None:
    plain, quiet = SecureChannel(KEYS, SIZE), SecureChannel(KEYS, SIZE)
    gated(tmp_path, quiet, 5, metrics={"names": []})
    models, counts = [], []
    for channel in (plain, quiet):
        coordinator = secure_coordinator(secure(), channel)
        report = next(coordinator.rounds(channel, 1))
        counts.append(report.metrics["train"]["examples"])
        models.append(coordinator.state.parameters)
    assert counts == [21.0, 15.0]
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=2e-6)


def test_a_sites_no_is_in_the_servers_report_and_the_others_go_on(tmp_path: Path) -> None:
    channel = SecureChannel(KEYS, SIZE)
    config = gated(tmp_path, channel, 2, accept=["local", "distributed"])
    report = next(secure_coordinator(secure(), channel).rounds(channel, 1))
    said = (
        "the server's work is protected by secure-aggregation that this site can see, it accepts local or distributed"
    )
    bodies = [reply.body for stage, client, reply in channel.seen if (stage, client) == ("mask", 2)]
    assert bodies == [Refusal("accept", said)]
    rows = [(row.client, row.rule, row.reason) for row in report.excluded]
    assert rows == [(2, "refused", f"refused by its policy, rule accept: {said}")]
    assert report.status == "ok" and 2 not in report.participants
    assert ledger_of(config).known() == []


def test_the_honest_members_of_a_sum_are_the_minimum_without_those_that_may_collude(tmp_path: Path) -> None:
    channel, found = SecureChannel(KEYS, SIZE), list[Sum]()

    class Watching(Gate):
        def admit(self, assignment: Any, work: Any, secure: Sum | None) -> None:
            assert secure is not None
            found.append(secure)
            super().admit(assignment, work, secure)

    config = gated(tmp_path, channel, 0)
    channel.members[0]._gate = Watching(config)
    next(secure_coordinator(secure(minimum=4), channel).rounds(channel, 1))
    # Of 6 members a share of 0.2 may collude: 1. Of the 4 whose sum may be shown, 3 are honest then.
    assert found == [Sum(3)]
    secret = channel.members[0]._secure
    assert secret is not None
    with pytest.raises(SecureAggregationError, match="in no such session"):
        secret.sum(b"another")
