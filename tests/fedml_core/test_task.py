"""A task builds the same model everywhere, and its losses and checks mean what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedml_core import task as module_under_test
from fedml_core.data import Examples
from fedml_core.errors import TaskError
from fedml_core.task import Task, absolute_error, accuracy, cross_entropy, squared_error


def linear() -> nn.Module:
    return nn.Linear(4, 3)


def weights(task: Task, seed: int) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in task.build(seed).parameters()])


def test_a_seed_builds_the_same_model_whatever_was_drawn_before(untouched_generators: None) -> None:
    task = Task.classification(model=linear, classes=3)
    first = weights(task, 5)
    state = torch.get_rng_state()
    torch.rand(9)
    assert torch.equal(weights(task, 5), first)
    assert not torch.equal(weights(task, 6), first)
    torch.set_rng_state(state)


def test_building_does_not_wake_sleeping_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    # A process that has woken CUDA up can no longer fork workers that use it.
    def woken(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("the GPU was asked")

    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all", "init"):
        monkeypatch.setattr(torch.cuda, name, woken)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(Task(model=linear, loss=cross_entropy).build(0), nn.Linear)


def test_a_model_that_wakes_a_gpu_up_is_built_again_with_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded_gpus: list[list[int]] = []
    answers = iter([[], [0], [0]])

    def built(self: Task, seed: int, gpus: list[int]) -> nn.Module:
        seeded_gpus.append(gpus)
        return linear()

    monkeypatch.setattr(module_under_test, "_awake_gpus", lambda: next(answers))
    monkeypatch.setattr(Task, "_built", built)
    Task(model=linear, loss=cross_entropy).build(0)
    assert seeded_gpus == [[], [0]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_made_on_the_gpu_follows_the_seed() -> None:
    task = Task(model=lambda: nn.Linear(4, 3, device="cuda"), loss=cross_entropy)
    first = weights(task, 1)
    before = torch.cuda.get_rng_state()
    assert torch.equal(weights(task, 1), first)
    assert not torch.equal(weights(task, 2), first)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def failing() -> nn.Module:
    raise KeyError("weights")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (failing, r"the task's model\(\) failed: KeyError: 'weights'"),
        (lambda: nn.Linear, r"the task's model\(\) must return a torch module, got type"),
    ],
)
def test_a_model_function_at_fault_is_a_clear_error(model: Callable[[], Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Task(model=model, loss=cross_entropy).build(0)


def test_classification_takes_more_metrics_and_another_loss() -> None:
    plain = Task.classification(model=linear, classes=3)
    assert (plain.loss, list(plain.metrics), plain.classes) == (cross_entropy, ["accuracy"], 3)
    more = Task.classification(model=linear, classes=3, loss=squared_error, metrics={"other": absolute_error})
    assert (more.loss, list(more.metrics)) == (squared_error, ["accuracy", "other"])


def test_regression_reports_the_root_of_the_mean_square() -> None:
    task = Task.regression(model=linear)
    assert (task.loss, list(task.metrics)) == (squared_error, ["mae"])
    assert task.derive is not None
    assert task.derive({"loss": 9.0}) == {"rmse": 3.0}
    assert task.derive({}) == {}


# Losses.


@pytest.mark.parametrize("classes", [1, 2, 10, 15, 16, 40])
@pytest.mark.parametrize("count", [255, 256, 3000])
def test_cross_entropy_of_many_examples_and_few_classes_is_torchs(count: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = (30 * torch.randn(count, classes, generator=generator)).requires_grad_()
    labels = torch.randint(0, classes, (count,), generator=generator)
    weights = torch.rand(count, generator=generator)
    losses, expected = cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    found, wanted = (torch.autograd.grad(each, logits, weights)[0] for each in (losses, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [200, 300])
def test_cross_entropy_takes_labels_of_a_byte(count: int) -> None:
    logits, labels = torch.randn(count, 4), torch.arange(count) % 4
    assert torch.allclose(cross_entropy(logits, labels.to(torch.uint8)), cross_entropy(logits, labels), atol=1e-6)


def test_cross_entropy_takes_probabilities_of_many_examples() -> None:
    logits, labels = torch.randn(300, 4), torch.softmax(torch.randn(300, 4), dim=1)
    assert torch.equal(cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none"))


def test_cross_entropy_is_torchs_and_averages_over_pixels() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    expected = -logits.double().log_softmax(1)[range(4), labels]
    assert torch.allclose(cross_entropy(logits, labels).double(), expected, atol=1e-6)
    images, maps = torch.randn(2, 3, 5, 6), torch.randint(0, 3, (2, 5, 6))
    pixels = F.cross_entropy(images, maps, reduction="none")
    assert torch.allclose(cross_entropy(images, maps), torch.stack([p.mean() for p in pixels]), atol=1e-6)


def test_accuracy_counts_the_largest_logit() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    assert accuracy(logits, torch.tensor([1, 1])).tolist() == [1.0, 0.0]
    pixels = logits.T.reshape(1, 3, 2)
    assert accuracy(pixels, torch.tensor([[1, 1]])).tolist() == [0.5]


@pytest.mark.parametrize(("loss", "expected"), [(squared_error, [1.0, 4.0]), (absolute_error, [1.0, 2.0])])
def test_a_column_of_outputs_meets_a_row_of_targets(
    loss: Callable[[Tensor, Tensor], Tensor], expected: list[float]
) -> None:
    outputs, targets = torch.tensor([[1.0], [5.0]]), torch.tensor([2.0, 3.0])
    assert loss(outputs, targets).tolist() == expected
    assert loss(outputs, targets.reshape(2, 1)).tolist() == expected
    assert loss(outputs.repeat(1, 3), targets.reshape(2, 1).repeat(1, 3)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [squared_error, absolute_error])
def test_outputs_that_would_broadcast_are_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    # (3, 3) against (3,) would subtract each row's targets from every other row, without a word.
    with pytest.raises(TaskError, match=r"outputs of shape \(3, 3\) do not fit targets of shape \(3,\); a regression"):
        loss(torch.zeros(3, 3), torch.zeros(3))


# Checks.


def labels(*values: int, dtype: torch.dtype = torch.long) -> Examples:
    return Examples.of(torch.zeros(len(values), 4), torch.tensor(values, dtype=dtype))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (labels(), "client 7: no examples; give it data or leave it out"),
        (labels(0, 2, 3), r"client 7: label 3 of example 2 is out of range; labels must be 0 to 2"),
        (labels(0, -1, 3), r"client 7: label -1 of example 1 is out of range"),
        (labels(0, 1, dtype=torch.float32), "client 7: labels must be integers for classification, got torch.float32"),
        (Examples.of(torch.zeros(1, 4), torch.tensor([[[0, 5]]])), "label 5 of example 0 is out of range"),
        (
            Examples.of(torch.zeros(2, 4), torch.tensor([0, 1]), weights=torch.zeros(2)),
            "client 7: every example weighs 0; weigh one at least, or leave it out",
        ),
    ],
)
def test_data_that_does_not_fit_is_named(data: Examples, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Task.classification(model=linear, classes=3).check(data, "client 7")


def test_data_that_fits_passes() -> None:
    task = Task.classification(model=linear, classes=3)
    task.check(labels(0, 1, 2), "client 7")
    task.check(labels(2, dtype=torch.uint8), "client 7")
    task.check(Examples.of(torch.zeros(2, 4), torch.tensor([0, 1]), weights=torch.tensor([0.0, 0.5])), "client 7")
    Task.regression(model=linear).check(Examples.of(torch.zeros(2, 4), torch.tensor([-5.0, 9.0])), "client 7")


def test_a_map_style_data_set_is_only_counted_beforehand() -> None:
    class Untouchable:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("reading all of it could take hours")

    Task.classification(model=linear, classes=3).check(Untouchable(), "client 7")
