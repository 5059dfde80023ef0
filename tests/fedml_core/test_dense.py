"""Dense layers by oneDNN compute what torch's own do, and stand back wherever they would not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fedml_core import dense
from fedml_core.dense import quick_dense
from tests.clients.trainer_cases import batches_of, by_hand, classification, drawn, labelled, trained, trainer_of

CPU = torch.device("cpu")
IN, OUT, ROWS = 1024, 512, 8
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list with one entry for each product that oneDNN computed."""
    calls: list[int] = []
    product = dense._product

    def counted(*arguments: Tensor) -> Tensor:
        calls.append(1)
        return product(*arguments)

    monkeypatch.setattr(dense, "_product", counted)
    return calls


def layer(bias: bool = True) -> nn.Linear:
    made = nn.Linear(IN, OUT, bias=bias)
    with torch.no_grad():
        for place, parameter in enumerate(made.parameters()):
            parameter.copy_(drawn(parameter.numel(), seed=place).view(parameter.shape) / 10)
    return made


def close(one: Tensor | None, other: Tensor | None) -> None:
    assert one is not None and other is not None
    # Sums of up to 1,024 float32 products in another order.
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.detach().abs().max()))


@pytest.mark.parametrize("shape", [(ROWS, IN), (2, 4, IN), (2, 2, 2, IN)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_torchs(shape: tuple[int, ...], bias: bool, products: list[int]) -> None:
    ours, theirs = layer(bias), layer(bias)
    one, other = (drawn(*shape, seed=7).requires_grad_() for _ in range(2))
    weights = drawn(*shape[:-1], OUT, seed=8)
    with quick_dense(ours, CPU):
        found = ours(one)
        (found * weights).sum().backward()
    assert len(products) == 3
    wanted = theirs(other)
    (wanted * weights).sum().backward()
    close(found, wanted)
    close(one.grad, other.grad)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(mine.grad, reference.grad)


def test_a_gradient_without_strides_is_taken(products: list[int]) -> None:
    ours, theirs, inputs = layer(), layer(), drawn(ROWS, IN)
    with quick_dense(ours, CPU):
        ours(inputs).sum().backward()
    theirs(inputs).sum().backward()
    close(ours.weight.grad, theirs.weight.grad)
    assert len(products) == 2


def test_frozen_weights_get_no_gradient(products: list[int]) -> None:
    ours, inputs = layer().requires_grad_(False), drawn(ROWS, IN).requires_grad_()
    with quick_dense(ours, CPU):
        ours(inputs).sum().backward()
    assert ours.weight.grad is None and inputs.grad is not None
    assert len(products) == 2


def test_gradients_of_gradients_are_torchs(products: list[int]) -> None:
    found = []
    for quick in (True, False):
        made, inputs = layer(), drawn(ROWS, IN).requires_grad_()
        with quick_dense(made if quick else nn.Identity(), CPU):
            (slope,) = torch.autograd.grad(made(inputs).square().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        found.append(made.weight.grad)
    close(found[0], found[1])
    # One for the value, two for the last pass; the pass that is differentiated itself takes torch's own.
    assert len(products) == 3


def half(made: nn.Linear) -> Tensor:
    return made.double()(drawn(ROWS, IN, dtype=torch.float64))  # type: ignore[no-any-return]


def autocast(made: nn.Linear) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return made(drawn(ROWS, IN))  # type: ignore[no-any-return]


def vmapped(made: nn.Linear) -> Tensor:
    return torch.vmap(made)(drawn(3, ROWS, IN))  # type: ignore[no-any-return]


def forward_mode(made: nn.Linear) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(drawn(ROWS, IN), drawn(ROWS, IN, seed=1))
        tangent: Tensor = forward_ad.unpack_dual(made(dual)).tangent
        return tangent


def one_example(made: nn.Linear) -> Tensor:
    return made(drawn(IN))  # type: ignore[no-any-return]


def scattered(made: nn.Linear) -> Tensor:
    return made(drawn(IN, ROWS).t())  # type: ignore[no-any-return]


# Torch's own forward mode compiles its rules by what it has deprecated itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("call", [half, autocast, vmapped, forward_mode, one_example, scattered])
def test_what_onednn_would_not_do_as_well_is_torchs_own_to_the_bit(
    call: Callable[[nn.Linear], Tensor], products: list[int]
) -> None:
    ours = layer()
    with quick_dense(ours, CPU):
        found = call(ours)
    assert torch.equal(found, call(layer()))
    assert products == []


def test_wrong_inputs_fail_with_torchs_own_words() -> None:
    ours = layer()
    with quick_dense(ours, CPU), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ours(drawn(ROWS, IN + 1))


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    class Doubling(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    made = Doubling(IN, OUT)
    with quick_dense(made, CPU):
        assert "forward" not in vars(made)
    assert torch.equal(made(drawn(ROWS, IN)), 2 * nn.functional.linear(drawn(ROWS, IN), made.weight, made.bias))


def test_the_layer_is_given_back_by_an_error_too() -> None:
    made = layer()
    with pytest.raises(KeyError), quick_dense(made, CPU):
        assert "forward" in vars(made)
        raise KeyError
    assert "forward" not in vars(made)


def test_other_devices_are_left_alone() -> None:
    made = layer()
    with quick_dense(made, torch.device("cuda")):
        assert "forward" not in vars(made)


def test_a_trainer_uses_it_for_large_layers_and_not_for_small_ones(products: list[int]) -> None:
    trained(trainer_of(classification()), labelled(16))
    assert products == []

    def large() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 2048), nn.Tanh(), nn.Linear(2048, 512), nn.Tanh(), nn.Linear(512, 3))

    task, data = classification(large), labelled(16)
    trainer = trainer_of(task)
    update = trained(trainer, data)
    assert len(products) == 4 * 2  # forward and back; the weight's step is taken from the factors of its gradient
    module, start = task.build(0), task.build(0)
    by_hand(module, data, batches_of(data, 4), lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    close(update.values, trainer.spec.flatten(module) - trainer.spec.flatten(start))


@pytest.mark.parametrize(
    ("dtype", "rows", "taken"), [(torch.float32, 64, 1), (torch.float32, 2, 0), (torch.float64, 64, 0)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_torchs_and_takes_onednn_where_it_pays(
    dtype: torch.dtype, rows: int, taken: int, bias: bool, products: list[int]
) -> None:
    one, other = drawn(rows, 300, dtype=dtype), drawn(400, 300, seed=1, dtype=dtype)
    added = drawn(400, seed=2, dtype=dtype) if bias else None
    close(dense.product(one, other, added), nn.functional.linear(one, other, added))
    close(dense.product(one.t().contiguous().t(), other, added), nn.functional.linear(one, other, added))
    assert len(products) == 2 * taken
