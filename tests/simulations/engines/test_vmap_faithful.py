"""What maps get wrong, or a trial of a few examples could miss: the answer is each client's own, or it is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedml_core import ClientData, Examples, Task, Training
from fedml_core.errors import FedveilError
from simulations import Sequential, Vectorised, simulate
from simulations.engines.batch_trainer import UnsupportedError
from simulations.engines.vmap_trainer import VmapTrainer
from strategies import FedAvg
from tests.simulations.engines.vmap_cases import SIZES, TOKENS, VECTOR, check, cohort, work_of

TRAINING = Training(epochs=2, batch_size=4, learning_rate=0.1)


def classification(model: Callable[[], nn.Module]) -> Task:
    return Task.classification(model=model, classes=3)


class Words(nn.Module):
    """Adds up the embeddings of words; `functional` looks them up without a layer."""

    def __init__(self, functional: bool = False, **arguments: Any) -> None:
        super().__init__()
        self.embed, self.leave, self.functional = nn.Embedding(11, 8, **arguments), nn.Linear(8, 3), functional

    def forward(self, tokens: Tensor) -> Tensor:
        if self.functional:
            return self.leave(F.embedding(tokens, self.embed.weight, padding_idx=0).sum(dim=1))  # type: ignore[no-any-return]
        return self.leave(self.embed(tokens).sum(dim=1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("padding", [0, 3, -1])
def test_no_client_trains_the_row_of_an_embeddings_padding(padding: int) -> None:
    made = check(classification(lambda: Words(padding_idx=padding)), cohort(TOKENS, SIZES), TRAINING)
    rows = made.values[:, : 11 * 8].view(len(SIZES), 11, 8)
    assert not rows[:, padding].any() and rows[:, 5].any()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Words(functional=True), "F.embedding is called with a padding_idx"),
        (lambda: Words(scale_grad_by_freq=True), "scales its gradient by frequency"),
    ],
)
def test_embeddings_that_maps_get_wrong_are_refused(model: Callable[[], nn.Module], message: str) -> None:
    trainer = VmapTrainer(classification(model), device="cpu")
    with pytest.raises(UnsupportedError, match=message):
        trainer.train(work_of(cohort(TOKENS, SIZES), trainer.initial(), TRAINING, list(range(len(SIZES))), None))


def hooked(kind: str) -> nn.Module:
    made = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    weight = made[0].weight
    assert isinstance(weight, nn.Parameter)
    if kind == "parameter":
        weight.register_hook(lambda gradient: gradient * 0.1)
    elif kind == "accumulated":
        weight.register_post_accumulate_grad_hook(lambda parameter: None)
    elif kind == "backward":
        made[2].register_full_backward_hook(lambda module, into, out: None)
    else:
        made[2].register_full_backward_pre_hook(lambda module, out: None)
    return made


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("parameter", "parameter 0.weight has hooks"),
        ("accumulated", "parameter 0.weight has hooks"),
        ("backward", r"model.2 \(Linear\) has hooks"),
        ("before", r"model.2 \(Linear\) has hooks"),
    ],
)
def test_hooks_on_gradients_are_refused(kind: str, named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        VmapTrainer(classification(lambda: hooked(kind)), device="cpu")


class Gated(nn.Module):
    """What compares examples is behind a gate that begins closed."""

    def __init__(self) -> None:
        super().__init__()
        self.leave, self.gate = nn.Linear(5, 3), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(x) + self.gate * x.mean(dim=0).sum()  # type: ignore[no-any-return]


class Headless(nn.Module):
    """BatchNorm behind a last layer that begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.leave = nn.Linear(8, 3)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.body(x))  # type: ignore[no-any-return]


class Averaging(nn.Module):
    """Remembers the mean of its batches, and does not use it."""

    mean: Tensor

    def __init__(self, replaced: bool) -> None:
        super().__init__()
        self.leave, self.replaced = nn.Linear(5, 3), replaced
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.replaced:
                self.mean = 0.9 * self.mean + x.mean(dim=0)
            else:
                self.mean.mul_(0.9).add_(x.mean(dim=0))
        return self.leave(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "model", [Gated, Headless, lambda: Averaging(True), lambda: Averaging(False)], ids=["gate", "head", "new", "same"]
)
def test_batches_are_not_filled_up_for_a_model_that_compares_examples_out_of_sight(
    model: Callable[[], nn.Module],
) -> None:
    check(classification(model), cohort(VECTOR, [7, 4, 12, 9]), TRAINING)


