"""What passes a site's gate: policy first, then the ledger, then training, then what may be said about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.client import Client
from clients.gate import Gate
from clients.ledger import Books, ledger_of
from clients.memory import InProcessMemory
from fedml_core.config import SiteConfig
from fedml_core.data import ClientData, Examples
from fedml_core.errors import PrivacyError, TaskError
from fedml_core.message_frames import assignment_from_frame, assignment_to_frame
from fedml_core.messages import Assignment, EvaluateWork, Evaluation, Failure, Refusal, TrainWork
from fedml_core.privacy.accounting import Claim
from fedml_core.privacy.clipping import ClipByNorm
from fedml_core.privacy.ledger import Entry, Ledger
from fedml_core.privacy.local import LocalGaussian
from fedml_core.training import Training
from fedml_core.transform import Transform, chain
from fedml_core.update import Update
from fedml_core.weighting import Uniform, Weigh
from tests.doubles import PullTrainer, data_of, raising

SIZE, EXAMPLES = 3, 25
PROMISE = {"name": "gaussian", "noise_multiplier": 1.0}
CLIPPED = chain(Weigh(Uniform()), ClipByNorm(2.0))
STEPS = {"name": "repeated", "count": 4, "event": {"name": "poisson", "sampling_probability": 0.1, "event": PROMISE}}


def counting(events: Sequence[Mapping[str, Any]], *, delta: float, unit: str, adjacency: str) -> Claim:
    return Claim(float(len(events)), delta, unit, adjacency, "none", "counting")


class Site:
    """A client behind a gate, and its ledger."""

    def __init__(self, folder: Path, *, example: bool = False, trainer: Any = None, **tables: Any) -> None:
        path = {"id": 3, "task": "task.py", "memory": str(folder / "memory")}
        self.config = SiteConfig.model_validate({**path, **tables}, strict=True)
        self.gate = Gate(self.config, server="fl.example.org:8443", example=example, cost=counting)
        self.load = partial(data_of, 2, SIZE, EXAMPLES)
        self.trainer = trainer or PullTrainer(SIZE)

    def ask(self, work: TrainWork | EvaluateWork, round_number: int = 1, run: str = "run") -> Any:
        client = Client(3, self.load, self.trainer, InProcessMemory(), gate=self.gate)
        fingerprint = self.trainer.spec.fingerprint
        assignment = Assignment(run, round_number, fingerprint, torch.zeros(SIZE), work)
        return client.answer(assignment_from_frame(assignment_to_frame(assignment))).body

    def train(self, pipeline: Transform | None = None, round_number: int = 1, **changes: Any) -> Any:
        return self.ask(TrainWork(Training(), pipeline or chain(Weigh()), **changes), round_number)

    @property
    def entries(self) -> list[Entry]:
        return ledger_of(self.config).known()


class Protecting(PullTrainer):
    """A trainer that reserves what it is about to do to examples, if it is honest."""

    def __init__(self, event: Mapping[str, Any] | None) -> None:
        super().__init__(SIZE)
        self.event = event
        self.gate: Gate | None = None
        self.steps = 0

    def train(self, *values: Any, **named: Any) -> Update:
        if self.event is not None:
            assert self.gate is not None
            self.gate.reserve(self.event)
        self.steps += 1
        return super().train(*values, **named)


def test_every_training_is_in_the_ledger_before_its_first_step_and_stays_when_it_fails(tmp_path: Path) -> None:
    # Guarantees: "nothing is trained that the policy refuses or that is not in the ledger; what fails later stays
    # there."
    # Guarantees: "every training that is begun is in the ledger before its first step, with the event that protects it
    # or with none."
    site, seen = Site(tmp_path), list[int]()

    class Failing(PullTrainer):
        def train(self, *values: Any, **named: Any) -> Update:
            seen.append(len(site.entries))
            raise TaskError("out of memory")

    site.trainer = Failing(SIZE)
    assert isinstance(site.train(), Failure)
    assert isinstance(site.train(), Failure)
    assert seen == [1, 2]
    assert [(entry.round, entry.participation, entry.event) for entry in site.entries] == [(1, 1, None), (1, 2, None)]
    assert {(entry.run, entry.server, entry.dataset) for entry in site.entries} == {
        ("run", "fl.example.org:8443", "client-3")
    }


def test_what_the_policy_refuses_is_told_to_the_server_and_neither_read_nor_written_down(tmp_path: Path) -> None:
    # Guarantees: "nothing that a server sends changes the policy; what does not meet it is refused with the rule's key
    # and the numbers, before any data is read."
    site = Site(tmp_path, policy={"maximum_epochs": 2, "accept": ["none"]})
    site.load = partial(raising(TaskError("the data were read")))
    body = site.ask(TrainWork(Training(epochs=3), chain(Weigh())))
    assert body == Refusal("maximum_epochs", "the server asks for 3 epochs in a round, this site's maximum_epochs is 2")
    assert site.entries == []


def test_participations_are_counted_over_restarts(tmp_path: Path) -> None:
    for number in range(2):
        assert isinstance(Site(tmp_path, policy={"maximum_participations": 2}).train(round_number=number + 1), Update)
    again = Site(tmp_path, policy={"maximum_participations": 2})
    assert again.train(round_number=3).rule == "maximum_participations"
    assert isinstance(again.ask(TrainWork(Training(), chain(Weigh())), run="another"), Update)


def test_a_promise_of_noise_reaches_the_ledger_and_the_budget_ends_it(tmp_path: Path) -> None:
    site = Site(tmp_path, policy={"accept": ["central"]}, budget={"epsilon": 2.0, "unit": "client"})
    for number in (1, 2):
        assert isinstance(site.train(CLIPPED, number, promised=PROMISE), Update)
    body = site.train(CLIPPED, 3, promised=PROMISE)
    assert isinstance(body, Refusal)
    assert body.rule == "epsilon"
    assert body.reason.startswith("2.0000 of the epsilon 2 is spent (delta 1e-05, unit client, ")
    assert [(entry.event, entry.unit, entry.protection) for entry in site.entries] == [
        (PROMISE, "client", "central")
    ] * 2


def test_noise_for_a_whole_run_is_counted_once_in_it(tmp_path: Path) -> None:
    tree = {"name": "tree", "noise_multiplier": 4.0, "steps": 8, "restarts": 0}
    site = Site(
        tmp_path, policy={"accept": ["central"], "maximum_participations": 3}, budget={"epsilon": 1.0, "unit": "client"}
    )
    for number in (1, 2, 3):
        assert isinstance(site.train(CLIPPED, number, promised=tree), Update)
    assert site.train(CLIPPED, 4, promised=tree).rule == "maximum_participations"
    assert [entry.event for entry in site.entries] == [tree]
    assert site.ask(TrainWork(Training(), CLIPPED, promised=tree), run="another").rule == "epsilon"


def test_a_budget_refuses_work_that_no_noise_protects_or_that_protects_another_unit(tmp_path: Path) -> None:
    site = Site(tmp_path, budget={"epsilon": 2.0, "unit": "example"})
    assert site.train().rule == "unprotected"
    body = site.train(LocalGaussian(1.0, 4.0))
    assert body == Refusal(
        "unit",
        "this site's budget counts the unit example, and this work protects the unit client (local); both must agree",
    )
    assert site.entries == []


def test_the_trainers_event_is_checked_and_written_down_before_its_first_step(tmp_path: Path) -> None:
    trainer = Protecting(STEPS)
    site = Site(
        tmp_path,
        example=True,
        trainer=trainer,
        policy={"accept": ["example"], "example": {"minimum_noise_multiplier": 0.9}},
        budget={"epsilon": 2.0, "unit": "example"},
    )
    trainer.gate = site.gate
    assert isinstance(site.train(), Update)
    trainer.event = {**STEPS, "event": {"name": "gaussian", "noise_multiplier": 0.5}}
    assert site.train(round_number=2).rule == "example.minimum_noise_multiplier"
    trainer.event = STEPS
    assert isinstance(site.train(round_number=2), Update)
    assert site.train(round_number=3).rule == "epsilon"
    assert trainer.steps == 2
    assert [(entry.event, entry.unit) for entry in site.entries] == [(STEPS, "example")] * 2


def test_a_trainer_that_claims_protection_and_reserves_nothing_sends_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path, example=True, trainer=Protecting(None))
    body = site.train()
    assert isinstance(body, Failure)
    assert body.reason.startswith("the trainer claims to protect examples and reserved nothing")


def test_no_metric_leaves_beside_the_sites_own_noise_unless_it_is_named(tmp_path: Path) -> None:
    # Guarantees: "where the site's own noise protects the update, no metric leaves beside it unless the site.toml
    # names it."
    trainer = Protecting(STEPS)
    site = Site(tmp_path, example=True, trainer=trainer)
    trainer.gate = site.gate
    assert site.train().sums == {}
    named = Site(tmp_path, example=True, trainer=trainer, policy={"metrics": {"names": ["loss"]}})
    trainer.gate = named.gate
    assert named.train().sums.keys() == {"loss", "examples"}
    assert Site(tmp_path).train().sums.keys() == {"loss", "examples"}


def test_metrics_leave_as_coarse_as_the_policy_says(tmp_path: Path) -> None:
    site = Site(tmp_path, policy={"metrics": {"step": 0.5, "examples_step": 10}})
    sums = site.train().sums
    # 25 examples count as 20; the mean distance 1.732 is said as 1.5.
    assert (float(sums["examples"]), float(sums["loss"])) == (20.0, 30.0)
    body = site.ask(EvaluateWork())
    assert isinstance(body, Evaluation)
    assert body.sums == {"examples": 20.0, "loss": pytest.approx(20 * 3.5)}
    fewer = Site(tmp_path, policy={"metrics": {"examples_step": 100}})
    assert float(fewer.train().sums["examples"]) == 100.0
    assert Site(tmp_path, policy={"metrics": {"names": []}}).train().sums == {}


def test_evaluations_are_refused_where_privacy_is_counted_unless_metrics_are_named(tmp_path: Path) -> None:
    counted = {"epsilon": 2.0, "unit": "client"}
    assert Site(tmp_path, budget=counted).ask(EvaluateWork()).rule == "metrics.names"
    named = Site(tmp_path, budget=counted, policy={"metrics": {"names": ["loss"]}})
    assert isinstance(named.ask(EvaluateWork()), Evaluation)
    assert Site(tmp_path, policy={"metrics": {"evaluate": False}}).ask(EvaluateWork()).rule == "metrics.evaluate"


def test_a_weight_that_tells_the_number_of_examples_does_not_leave(tmp_path: Path) -> None:
    assert Site(tmp_path, policy={"uniform_weights": True}).train().rule == "uniform_weights"
    gate = Site(tmp_path, policy={"uniform_weights": True}).gate
    with pytest.raises(PrivacyError, match="nothing was admitted that could be trained"):
        gate.released(Update.of(torch.zeros(SIZE)))


def test_a_ledger_that_cannot_be_believed_stops_the_site_and_keeps_its_path(tmp_path: Path) -> None:
    # Guarantees: "a ledger that cannot be written or believed is a refusal, and nothing is trained."
    site = Site(tmp_path)
    assert isinstance(site.train(), Update)
    (tmp_path / "memory" / "ledger.sqlite.head").unlink()
    body = site.train(round_number=2)
    assert body == Refusal(
        "ledger", "this site's privacy ledger cannot be used, so it trains nothing; its log says why"
    )
    blocked = Site(tmp_path, ledger={"path": str(tmp_path / "memory")})
    assert blocked.train().rule == "ledger"


def test_the_same_data_under_another_name_or_another_site_of_the_holder_are_recognised(tmp_path: Path) -> None:
    shared = {"path": str(tmp_path / "holder.sqlite")}
    assert isinstance(Site(tmp_path, ledger={**shared, "dataset": "ward-a"}).train(), Update)
    body = Site(tmp_path, ledger={**shared, "dataset": "ward-b"}).train(round_number=2)
    assert body == Refusal(
        "dataset", "these data are in the ledger as 'ward-a', so they cannot begin anew as 'ward-b'; keep the name"
    )
    other = Site(tmp_path, ledger={**shared, "dataset": "ward-b"})
    other.load = partial(data_of, 5, SIZE, EXAMPLES)
    assert isinstance(other.train(), Update)


def test_a_digest_tells_apart_values_shapes_types_and_weights(tmp_path: Path) -> None:
    books = Books(Site(tmp_path).config)
    inputs, targets = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    variants = [
        Examples.of(inputs, targets),
        Examples.of(inputs + 1, targets),
        Examples.of(inputs.reshape(4, 2, 1), targets),
        Examples.of(inputs.to(torch.bfloat16), targets),
        Examples.of(inputs, targets, weights=torch.ones(4)),
    ]
    assert len({books.content(data) for data in variants}) == len(variants)
    assert books.content(variants[0]) == books.content(Examples.of(inputs.clone(), targets.clone()))
    assert books.content([(inputs[0], 1)] * 4) == ""


def test_an_ordinary_client_in_a_simulation_has_no_gate_and_no_ledger(tmp_path: Path) -> None:
    client = Client(0, lambda: ClientData(data_of(0, SIZE).train), PullTrainer(SIZE), InProcessMemory())
    work = TrainWork(Training(), chain(Weigh()))
    body = client.answer(Assignment("run", 1, PullTrainer(SIZE).spec.fingerprint, torch.zeros(SIZE), work)).body
    assert isinstance(body, Update)
    assert Ledger(tmp_path / "ledger.sqlite").known() == []
