"""The fused trainer: equal to each client trained alone, and honest about what it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clients.torch_trainer import TorchTrainer
from fedml_core.data import Examples
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.transform import Guide
from fedml_core.update import Update
from simulations.engines.batch_trainer import BatchWork, UnsupportedError
from simulations.engines.fused_plan import together
from simulations.engines.fused_stack import Dense, stack_of
from simulations.engines.fused_trainer import FusedTrainer
from simulations.packing import Packed, visits

FEATURES, CLASSES = 6, 3
SIZES = [1, 5, 23, 17, 30, 2, 10]
PURPOSE = (7, "train")
NO_GUIDE = Guide()
# float32 rounding after a few dozen steps in another order of additions: in units of the largest change, and of the
# weights, to which each step adds a much smaller number.
CLOSE, WEIGHT_ROUNDING = 1e-5, 4 * torch.finfo(torch.float32).eps


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.Tanh(), nn.Linear(5, CLASSES)
    )


def linear() -> nn.Module:
    return nn.Linear(FEATURES, CLASSES)


def classes(sizes: Sequence[int], *, weigh: bool = False, shape: tuple[int, ...] = (FEATURES,)) -> list[Examples]:
    draws = torch.Generator().manual_seed(1)
    return [
        Examples.of(
            torch.randn(n, *shape, generator=draws),
            torch.randint(0, CLASSES, (n,), generator=draws),
            weights=torch.rand(n, generator=draws) + 0.1 if weigh else None,
        )
        for n in sizes
    ]


def fused(trainer: FusedTrainer, parts: list[Examples], training: Training, guide: Guide, parameters: Tensor) -> Update:
    return trainer.train(BatchWork(parameters, Packed.of(parts), training, 2, range(len(parts)), PURPOSE, guide))


def assert_equal_to_each_alone(
    task: Task, parts: list[Examples], training: Training, guide: Guide = NO_GUIDE, together: int | None = None
) -> None:
    alone = TorchTrainer(task, device="cpu")
    start = alone.initial()
    update = fused(FusedTrainer(task, together=together), parts, training, guide, start)
    assert update.weight.tolist() == [1.0] * len(parts)
    for k, part in enumerate(parts):
        own = guide if guide.offset is None or guide.offset.dim() == 1 else Guide(guide.mu, guide.offset[k])
        expected = alone.train(start, part, training, round_number=2, key=(*PURPOSE, k), guide=own)
        error = CLOSE * expected.values.abs().max() + WEIGHT_ROUNDING * start.abs().max()
        torch.testing.assert_close(update.values[k], expected.values, rtol=0, atol=float(error))
        for mine, theirs in ((update.sums, expected.sums), (update.facts, expected.facts)):
            assert list(mine) == list(theirs)
            for name, value in theirs.items():
                torch.testing.assert_close(mine[name][k], value, rtol=CLOSE, atol=1e-6)


def refused(task: Task, what: str, training: Training | None = None, guide: Guide = NO_GUIDE) -> None:
    with pytest.raises(UnsupportedError, match=what):
        trainer = FusedTrainer(task)
        fused(trainer, classes([4, 3]), training or Training(batch_size=2), guide, TorchTrainer(task).initial())


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    lambda: nn.LeakyReLU(0.2),
    nn.Tanh,
    nn.Sigmoid,
    nn.GELU,
    lambda: nn.GELU("tanh"),
    nn.SiLU,
    lambda: nn.ELU(0.7),
    nn.Identity,
]


@st.composite
def stacks(draw: st.DrawFn) -> Callable[[], nn.Module]:
    widths = [FEATURES, *draw(st.lists(st.integers(1, 9), max_size=3)), CLASSES]
    biases = draw(st.lists(st.booleans(), min_size=len(widths) - 1, max_size=len(widths) - 1))
    between = draw(st.lists(st.sampled_from(ACTIVATIONS), min_size=len(widths) - 1, max_size=len(widths) - 1))
    ends = draw(st.booleans())

    def make() -> nn.Module:
        parts: list[nn.Module] = [nn.Flatten()]
        for place, (bias, activation) in enumerate(zip(biases, between, strict=True)):
            parts.append(nn.Linear(widths[place], widths[place + 1], bias=bias))
            if ends or place < len(biases) - 1:
                parts.append(activation())
        return nn.Sequential(*parts)

    return make


@settings(max_examples=60)
@given(
    make=stacks(),
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=17),
    batch_size=st.integers(1, 9),
    length=st.sampled_from([{"epochs": 1}, {"epochs": 3}, {"steps": 1}, {"steps": 7}]),
    together=st.sampled_from([None, 0, 1, 2, 3, 100]),
    weigh=st.booleans(),
)
def test_random_stacks_and_cohorts_equal_each_client_alone(
    make: Callable[[], nn.Module],
    sizes: list[int],
    batch_size: int,
    length: dict[str, int],
    together: int | None,
    weigh: bool,
) -> None:
    task = Task.classification(model=make, classes=CLASSES)
    training = Training.model_validate({"batch_size": batch_size, **length})
    assert_equal_to_each_alone(task, classes(sizes, weigh=weigh, shape=(2, 3)), training, together=together)


STEERED = {
    "decay": (Training(batch_size=4, epochs=2, optimizer_arguments={"weight_decay": 0.3}), Guide()),
    "decay to nothing": (Training(batch_size=4, learning_rate=0.1, optimizer_arguments={"weight_decay": 10}), Guide()),
    "overshooting decay": (
        Training(batch_size=4, learning_rate=0.1, optimizer_arguments={"weight_decay": 15}),
        Guide(),
    ),
    "clipped": (Training(batch_size=4, epochs=2, max_gradient_norm=0.4), Guide()),
    "clipped decay": (
        Training(batch_size=4, max_gradient_norm=0.4, optimizer_arguments={"weight_decay": 0.3}),
        Guide(),
    ),
    "proximal": (Training(batch_size=4, epochs=2), Guide(mu=0.5)),
    "lower rate": (Training(batch_size=4, learning_rate_decay=0.5), Guide()),
    "neutral arguments": (Training(batch_size=4, optimizer="SGD", optimizer_arguments={"momentum": 0.0}), Guide()),
}


@pytest.mark.parametrize("together", [0, 1, 2, 100])
@pytest.mark.parametrize("make", [mlp, linear])
@pytest.mark.parametrize("case", STEERED)
def test_steered_descent_equals_each_client_alone(case: str, make: Callable[[], nn.Module], together: int) -> None:
    training, guide = STEERED[case]
    task = Task.classification(model=make, classes=CLASSES)
    assert_equal_to_each_alone(task, classes(SIZES), training, guide, together)


@pytest.mark.parametrize("together", [0, 1, 3, 100])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.2])
def test_an_offset_for_all_or_for_each_equals_each_client_alone(mu: float, each: bool, together: int) -> None:
    task = Task.classification(model=mlp, classes=CLASSES)
    size = len(TorchTrainer(task).initial())
    offset = torch.randn((len(SIZES), size) if each else (size,))
    assert_equal_to_each_alone(task, classes(SIZES), Training(batch_size=4, epochs=2), Guide(mu, offset), together)


@pytest.mark.parametrize("together", [0, 1, 100])
@pytest.mark.parametrize("targets", [(), (2,), (1, 2)])
def test_regression_equals_each_client_alone(targets: tuple[int, ...], together: int) -> None:
    outputs = 2 if targets else 1
    task = Task.regression(model=lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, outputs)))
    parts = [Examples.of(torch.randn(n, FEATURES), torch.randn(n, *targets)) for n in SIZES]
    assert_equal_to_each_alone(task, parts, Training(batch_size=4, epochs=2), together=together)


def test_regression_on_whole_numbers_equals_each_client_alone() -> None:
    task = Task.regression(model=lambda: nn.Linear(FEATURES, 1))
    parts = [Examples.of(torch.randn(n, FEATURES), torch.randint(-3, 4, (n,))) for n in SIZES]
    assert_equal_to_each_alone(task, parts, Training(batch_size=4, learning_rate=0.02))


def test_triangles_of_inner_products_are_whole_for_long_segments() -> None:
    task = Task.classification(model=mlp, classes=CLASSES)
    assert_equal_to_each_alone(task, classes([130, 117, 90, 8]), Training(batch_size=7), together=100)


def test_outputs_beyond_the_range_of_exponentials_equal_each_client_alone() -> None:
    task = Task.classification(model=linear, classes=CLASSES)
    parts = [Examples.of(300 * part.inputs[0], part.targets) for part in classes(SIZES)]
    assert_equal_to_each_alone(task, parts, Training(batch_size=4, learning_rate=0.01))


def test_ties_count_as_correct_only_for_the_first_class() -> None:
    def zeros() -> nn.Module:
        layer = nn.Linear(FEATURES, CLASSES)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    task = Task.classification(model=zeros, classes=CLASSES)
    assert_equal_to_each_alone(task, classes(SIZES), Training(batch_size=4, steps=1))


def test_an_example_that_no_step_visits_changes_nothing() -> None:
    task = Task.classification(model=mlp, classes=CLASSES)
    parts = classes([9, 5])
    seen = visits(Packed.of(parts), Training(batch_size=2, steps=1), PURPOSE, range(2))
    visited = set(seen.rows[0, 0].tolist())
    unseen = next(row for row in range(9) if row not in visited)
    spoiled = parts[0].inputs[0].clone()
    spoiled[unseen] = torch.nan
    parts[0] = Examples.of(spoiled, parts[0].targets)
    assert_equal_to_each_alone(task, parts, Training(batch_size=2, steps=1))


def test_a_diverging_client_leaves_the_others_alone() -> None:
    task = Task.classification(model=mlp, classes=CLASSES)
    parts = classes([9, 9, 4])
    spoiled = parts[1].inputs[0].clone()
    spoiled[0] = torch.nan
    update = fused(
        trainer := FusedTrainer(task, together=2),
        [parts[0], Examples.of(spoiled, parts[1].targets), parts[2]],
        Training(batch_size=4),
        Guide(),
        TorchTrainer(task).initial(),
    )
    clean = fused(trainer, parts, Training(batch_size=4), Guide(), TorchTrainer(task).initial())
    assert not update.values[1].isfinite().all()
    torch.testing.assert_close(update.values[[0, 2]], clean.values[[0, 2]], rtol=0, atol=1e-6)


def test_a_trainer_gives_the_same_again_and_leaves_earlier_results_alone() -> None:
    task = Task.classification(model=mlp, classes=CLASSES)
    trainer, start = FusedTrainer(task), TorchTrainer(task).initial()
    first = fused(trainer, classes(SIZES), Training(batch_size=4), Guide(), start)
    kept = first.values.clone()
    fused(trainer, classes([40, 3]), Training(batch_size=5, epochs=2), Guide(), start)
    again = fused(trainer, classes(SIZES), Training(batch_size=4), Guide(), start)
    assert torch.equal(first.values, kept)
    assert torch.equal(again.values, kept)
    assert torch.equal(start, TorchTrainer(task).initial())


class Written(nn.Module):
    """A plain stack, written as a forward."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        # Not in the order of use: the vector's layout follows this one.
        self.second = nn.Linear(8, CLASSES)
        self.first = nn.Linear(FEATURES, 8)
        self.activation = nn.ELU()
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.second(torch.relu(self.first(torch.flatten(x, 1)))),
        lambda self, x: self.second(F.relu(self.first(x.flatten(1)), inplace=True)),
        lambda self, x: self.second(self.first(x.view(x.shape[0], -1)).tanh()),
        lambda self, x: self.second(self.activation(self.first(x.view(x.size(0), FEATURES)))),
        lambda self, x: self.second(F.gelu(self.first(x.reshape(-1, FEATURES)), approximate="tanh")),
        lambda self, x: self.second(F.leaky_relu(self.first(torch.flatten(x, start_dim=1)), negative_slope=0.3)),
        lambda self, x: self.second(F.leaky_relu(self.first(x.reshape((x.size()[0], -1))), 0.3)),
        lambda self, x: self.second(F.elu(self.first(x.flatten(start_dim=1)), 0.5)),
        lambda self, x: torch.sigmoid(self.second(F.silu(self.first(torch.reshape(x, (-1, FEATURES)))))),
    ],
)
def test_a_forward_that_is_a_plain_stack_equals_each_client_alone(forward: Callable[[Any, Tensor], Tensor]) -> None:
    task = Task.classification(model=lambda: Written(forward), classes=CLASSES)
    assert_equal_to_each_alone(task, classes(SIZES, shape=(3, 2)), Training(batch_size=4))