def test_batches_are_not_filled_up_for_a_loss_that_counts_targets_which_come_late() -> None:
    def counted(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none") / (1 + (targets > 0).float().sum())

    parts = []
    for part in cohort(VECTOR, [20, 19, 17]):
        targets = torch.zeros(len(part), dtype=torch.int64)
        targets[8:] = torch.arange(len(part) - 8) % 3
        parts.append(Examples.of(*part.inputs, targets))
    task = Task.classification(model=lambda: nn.Linear(5, 3), classes=3, loss=counted)
    check(task, parts, Training(epochs=2, batch_size=16, learning_rate=0.1))


def twice_named() -> nn.Module:
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(5, 3))


class Scales(nn.Module):
    """A parameter and a buffer without dimensions."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.leave, self.scale = nn.Linear(5, 3), nn.Parameter(torch.tensor(1.5))
        self.register_buffer("seen", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen.add_(1.0)
        return self.leave(x) * self.scale  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [twice_named, Scales], ids=["two names", "no dimensions"])
def test_chunk_after_chunk_equals_each_alone(model: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    task, parts = classification(model), cohort(VECTOR, SIZES)
    trainer = VmapTrainer(task, device="cpu")
    check(task, parts, TRAINING, trainer=trainer)
    check(task, parts, TRAINING.model_copy(update={"max_gradient_norm": 0.5}), trainer=trainer)
    settings: dict[str, Any] = {"clients": parts, "rounds": 2, "training": TRAINING, "device": "cpu"}
    with caplog.at_level(logging.WARNING):
        found = simulate(task, FedAvg(), engine=Vectorised(clients_at_once=3), **settings)
    assert not caplog.records
    expected = simulate(task, FedAvg(), engine=Sequential(), **settings)
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=1e-5, atol=1e-6)


def run(task: Task, parts: list[Examples], engine: Any, training: Training = TRAINING) -> Tensor | str:
    try:
        history = simulate(task, FedAvg(), clients=parts, rounds=1, training=training, engine=engine, device="cpu")
    except FedveilError as error:
        return str(error)
    return history.parameters


def test_clients_whose_examples_have_other_shapes_train_one_by_one() -> None:
    task = classification(Words)
    parts = [Examples.of(torch.arange(n * (3 + n)).view(n, 3 + n) % 11, torch.arange(n) % 3) for n in (4, 5, 7)]
    found, expected = (run(task, parts, engine) for engine in (Vectorised(clients_at_once=3), Sequential()))
    assert isinstance(found, Tensor) and isinstance(expected, Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_error_of_one_clients_dtype_is_the_same_whoever_trains_beside_it() -> None:
    task, parts = classification(lambda: nn.Linear(5, 3)), cohort(VECTOR, [4, 5, 6])
    parts[1] = Examples.of(*parts[1].inputs, parts[1].targets.int())
    found, expected = (run(task, parts, engine) for engine in (Vectorised(clients_at_once=3), Sequential()))
    assert isinstance(found, str) and found == expected and "client 1" in found


def test_a_differentiable_optimizer_is_the_error_that_it_is_alone() -> None:
    task, parts = classification(lambda: nn.Linear(5, 3)), cohort(VECTOR, [4, 5])
    training = TRAINING.model_copy(update={"optimizer_arguments": {"differentiable": True}})
    found, expected = (run(task, parts, engine, training) for engine in (Vectorised(), Sequential()))
    assert isinstance(found, str) and found == expected


@pytest.mark.parametrize("engine", [Sequential(), Vectorised(clients_at_once=2)], ids=str)
def test_an_autocast_around_a_run_changes_nothing(engine: Any) -> None:
    task = classification(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))
    parts = cohort(VECTOR, SIZES)
    expected = run(task, parts, engine)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(task, parts, engine)
        assert torch.is_autocast_enabled("cpu")
    assert isinstance(found, Tensor) and isinstance(expected, Tensor)
    assert torch.equal(found, expected)


def test_a_client_alone_in_memory_is_the_same_as_one_that_keeps_examples_aside() -> None:
    parts = cohort(VECTOR, [5, 6])
    task = classification(lambda: nn.Linear(5, 3))
    held = [ClientData(part, parts[0]) for part in parts]
    settings: dict[str, Any] = {"rounds": 1, "device": "cpu", "training": TRAINING}
    kept = simulate(task, FedAvg(), clients=held, **settings).parameters
    assert torch.equal(kept, simulate(task, FedAvg(), clients=parts, **settings).parameters)
