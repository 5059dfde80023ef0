"""Membership by shadow models: a model that learned its examples by heart is found out, and one that did not is not."""

from __future__ import annotations

import pytest
import torch

from clients.torch_trainer import TorchTrainer
from fedml_core.data import Examples
from fedml_core.task import Task
from fedml_core.training import Training
from simulations.audit.findings import Finding, Verdict
from simulations.audit.shadows import RATES, Membership, infer_membership
from tests.simulations.audit.audit_cases import CLASSES, examples, model

TRAINING = Training(epochs=1, batch_size=10, learning_rate=0.3)


def task_of(train: Examples, test: Examples) -> Task:
    return Task.classification(model=model, classes=CLASSES, train_data=lambda: train, test_data=lambda: test)


def attacked(passes: int) -> tuple[Finding, Membership]:
    """Return what 8 shadow models tell of a model after so many passes; labels are random, so it can only remember."""
    pool = examples(200)
    task = task_of(pool.take(torch.arange(100)), pool.take(torch.arange(100, 200)))
    trainer = TorchTrainer(task, 0, device="cpu")
    assert task.train_data is not None
    length = TRAINING.model_copy(update={"epochs": max(1, passes)})
    start = trainer.initial()
    update = trainer.train(start, task.train_data(), length, round_number=1, key=(1, "target"))
    parameters = start + update.values if passes else start
    finding, found = infer_membership(
        task, parameters, TRAINING, TorchTrainer(task, 0, device="cpu"), passes=max(1, passes), shadows=8, seed=4
    )
    assert found is not None
    return finding, found


def test_a_model_that_learned_by_heart_gives_its_examples_away() -> None:
    finding, found = attacked(40)
    assert finding.verdict is Verdict.INFO
    assert finding.numbers["area"] > 0.9
    assert set(finding.numbers["tpr_at_fpr"]) == {f"{rate:g}" for rate in RATES}
    assert finding.numbers["tpr_at_fpr"]["0.1"] > 0.5
    assert len(found.members) == len(found.others) == 100


def test_a_model_that_never_saw_them_tells_nothing() -> None:
    finding, _ = attacked(0)
    # Of 100 examples each the area has a standard deviation of 0.04.
    assert finding.numbers["area"] == pytest.approx(0.5, abs=0.16)


def test_without_shadows_or_without_classes_there_is_no_test() -> None:
    pool = examples(20)
    task = task_of(pool, examples(10))
    trainer = TorchTrainer(task, 0, device="cpu")
    finding, found = infer_membership(task, trainer.initial(), TRAINING, trainer, passes=1, shadows=0, seed=1)
    assert (finding.verdict, found) == (Verdict.INFO, None)
    regression = Task(model=task.model, loss=task.loss, train_data=task.train_data, test_data=task.test_data)
    finding, found = infer_membership(regression, trainer.initial(), TRAINING, trainer, passes=1, shadows=4, seed=1)
    assert found is None
    assert "no pooled classes" in finding.said