@pytest.mark.parametrize(
    ("forward", "what"),
    [
        (lambda self, x: self.second(self.first(x)) + 1, "add"),
        (lambda self, x: self.second(self.first(x) * self.first.bias), "mul|bias"),
        (
            lambda self, x: self.second(F.relu(self.first(x))) if x.sum() > 0 else self.second(self.first(x)),
            "depends on the values of a tensor",
        ),
        (lambda self, x: self.first(x), "second.weight is not used"),
        (lambda self, x: self.second(F.dropout(self.first(x))), "dropout"),
        (lambda self, x: self.second(torch.relu(torch.tanh(self.first(x)))), "ReLU after Tanh"),
        (lambda self, x: self.second(self.first(torch.relu(x))), "ReLU before"),
        (lambda self, x: self.second(self.first(x.view(-1, 3))), "views 3 features as 6"),
        (lambda self, x: self.second(self.first(x.flatten())), "flatten from dimension 0"),
        (lambda self, x: self.second(self.first(x).view(-1, 8)), "view"),
        (lambda self, x: (self.second(self.first(x)),), "last layer's output alone"),
        (lambda self, x: [self.first(x), self.second(self.first(x))][1], "used twice|call_module|first"),
        (lambda self, x: F.linear(x, self.second.weight), "weight"),
        (lambda self, x: self.second(F.relu(self.first(x), x.shape[0])), "getattr"),
        (lambda self, x: self.second(F.softplus(self.first(x))), "softplus"),
    ],
)
def test_a_forward_that_is_anything_else_is_refused(forward: Callable[[Any, Tensor], Any], what: str) -> None:
    with pytest.raises(UnsupportedError, match=what):
        stack_of(Written(forward))


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES))
    module[1].weight = module[0].weight
    return module


