"""What `fedml_core.secagg.keys` promises, against RFC vectors and the standard library."""

from __future__ import annotations

import copy
import hashlib
import hmac
import pickle
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.keys import KeyPair, commitment, derive, encoded, fresh_bytes, open_sealed, seal
from fedml_core.secagg.secrets import Secret

SHARED = bytes(range(32))
SESSION = hashlib.sha256(b"a session").digest()
LOW_ORDER = (
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
)

parts = st.lists(st.binary(max_size=9) | st.text(max_size=9) | st.integers(0, 2**64 - 1), max_size=4)


def hkdf(key: bytes, info: bytes) -> bytes:
    """RFC 5869 with no salt, for 32 bytes: one block."""
    extracted = hmac.digest(bytes(32), key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def test_agreement_is_that_of_rfc_7748() -> None:
    bob = KeyPair.of(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    alice_public = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert bob.public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert bob.agree(alice_public, 1).bytes().hex() == (
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    )


def test_two_members_agree_and_nobody_else_does() -> None:
    """whoever knows an agreed secret and the session knows the keys; the server knows neither member's."""
    one, two, server = KeyPair.fresh(), KeyPair.fresh(), KeyPair.fresh()
    agreed = one.agree(two.public, 2)
    assert agreed.same_as(two.agree(one.public, 1))
    assert not agreed.same_as(server.agree(one.public, 1))
    assert not agreed.same_as(server.agree(two.public, 2))
    assert derive(agreed, "mask", SESSION, 1, 2).same_as(derive(two.agree(one.public, 1), "mask", SESSION, 1, 2))


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_point_of_low_order_is_refused_with_its_owner(point: str) -> None:
    """a public key that would make the secret known to everybody (a point of low order) is refused."""
    with pytest.raises(SecureAggregationError, match="the public key of member 7 is refused"):
        KeyPair.fresh().agree(bytes.fromhex(point), 7)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_public_key_of_another_size_is_refused_with_its_owner(size: int) -> None:
    with pytest.raises(SecureAggregationError, match="the public key of member 7 is refused"):
        KeyPair.fresh().agree(bytes([9] * size), 7)


def test_a_lost_members_pair_is_rebuilt_from_its_secret() -> None:
    """the returned pair's public key is the advertised one."""
    lost, peer = KeyPair.fresh(), KeyPair.fresh()
    rebuilt = KeyPair.from_secret(lost.secret(), lost.public, 3)
    assert rebuilt.public == lost.public
    assert rebuilt.agree(peer.public, 4).same_as(lost.agree(peer.public, 4))


def test_a_wrong_secret_is_seen_and_attributed() -> None:
    lost = KeyPair.fresh()
    with pytest.raises(SecureAggregationError, match="member 3 does not belong to the public key"):
        KeyPair.from_secret(Secret.fresh(), lost.public, 3)
    with pytest.raises(SecureAggregationError, match="must have 32 bytes, got 31"):
        KeyPair.from_secret(bytes(31), lost.public, 3)


def test_a_pair_shows_and_gives_away_its_public_half_only() -> None:
    """neither the `repr` of a pair nor pickling it gives away the secret half."""
    pair = KeyPair.fresh()
    assert repr(pair) == f"KeyPair(public={pair.public.hex()})"
    for use in (pickle.dumps, copy.deepcopy):
        with pytest.raises(SecureAggregationError, match="neither copied nor stored"):
            use(pair)


def test_a_wiped_pair_keeps_its_public_half_and_agrees_with_nobody() -> None:
    with KeyPair.fresh() as pair:
        public, copied = pair.public, pair.secret()
    assert pair.public == public
    assert KeyPair.of(copied).public == public
    with pytest.raises(SecureAggregationError, match="wiped"):
        pair.agree(KeyPair.fresh().public, 1)
    with pytest.raises(SecureAggregationError, match="wiped"):
        pair.secret()


def test_derived_keys_are_hkdf_over_the_encoded_place() -> None:
    info = encoded("fedveil/secagg/1", "mask", SESSION, 3, 5)
    assert derive(SHARED, "mask", SESSION, 3, 5).bytes() == hkdf(SHARED, info)
    assert derive(Secret(SHARED), "mask", SESSION, 3, 5).bytes() == hkdf(SHARED, info)


def test_keys_of_different_places_differ() -> None:
    places: list[tuple[str, bytes, tuple[int, ...]]] = [
        ("mask", SESSION, (3, 5)),
        ("share", SESSION, (3, 5)),
        ("share", SESSION, (5, 3)),
        ("share", SESSION[::-1], (3, 5)),
        ("share", SESSION + b"\x00", (3, 5)),
        ("share", SESSION, (3,)),
        ("share", SESSION, (3, 5, 0)),
        ("share", SESSION, (3, 6)),
    ]
    keys = {derive(SHARED, purpose, session, *members).bytes() for purpose, session, members in places}
    assert len(keys) == len(places)


@given(parts, parts)
def test_different_lists_are_encoded_differently(one: list[bytes | str | int], other: list[bytes | str | int]) -> None:
    """keys that differ in purpose, session or any member, or in the members' order, are derived from different
    inputs: every part that is hashed carries its type and its length."""
    same = [(type(part), part) for part in one] == [(type(part), part) for part in other]
    assert (encoded(*one) == encoded(*other)) is same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((b"ab", b"c"), (b"a", b"bc")),
        ((b"ab",), ("ab",)),
        ((1,), (b"\x00" * 7 + b"\x01",)),
        ((b"",), ()),
        ((), ((b""),)),
    ],
)
def test_parts_do_not_run_into_each_other(one: tuple[bytes, ...], other: tuple[bytes, ...]) -> None:
    assert encoded(*one) != encoded(*other)


