"""kill -9 of a site at every stage of a training: what was begun stays in its ledger, and is paid for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.ledger import ledger_of
from fedml_core.messages import Refusal, TrainWork
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.ledger import Account, Ledger
from fedml_core.training import Training
from fedml_core.update import Update
from tests.clients.test_gate import CLIPPED, PROMISE, STEPS, Protecting, Site
from tests.sources import ROOT

DATASET = "client-3"
STAGES = ("read", "reserve", "reserved", "trained", "encoded", "answered", "none")
SITE = """
import json, os, signal, sys
from pathlib import Path

import torch
from clients.client import Client
from clients.gate import Gate
from clients.ledger import ledger_of
from clients.memory import InProcessMemory
from fedml_core.config import SiteConfig
from fedml_core.messages import Assignment, Refusal, TrainWork
from fedml_core.privacy.clipping import ClipByNorm
from fedml_core.training import Training
from fedml_core.transform import chain
from fedml_core.update import Update
from fedml_core.weighting import Uniform, Weigh
from tests.doubles import PullTrainer, data_of

torch.set_num_threads(1)
folder, kind, limit, stages = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4].split(",")
NOISE = {"name": "gaussian", "noise_multiplier": 1.0}
unit = "example" if kind == "example" else "client"
config = SiteConfig.model_validate(
    {"id": 3, "task": "task.py", "memory": str(folder / "memory"), "budget": {"epsilon": limit, "unit": unit}},
    strict=True,
)


def die(when, stage):
    if when == stage:
        os.kill(os.getpid(), signal.SIGKILL)


class Trainer(PullTrainer):
    gate, stage = None, ""

    def train(self, *values, **named):
        die("reserve", self.stage)
        if kind == "example":
            self.gate.reserve({"name": "repeated", "count": 4, "event": NOISE})
        die("reserved", self.stage)
        update = super().train(*values, **named)
        die("trained", self.stage)
        return update


class Encoding(Gate):
    stage = ""

    def released(self, update):
        die("encoded", self.stage)
        return super().released(update)


def serve(stage, number):
    gate = Encoding(config, server="fl.example.org:8443", example=kind == "example")
    trainer = Trainer(3)
    gate.stage = trainer.stage = stage
    trainer.gate = gate

    def load():
        die("read", stage)
        return data_of(2, 3)

    client = Client(3, load, trainer, InProcessMemory(), gate=gate)
    promised = NOISE if kind == "client" else None
    work = TrainWork(Training(), chain(Weigh(Uniform()), ClipByNorm(2.0)), promised=promised)
    body = client.answer(Assignment("run", number, trainer.spec.fingerprint, torch.zeros(3), work)).body
    die("answered", stage)
    return {Update: 0, Refusal: 3}.get(type(body), 1)


rows = []
for number, stage in enumerate(stages, start=1):
    child = os.fork()
    if child == 0:
        os._exit(serve(stage, number))
    status = os.waitpid(child, 0)[1]
    ended = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    rows.append([stage, ended, len(ledger_of(config).known())])
