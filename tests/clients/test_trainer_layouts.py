"""A memory layout changes how fast a model trains and nothing else; a model that cannot bear one says so and trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from clients.torch_trainer import TorchTrainer
from fedml_core.errors import ConfigError, TaskError
from fedml_core.memory_layout import MemoryLayout
from fedml_core.task import Task, cross_entropy
from fedml_core.training import Training
from tests.clients.layout_cases import Recurrent, ResNet, Transformer, Viewing, images, normed
from tests.clients.trainer_cases import batches_of, by_hand, classification, trained, trainer_of

SGD = partial(torch.optim.SGD, lr=0.1)
TRAINING = Training(epochs=2, batch_size=5)
LAYOUTS: tuple[MemoryLayout, ...] = ("auto", "channels_last", "contiguous")


def expected(task: Task, count: int = 18) -> Tensor:
    """Return what the plainest loop adds to the model, parameters first, then averaged buffers."""
    trainer, data = trainer_of(task), images(count)
    module, start = task.build(0), task.build(0)
    by_hand(module, data, batches_of(data, 5, epochs=2), SGD)
    return trainer.spec.flatten(module) - trainer.spec.flatten(start)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", [Transformer, Recurrent, ResNet, normed])
def test_every_model_trains_as_in_the_plain_loop_in_every_layout(
    model: Callable[[], nn.Module], layout: MemoryLayout, caplog: pytest.LogCaptureFixture
) -> None:
    task = classification(model)
    trainer = trainer_of(task, memory_layout=layout)
    for _ in range(2):
        update = trained(trainer, images(), TRAINING)
        reference = expected(task)
        torch.testing.assert_close(update.values, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))
    assert update.values.abs().max() > 0.001
    assert caplog.records == []


@pytest.mark.parametrize("model", [ResNet, normed])
def test_evaluation_is_the_same_in_every_layout(model: Callable[[], nn.Module]) -> None:
    trainers = [trainer_of(classification(model), memory_layout=layout) for layout in LAYOUTS]
    found = [trainer.evaluate(trainer.initial() * 1.1, images(), batch_size=7) for trainer in trainers]
    assert found[0] == pytest.approx(found[2], rel=1e-5)
    assert found[1] == pytest.approx(found[2], rel=1e-5)


def test_auto_reaches_the_convolutions_and_their_inputs() -> None:
    seen: list[bool] = []

    class Watching(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
            seen.append(self.block.first.weight.is_contiguous(memory_format=torch.channels_last))
            return super().forward(x)

    trainer = trainer_of(classification(Watching))
    trained(trainer, images(), TRAINING)
    trainer.evaluate(trainer.initial(), images())
    assert len(seen) > 4 and all(seen)


def test_a_model_that_cannot_bear_channels_last_says_so_once_and_trains(caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(classification(Viewing))
    with caplog.at_level(logging.WARNING):
        updates = [trained(trainer, images(), TRAINING) for _ in range(2)]
        trainer.evaluate(trainer.initial(), images())
    plain = trained(trainer_of(classification(Viewing), memory_layout="contiguous"), images(), TRAINING)
    for update in updates:
        assert torch.equal(update.values, plain.values)
        assert {name: value.item() for name, value in update.sums.items()} == {
            name: value.item() for name, value in plain.sums.items()
        }
        assert update.facts["steps"].item() == 8
    (said,) = [record.getMessage() for record in caplog.records]
    assert "keeps the default layout: the task's model failed at round 1: RuntimeError: view size" in said


def test_evaluation_falls_back_too() -> None:
    told: list[str] = []
    trainer = trainer_of(classification(Viewing))
    trainer.configure("auto", tell=told.append)
    plain = trainer_of(classification(Viewing), memory_layout="contiguous")
    assert trainer.evaluate(trainer.initial(), images()) == plain.evaluate(plain.initial(), images())
    assert len(told) == 1


def test_a_loss_that_fails_late_is_begun_anew_for_the_whole_client() -> None:
    calls: list[int] = []

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            inner = self.conv(x)
            calls.append(len(calls))
            return self.head(inner.view(len(x), -1) if len(calls) == 3 else inner.flatten(1))  # type: ignore[no-any-return]

    told: list[str] = []
    trainer = trainer_of(classification(Late))
    trainer.configure("auto", tell=told.append)
    update = trained(trainer, images(), TRAINING)
    # Two steps, a third that failed, and then all eight again from the start.
    assert len(calls) == 11 and len(told) == 1
    assert update.facts["steps"].item() == 8
    reference = expected(classification(Late))
    torch.testing.assert_close(update.values, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


def test_channels_last_by_name_is_an_error_where_it_cannot_be() -> None:
    trainer = trainer_of(classification(Viewing), memory_layout="channels_last")
    with pytest.raises(TaskError, match=r"view size is not compatible.*; let the task call \.reshape instead"):
        trained(trainer, images(), TRAINING)


def test_an_error_that_is_not_the_layouts_is_raised_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ValueError("two contiguous things")

    trainer = trainer_of(Task(model=ResNet, loss=loss))
    for _ in range(2):
        with pytest.raises(TaskError, match="two contiguous things"):
            trained(trainer, images(), TRAINING)
    assert caplog.records == []


def test_lbfgs_which_flattens_gradients_by_view_falls_back_aloud() -> None:
    told: list[str] = []
    trainer = trainer_of(classification(ResNet))
    trainer.configure("auto", tell=told.append)
    training = Training(steps=1, batch_size=18, optimizer="lbfgs", learning_rate=0.01)
    update = trained(trainer, images(), training)
    plain = trained(trainer_of(classification(ResNet), memory_layout="contiguous"), images(), training)
    assert torch.equal(update.values, plain.values)
    assert len(told) == 1 and "optimizer LBFGS failed" in told[0]


def test_an_unknown_layout_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="memory_layout must be one of auto, .*got 'channel_last'; did you mean"):
        TorchTrainer(classification(), memory_layout="channel_last")  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_trains_in_channels_last(precision: str) -> None:
    training = TRAINING.model_copy(update={"precision": precision})
    updates = [
        trained(trainer_of(classification(ResNet), memory_layout=layout), images(), training).values
        for layout in ("channels_last", "contiguous")
    ]
    assert torch.allclose(updates[0], updates[1], atol=2e-2)
    assert updates[0].abs().max() > 0.05


def test_tied_convolutions_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer, self.head = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Linear(3 * 4 * 4, 3)
            self.outer.weight = self.inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.outer(torch.tanh(self.inner(x)))).flatten(1))  # type: ignore[no-any-return]

    task = Task(model=Tied, loss=cross_entropy, classes=3)
    reference = expected(task)
    update = trained(trainer_of(task), images(), TRAINING)
    torch.testing.assert_close(update.values, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))
