"""A module becomes one vector and back without loss, and two models agree only if they are the same."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedml_core.errors import SpecMismatchError, TaskError
from fedml_core.model import ModelSpec, TensorSpec

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Bag(nn.Module):
    """Parameters and buffers by name: what a spec is about, without layers."""

    def __init__(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, value in parameters.items():
            parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, not name.startswith("frozen"))
            self.register_parameter(name, parameter)
        for name, value in (buffers or {}).items():
            self.register_buffer(name, value, persistent=not name.startswith("cache"))


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    size = st.integers(1, 4)
    makers: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(draw(size), draw(size), bias=draw(st.booleans())),
        lambda: nn.Conv2d(draw(size), draw(size), draw(size)),
        lambda: nn.BatchNorm1d(draw(size), affine=draw(st.booleans())),
        lambda: nn.GRU(draw(size), draw(size), num_layers=draw(st.integers(1, 2))),
        lambda: nn.Embedding(draw(size), draw(size)),
        lambda: nn.PReLU(),
        lambda: nn.ReLU(),
        lambda: Bag({"scalar": torch.tensor(draw(st.floats(-9, 9, width=16))), "empty": torch.zeros(0, draw(size))}),
        lambda: Bag({"frozen": torch.ones(draw(size))}, {"cache": torch.ones(2), "count": torch.tensor(draw(size))}),
    ]
    return draw(st.sampled_from(makers))()


@st.composite
def modules(draw: st.DrawFn) -> nn.Module:
    parts = [draw(layers()) for _ in range(draw(st.integers(1, 4)))]
    if draw(st.booleans()):
        parts.append(nn.Sequential(parts[0], nn.Linear(2, 1)))  # the first part again: tied
    module = nn.Sequential(nn.Linear(1, 1), *parts)
    return module.to(draw(st.sampled_from(FLOATS)))


@given(modules(), st.integers(0, 2**31))
def test_loading_and_flattening_are_inverse(module: nn.Module, seed: int) -> None:
    spec = ModelSpec.of(module)
    dtypes = {getattr(torch, tensor.dtype) for tensor in (*spec.parameters, *spec.buffers)}
    vector = torch.randn(spec.size, generator=torch.Generator().manual_seed(seed))
    for dtype in dtypes:
        vector = vector.to(dtype).float()
    spec.load(vector, module)
    assert torch.equal(spec.flatten(module), vector)
    spec.load(torch.zeros(spec.size), module)
    assert not spec.flatten(module).any()


@given(modules())
def test_a_spec_counts_each_travelling_tensor_once(module: nn.Module) -> None:
    spec = ModelSpec.of(module)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    persistent = module.state_dict(keep_vars=True)
    averaged = [b for name, b in module.named_buffers() if name in persistent and b.is_floating_point()]
    assert spec.parameter_count == sum(parameter.numel() for parameter in trainable)
    assert spec.size == spec.parameter_count + sum(buffer.numel() for buffer in averaged)
    rows = [*spec.parameters, *spec.buffers]
    assert [row.offset for row in rows] == [sum(row.size for row in rows[:place]) for place in range(len(rows))]


@given(modules())
def test_a_spec_survives_json(module: nn.Module) -> None:
    spec = ModelSpec.of(module)
    again = ModelSpec.from_config(json.loads(json.dumps(spec.to_config())))
    assert again == spec
    assert again.fingerprint == spec.fingerprint


def test_loading_touches_only_what_travels() -> None:
    module = Bag(
        {"w": torch.ones(2), "frozen": torch.full((2,), 3.0)},
        {"mean": torch.ones(1), "count": torch.tensor(4), "cache": torch.full((1,), 5.0)},
    )
    spec = ModelSpec.of(module)
    assert [tensor.name for tensor in (*spec.parameters, *spec.buffers)] == ["w", "mean"]
    spec.load(torch.tensor([7.0, 8.0, 9.0]), module)
    held = {name: tensor.tolist() for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    assert held == {"w": [7.0, 8.0], "frozen": [3.0, 3.0], "mean": [9.0], "count": 4, "cache": [5.0]}


def test_tied_weights_stay_tied() -> None:
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    module = nn.Sequential(first, second)
    spec = ModelSpec.of(module)
    assert spec.size == 4
    spec.load(torch.arange(4.0), module)
    assert second.weight is first.weight
    assert second.weight.flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_flattening_copies() -> None:
    module = nn.Linear(2, 1)
    spec = ModelSpec.of(module)
    spec.flatten(module).zero_()
    assert spec.flatten(module).abs().min() > 0
    assert not spec.flatten(module).requires_grad


@pytest.mark.parametrize("shape", [(2,), (4,), (1, 3), ()])
def test_a_vector_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    module = nn.Linear(2, 1)
    with pytest.raises(SpecMismatchError, match=r"a vector of shape \(3,\) fits this model, got "):
        ModelSpec.of(module).load(torch.zeros(shape), module)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_views_share_memory_and_keep_leading_dimensions(lead: tuple[int, ...]) -> None:
    spec = ModelSpec.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    vectors = torch.zeros(*lead, spec.size)
    views = spec.views(vectors)
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "0.weight": (*lead, 2, 3),
        "0.bias": (*lead, 2),
        "1.weight": (*lead, 2),
        "1.bias": (*lead, 2),
        "1.running_mean": (*lead, 2),
        "1.running_var": (*lead, 2),
    }
    for place, view in enumerate(views.values()):
        assert view.untyped_storage().data_ptr() == vectors.untyped_storage().data_ptr()
        view.fill_(place + 1)
    row = vectors.reshape(-1, spec.size)[-1]
    assert row.tolist() == [1.0] * 6 + [2.0] * 2 + [3.0] * 2 + [4.0] * 2 + [5.0] * 2 + [6.0] * 2


# Fingerprints.


BASE = Bag({"a": torch.ones(2, 3), "b": torch.ones(3), "frozen": torch.ones(2)}, {"mean": torch.ones(3)})
DIFFERENT = {
    "a name": Bag({"A": torch.ones(2, 3), "b": torch.ones(3), "frozen": torch.ones(2)}, {"mean": torch.ones(3)}),
    "a shape": Bag({"a": torch.ones(3, 2), "b": torch.ones(3), "frozen": torch.ones(2)}, {"mean": torch.ones(3)}),
    "a dtype": Bag(
        {"a": torch.ones(2, 3).half(), "b": torch.ones(3), "frozen": torch.ones(2)}, {"mean": torch.ones(3)}
    ),
    "the order": Bag({"b": torch.ones(3), "a": torch.ones(2, 3), "frozen": torch.ones(2)}, {"mean": torch.ones(3)}),
    "one more": Bag(
        {"a": torch.ones(2, 3), "b": torch.ones(3), "frozen": torch.ones(2)},
        {"mean": torch.ones(3), "z": torch.ones(1)},
    ),
    "one less": Bag({"a": torch.ones(2, 3), "b": torch.ones(3), "frozen": torch.ones(2)}),
    "a buffer": Bag({"a": torch.ones(2, 3), "frozen": torch.ones(2)}, {"b": torch.ones(3), "mean": torch.ones(3)}),
    "a frozen value": Bag(
        {"a": torch.ones(2, 3), "b": torch.ones(3), "frozen": torch.tensor([1.0, 1.0001])}, {"mean": torch.ones(3)}
    ),
    "a frozen shape": Bag(
        {"a": torch.ones(2, 3), "b": torch.ones(3), "frozen": torch.ones(1, 2)}, {"mean": torch.ones(3)}
    ),
    "a frozen dtype": Bag(
        {"a": torch.ones(2, 3), "b": torch.ones(3), "frozen": torch.ones(2).double()}, {"mean": torch.ones(3)}
    ),
    "nothing frozen": Bag({"a": torch.ones(2, 3), "b": torch.ones(3)}, {"mean": torch.ones(3)}),
}
MESSAGES = {
    "a name": "first difference at a (2, 3) float32 of the server and A (2, 3) float32 of the client",
    "a shape": "first difference at a (2, 3) float32 of the server and a (3, 2) float32 of the client",
    "a dtype": "first difference at a (2, 3) float32 of the server and a (2, 3) float16 of the client",
    "the order": "first difference at a (2, 3) float32 of the server and b (3,) float32 of the client",
    "one more": "only the client has z (1,) float32",
    "one less": "only the server has mean (3,) float32",
    "a buffer": "the same tensors are parameters on one side and buffers on the other",
    "a frozen value": "names and shapes agree, but the values of the frozen parameters differ",
    "a frozen shape": "names and shapes agree, but the values of the frozen parameters differ",
    "a frozen dtype": "names and shapes agree, but the values of the frozen parameters differ",
    "nothing frozen": "names and shapes agree, but the values of the frozen parameters differ",
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_a_fingerprint_changes_with_each_kind_of_difference(difference: str) -> None:
    one, other = ModelSpec.of(BASE), ModelSpec.of(DIFFERENT[difference])
    assert one.fingerprint != other.fingerprint
    with pytest.raises(SpecMismatchError) as caught:
        one.require_equal(other)
    assert str(caught.value) == (
        f"the server's model {one.fingerprint} is not the client's {other.fingerprint}: "
        f"{MESSAGES[difference]}; install the same task on both sides"
    )


def test_every_difference_has_a_fingerprint_of_its_own() -> None:
    prints = {ModelSpec.of(module).fingerprint for module in (BASE, *DIFFERENT.values())}
    assert len(prints) == 1 + len(DIFFERENT)
    assert all(len(text) == 32 and int(text, 16) >= 0 for text in prints)


def test_equal_models_agree_whatever_their_trainable_values() -> None:
    other = Bag({"a": torch.zeros(2, 3), "b": torch.ones(3), "frozen": torch.ones(2)}, {"mean": torch.zeros(3)})
    ModelSpec.of(BASE).require_equal(ModelSpec.of(other))
    assert ModelSpec.of(BASE).fingerprint == ModelSpec.of(other).fingerprint


def test_what_stays_at_home_is_not_in_the_fingerprint() -> None:
    buffers = {"mean": torch.ones(3), "count": torch.tensor(1), "cache": torch.ones(9)}
    other = Bag({"a": torch.ones(2, 3), "b": torch.ones(3), "frozen": torch.ones(2)}, buffers)
    assert ModelSpec.of(BASE).fingerprint == ModelSpec.of(other).fingerprint


def test_a_fingerprint_is_the_one_that_was_published() -> None:
    # Written down once: a change here parts every client from every server of another version.
    assert ModelSpec.of(BASE).fingerprint == "ed02b0b0f4edf6ae8a53da19692a3cf1"


def test_a_spec_names_both_sides_as_asked() -> None:
    with pytest.raises(
        SpecMismatchError, match="the checkpoint's model .* is not the task's .*: only the checkpoint has"
    ):
        ModelSpec.of(BASE).require_equal(ModelSpec.of(DIFFERENT["one less"]), "checkpoint", "task")


# Modules that cannot be a vector.


def test_a_module_without_trainable_parameters_is_refused() -> None:
    for module in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        with pytest.raises(
            TaskError, match=f"{type(module).__name__} has no trainable parameter; unfreeze at least one"
        ):
            ModelSpec.of(module)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(1, 1), nn.LazyLinear(2)),
        nn.Sequential(nn.Linear(1, 1), Bag({"frozen": nn.UninitializedParameter(requires_grad=False)})),
        nn.Sequential(nn.Linear(1, 1), nn.LazyBatchNorm1d(affine=False)),
    ],
)
def test_a_lazy_module_is_refused_trainable_or_not(module: nn.Module) -> None:
    with pytest.raises(
        TaskError, match=r"1\.\w+ has no shape yet; let model\(\) run its lazy module on one batch first"
    ):
        ModelSpec.of(module)


def test_a_complex_parameter_is_refused_and_a_frozen_one_is_not() -> None:
    with pytest.raises(TaskError, match=r"parameter w is torch.complex64; trainable parameters must be real floats"):
        ModelSpec.of(Bag({"w": torch.ones(2, dtype=torch.complex64)}))
    for frozen in (torch.ones(2, dtype=torch.complex64), torch.tensor(3.0), torch.zeros(0), torch.ones(2).bfloat16()):
        assert len(ModelSpec.of(Bag({"w": torch.ones(1), "frozen": frozen})).frozen_digest) == 64


def test_a_spec_of_a_size_is_one_vector() -> None:
    spec = ModelSpec.of_size(7)
    assert (spec.size, spec.parameter_count) == (7, 7)
    assert spec.parameters == (TensorSpec("vector", (7,), "float32", 0),)
    assert spec.views(torch.arange(7.0))["vector"].tolist() == list(range(7))
