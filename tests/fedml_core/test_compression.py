from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedml_core.compression import StochasticQuantize, TopK
from fedml_core.errors import ConfigError
from fedml_core.model import ModelSpec
from fedml_core.transform import Draws
from fedml_core.update import Update

SPEC = ModelSpec.of(torch.nn.BatchNorm1d(2))  # 4 parameters, then 4 running statistics
VECTOR = ModelSpec.of_size


def sent(transform: TopK, values: list[float], memory: Any) -> tuple[list[float], list[float]]:
    encoded, after = transform.encode(Update.of(torch.tensor(values)), {}, memory, Draws.of(0))
    return encoded.values.tolist(), after["residual"].tolist()


def quantized(bits: int, values: Tensor, *key: int, count: int | None = None) -> Tensor:
    told = {"parameter_count": values.shape[-1] if count is None else count}
    return StochasticQuantize(bits).encode(Update.of(values), told, {}, Draws.of("test", *key))[0].values


def test_top_k_sends_the_largest_and_remembers_the_rest() -> None:
    topk = TopK(0.5)
    values, residual = sent(topk, [1.0, -3.0, 2.0, 0.5], topk.memory(VECTOR(4)))
    assert values == [0.0, -3.0, 2.0, 0.0]
    assert residual == [1.0, 0.0, 0.0, 0.5]


def test_top_k_adds_what_it_remembers_to_the_next_update() -> None:
    values, residual = sent(TopK(0.25), [0.0, 1.0, 1.5, 0.0], {"residual": torch.tensor([2.0, 1.0, 0.0, 0.0])})
    assert values == [2.0, 0.0, 0.0, 0.0]
    assert residual == [0.0, 2.0, 1.5, 0.0]


def test_top_k_sends_one_entry_at_least_and_all_for_a_fraction_of_one() -> None:
    assert sent(TopK(1e-9), [1.0, 2.0, 3.0], TopK(1e-9).memory(VECTOR(3)))[0] == [0.0, 0.0, 3.0]
    assert sent(TopK(1.0), [1.0, 0.0, 3.0], TopK(1.0).memory(VECTOR(3))) == ([1.0, 0.0, 3.0], [0.0] * 3)


def test_top_k_sends_exactly_k_of_equal_magnitudes_and_the_first_ones() -> None:
    assert sent(TopK(0.4), [1.0, -2.0, 2.0, 2.0, -1.0], {"residual": torch.zeros(5)})[0] == [0.0, -2.0, 2.0, 0.0, 0.0]
    assert sent(TopK(0.5), [0.0] * 4, {"residual": torch.zeros(4)}) == ([0.0] * 4, [0.0] * 4)


def test_top_k_passes_averaged_buffers_whole() -> None:
    topk = TopK(0.25)
    values, residual = sent(topk, [1.0, 2.0, 3.0, 4.0, 0.1, 0.2, 0.3, 0.4], topk.memory(SPEC))
    assert values[:4] == [0.0, 0.0, 0.0, 4.0]
    assert values[4:] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert residual == [1.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_top_k_passes_a_diverged_update_on_to_be_refused_and_keeps_its_memory(wrong: float) -> None:
    memory = {"residual": torch.tensor([1.0, 2.0, 3.0])}
    values, residual = sent(TopK(0.5), [1.0, wrong, 1.0], memory)
    assert not np.isfinite(values).all()
    assert residual == [1.0, 2.0, 3.0]


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5), min_size=1, max_size=8),
    st.sampled_from([0.2, 0.5, 0.8]),
)
def test_top_k_loses_nothing_over_many_rounds(updates: list[list[float]], fraction: float) -> None:
    topk, total = TopK(fraction), np.zeros(5)
    memory = topk.memory(VECTOR(5))
    for values in updates:
        encoded, memory = topk.encode(Update.of(torch.tensor(values)), {}, memory, Draws.of(0))
        total += encoded.values.double().numpy()
        assert np.count_nonzero(encoded.values) <= round(5 * fraction)
    # Eight additions of float32 numbers of at most 800 in sum: a few units in the last place of 800.
    np.testing.assert_allclose(
        total + memory["residual"].double().numpy(), np.sum(updates, axis=0), rtol=0, atol=8 * 800 * 2**-23
    )


def test_quantized_values_are_levels_within_the_clients_own_range() -> None:
    values = torch.tensor([0.0, 0.1, -0.33, 0.77, -1.5])
    for bits, levels in ((2, 1), (3, 3), (8, 127)):
        out = quantized(bits, values, bits)
        scaled = out.double() / 1.5 * levels
        torch.testing.assert_close(scaled, scaled.round(), rtol=0, atol=1e-5)
        assert float((out - values).abs().max()) < 1.5 / levels + 1e-6
        assert float(out.abs().max()) <= 1.5
        assert out[4].item() == -1.5


@pytest.mark.parametrize("bits", [2, 4, 16])
def test_quantization_is_unbiased(bits: int) -> None:
    values = torch.tensor([0.1, -0.37, 0.5, 0.9123, -1.0])
    count = 4000
    batch = Update(values.expand(count, 5), torch.ones(count, dtype=torch.float64))
    told, draws = {"parameter_count": 5}, Draws.each([("test", bits, place) for place in range(count)])
    mean = StochasticQuantize(bits).encode(batch, told, {}, draws)[0].values.double().mean(dim=0)
    # A draw varies by at most half a step, so five standard errors of the mean are 2.5 steps / sqrt(count).
    step = 1 / (2 ** (bits - 1) - 1)
    torch.testing.assert_close(mean, values.double(), rtol=0, atol=2.5 * step / count**0.5 + 1e-7)


def test_the_test_of_bias_would_notice_rounding_to_nearest() -> None:
    assert abs(round(0.37 * 7) / 7 - 0.37) > 2.5 / 7 / 4000**0.5


@pytest.mark.parametrize("make", [torch.zeros, lambda n: torch.full((n,), 1e-44), lambda n: torch.full((n,), 3e38)])
def test_quantization_holds_at_the_ends_of_float32(make: Callable[[int], Tensor]) -> None:
    values = make(4)
    torch.testing.assert_close(quantized(8, values), values, rtol=1e-6, atol=0)


def test_quantization_passes_averaged_buffers_whole() -> None:
    values = torch.tensor([1.0, 0.3, 0.001, 0.002])
    assert quantized(2, values, count=2)[2:].tolist() == values[2:].tolist()
    state = StochasticQuantize(2).init(SPEC)
    assert StochasticQuantize(2).told(state) == {"parameter_count": 4}


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_quantization_makes_nan_of_a_diverged_update(wrong: float) -> None:
    assert quantized(8, torch.tensor([1.0, wrong, 2.0])).isnan().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0.0), "fraction must be > 0 and <= 1, got 0.0"),
        (lambda: TopK(1.5), "fraction must be > 0 and <= 1, got 1.5"),
        (lambda: TopK(float("nan")), "fraction must be > 0 and <= 1, got nan"),
        (lambda: StochasticQuantize(1), "bits must be >= 2 and <= 16, got 1"),
        (lambda: StochasticQuantize(17), "bits must be >= 2 and <= 16, got 17"),
        (lambda: StochasticQuantize(8.0), "bits must be a whole number, got 8.0"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_argument_is_refused_at_construction(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        make()
