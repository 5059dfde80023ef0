"""A site's gate in a secure sum: what it lets through is masked, what it withholds adds nothing, its no is heard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clients.asked import Sum
from clients.client import Client
from clients.gate import Gate
from clients.ledger import ledger_of
from clients.private_trainer import PrivateTorchTrainer
from clients.private_training import PrivateTraining
from clients.torch_trainer import TorchTrainer
from fedml_core.config import SiteConfig
from fedml_core.data import ClientData, Examples
from fedml_core.errors import SecureAggregationError
from fedml_core.messages import Assignment, Refusal, TrainWork
from fedml_core.model import ModelSpec
from fedml_core.policy_tables import ExampleTable
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.transform import chain
from fedml_core.weighting import Weigh
from tests.secure_cases import COUNT, KEYS, SIZE, SecureChannel, secure, secure_coordinator

EXAMPLES = {"noise_multiplier": 2.0, "clip_norm": 1.0, "sampling_rate": 0.5}
EVENT = {
    "name": "repeated",
    "count": 2,
    "event": {"name": "poisson", "sampling_probability": 0.5, "event": {"name": "gaussian", "noise_multiplier": 2.0}},
}


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


def test_a_site_that_names_some_metrics_only_does_not_lower_the_mean_of_the_others(tmp_path: Path) -> None:
    reports = []
    for names in ([], ["examples"]):
        channel = SecureChannel(KEYS, SIZE)
        gated(tmp_path / str(len(names)), channel, 5, metrics={"names": names})
        reports.append(next(secure_coordinator(secure(), channel).rounds(channel, 1)).metrics["train"])
    assert reports[0] == reports[1]
    # Client i is half of i away from zero, in each coordinate, and says so of i + 1 examples: without client 5.
    loss = sum((i + 1) * 0.5 * i * SIZE**0.5 for i in range(5)) / 15
    assert reports[0] == {"examples": 15.0, "loss": pytest.approx(loss, abs=1e-3)}


def test_another_tasks_metrics_are_no_withheld_ones(tmp_path: Path) -> None:
    channel = SecureChannel(KEYS, SIZE)
    gated(tmp_path, channel, 4, metrics={"names": ["examples", "loss", "recall"]})
    trainer, train = channel.trainer, channel.trainer.train

    class Other(type(trainer)):  # type: ignore[misc]  # the double's own class
        def train(self, *values: Any, **named: Any) -> Any:
            update = train(*values, **named)
            return update.replace(sums={**update.sums, "recall": update.sums["examples"]})

    channel.members[4]._trainer = Other(SIZE)
    report = next(secure_coordinator(secure(), channel).rounds(channel, 1))
    assert [row.client for row in report.excluded] == [4]
    assert "install the same task on both sides" in report.excluded[0].reason


class Wards(SecureChannel):
    """Clients that train a model of torch behind gates; those of `private` protect every example, and insist on it."""

    def __init__(self, folder: Path, private: range) -> None:
        self.folder, self.private = folder, private
        self.configs: dict[int, SiteConfig] = {}
        self.task = Task.classification(model=lambda: nn.Linear(2, 2), classes=2)
        super().__init__(KEYS, ModelSpec.of(nn.Linear(2, 2)).size)
        self.trainer = TorchTrainer(self.task)  # type: ignore[assignment]  # for its spec

    def fresh(self, number: int) -> Client:
        """Return a client with a gate and a ledger."""
        standing = super().fresh(number)._secure._standing  # type: ignore[union-attr]  # it has one
        memory, private = str(self.folder / f"memory-{number}"), number in self.private
        tables = {"examples": EXAMPLES, "policy": {"accept": ["secure-aggregation+example"]}} if private else {}
        config = SiteConfig.model_validate({"id": number, "task": "task.py", "memory": memory, **tables}, strict=True)
        gate = Gate(config, server="fl.example.org:8443", example=private)
        trainer: Any = TorchTrainer(self.task)
        if private:
            table = ExampleTable.model_validate(EXAMPLES)
            trainer = PrivateTorchTrainer(self.task, PrivateTraining.of(table), gate.reserve, device="cpu")
        rows = Examples.of(torch.linspace(-1, 1, 16).reshape(8, 2) + number, torch.arange(8) % 2)
        self.configs[number] = config
        return Client(number, lambda: ClientData(rows), trainer, self.memory, standing=standing, gate=gate)


def rounds_of(channel: Wards, names: tuple[str, ...], count: int = 2) -> list[Any]:
    coordinator = secure_coordinator(secure(), channel, training=Training(batch_size=4))
    coordinator._gathering._metrics = names  # type: ignore[attr-defined]  # what this task reports
    return list(coordinator.rounds(channel, count))


def test_sites_that_protect_every_example_take_part_in_secure_sums_and_say_nothing_else(tmp_path: Path) -> None:
    channel = Wards(tmp_path, range(COUNT))
    reports = rounds_of(channel, ("examples", "loss", "accuracy"))
    for report in reports:
        assert report.status == "ok" and len(report.participants) == COUNT and not report.excluded
        assert report.metrics["train"] == {}  # zeros are no metrics
    for config in channel.configs.values():
        entries = [(entry.round, entry.unit, entry.protection, entry.event) for entry in ledger_of(config).entries()]
        assert entries == [(number, "example", "example+secure-aggregation", EVENT) for number in (1, 2)]


def test_beside_sites_that_say_their_metrics_those_that_do_not_add_nothing(tmp_path: Path) -> None:
    channel = Wards(tmp_path, range(2, COUNT))
    (report,) = rounds_of(channel, ("examples", "loss", "accuracy"), 1)
    assert len(report.participants) == COUNT
    assert report.metrics["train"]["examples"] == 16.0
    assert 0.2 < report.metrics["train"]["loss"] < 3.0


def test_without_the_masks_a_site_that_asks_for_both_protections_refuses(tmp_path: Path) -> None:
    channel = Wards(tmp_path, range(1))
    work = TrainWork(Training(batch_size=4), chain(Weigh()))
    asked = Assignment("r", 1, channel.trainer.spec.fingerprint, torch.zeros(channel.size), work)
    body = channel.members[0].answer(asked).body
    assert isinstance(body, Refusal) and body.rule == "accept"
    assert ledger_of(channel.configs[0]).known() == []


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
    assert found == [Sum(3, ("examples", "loss"))]
    secret = channel.members[0]._secure
    assert secret is not None
    with pytest.raises(SecureAggregationError, match="in no such session"):
        secret.sum(b"another")
