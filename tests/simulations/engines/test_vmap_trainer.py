"""Clients trained side by side are trained as each would be alone."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedml_core.data import Examples
from fedml_core.errors import ConfigError, StrategyError
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.transform import Guide
from simulations import simulate
from simulations.engines.batch_trainer import UnsupportedError
from simulations.engines.engine import Engine
from simulations.engines.vmap_trainer import VmapTrainer
from strategies import FedAvg
from tests.simulations.engines.vmap_cases import (
    IMAGE,
    MODELS,
    SIZES,
    TOKENS,
    VECTOR,
    Reader,
    alone,
    check,
    cohort,
    work_of,
)

PERCEPTRON = MODELS["perceptron"][0]
TRAINING = Training(epochs=2, batch_size=4, learning_rate=0.1)


def classification(name: str = "perceptron") -> Task:
    return Task.classification(model=MODELS[name][0], classes=3)


@pytest.mark.parametrize("name", MODELS)
def test_clients_side_by_side_equal_each_alone(name: str) -> None:
    check(classification(name), cohort(MODELS[name][1], SIZES), TRAINING)


@pytest.mark.parametrize("clients", [1, 3, 17])
@pytest.mark.parametrize("name", ["cnn-dropout", "batch-norm"])
def test_any_number_of_clients_will_do(name: str, clients: int) -> None:
    sizes = (SIZES * 3)[:clients]
    check(classification(name), cohort(IMAGE, sizes), Training(batch_size=4, learning_rate=0.05))


@pytest.mark.parametrize("name", ["perceptron", "batch-norm"])
@pytest.mark.parametrize(
    "length", [{"steps": 5}, {"epochs": 3}, {"epochs": 1, "batch_size": 1}, {"batch_size": 100}], ids=str
)
def test_epochs_and_steps_of_any_batch_size(name: str, length: dict[str, Any]) -> None:
    check(classification(name), cohort(MODELS[name][1], SIZES), Training(**{"batch_size": 5, **length}))


@pytest.mark.parametrize(
    ("name", "arguments", "rate"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, 0.05),
        ("adam", {"weight_decay": 0.01, "amsgrad": True}, 0.01),
        ("adamw", {"weight_decay": 0.1}, 0.01),
        ("adamax", {}, 0.01),
        ("adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.1}, 0.05),
        ("rmsprop", {"centered": True, "momentum": 0.5}, 0.01),
        ("adadelta", {}, 1.0),
    ],
)
def test_optimizers_remember_for_each_client(name: str, arguments: dict[str, Any], rate: float) -> None:
    training = Training(
        epochs=2,
        batch_size=4,
        optimizer=name,
        learning_rate=rate,
        optimizer_arguments=arguments,
        learning_rate_decay=0.9,
    )
    # Adaptive steps divide by gradients near zero, which magnifies the order of additions.
    check(classification(), cohort(VECTOR, SIZES), training, tolerance=1e-4)


@pytest.mark.parametrize("name", ["perceptron", "batch-norm", "tied"])
@pytest.mark.parametrize("each", [False, True])
def test_guides_and_clipping_steer_each_client(name: str, each: bool) -> None:
    task, parts = classification(name), cohort(MODELS[name][1], SIZES)
    count = VmapTrainer(task, device="cpu").spec.parameter_count
    shape = (len(SIZES), count) if each else (count,)
    offset = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    training = Training(batch_size=4, learning_rate=0.1, max_gradient_norm=0.5)
    check(task, parts, training, guide=Guide(0.3, offset))
    check(task, parts, training)


@pytest.mark.parametrize("name", MODELS)
def test_at_bfloat16_clients_are_as_near_to_float32_as_each_alone(name: str) -> None:
    task, parts = classification(name), cohort(MODELS[name][1], SIZES)
    trainer, low = VmapTrainer(task, device="cpu"), TRAINING.model_copy(update={"precision": "bfloat16"})
    clients = list(range(len(SIZES)))
    works = [work_of(parts, trainer.initial(), each, clients, None) for each in (TRAINING, low)]
    exact, (together, apart) = alone(task, works[0], parts), (trainer.train(works[1]), alone(task, works[1], parts))
    for place, (update, one) in enumerate(zip(exact, apart, strict=True)):
        size = update.values.norm()
        off, off_alone = (update.values - together.values[place]).norm(), (update.values - one.values).norm()
        assert 1e-5 * size < off <= 2 * off_alone + 0.02 * size
        assert together.sums["loss"][place] == pytest.approx(float(one.sums["loss"]), rel=0.02)


@pytest.mark.parametrize("name", ["perceptron", "batch-norm", "cnn-dropout"])
def test_examples_weigh_what_they_weigh_alone(name: str) -> None:
    parts = cohort(MODELS[name][1], SIZES, weighted=True)
    check(classification(name), parts, TRAINING)


def test_regression_reports_the_same_sums() -> None:
    task = Task.regression(model=lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)))
    parts = [Examples.of(part.inputs[0], part.inputs[0].sum(dim=1)) for part in cohort(VECTOR, SIZES)]
    made = check(task, parts, TRAINING)
    assert set(made.sums) == {"examples", "loss", "mae"}


def test_a_loss_of_the_whole_batch_is_each_clients_own() -> None:
    task = Task(model=PERCEPTRON, loss=F.cross_entropy, metrics={"first": lambda outputs, targets: outputs[:, 0]})
    check(task, cohort(VECTOR, SIZES), TRAINING)


def test_losses_that_compare_examples_see_only_their_own_batch() -> None:
    def contrast(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs - 0.5 * outputs.mean(dim=0), targets, reduction="none")

    check(Task(model=PERCEPTRON, loss=contrast), cohort(VECTOR, SIZES), TRAINING)


def test_models_that_compare_examples_see_only_their_own_batch() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leave = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(x - 0.5 * x.mean(dim=0))  # type: ignore[no-any-return]

    check(Task.classification(model=Centred, classes=3), cohort(VECTOR, SIZES), TRAINING)


def test_clients_keep_their_own_running_statistics() -> None:
    task, parts = classification("batch-norm"), cohort(IMAGE, SIZES)
    trainer = VmapTrainer(task, device="cpu")
    made = check(task, parts, TRAINING, trainer=trainer)
    buffers = made.values[:, trainer.spec.parameter_count :]
    assert buffers.shape == (len(SIZES), 8)
    assert len({tuple(row.tolist()) for row in buffers}) == len(SIZES)


def test_a_buffer_that_a_model_replaces_is_each_clients_own() -> None:
    class Counting(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.leave = nn.Linear(5, 3)
            self.register_buffer("seen", torch.zeros(5))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + x.detach().mean(dim=0)
            return self.leave(x + self.seen)  # type: ignore[no-any-return]

    check(Task.classification(model=Counting, classes=3), cohort(VECTOR, [4, 8, 4]), TRAINING)


class Witness(nn.Linear):
    """Remembers whether torch was to choose deterministic algorithms."""

    seen: ClassVar[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.are_deterministic_algorithms_enabled())
        return super().forward(x)


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_algorithms_are_chosen_while_clients_train_and_no_longer(wanted: bool) -> None:
    Witness.seen.clear()
    parts = cohort(VECTOR, SIZES)
    task = Task.classification(model=lambda: Witness(5, 3), classes=3)
    engine = Engine.from_config({"name": "vectorised", "deterministic": wanted, "clients_at_once": 3})
    found = simulate(task, FedAvg(), clients=parts, rounds=2, training=TRAINING, engine=engine, device="cpu")
    assert all(flag == wanted for flag in Witness.seen[1:]) and wanted in Witness.seen
    assert not torch.are_deterministic_algorithms_enabled()
    plain = simulate(task, FedAvg(), clients=parts, rounds=2, training=TRAINING, device="cpu")
    torch.testing.assert_close(found.parameters, plain.parameters, rtol=1e-5, atol=1e-6)


def test_the_order_of_clients_changes_nothing() -> None:
    task, parts = classification("cnn-dropout"), cohort(IMAGE, SIZES)
    trainer = VmapTrainer(task, device="cpu")
    numbers = list(range(len(parts)))
    first = check(task, parts, TRAINING, trainer=trainer, clients=numbers)
    turned = check(task, parts[::-1], TRAINING, trainer=trainer, clients=numbers[::-1])
    assert torch.allclose(first.values, turned.values.flip(0), rtol=1e-5, atol=1e-6)


def test_a_trainer_repeats_itself_whatever_it_did_before() -> None:
    task, parts = classification("batch-norm-all"), cohort(IMAGE, SIZES)
    trainer = VmapTrainer(task, device="cpu")
    first = check(task, parts, TRAINING, trainer=trainer)
    check(task, parts[:2], Training(batch_size=3), trainer=trainer)
    assert torch.equal(first.values, check(task, parts, TRAINING, trainer=trainer).values)


def test_the_arguments_and_torchs_generator_are_left_as_they_were(untouched_generators: None) -> None:
    task, parts = classification("cnn-dropout"), cohort(IMAGE, SIZES)
    trainer = VmapTrainer(task, device="cpu")
    parameters = trainer.initial()
    before = [parameters.clone(), *(part.inputs[0].clone() for part in parts)]
    trainer.train(work_of(parts, parameters, TRAINING, range(len(parts)), None))
    assert all(torch.equal(a, b) for a, b in zip(before, [parameters, *(p.inputs[0] for p in parts)], strict=True))


@settings(max_examples=15)
@given(st.data())
def test_small_networks_of_any_shape_train_as_alone(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 6), min_size=0, max_size=3))
    extras: list[Any] = data.draw(st.lists(st.sampled_from(["relu", "tanh", "drop", "norm", "batch"]), max_size=3))
    sizes = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=5))
    batch_size = data.draw(st.integers(2, 5))

    def model() -> nn.Module:
        layers: list[nn.Module] = []
        width = 5
        for place, wide in enumerate(widths):
            layers.append(nn.Linear(width, wide))
            width = wide
            if place < len(extras):
                made: dict[str, nn.Module] = {
                    "relu": nn.LeakyReLU(),
                    "tanh": nn.Tanh(),
                    "drop": nn.Dropout(0.3),
                    "norm": nn.LayerNorm(wide),
                    "batch": nn.BatchNorm1d(wide),
                }
                layers.append(made[extras[place]])
        return nn.Sequential(*layers, nn.Linear(width, 3))

    # Normalising two nearly equal numbers magnifies the rounding of float32.
    training = Training(batch_size=batch_size, learning_rate=0.05)
    check(Task.classification(model=model, classes=3), cohort(VECTOR, sizes), training, tolerance=1e-3)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


class Choosy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Batchwise(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Noisy, r"layer 1 \(Noisy\) cannot be vectorised: it draws random numbers"),
        (nn.RReLU, r"layer 1 \(RReLU\) cannot be vectorised: it draws random numbers"),
        (Choosy, r"layer 1 \(Choosy\) cannot be vectorised: what it computes depends on the values of a tensor"),
        (Batchwise, "the model changes 1.calls, which clients side by side would share"),
    ],
)
def test_what_cannot_be_vectorised_names_the_layer_and_why(layer: type[nn.Module], message: str) -> None:
    task = Task.classification(model=lambda: nn.Sequential(nn.Linear(5, 3), layer(), nn.Linear(3, 3)), classes=3)
    refuse(task, cohort(VECTOR, SIZES), TRAINING, message)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True),
            r"layer layer.self_attn \(Multihead.*draws",
        ),
        (nn.GRU(8, 8, num_layers=2, dropout=0.1, batch_first=True), r"layer layer \(GRU\).*draws dropout of its own"),
        (nn.LSTM(8, 8, proj_size=4, batch_first=True), r"layer layer \(LSTM\) has a proj_size"),
    ],
)
def test_what_layers_of_sequences_draw_themselves_is_refused(layer: nn.Module, message: str) -> None:
    task = Task.classification(model=lambda: Reader(layer), classes=3)
    refuse(task, cohort(TOKENS, SIZES), TRAINING, message)


def test_other_running_statistics_are_refused() -> None:
    task = Task.classification(
        model=lambda: nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True), nn.Flatten(), nn.Linear(128, 3)),
        classes=3,
    )
    refuse(task, cohort(IMAGE, SIZES), TRAINING, r"layer 0 \(InstanceNorm2d\) keeps running statistics in its own way")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "lbfgs"}, "optimizer LBFGS cannot train clients side by side; SGD, Adam"),
        ({"optimizer": "rprop"}, "optimizer Rprop cannot train clients side by side"),
        (
            {"precision": "float16"},
            "precision float16 scales each client's losses in its own way; use bfloat16 or float32",
        ),
    ],
)
def test_other_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    refuse(classification(), cohort(VECTOR, SIZES), Training(batch_size=4, **arguments), message)


def test_models_of_another_precision_are_refused() -> None:
    task = Task.classification(model=lambda: nn.Linear(5, 3).double(), classes=3)
    with pytest.raises(UnsupportedError, match="weight is torch.float64; clients side by side train float32 models"):
        VmapTrainer(task, device="cpu")


def test_a_client_whose_examples_weigh_nothing_is_left_to_training_alone() -> None:
    parts = cohort(VECTOR, [3, 2])
    parts[1] = Examples.of(*parts[1].inputs, parts[1].targets, weights=torch.zeros(2))
    refuse(classification(), parts, TRAINING, "a client has no examples that count")


def test_failures_of_user_code_are_left_to_training_alone() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ValueError("no\nsuch loss")

    task = Task(model=PERCEPTRON, loss=loss)
    message = "the loss, a metric or the backward pass cannot be vectorised: ValueError: no such loss"
    refuse(task, cohort(VECTOR, SIZES), TRAINING, message)


def test_wrong_settings_are_said_as_they_are_alone() -> None:
    task, parts = classification(), cohort(VECTOR, [3, 2])
    trainer = VmapTrainer(task, device="cpu")
    with pytest.raises(ConfigError, match="unknown optimizer 'sdg'"):
        trainer.train(work_of(parts, trainer.initial(), Training(optimizer="sdg"), [1, 2], None))
    wrong = Guide(0.0, torch.zeros(3, 4))
    with pytest.raises(StrategyError, match=r"offset must have shape \(75,\) or \(2, 75\), got \(3, 4\)"):
        trainer.train(work_of(parts, trainer.initial(), TRAINING, [1, 2], wrong))


def refuse(task: Task, parts: list[Examples], training: Training, message: str) -> None:
    trainer = VmapTrainer(task, device="cpu")
    with pytest.raises(UnsupportedError, match=message) as caught:
        trainer.train(work_of(parts, trainer.initial(), training, range(len(parts)), None))
    assert "\n" not in str(caught.value)
