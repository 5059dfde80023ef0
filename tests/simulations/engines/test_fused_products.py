"""Products in blocks equal plain products, with torch's own kernels and with oneDNN's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from simulations.engines import fused_products
from simulations.engines.fused_products import Threads, added_up, inner_products, linear, padded, threads


@pytest.fixture(params=["as found here", "torch's own"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "torch's own":
        monkeypatch.setattr(fused_products, "_product", lambda: None)
    yield


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("count", [1, 128, 1000, 1025, 2100])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_of_many_rows(count: int, bias: bool) -> None:
    rows, weight, shift = drawn(padded(count), 33), drawn(7, 33), drawn(7) if bias else None
    out = torch.empty(len(rows), 7)
    assert linear(rows, weight, shift, out) is out
    expected = rows.double() @ weight.double().t()
    close(out, expected if shift is None else expected + shift.double())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("count", [1, 128, 1000, 1025, 2100])
def test_errors_times_rows(count: int) -> None:
    errors, rows = drawn(padded(count), 5), drawn(padded(count), 33)
    errors[count:], rows[count:] = 0, 0
    close(added_up(errors, rows), errors.double().t() @ rows.double())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("first", "last"), [(0, 1), (3, 50), (3, 51), (0, 128), (90, 128), (10, 127), (60, 120)])
def test_inner_products_do_not_see_the_rows_beside(first: int, last: int) -> None:
    rows, count = drawn(128, 33), last - first
    rows[last:] = torch.nan
    rows[:first] = torch.nan
    out = torch.zeros(count + 2, count + 2)
    inner_products(rows, first, last, out[:count, :count])
    own = rows[first:last].double()
    close(out[:count, :count], own @ own.t())
    assert not out[count:].any() and not out[:, count:].any()


def test_rows_are_padded_to_few_sizes() -> None:
    assert {padded(count) for count in range(1, 1025)} == set(range(128, 1025, 128))


def test_threads_are_what_they_were() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="inside"), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ValueError("inside")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("most", [1, 2, 3])
def test_only_large_pieces_of_work_get_all_threads_and_all_are_given_back(most: int) -> None:
    before, fair = torch.get_num_threads(), Threads(most)
    pairs = [(fair.for_flops(4e7), fair.for_flops(6e7)), (fair.for_bytes(1 << 20), fair.for_bytes(1 << 25))]
    for small, large in pairs:
        with small:
            assert torch.get_num_threads() == 1
            with large:
                assert torch.get_num_threads() == most
            assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