def frozen() -> nn.Module:
    module = mlp()
    next(module.parameters()).requires_grad_(False)
    return module


def hooked() -> nn.Module:
    module = mlp()
    module.register_forward_hook(lambda *_: None)
    return module


def hooked_parameter() -> nn.Module:
    module = mlp()
    next(module.parameters()).register_hook(lambda gradient: gradient * 2)
    return module


class Sub(nn.Linear):
    """A linear layer that may do anything."""


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (tied, "1.weight is tied"),
        (frozen, "frozen"),
        (hooked, "model has hooks"),
        (hooked_parameter, "parameter 0.weight has hooks"),
        (Two, "Two.forward cannot be read .* argument: 'y'"),
        (lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4)), "buffer 1.running_mean"),
        (lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.LayerNorm(4)), "layer 1 is a LayerNorm"),
        (lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.Sequential(nn.Dropout())), "layer 1.0 is a Dropout"),
        (lambda: nn.Sequential(nn.Conv1d(1, 1, 1), nn.Linear(FEATURES, 4)), "layer 0 is a Conv1d"),
        (lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Tanh()), "Tanh after ReLU"),
        (lambda: nn.Sequential(nn.Tanh(), nn.Linear(FEATURES, 4)), "Tanh before"),
        (lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.Linear(5, 4)), "1.weight takes 5 features, given 4"),
        (lambda: nn.Sequential(nn.Flatten(0), nn.Linear(FEATURES, 4)), "flatten from dimension 0"),
        (lambda: nn.Linear(FEATURES, CLASSES).double(), "float64"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, 4)), "Parametrized|parametrizations"),
        (lambda: nn.Sequential(Sub(FEATURES, CLASSES)), "linear|weight"),
    ],
)
def test_a_model_that_is_no_plain_stack_is_refused(make: Callable[[], nn.Module], what: str) -> None:
    with pytest.raises(UnsupportedError, match=what):
        FusedTrainer(Task.classification(model=make, classes=CLASSES))


