"""Masks come off an assisted sum once each, by whoever was asked for them, and never by two answers that differ."""

from __future__ import annotations

import numpy as np
import pytest

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.assistance import Assistance
from fedml_core.secagg.assisted_masks import MaskDesk

THREE = Assistance((7, 8, 9), 1, 0)


def test_every_mask_is_asked_for_and_taken_off_once() -> None:
    """the sum of a mask is taken off once; an answer that differs from another one for the same masks makes the sum
    void."""
    # "whoever runs it sees sums of masks."
    desk, total = MaskDesk(THREE, 1), np.full(3, 10, np.uint32)
    asked = desk.ask([7, 8, 9])
    places = [place for listed in asked.values() for subsets in listed for place in subsets]
    assert sorted(places) == [0, 1, 2] and desk.ask([7, 8, 9]) == {} and not desk.ready
    for assistant, listed in asked.items():
        for subsets in listed:
            desk.require_asked(assistant, subsets)
            desk.take(assistant, subsets, np.full(3, len(subsets), np.uint32), total)
            with pytest.raises(SecureAggregationError, match=f"assistant {assistant} was not asked for these masks"):
                desk.require_asked(assistant, subsets)
    assert desk.ready and total.tolist() == [7, 7, 7]
    assert set(desk.answered) == {0, 1, 2} and not desk.compared


def test_masks_of_a_lost_assistant_are_asked_of_another_one_and_of_nobody_if_none_is_left() -> None:
    desk = MaskDesk(THREE, 1)
    first = desk.ask([7, 8, 9])
    lost = next(iter(first))
    others = [one for one in (7, 8, 9) if one != lost]
    desk.lose(lost)
    again = desk.ask(others)
    assert sorted(p for listed in again.values() for s in listed for p in s) == sorted(
        p for s in first[lost] for p in s
    )
    assert lost not in again
    with pytest.raises(ThresholdError):
        MaskDesk(THREE, 1).ask([])


@pytest.mark.parametrize("second", [4, 5])
def test_two_answers_for_the_same_masks_agree_or_the_sum_is_void(second: int) -> None:
    desk, total = MaskDesk(THREE, 2), np.full(3, 100, np.uint32)
    asked = [(one, subsets) for one, listed in desk.ask([7, 8, 9]).items() for subsets in listed]
    assert sorted(place for _, subsets in asked for place in subsets) == [0, 0, 1, 1, 2, 2]
    seen: set[tuple[int, ...]] = set()
    void = 0
    for assistant, subsets in asked:
        value = second if subsets in seen else 4
        seen.add(subsets)
        try:
            desk.take(assistant, subsets, np.full(3, value, np.uint32), total)
        except SecureAggregationError as error:
            assert "summed up other masks than another one; the sum is void" in str(error)
            void += 1
    assert desk.ready is (second == 4) is (void == 0)
    assert desk.compared == ({0, 1, 2} if second == 4 else set())
    assert desk.left == (set() if second == 4 else {0, 1, 2})
    assert total.tolist() == [100 - 4 * len(seen)] * 3  # each first answer once, whatever the second one was


@pytest.mark.parametrize("each", [0, 3])
def test_one_or_two_are_asked_for_the_same_masks(each: int) -> None:
    with pytest.raises(SecureAggregationError, match=f"1 or 2 assistants are asked for the same masks, got {each}"):
        MaskDesk(THREE, each)