print(json.dumps(rows))
"""
ANSWERED, REFUSED, KILLED = 0, 3, -9


def rows_of(folder: Path, kind: str, limit: float, *stages: str) -> list[list[Any]]:
    outcome = subprocess.run(
        [sys.executable, "-c", SITE, str(folder), kind, str(limit), ",".join(stages)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert outcome.returncode == 0, outcome.stderr
    found: list[list[Any]] = json.loads(outcome.stdout)
    return found


@pytest.mark.parametrize(
    ("kind", "entries"),
    [("client", [0, 1, 2, 3, 4, 5, 6]), ("example", [0, 0, 1, 2, 3, 4, 5])],
    ids=["client", "example"],
)
def test_a_kill_before_the_ledger_costs_nothing_and_one_at_any_moment_after_it_gives_nothing_back(
    kind: str, entries: list[int], tmp_path: Path
) -> None:
    # The trainer that protects examples writes its entry itself, right before its first step.
    rows = rows_of(tmp_path, kind, 1e6, *STAGES)
    assert rows == [
        [stage, ANSWERED if stage == "none" else KILLED, count] for stage, count in zip(STAGES, entries, strict=True)
    ]
    ledger = Ledger(tmp_path / "memory" / "ledger.sqlite")
    assert ledger.verify().number == entries[-1]
    unit = "example" if kind == "example" else "client"
    event = {"name": "repeated", "count": 4, "event": PROMISE} if kind == "example" else PROMISE
    spent = ledger.spent(Account(DATASET, unit, "add-or-remove-one"), 1e-5)
    assert spent == epsilon_of([event] * entries[-1], delta=1e-5, unit=unit, adjacency="add-or-remove-one")


def test_a_site_that_is_killed_again_and_again_spends_its_budget_without_a_single_answer(tmp_path: Path) -> None:
    cost = [
        epsilon_of([PROMISE] * rounds, delta=1e-5, unit="client", adjacency="add-or-remove-one").epsilon
        for rounds in (3, 4)
    ]
    rows = rows_of(tmp_path, "client", sum(cost) / 2, "trained", "answered", "reserved", "none", "none")
    assert [row[1:] for row in rows] == [[KILLED, 1], [KILLED, 2], [KILLED, 3], [REFUSED, 3], [REFUSED, 3]]


def test_one_data_set_pays_over_runs_and_servers_and_sites_of_its_holder(tmp_path: Path) -> None:
    shared = {"ledger": {"path": str(tmp_path / "holder.sqlite"), "dataset": "ward-a"}}
    tables: dict[str, Any] = {**shared, "policy": {"accept": ["central"]}, "budget": {"epsilon": 3.0, "unit": "client"}}
    work = TrainWork(Training(), CLIPPED, promised=PROMISE)
    bodies = []
    for run, server, folder in (
        ("one", "a.example.org:1", "x"),
        ("two", "a.example.org:1", "x"),
        ("one", "b.example.org:2", "y"),
        ("three", "b.example.org:2", "y"),
    ):
        site = Site(tmp_path / folder, **tables)
        site.gate._server = server
        bodies.append(site.ask(work, run=run))
    assert [type(body) for body in bodies] == [Update, Update, Update, Refusal]
    assert bodies[-1].rule == "epsilon"
    entries = ledger_of(site.config).entries()
    assert {(entry.run, entry.server) for entry in entries} == {
        ("one", "a.example.org:1"),
        ("two", "a.example.org:1"),
        ("one", "b.example.org:2"),
    }
    assert {entry.dataset for entry in entries} == {"ward-a"}


def test_of_two_processes_that_were_both_admitted_one_gets_the_last_bit(tmp_path: Path) -> None:
    tables: dict[str, Any] = {
        "ledger": {"path": str(tmp_path / "holder.sqlite"), "dataset": "ward-a"},
        "budget": {"epsilon": 1.0},
    }
    trainers = [Protecting(STEPS), Protecting(STEPS)]
    first, second = (
        Site(tmp_path / name, example=True, trainer=trainer, **tables)
        for name, trainer in zip("ab", trainers, strict=True)
    )
    trainers[0].gate, trainers[1].gate = first.gate, second.gate
    inner = first.load
    answers: list[Any] = []

    def other_first() -> Any:
        # The first site is admitted by now, and has written nothing; the other one comes before it.
        answers.append(second.train())
        return inner()

    first.load = other_first  # type: ignore[assignment]  # a plain function does as well
    answers.append(first.train())
    assert [type(body) for body in answers] == [Update, Refusal] and answers[1].rule == "epsilon"
    assert [trainer.steps for trainer in trainers] == [0, 1]
    assert len(ledger_of(first.config).entries()) == 1
    assert torch.is_tensor(answers[0].values)
