"""Weights that descend within the backward pass: which may, that the result is the same, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedml_core.task import Task
from fedml_core.training import Training
from simulations.engines.batch_trainer import UnsupportedError
from simulations.engines.batched_linear import Linears, lone_weights
from simulations.engines.vmap_trainer import VmapTrainer
from tests.simulations.engines.vmap_cases import MODELS, SIZES, VECTOR, check, cohort, work_of

# The least that a weight's own step, one that autograd does not see, must be taken for.
TRAINING = Training(epochs=3, batch_size=4, learning_rate=0.1)


class Odd(nn.Module):
    """A layer that is used in one way until `way` says another."""

    way = "once"

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "never":
            return self.outer(x)  # type: ignore[no-any-return]
        hidden = torch.tanh(self.inner(x))
        if self.way == "twice":
            hidden = torch.tanh(self.inner(hidden))
        made: Tensor = self.outer(hidden)
        if self.way == "otherwise":
            made = made + self.inner.weight.sum()
        if self.way == "read":
            made = made * self.inner.weight.detach().sum()
        return made


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many weights took their steps by themselves, as a list with an entry for each."""
    taken, real = list[int](), Linears.take

    def counted(self: Linears, *given: Tensor) -> bool:
        descends = real(self, *given)
        taken.extend([1] * descends)
        return descends

    monkeypatch.setattr(Linears, "take", counted)
    return taken


def task(model: Callable[[], nn.Module]) -> Task:
    return Task.classification(model=model, classes=3)


@pytest.mark.parametrize("name", ["perceptron", "transformer", "residual", "tied"])
def test_plain_descent_stores_no_gradient_and_ends_where_each_alone_does(name: str, steps_taken: list[int]) -> None:
    model, shape = MODELS[name]
    check(task(model), cohort(shape, SIZES), TRAINING)
    assert bool(steps_taken) == (name != "tied")


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer_arguments": {"momentum": 0.9}},
        {"optimizer": "adam", "learning_rate": 0.01},
        {"max_gradient_norm": 0.5},
        {"optimizer_arguments": {"maximize": True}},
        {"optimizer_arguments": {"weight_decay": 1e-3}},
    ],
    ids=str,
)
def test_whatever_else_is_done_to_a_gradient_gets_it(settings: dict[str, Any], steps_taken: list[int]) -> None:
    check(task(MODELS["perceptron"][0]), cohort(VECTOR, SIZES), TRAINING.model_copy(update=settings), tolerance=1e-4)
    assert not steps_taken


@pytest.mark.parametrize(
    ("way", "expected"), [("once", [0, 2]), ("twice", [2]), ("otherwise", [2]), ("never", [2]), ("read", [0, 2])]
)
def test_only_weights_with_one_use_may_descend_by_themselves(
    way: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Odd, "way", way)
    trainer = VmapTrainer(task(Odd), device="cpu")
    trainer.train(work_of(cohort(VECTOR, SIZES), trainer.initial(), TRAINING, list(range(len(SIZES))), None))
    assert trainer.linears.lone == expected


@pytest.mark.parametrize("way", ["twice", "otherwise", "never"])
def test_weights_that_are_used_otherwise_later_get_their_gradients_again(
    way: str, monkeypatch: pytest.MonkeyPatch, steps_taken: list[int]
) -> None:
    trainer, parts = VmapTrainer(task(Odd), device="cpu"), cohort(VECTOR, SIZES)
    check(task(Odd), parts, TRAINING, trainer=trainer)
    assert steps_taken and trainer.linears.lone == [0, 2]
    monkeypatch.setattr(Odd, "way", way)
    check(task(Odd), parts, TRAINING, trainer=trainer)
    assert trainer.linears.lone == []


@pytest.mark.parametrize("way", ["twice", "otherwise", "never"])
def test_a_step_taken_by_another_weight_than_was_said_is_an_error(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = VmapTrainer(task(Odd), device="cpu")
    work = work_of(cohort(VECTOR, SIZES), trainer.initial(), TRAINING, list(range(len(SIZES))), None)
    trainer.train(work)
    monkeypatch.setattr(Odd, "way", way)
    with pytest.raises(UnsupportedError, match="linear layer|inplace operation"):
        trainer._explained(work)


def test_a_weight_of_which_only_the_values_are_used_besides_is_what_it_was_before_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Odd, "way", "read")
    check(task(Odd), cohort(VECTOR, SIZES), TRAINING)


class Scaled(nn.Module):
    """Keeps a weight's values for the backward pass of what comes before its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.second.weight.detach()[0])  # type: ignore[no-any-return]


def test_values_that_the_backward_pass_still_needs_are_not_changed_under_it() -> None:
    trainer = VmapTrainer(task(Scaled), device="cpu")
    check(task(Scaled), cohort(VECTOR, SIZES), TRAINING, trainer=trainer)
    assert trainer.linears.lone == []


class Keeping(torch.autograd.Function):
    """Keeps a weight's values where no version of them is counted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
        return above @ ctx.weight, None


class Stash(nn.Module):
    """Hands the values of a layer's weight to a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("back", torch.linspace(-1, 1, 24).view(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        kept = Keeping.apply(self.inner(x), self.outer.weight.detach())  # type: ignore[no-untyped-call]  # torch's own
        return self.outer(kept @ self.back)  # type: ignore[no-any-return]


def test_no_weight_descends_by_itself_beside_a_users_own_backward(steps_taken: list[int]) -> None:
    check(task(Stash), cohort(VECTOR, SIZES), TRAINING)
    assert not steps_taken


class Shown(nn.Linear):
    """Shows its weight beside its outputs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), self.weight.detach()


def test_metrics_see_weights_before_their_step() -> None:
    shown = Task(
        model=lambda: Shown(5, 3),
        loss=lambda outputs, targets: F.cross_entropy(outputs[0], targets, reduction="none"),
        metrics={"size": lambda outputs, targets: outputs[1].square().sum().expand(len(targets))},
    )
    check(shown, cohort(VECTOR, SIZES), TRAINING)


def test_a_leaf_behind_another_operation_is_not_alone() -> None:
    leaf, values = torch.ones(2, 3, 4, requires_grad=True), torch.ones(2, 5, 4)
    assert lone_weights(torch.bmm(values, leaf.mT), [leaf]) == []
    assert lone_weights(torch.ones(2), [leaf]) == []


@pytest.mark.parametrize("way", ["rows first", "total first"])
def test_the_sum_is_that_of_the_rows_whichever_is_asked_for_first(way: str) -> None:
    trainer = VmapTrainer(task(MODELS["batch-norm"][0]), device="cpu")
    parts = cohort(MODELS["batch-norm"][1], SIZES)
    work = work_of(parts, trainer.initial(), TRAINING, list(range(len(SIZES))), None)
    factors = torch.arange(1.0, 1 + len(SIZES), dtype=torch.float64)
    trained = trainer.descend(work)
    total = trained.total(factors) if way == "total first" else None
    rows = trained.rows()
    if total is None:
        total = trained.total(factors)
    torch.testing.assert_close(total, factors.float() @ rows.values, rtol=1e-5, atol=1e-6)
    assert trained.reports.values.shape == (len(SIZES), 0)
    assert torch.equal(trained.reports.sums["loss"], rows.sums["loss"])