@pytest.mark.parametrize(
    ("training", "what"),
    [
        ({"optimizer": "adam"}, "optimizer adam"),
        ({"optimizer_arguments": {"momentum": 0.9}}, "momentum = 0.9"),
        ({"optimizer_arguments": {"maximize": True}}, "maximize = True"),
        ({"optimizer_arguments": {"wight_decay": 0.9}}, "wight_decay"),
        ({"optimizer_arguments": {"weight_decay": -1}}, "weight_decay = -1"),
        ({"precision": "bfloat16"}, "precision bfloat16"),
    ],
)
def test_training_that_is_not_plain_descent_is_refused(training: dict[str, Any], what: str) -> None:
    refused(Task.classification(model=mlp, classes=CLASSES), what, Training.model_validate(training))


def test_guides_that_do_not_fit_are_refused() -> None:
    task = Task.classification(model=linear, classes=CLASSES)
    refused(task, "max_gradient_norm together with a guide", Training(max_gradient_norm=1.0), Guide(mu=0.1))
    refused(task, "offset must have shape", guide=Guide(offset=torch.zeros(3)))


def test_losses_and_metrics_without_a_gradient_by_hand_are_refused() -> None:
    refused(Task(model=linear, loss=F.cross_entropy), "the loss cross_entropy")
    refused(Task(model=linear, loss=lambda outputs, _: outputs.sum(dim=1)), "the loss <lambda>")
    scalar = {"mean": lambda outputs, _: outputs.mean()}
    refused(Task.classification(model=linear, classes=CLASSES, metrics=scalar), "metric mean did not")
    failing = {"picky": lambda outputs, _: outputs.view(2, -1, 99)}
    refused(Task.classification(model=linear, classes=CLASSES, metrics=failing), "metric picky failed")