def test_the_encoding_is_written_down() -> None:
    expected = "00000003" + "69" + "0000000000000008" + "0000000000000007" + "73" + "0000000000000001" + "61"
    assert encoded(7, "a", b"").hex() == expected + "62" + "0000000000000000"


@pytest.mark.parametrize("part", [-1, 2**64, True, 1.5, None])
def test_what_is_no_part_is_refused(part: int) -> None:
    with pytest.raises(SecureAggregationError, match="was expected, got"):
        encoded(part)


def test_a_box_is_aes_gcm_under_the_derived_key() -> None:
    key = hkdf(SHARED, encoded("fedveil/secagg/1", "share", SESSION, 1, 2))
    box = seal(SHARED, b"a share", SESSION, 1, 2)
    assert box == AESGCM(key).encrypt(bytes(12), b"a share", encoded("box", SESSION, 1, 2))
    assert open_sealed(Secret(SHARED), box, SESSION, 1, 2).bytes() == b"a share"
    assert seal(Secret(SHARED), Secret(bytes(72)), SESSION, 1, 2)[72:] != box[7:]


CHANGES: dict[str, Callable[[bytes], tuple[bytes, bytes, bytes, int, int]]] = {
    "secret": lambda box: (bytes(32), box, SESSION, 1, 2),
    "session": lambda box: (SHARED, box, SESSION[::-1], 1, 2),
    "direction": lambda box: (SHARED, box, SESSION, 2, 1),
    "sender": lambda box: (SHARED, box, SESSION, 3, 2),
    "receiver": lambda box: (SHARED, box, SESSION, 1, 3),
    "cut": lambda box: (SHARED, box[:-1], SESSION, 1, 2),
    "longer": lambda box: (SHARED, box + b"\x00", SESSION, 1, 2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_box_opens_nowhere_else(change: Callable[[bytes], tuple[bytes, bytes, bytes, int, int]]) -> None:
    """what was sealed opens only under the same agreed secret, session, sender and receiver."""
    agreed, box, session, sender, receiver = change(seal(SHARED, b"a share", SESSION, 1, 2))
    with pytest.raises(SecureAggregationError, match=f"the box of member {sender} does not open") as caught:
        open_sealed(agreed, box, session, sender, receiver)
    assert caught.value.__cause__ is None


def test_no_byte_of_a_box_can_be_changed() -> None:
    box = seal(SHARED, bytes(72), SESSION, 1, 2)
    for place in range(len(box)):
        changed = bytearray(box)
        changed[place] ^= 0x80
        with pytest.raises(SecureAggregationError, match="member 1 does not open"):
            open_sealed(SHARED, bytes(changed), SESSION, 1, 2)


@pytest.mark.parametrize("size", [0, 1, 16])
def test_a_box_that_is_too_short_is_refused_with_its_sender(size: int) -> None:
    with pytest.raises(SecureAggregationError, match=f"the box of member 1 has {size} bytes"):
        open_sealed(SHARED, bytes(size), SESSION, 1, 2)


def test_a_commitment_is_a_hash_that_no_key_equals() -> None:
    """it hides the secret because the secret is random; it is no commitment to a value that can be guessed."""
    prefix = encoded("fedveil/secagg/1", "commitment", "seed", 32)
    assert commitment(SHARED) == hashlib.sha256(prefix + SHARED).digest() == commitment(Secret(SHARED))
    assert len({commitment(SHARED), commitment(SHARED, "other"), commitment(SHARED + b"\x00")}) == 3
    with pytest.raises(SecureAggregationError, match="32 random bytes or more, got 31"):
        commitment(bytes(31))


def test_nonces_are_fresh() -> None:
    assert len({fresh_bytes(32) for _ in range(100)}) == 100


def test_every_bit_of_a_mask_key_is_as_often_one_as_zero() -> None:
    """A6 at a smaller size: 4,000 keys, so 5 standard errors are 0.04."""
    keys = b"".join(derive(SHARED, "mask", SESSION, 0, other).bytes() for other in range(4000))
    ones = [0] * 256
    for start in range(0, len(keys), 32):
        number = int.from_bytes(keys[start : start + 32], "big")
        for place in range(256):
            ones[place] += number >> place & 1
    assert max(abs(count / 4000 - 0.5) for count in ones) < 0.04
