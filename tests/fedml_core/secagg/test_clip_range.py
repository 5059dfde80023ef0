"""What `fedml_core.secagg.clip_range` promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_core.errors import ConfigError
from fedml_core.secagg.clip_range import ClipFromSums

RULE = ClipFromSums(floor=0.01)


def test_the_clip_follows_the_means_largest_coordinate() -> None:
    """the clip depends on public sums alone, so every party computes the same one, and it tells nothing new."""
    # Trust: server sees only sums.
    assert RULE.following(1.0, 0.03, count=100, clipped_share=0.0) == 4 * 0.03 * 10
    assert RULE.following(1.0, 0.03, count=100, clipped_share=1e-4) == 4 * 0.03 * 10


@given(st.floats(0.01, 1e6), st.floats(0, 1e6), st.integers(1, 10_000), st.floats(0, 1), st.floats(1.01, 10))
def test_the_clip_changes_within_bounds(clip: float, mean: float, count: int, share: float, growth: float) -> None:
    """it never falls below `floor`, and from one round to the next never changes by more than `growth`."""
    found = ClipFromSums(floor=0.01, growth=growth).following(clip, mean, count=count, clipped_share=share)
    assert max(0.01, clip / growth) <= found <= clip * growth


def test_clipped_coordinates_make_it_grow_whatever_the_mean() -> None:
    assert RULE.following(1.0, 0.0, count=100, clipped_share=2e-4) == 2.0
    assert RULE.following(1.0, 0.0, count=100, clipped_share=0.0) == 0.5


@pytest.mark.parametrize("start", [0.01, 0.1, 1.0, 10.0, 100.0])
def test_it_settles_from_any_start(start: float) -> None:
    clip = start
    for _ in range(20):
        # 100 clients of independent signs and size 0.5: a mean of 0.05, less where they were clipped.
        clip = RULE.following(clip, min(clip, 0.5) / 10, count=100, clipped_share=0.9 if clip < 0.5 else 0.0)
    assert clip == pytest.approx(4 * 0.5)


def test_an_update_of_zeros_leaves_the_floor() -> None:
    assert RULE.following(0.011, 0.0, count=3, clipped_share=0.0) == 0.01


@pytest.mark.parametrize(
    "bad", [{"floor": 0.0}, {"growth": 1.0}, {"headroom": 0.5}, {"tolerated": 1.0}, {"floor": math.nan}]
)
def test_a_rule_that_cannot_work_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(bad))} must be"):
        ClipFromSums(**({"floor": 0.01} | bad))


@pytest.mark.parametrize(
    ("clip", "mean", "count", "share", "named"),
    [
        (0.0, 1.0, 1, 0.0, "clip"),
        (1.0, math.nan, 1, 0.0, "largest_mean"),
        (1.0, -1.0, 1, 0.0, "largest_mean"),
        (1.0, 1.0, 0, 0.0, "count"),
        (1.0, 1.0, 1, 1.1, "clipped_share"),
        (1.0, 1.0, 1, math.nan, "clipped_share"),
    ],
)
def test_sums_that_are_none_are_refused(clip: float, mean: float, count: int, share: float, named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named} must be"):
        RULE.following(clip, mean, count=count, clipped_share=share)
