"""Many members' masked vectors that a simulation has added up already: all of them are in the sum, or none is."""

from __future__ import annotations

import numpy as np
import pytest

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.codec import Kind, Writer
from tests.fedml_core.secagg.assisted_cases import BINDING, Assisted


def refusal(members: tuple[int, ...]) -> bytes:
    """Return an assistant's word that these members cannot be summed."""
    return Writer(Kind.REFUSALS).numbers(members).bytes()


def contribute_together(case: Assisted, members: tuple[int, ...]) -> None:
    """Hand over the messages of members and the sum of their masked vectors."""
    total = np.zeros_like(case.vectors[0])
    messages = {}
    for member in members:
        messages[member], masked = case.masked(member)
        total += masked
    case.server.receive_contribution_sum(messages, total)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_a_sum_that_comes_in_one_piece_is_unmasked_as_single_vectors_are(bits: int) -> None:
    case = Assisted(bits=bits)
    case.advertise()
    contribute_together(case, (0, 1, 2, 3))
    case.gather()
    case.witness()
    case.answer()
    np.testing.assert_array_equal(case.server.total(), case.expected())


def test_pieces_and_single_vectors_go_into_the_same_sum() -> None:
    case = Assisted(members=5)
    case.advertise()
    contribute_together(case, (0, 3))
    case.contribute([4])
    contribute_together(case, (1, 2))
    case.gather()
    case.witness()
    case.answer()
    np.testing.assert_array_equal(case.server.total(), case.expected())


def test_one_member_that_an_assistant_refuses_leaves_its_whole_piece_out() -> None:
    case = Assisted(members=5)
    case.advertise()
    case.contribute([3, 4])
    message, masked = case.masked(0)
    flipped = message[:-1] + bytes([message[-1] ^ 1])
    other, more = case.masked(1)
    with pytest.raises(SecureAggregationError, match="not signed"):
        case.server.receive_contribution_sum({0: flipped, 1: other}, masked + more)
    assert set(case.server.contributions) == {3, 4}
    case.server.receive_contribution_sum({0: message, 1: other}, masked + more)
    for one in case.server.live:
        roundup = case.server.roundup(one)
        if one == 100:  # its session never sees member 0, and says that it refused it
            case.assistants[one].gather(roundup)
            case.server.receive_gathered(one, refusal((0,)))
        else:
            case.server.receive_gathered(one, case.assistants[one].gather(roundup))
    case.server.close_contributions()
    assert case.server.contributors == (3, 4)


def test_a_piece_alone_that_is_refused_is_no_sum() -> None:
    case = Assisted()
    case.advertise()
    contribute_together(case, (0, 1, 2, 3))
    for one in case.server.live:
        case.assistants[one].gather(case.server.roundup(one))
        case.server.receive_gathered(one, refusal((2,) if one == 101 else ()))
    with pytest.raises(ThresholdError, match="0 contributions were accepted, 4 were not"):
        case.server.close_contributions()


def test_a_member_is_in_one_piece_only_and_nothing_of_a_wrong_piece_is_taken() -> None:
    case = Assisted()
    case.advertise()
    case.contribute([0])
    message, masked = case.masked(0)
    other, more = case.masked(1)
    with pytest.raises(SecureAggregationError, match="member 0 contributed before"):
        case.server.receive_contribution_sum({1: other, 0: message}, masked + more)
    with pytest.raises(SecureAggregationError, match="the sum of masked vectors must be"):
        case.server.receive_contribution_sum({1: other}, more[:-1])
    assert set(case.server.contributions) == {0}
    case.server.receive_contribution_sum({}, np.zeros_like(more))
    assert set(case.server.contributions) == {0} and case.server.binding == BINDING
