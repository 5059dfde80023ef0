"""Every optimizer of torch is a name away, a script's own is a function away, and a wrong one is one clear line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.optimizers import make_optimizer, needs_closure
from fedml_core.data import Examples
from fedml_core.errors import ConfigError, TaskError
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.transform import Guide
from fedml_core.update import Update
from tests.clients.trainer_cases import classification, drawn, labelled, trained, trainer_of

KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
}


def one_layer() -> nn.Module:
    return nn.Linear(5, 3, bias=False)  # a matrix, which Muon insists on


def by(name: str, arguments: dict[str, Any] | None = None, **rest: Any) -> Training:
    return Training(**{"batch_size": 8, "optimizer": name, "optimizer_arguments": arguments or {}, **rest})


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_optimizer_of_torch_lowers_the_loss(name: str) -> None:
    trainer = trainer_of(classification(one_layer))
    update = trained(trainer, labelled(16), by(name.upper(), epochs=5, learning_rate=0.01))
    before = trainer.evaluate(trainer.initial(), labelled(16))["loss"]
    assert trainer.evaluate(trainer.initial() + update.values, labelled(16))["loss"] < before
    assert update.facts["steps"].item() == 10
    assert update.facts["step_size"].item() == pytest.approx(0.1)


def test_lbfgs_solves_least_squares() -> None:
    x, truth = drawn(40, 3), torch.tensor([1.0, -2.0, 0.5])
    task = Task.regression(model=lambda: nn.Linear(3, 1, bias=False))
    trainer = trainer_of(task)
    arguments = {"line_search_fn": "strong_wolfe", "max_iter": 30}
    training = Training(steps=1, batch_size=40, optimizer="lbfgs", learning_rate=1, optimizer_arguments=arguments)
    data = Examples.of(x, x @ truth)
    update = trained(trainer, data, training)
    assert torch.allclose(trainer.initial() + update.values, truth, atol=1e-4)
    # The loss that is reported is the one before the step, once, however often the search evaluated it.
    assert update.sums["loss"].item() == pytest.approx(trainer.evaluate(trainer.initial(), data)["loss"], rel=1e-5)
    guided = trained(trainer, data, training, guide=Guide(mu=2.0))
    gram = x.T @ x / 40
    expected = torch.linalg.solve(gram + torch.eye(3), gram @ truth + trainer.initial())
    assert torch.allclose(trainer.initial() + guided.values, expected, atol=1e-4)
    pulled = trained(trainer, data, training, guide=Guide(offset=torch.tensor([0.2, 0.0, -0.2])))
    expected = torch.linalg.solve(gram, gram @ truth - torch.tensor([0.1, 0.0, -0.1]))
    assert torch.allclose(trainer.initial() + pulled.values, expected, atol=1e-4)


def test_only_lbfgs_needs_a_closure() -> None:
    matrix = [nn.Parameter(torch.zeros(2, 2))]
    assert [name for name, kind in KINDS.items() if needs_closure(kind(matrix, lr=0.1))] == ["LBFGS"]


def test_a_function_replaces_the_name() -> None:
    task = classification()
    ours = trainer_of(task, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    named = by("sgd", {"momentum": 0.9}, learning_rate=0.05)
    assert torch.equal(
        trained(ours, labelled(), by("adam")).values, trained(trainer_of(task), labelled(), named).values
    )


def test_a_functions_rates_decay_with_the_rounds() -> None:
    def two_rates(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": parameters[:2], "lr": 0.4}, {"params": parameters[2:], "lr": 0.8}], lr=1)

    made = make_optimizer(
        Training(learning_rate=0.1, learning_rate_decay=0.5),
        3,
        nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).parameters(),
        two_rates,
    )
    assert [group["lr"] for group in made.param_groups] == pytest.approx([0.1, 0.2])
    update = trained(
        trainer_of(classification(), optimizer=two_rates),
        labelled(8),
        by("sgd", learning_rate_decay=0.5),
        round_number=2,
    )
    assert update.facts["step_size"].item() == pytest.approx(0.2)


def test_each_call_gets_a_fresh_optimizer() -> None:
    trainer = trainer_of(classification())
    training = by("sgd", {"momentum": 0.99})
    assert torch.equal(trained(trainer, labelled(), training).values, trained(trainer, labelled(), training).values)


REFUSED = [
    (by("sdg"), r"unknown optimizer 'sdg'; did you mean 'SGD'"),
    (by("quantum leap"), r"unknown optimizer 'quantum leap'; known: ASGD, "),
    (by("optimizer"), r"unknown optimizer 'optimizer'"),
    (by("SparseAdam"), r"SparseAdam takes sparse gradients only, .*; use Adam"),
    (by("sgd", {"momentun": 0.9}), r"optimizer_arguments: SGD has no argument 'momentun'; did you mean 'momentum'\?"),
    (by("sgd", {"lr": 0.9}), r"optimizer_arguments must not set lr; set learning_rate"),
    (by("sgd", {"params": []}), r"SGD has no argument 'params'"),
    (by("sgd", {"momentum": -1.0}), r"optimizer_arguments: SGD refuses momentum: Invalid momentum value: -1.0"),
    (by("sgd", {"weight_decay": 0.1, "momentum": "much"}), r"SGD refuses momentum: "),
    (by("sgd", {"nesterov": True}), r"SGD refuses nesterov: Nesterov momentum requires"),
    (by("adam", {"foreach": True, "fused": True}), r"Adam refuses foreach, fused: "),
    (by("muon"), r"optimizer Muon refuses this model: Muon only supports 2D"),
    (by("adam", {"betas": ["a", "b"]}), r"Adam refuses betas: "),
    (by("sgd", {"differentiable": True}), r"optimizer SGD failed at round 1: RuntimeError"),
    (by("lbfgs", precision="float16"), r"precision float16 cannot be used with LBFGS.*; use float32"),
]


@pytest.mark.parametrize(("training", "message"), REFUSED, ids=lambda case: getattr(case, "optimizer", None))
def test_a_wrong_optimizer_is_one_clear_line(training: Training, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        trained(trainer_of(classification()), labelled(8), training)
    assert "\n" not in str(caught.value)


def test_a_function_that_fails_is_the_tasks_fault() -> None:
    def broken(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        raise KeyError("rate")

    def wrong(parameters: list[nn.Parameter]) -> Any:
        return parameters

    for factory, message in (
        (broken, "the optimizer function failed: KeyError: 'rate'"),
        (wrong, "the optimizer function must return a torch optimizer, got list"),
    ):
        with pytest.raises(TaskError, match=message):
            trained(trainer_of(classification(), optimizer=factory), labelled(8))


# Precision.


def halved(precision: str) -> tuple[Update, list[Tensor]]:
    seen: list[Tensor] = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(super().forward(x))
            return seen[-1]

    training = by("sgd", precision=precision, learning_rate=0.5, max_gradient_norm=0.05)
    return trained(trainer_of(classification(lambda: Watched(5, 3))), labelled(32), training), seen


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_trains_close_to_float32(precision: str) -> None:
    (low, seen), (full, _) = halved(precision), halved("float32")
    assert {str(tensor.dtype) for tensor in seen} == {f"torch.{precision}"}
    assert low.values.dtype == torch.float32
    assert torch.allclose(low.values, full.values, atol=2e-3)
    assert not torch.equal(low.values, full.values)
    assert low.sums["loss"].item() == pytest.approx(full.sums["loss"].item(), rel=0.02)


def test_a_guide_is_added_to_unscaled_gradients() -> None:
    offset = 0.01 * drawn(18, seed=3)
    updates = []
    for precision in ("float16", "float32"):
        training = by("sgd", precision=precision)
        task = classification(lambda: nn.Linear(5, 3))
        updates.append(trained(trainer_of(task), labelled(32), training, guide=Guide(5.0, offset)).values)
    assert torch.allclose(updates[0], updates[1], atol=2e-3)


def test_a_step_that_overflows_float16_is_skipped_and_not_counted() -> None:
    # Gradients of 4 * 65536 overflow; the scale is halved until they fit.
    task = Task(model=lambda: nn.Linear(1, 1, bias=False), loss=lambda outputs, targets: 4.0 * outputs.squeeze(1))
    data = Examples.of(torch.ones(8, 1), torch.zeros(8))
    training = Training(steps=8, batch_size=8, precision="float16", learning_rate=0.01)
    update = trained(trainer_of(task), data, training)
    skipped = 8 - int(update.facts["steps"].item())
    assert 1 <= skipped <= 4
    assert update.values.item() == pytest.approx(-0.01 * 4 * (8 - skipped), rel=1e-3)
    assert update.facts["step_size"].item() == pytest.approx(0.01 * (8 - skipped))


def test_float16_weights_cannot_be_scaled() -> None:
    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.half())

    task = classification(lambda: Half(5, 3, dtype=torch.float16))
    with pytest.raises(ConfigError, match="precision float16 needs float32 weights, and this model's are float16"):
        trained(trainer_of(task), labelled(8), by("sgd", precision="float16"))
