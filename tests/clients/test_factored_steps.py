"""Large weights under plain SGD take their step from the factors of their gradient: the same step in fewer passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clients import descent, local_step
from clients.torch_trainer import TorchTrainer
from fedml_core import dense
from fedml_core.data import Examples
from fedml_core.task import Task
from fedml_core.training import Training

WIDE = 1024
TRAINING = Training(epochs=2, batch_size=16, learning_rate=0.05)


def examples() -> Examples:
    drawn = torch.randn(40, WIDE, generator=torch.Generator().manual_seed(1))
    return Examples.of(drawn, (drawn[:, 0] > 0).long())


class Plain(nn.Module):
    """Two layers, of which the first is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDE, 256), nn.Linear(256, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


class Tied(Plain):
    """Uses its large weight twice, and its values once more."""

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(self.first(x))
        again = torch.tanh(F.linear(inner, self.first.weight.t()) * self.first.weight.detach()[0])
        return self.second(torch.tanh(self.first(again)))  # type: ignore[no-any-return]


class Penalised(Plain):
    """Adds its large weight's own size to what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.first.weight.square().sum() * 1e-3


class Again(Plain):
    """Computes its large layer again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        inner = checkpoint(self.first, x.requires_grad_(), use_reentrant=False)
        assert isinstance(inner, Tensor)
        return self.second(torch.tanh(inner))  # type: ignore[no-any-return]


class Hooked(Plain):
    """Scales the gradient of its large weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first.weight.register_hook(lambda gradient: 0.1 * gradient)


class Inner(torch.autograd.Function):
    """A backward pass that asks for gradients itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return torch.tanh(layer(x))

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            made = torch.tanh(ctx.layer(x.detach()))
        return (None, *torch.autograd.grad(made, [ctx.layer.weight, ctx.layer.bias], above[0]), None)


class Asking(Plain):
    """Computes its large layer by a function of its own."""

    def forward(self, x: Tensor) -> Tensor:
        inner = Inner.apply(x, self.first.weight, self.first.bias, self.first)  # type: ignore[no-untyped-call]
        return self.second(inner)  # type: ignore[no-any-return]


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list with an entry for each step that was taken from factors."""
    found, real = list[int](), descent.SGD.descend

    def counted(self: descent.SGD, factors: Any) -> None:
        found.extend([1] * len(factors))
        real(self, factors)

    monkeypatch.setattr(descent.SGD, "descend", counted)
    return found


def trained(model: Callable[[], nn.Module], training: Training = TRAINING) -> Tensor:
    trainer = TorchTrainer(Task.classification(model=model, classes=2), 0, device="cpu")
    return trainer.train(trainer.initial(), examples(), training, round_number=1, key=(1, "client", 1, 2)).values


def made(model: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, training: Training = TRAINING) -> Tensor:
    """Return what the same training comes to where every gradient is made."""
    with monkeypatch.context() as patch:
        patch.setattr(local_step.LocalStep, "_takes_factors", lambda self, optimizer: False)
        return trained(model, training)


NEEDS_ONEDNN = pytest.mark.skipif(not dense._has_product(), reason="needs oneDNN, this torch has none")


@NEEDS_ONEDNN
@pytest.mark.parametrize("model", [Plain, Tied, Penalised, Again])
def test_steps_from_factors_are_the_steps_of_gradients(
    model: Callable[[], nn.Module], left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.testing.assert_close(trained(model), made(model, monkeypatch), rtol=1e-5, atol=1e-7)
    assert left


@pytest.mark.parametrize("model", [Hooked, Asking])
def test_where_somebody_asks_for_a_gradient_it_is_made(
    model: Callable[[], nn.Module], left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.testing.assert_close(trained(model), made(model, monkeypatch), rtol=1e-5, atol=1e-7)
    assert not left


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer_arguments": {"momentum": 0.9}},
        {"optimizer_arguments": {"weight_decay": 1e-4}},
        {"optimizer_arguments": {"maximize": True}},
        {"max_gradient_norm": 0.1},
        {"optimizer": "adam", "learning_rate": 0.01},
    ],
    ids=str,
)
def test_whatever_else_is_done_to_a_gradient_gets_it(settings: dict[str, Any], left: list[int]) -> None:
    assert trained(Plain, TRAINING.model_copy(update=settings)).isfinite().all()
    assert not left


def test_a_frozen_layer_stays_as_it_is(left: list[int]) -> None:
    def frozen() -> nn.Module:
        model = Plain()
        model.first.requires_grad_(False)
        return model

    assert trained(frozen).abs().max() > 0
    assert not left
