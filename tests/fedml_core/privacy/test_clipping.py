"""What one client can add: clipping at the client, and measuring where sums are taken."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_core.errors import ConfigError, PrivacyError, ReplyError
from fedml_core.privacy.clipping import BoundedSum, ClipByNorm, clipped
from fedml_core.transform import Draws
from fedml_core.update import Update

NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-45, 1e-38, -1e-20, 1e20, 3.4e38, -3.4e38]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def clip(values: torch.Tensor, clip_norm: float) -> torch.Tensor:
    encoded, _ = ClipByNorm(clip_norm).encode(Update.of(values), {}, {}, Draws.of(0))
    return encoded.values


@settings(max_examples=200, deadline=None)
@given(values=st.lists(NUMBERS, min_size=1, max_size=20), clip_norm=st.floats(1e-12, 1e12))
def test_no_finite_update_is_longer_than_the_norm_afterwards(values: list[float], clip_norm: float) -> None:
    # "the encoded update's L2 norm is at most clip_norm, for every finite update."
    # "clipping hides nothing by itself; the server sees every clipped update."
    row = clip(torch.tensor(values, dtype=torch.float32), clip_norm)
    assert math.sqrt(math.fsum(x * x for x in row.double().tolist())) <= clip_norm
    assert row.dtype == torch.float32


def test_clip_by_norm_keeps_small_updates_unchanged() -> None:
    # "an update that is at most as long, a zero update too, is left as it is."
    small = torch.tensor([[0.6, -0.8], [0.0, 0.0], [0.1, 1e-45]])
    assert torch.equal(clip(small, 1.0000001), small)
    beside_a_long_one = torch.cat([small, torch.tensor([[30.0, 40.0]])])
    together = clip(beside_a_long_one, 1.0000001)
    assert torch.equal(together[:3], small)
    torch.testing.assert_close(together[3], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_reaches_a_sum(wrong: float) -> None:
    # "an update that holds NaN or infinity becomes NaN as a whole, which no sum accepts."
    # "a row that is not finite is NaN in both, so that no comparison takes it for a short one."
    rows = torch.tensor([[0.5, wrong, 0.5], [3.0, 0.0, 4.0]])
    values, norms = clipped(rows, 1.0)
    assert values[0].isnan().all() and norms[0].isnan()
    torch.testing.assert_close(values[1], torch.tensor([0.6, 0.0, 0.8]))
    accumulator = BoundedSum(3, 10.0, 1.0)
    for values_ in (rows[0], values[0]):
        with pytest.raises(ReplyError):
            accumulator.add(Update.of(values_))
    assert accumulator.total().values.tolist() == [0.0, 0.0, 0.0]


def test_an_update_that_was_not_clipped_is_refused_by_the_sum() -> None:
    # "no sum that noise is added to holds an update that is longer than its bound, or not finite."
    # "an update whose L2 norm is above `bound` by more than 10^-6 of it raises ReplyError, and is not added."
    accumulator = BoundedSum(2, 10.0, 5.0)
    accumulator.add(Update.of(torch.tensor([3.0, 4.0])))
    accumulator.add(Update.of(torch.tensor([3.0, 4.000002])))
    before = accumulator.total()
    for long in (torch.tensor([3.0, 4.0001]), torch.tensor([[0.0, 0.0], [300.0, 400.0]])):
        with pytest.raises(ReplyError, match="longer than the 5 that noise is added for") as refused:
            accumulator.add(Update(long, torch.ones(long.shape[:-1], dtype=torch.float64)))
        assert refused.value.rule == "norm"
    assert torch.equal(accumulator.total().values, before.values) and accumulator.count == 2
    assert not accumulator.takes_totals


def test_a_bounded_sum_adds_in_double_precision_and_merges_with_its_like_alone() -> None:
    # "whoever runs it sees every update."
    one, other = BoundedSum(1, 10.0, 2.0), BoundedSum(1, 10.0, 2.0)
    one.add(Update.of(torch.tensor([1.0])))
    other.add(Update(torch.full((1000, 1), 2.0**-30), torch.ones(1000, dtype=torch.float64)))
    one.merge(pickle.loads(pickle.dumps(other)))
    assert one.total().values.tolist() == [1.0 + 1000 * 2.0**-30]
    with pytest.raises(PrivacyError, match="cannot merge a sum bounded by 3 into one bounded by 2"):
        one.merge(BoundedSum(1, 10.0, 3.0))


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf, 1e13])
def test_an_impossible_norm_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match="clip_norm must be"):
        ClipByNorm(wrong)


def test_the_bound_is_the_smaller_one() -> None:
    assert (ClipByNorm(2.0).l2_bound(math.inf), ClipByNorm(2.0).l2_bound(0.5)) == (2.0, 0.5)
