"""Gradients that are left in their factors: whose, that the result is the same, and where they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedml_core.task import Task
from fedml_core.training import Training
from simulations.engines.batched_linear import Linears
from simulations.engines.vmap_trainer import VmapTrainer
from tests.simulations.engines.vmap_cases import MODELS, SIZES, VECTOR, check, cohort, work_of

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
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list with an entry for each gradient that was left in factors."""
    found, real = list[int](), Linears.leave

    def counted(self: Linears, weight: Tensor | None, above: Tensor, values: Tensor) -> bool:
        leaves = real(self, weight, above, values)
        found.extend([1] * leaves)
        return leaves

    monkeypatch.setattr(Linears, "leave", counted)
    return found


def task(model: Callable[[], nn.Module]) -> Task:
    return Task.classification(model=model, classes=3)


@pytest.mark.parametrize("name", ["perceptron", "transformer", "residual", "tied", "dropout-twice"])
def test_plain_descent_makes_no_gradient_and_ends_where_each_alone_does(name: str, left: list[int]) -> None:
    model, shape = MODELS[name]
    check(task(model), cohort(shape, SIZES), TRAINING)
    assert left


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
def test_whatever_else_is_done_to_a_gradient_gets_it(settings: dict[str, Any], left: list[int]) -> None:
    check(task(MODELS["perceptron"][0]), cohort(VECTOR, SIZES), TRAINING.model_copy(update=settings), tolerance=1e-4)
    assert not left


@pytest.mark.parametrize("way", ["once", "twice", "otherwise", "never", "read"])
def test_a_weight_may_be_used_in_any_other_way_besides(
    way: str, monkeypatch: pytest.MonkeyPatch, left: list[int]
) -> None:
    trainer, parts = VmapTrainer(task(Odd), device="cpu"), cohort(VECTOR, SIZES)
    monkeypatch.setattr(Odd, "way", way)
    check(task(Odd), parts, TRAINING, trainer=trainer)
    assert left
    monkeypatch.setattr(Odd, "way", "once")
    check(task(Odd), parts, TRAINING, trainer=trainer)


class Scaled(nn.Module):
    """Keeps a weight's values for the backward pass of what comes before its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.second.weight.detach()[0])  # type: ignore[no-any-return]


def test_values_that_the_backward_pass_still_needs_are_not_changed_under_it(left: list[int]) -> None:
    check(task(Scaled), cohort(VECTOR, SIZES), TRAINING)
    assert left


class Adapted(nn.Module):
    """A frozen layer with a low-rank change of it that is trained, and a parametrized one."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.down, self.up = nn.Linear(5, 5), nn.Linear(5, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.frozen.requires_grad_(False)
        self.leave = nn.utils.parametrizations.orthogonal(nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.frozen(x) + self.up(self.down(x))))  # type: ignore[no-any-return]


def test_only_parameters_that_are_trained_as_they_are_leave_factors(left: list[int]) -> None:
    check(task(Adapted), cohort(VECTOR, [4]), Training(batch_size=4, learning_rate=0.1))
    assert len(left) == 2


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


def test_every_gradient_is_made_beside_a_users_own_backward(left: list[int]) -> None:
    check(task(Stash), cohort(VECTOR, SIZES), TRAINING)
    assert not left


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
