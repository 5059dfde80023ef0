"""Who takes part: signed, distinct, enough of them; and what everybody computes from that alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg import graph
from fedml_core.secagg.bulletin import Advert, Bulletin, verify
from fedml_core.secagg.codec import Kind, Writer
from tests.adversary.players import World, identity, parameters_of, roster_of

# Points of order 1, 2, 4 and 8 on the curve or its twist: they agree on zero with every key.
LOW_ORDER = [
    bytes(32),
    bytes([1, *[0] * 31]),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes([0xEC, *[0xFF] * 30, 0x7F]),
]


def adverts_of(count: int) -> list[Advert]:
    world = World(count)
    return list(world.advertise().adverts)


def resigned(advert: Advert, **changes: bytes) -> Advert:
    altered = dataclasses.replace(advert, **cast(Any, changes))
    context = parameters_of().context
    return dataclasses.replace(altered, signature=identity(altered.member).sign(altered.signed_bytes(context)))


def test_equal_bulletins_have_equal_everything_and_others_another_session() -> None:
    # "all who hold equal bulletins have the same session id, neighbours, threshold and quorum; whoever holds another
    # has another session id."
    world = World(104, dropout_share=0.05, security_bits=20)
    mine = world.advertise()
    other = Bulletin.read(world.parameters, mine.to_bytes, world.roster, world.verify)
    assert other.session == mine.session and (other.threshold, other.quorum) == (mine.threshold, mine.quorum)
    assert all(other.neighbours(member) == mine.neighbours(member) for member in mine.members)
    fewer = Bulletin.checked(world.parameters, mine.adverts[:-1], world.roster, world.verify)
    assert fewer.session != mine.session


@pytest.mark.parametrize("part", ["sealing_key", "mask_key", "nonce", "commitment", "signature"])
def test_one_flipped_bit_of_an_advert_is_refused(part: str) -> None:
    # "in active mode, every advertisement was signed by the identity key that the pinned roster names for its member,
    # and no two members share a key, a nonce or a commitment."
    # "a signature is over the parameters and over everything that the advertisement says."
    # "whoever holds a member's identity key is that member."
    adverts = adverts_of(3)
    value = getattr(adverts[1], part)
    adverts[1] = dataclasses.replace(adverts[1], **{part: bytes([value[0] ^ 1]) + value[1:]})
    with pytest.raises(SecureAggregationError, match="member 1 is not signed by its identity key"):
        Bulletin.checked(parameters_of(), adverts, roster_of(range(3)))


def test_a_signature_for_other_parameters_is_refused() -> None:
    with pytest.raises(SecureAggregationError, match="not signed"):
        Bulletin.checked(parameters_of(attempt=1), adverts_of(3), roster_of(range(3)))


def test_who_is_not_on_the_roster_is_refused() -> None:
    with pytest.raises(SecureAggregationError, match="member 2 is not on the pinned roster, or was revoked"):
        Bulletin.checked(parameters_of(), adverts_of(3), roster_of(range(2)))


@pytest.mark.parametrize("part", ["sealing_key", "mask_key", "nonce", "commitment"])
def test_values_that_two_members_share_are_refused(part: str) -> None:
    adverts = adverts_of(3)
    adverts[2] = resigned(adverts[2], **{part: getattr(adverts[0], part)})
    with pytest.raises(SecureAggregationError, match="members 0 and 2 advertise the same"):
        Bulletin.checked(parameters_of(), adverts, roster_of(range(3)))


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 0, 1), (0, 2, 2)])
def test_adverts_out_of_order_or_twice_are_refused(order: Sequence[int]) -> None:
    adverts = adverts_of(3)
    with pytest.raises(SecureAggregationError, match="ascending order of distinct members"):
        Bulletin.checked(parameters_of(), [adverts[place] for place in order], roster_of(range(3)))


def test_fewer_than_the_minimum_are_refused() -> None:
    with pytest.raises(ThresholdError, match="3 members advertised, the minimum is 4"):
        Bulletin.checked(parameters_of(minimum=4), adverts_of(3), roster_of(range(3)))


def test_a_bulletin_with_more_bytes_is_refused() -> None:
    world = World(3)
    data = world.advertise().to_bytes
    for wrong in (data + b"x", data[:-1], Writer(Kind.BULLETIN).number(2**31).bytes()):
        with pytest.raises(SecureAggregationError):
            Bulletin.read(world.parameters, wrong, world.roster)


@given(st.binary(max_size=300), st.integers(0, 600), st.integers(0, 10))
def test_altered_bulletins_and_adverts_are_refused_or_read(piece: bytes, at: int, cut: int) -> None:
    world = World(3)
    data = world.advertise().to_bytes
    changed = data[:at] + piece + data[at + cut :]
    reads: tuple[Callable[[], bytes], ...] = (
        lambda: Bulletin.read(world.parameters, changed, world.roster).to_bytes,
        lambda: Advert.from_bytes(changed).to_bytes(),
        lambda: Advert.from_bytes(b"fvsa\x01\x01" + changed[10:]).to_bytes(),
    )
    for read in reads:
        try:
            read()
        except SecureAggregationError:
            continue


@pytest.mark.parametrize("part", ["sealing_key", "mask_key"])
@pytest.mark.parametrize("key", LOW_ORDER, ids=range(5))
def test_a_key_that_keeps_no_secret_stops_its_owner_and_nobody_else(key: bytes, part: str) -> None:
    # "what a member sends in its own name alone cannot stop the others: what each of them would refuse is refused as it
    # arrives, and named."
    # "it carries sealed boxes, and can open none."
    world = World(4)
    advert = Advert.from_bytes(world.clients[3].advertise())
    with pytest.raises(SecureAggregationError, match="member 3 advertises a public key that keeps no secret"):
        world.server.receive_advert(3, resigned(advert, **{part: key}).to_bytes())
    world.members = range(3)
    assert np.array_equal(world.run(), world.sum_of(range(3)))


def test_one_value_for_two_purposes_stops_its_owner_and_nobody_else() -> None:
    world = World(4)
    advert = Advert.from_bytes(world.clients[3].advertise())
    with pytest.raises(SecureAggregationError, match="member 3 advertises .* that is there already"):
        world.server.receive_advert(3, resigned(advert, mask_key=advert.sealing_key).to_bytes())
    world.members = range(3)
    assert np.array_equal(world.run(), world.sum_of(range(3)))


def test_verify_says_no_to_what_is_no_key() -> None:
    assert not verify(b"", bytes(64), b"") and not verify(bytes(32), b"short", b"x")


def test_quorum_and_threshold_leave_no_room_for_two_sets() -> None:
    for count, corrupt in itertools.product(range(2, 40), (0.0, 0.1, 0.25, 0.3)):
        bulletin = Bulletin(parameters_of(corrupt_share=corrupt), tuple(fake_adverts(count)), {})
        most = bulletin.parameters.corrupt(count)
        assert 2 * bulletin.quorum > count + most
        assert 2 * bulletin.threshold > count + most


def fake_adverts(count: int) -> list[Advert]:
    parts = [[bytes([part]) + member.to_bytes(31, "big") for part in range(4)] for member in range(count)]
    return [Advert(member, *values) for member, values in enumerate(parts)]


def test_a_site_that_fears_so_many_in_its_roster_asks_for_as_many_members() -> None:
    # "of the members that a server put on it, at most the stated share is corrupt; so a site that fears C corrupt ones
    # in its whole roster asks for at least C / corrupt_share members."
    feared, share = 4, 0.2
    parameters = parameters_of(minimum=math.ceil(feared / share), corrupt_share=share)
    for count in range(parameters.minimum, 60):
        assert parameters.corrupt(count) >= feared
    assert parameters.corrupt(parameters.minimum - 1) < feared


def sparse(count: int = 104, **changes: object) -> Bulletin:
    fields = {"dropout_share": 0.05, "security_bits": 20, **changes}
    return Bulletin(parameters_of(**fields), tuple(fake_adverts(count)), {})


def most_in_two_gaps(count: int, corrupt: int, degree: int, bits: int) -> int:
    """Return how many corrupt members any two gaps hold at most, but for a probability of 2^-(bits + 1): exact."""
    most, tail = min(degree, corrupt), 0
    while most > 0:
        tail += math.comb(corrupt, most) * math.comb(count - corrupt, degree - most)
        if tail * (count * (count - degree - 1) << bits) > math.comb(count, degree):
            break
        most -= 1
    return most


@pytest.mark.parametrize("count", [101, 150, 200, 500, 1000, 10_000])
@pytest.mark.parametrize(
    ("corrupt", "dropout", "bits"), [(0.0, 0.05, 60), (0.05, 0.05, 60), (0.1, 0.1, 60), (0.1, 0.02, 20)]
)
def test_the_threshold_outnumbers_the_corrupt_in_any_two_gaps(
    count: int, corrupt: float, dropout: float, bits: int
) -> None:
    # "in active mode, no group of members can be summed without the other honest survivors, whatever a server tells
    # whom, but for a probability of 2^-security_bits over the drawing of a sparse graph."
    fields = {"corrupt_share": corrupt, "dropout_share": dropout, "security_bits": bits}
    bulletin = Bulletin(parameters_of(**fields), tuple(fake_adverts(count)), {})
    most = most_in_two_gaps(count, bulletin.parameters.corrupt(count), bulletin.degree, bits)
    assert 2 * bulletin.threshold > bulletin.degree + most


def test_the_bound_for_neighbourhoods_would_not_outnumber_them() -> None:
    degree, threshold = graph.neighbourhood(1000, 0.1, 0.1, security_bits=60)
    assert 2 * threshold <= degree + most_in_two_gaps(1000, 100, degree, 60)


def test_a_semi_honest_server_is_not_charged_for_gaps() -> None:
    bulletin = sparse(active=False, corrupt_share=0.05, count=150)
    assert (bulletin.degree, bulletin.threshold) == graph.neighbourhood(150, 0.05, 0.05, active=False, security_bits=20)


def test_random_losses_within_the_share_never_stop_a_sum() -> None:
    bulletin, chooser = sparse(corrupt_share=0.05, count=150, dropout_share=0.1), random.Random(5)
    for _ in range(50):
        alive = frozenset(chooser.sample(range(150), 135))
        assert bulletin.connects(sorted(alive))
        assert all(len(alive.intersection(bulletin.holders(member))) >= bulletin.threshold for member in range(150))