@pytest.mark.parametrize(
    ("examples", "what"),
    [
        (Examples.of(torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)), "6 features, got examples of shape"),
        (Examples.of(torch.zeros(4, 2, 3), torch.zeros(4, dtype=torch.int64)), "6 features, got examples of shape"),
        (Examples.of(torch.zeros(4, 6).double(), torch.zeros(4, dtype=torch.int64)), "float64"),
        (Examples.of(torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)), "one input tensor"),
        (Examples.of(torch.zeros(4, 6), torch.full((4,), 3)), "targets are not integers from 0 to 2"),
        (Examples.of(torch.zeros(4, 6), torch.zeros(4)), "targets are not integers"),
        (Examples.of(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int32)), "int32"),
        (Examples.of(torch.zeros(4, 6), torch.zeros(4, 2, dtype=torch.int64)), r"\(40?, 2\)|\(4, 2\)"),
        (Examples.of(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64)), "client 0 has no examples"),
        (
            Examples.of(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64), weights=torch.zeros(4)),
            "every example of client 0 weighs 0",
        ),
    ],
)
def test_examples_that_do_not_fit_are_refused(examples: Examples, what: str) -> None:
    task = Task.classification(model=linear, classes=CLASSES)
    trainer, start = FusedTrainer(task), TorchTrainer(task).initial()
    with pytest.raises(UnsupportedError, match=what):
        fused(trainer, [examples], Training(batch_size=2), Guide(), start)


def test_targets_are_checked_where_the_task_states_no_classes() -> None:
    task = Task(model=linear, loss=Task.classification(model=linear, classes=CLASSES).loss)
    parts = [Examples.of(torch.zeros(4, FEATURES), torch.full((4,), -100))]
    with pytest.raises(UnsupportedError, match="targets 0 to 2, got -100 to -100"):
        fused(FusedTrainer(task), parts, Training(), Guide(), TorchTrainer(task).initial())


@pytest.mark.parametrize("parameters", [torch.zeros(3), torch.zeros(21).double()])
def test_parameters_of_another_model_are_refused(parameters: Tensor) -> None:
    task = Task.classification(model=linear, classes=CLASSES)
    with pytest.raises(UnsupportedError, match=r"parameters must be float32 \(21,\) on the cpu"):
        fused(FusedTrainer(task), classes([4]), Training(), Guide(), parameters)


def test_work_whose_clients_and_examples_disagree_is_refused() -> None:
    task = Task.classification(model=linear, classes=CLASSES)
    work = BatchWork(TorchTrainer(task).initial(), Packed.of(classes([4, 2])), Training(), 1, [0], PURPOSE)
    with pytest.raises(UnsupportedError, match="2 clients' examples do not fit 1 clients"):
        FusedTrainer(task).train(work)


@pytest.mark.parametrize(
    ("widths", "batch_size", "clients", "count", "expected"),
    [
        ((784, 128), 10, 40, 100, 10),  # beyond the caches, all steps of a client at once
        ((784, 128), 10, 40, 1000, 7),
        ((784, 128), 10, 10, 100, 1),  # in the caches
        ((784, 128), 1, 10, 20, 20),
        ((60, 10), 10, 1000, 50, 1),
        ((784, 128), 100, 40, 100, 1),
    ],
)
def test_the_first_layer_is_touched_less_often_where_that_costs_more_than_inner_products(
    widths: tuple[int, int], batch_size: int, clients: int, count: int, expected: int
) -> None:
    layer = stack_of(nn.Linear(*widths)).layers[0]
    assert isinstance(layer, Dense)
    packed = Packed.of([Examples.of(torch.zeros(count, 1), torch.zeros(count))] * clients)
    seen = visits(packed, Training(batch_size=batch_size), PURPOSE, range(clients))
    assert together(layer, seen, hidden=True) == expected
