from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedml_core.errors import ReplyError, StrategyError
from strategies.array_layout import ArrayLayout

MODEL: dict[str, Any] = {
    "running_mean": np.array([7.0, 8.0], np.float32),
    "weight": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32),
    "batches": np.array(3),
    "scale": np.array(0.5, np.float64),
}
LAYOUT = ArrayLayout.of(MODEL, buffers=["running_mean"])


def test_parameters_come_first_buffers_after_and_integers_stay() -> None:
    assert [row.name for row in LAYOUT.spec.parameters] == ["weight", "scale"]
    assert [row.name for row in LAYOUT.spec.buffers] == ["running_mean"]
    assert LAYOUT.flatten(MODEL).tolist() == [1.0, 2.0, 3.0, 4.0, 0.5, 7.0, 8.0]
    assert LAYOUT.spec.parameter_count == 5


def test_merging_keeps_names_order_shapes_and_dtypes_and_changes_no_argument() -> None:
    merged = LAYOUT.merge(torch.arange(7.0), MODEL)
    assert list(merged) == list(MODEL)
    assert {name: (a.shape, a.dtype) for name, a in merged.items()} == {n: (a.shape, a.dtype) for n, a in MODEL.items()}
    assert merged["weight"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert (float(merged["scale"]), int(merged["batches"])) == (4.0, 3)
    assert merged["running_mean"].tolist() == [5.0, 6.0]
    assert MODEL["weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_what_was_flattened_merges_back_to_itself() -> None:
    merged = LAYOUT.merge(LAYOUT.flatten(MODEL), MODEL)
    assert all(np.array_equal(merged[name], MODEL[name]) for name in MODEL)


def test_without_buffers_every_float_is_a_parameter() -> None:
    assert ArrayLayout.of(MODEL).spec.parameter_count == 7


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_any_real_floats_are_taken(dtype: Any) -> None:
    sent = {**MODEL, "weight": MODEL["weight"].astype(dtype)}
    assert LAYOUT.flatten(sent).tolist() == LAYOUT.flatten(MODEL).tolist()


def test_numbers_beyond_float32_become_infinite_to_be_refused() -> None:
    assert LAYOUT.flatten({**MODEL, "scale": np.array(1e300)})[4].item() == float("inf")


@pytest.mark.parametrize(
    ("name", "array", "rule", "message"),
    [
        ("weight", None, "keys", "array 'weight' is missing, of 1"),
        ("extra", np.zeros(1), "keys", "array 'extra' is not one of the model's, of 1"),
        ("weight", np.zeros((1, 2)), "shape", r"array 'weight' must have shape \(2, 2\), got \(1, 2\)"),
        ("weight", np.zeros(4), "shape", r"array 'weight' must have shape \(2, 2\), got \(4,\)"),
        ("scale", np.zeros(1), "shape", r"array 'scale' must have shape \(\), got \(1,\)"),
        ("weight", np.zeros((2, 2), int), "dtype", "array 'weight' must hold floats, got int64"),
        ("weight", np.zeros((2, 2), complex), "dtype", "array 'weight' must hold floats, got complex128"),
        ("weight", np.full((2, 2), "1"), "dtype", "array 'weight' must hold floats, got <U1"),
    ],
)
def test_arrays_of_another_model_are_refused(name: str, array: Any, rule: str, message: str) -> None:
    sent = {**MODEL, name: array} if array is not None else {n: a for n, a in MODEL.items() if n != name}
    with pytest.raises(ReplyError, match=message) as refused:
        LAYOUT.flatten(sent)
    assert refused.value.rule == rule


@pytest.mark.parametrize(
    ("arrays", "buffers", "message"),
    [
        ({"n": np.array(1)}, (), "the model has no floating-point array to train"),
        ({}, (), "the model has no floating-point array to train"),
        ({"mean": np.zeros(2)}, ("mean",), "the model has no floating-point array to train"),
        ({"w": np.zeros(2, complex)}, (), "array 'w' holds complex128; a model's arrays must be real numbers"),
        ({"w": np.zeros(2)}, ("mean",), "buffer 'mean' is not among the model's arrays: w"),
    ],
)
def test_a_model_that_cannot_be_aggregated_is_refused(arrays: Any, buffers: Any, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        ArrayLayout.of(arrays, buffers)


def test_a_step_that_leaves_half_precision_is_refused() -> None:
    model = {"w": np.zeros(2, np.float16)}
    with pytest.raises(StrategyError, match="the step leaves the range of float16 in array 'w'; send float32"):
        ArrayLayout.of(model).merge(torch.tensor([1.0, 1e6]), model)
