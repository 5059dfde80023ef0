"""Both halves of a secure sum together: exact for every dropout that the threshold allows, silent for every other."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.client import ClientSession, ComplaintError, Phase
from fedml_core.secagg.codec import Kind, Reader, Writer
from fedml_core.secagg.party import Party
from fedml_core.secagg.secrets import Secret
from fedml_core.secagg.survivors import read_survivors, write_survivors
from tests.adversary.players import BINDING, NOBODY, World, boxes_of, identity

Step = Callable[[ClientSession, World], Any]


def lost_at(exchange: int, members: tuple[int, ...]) -> list[frozenset[int]]:
    return [frozenset(members) if place == exchange else frozenset() for place in range(5)]


@pytest.mark.parametrize("exchange", range(5))
@pytest.mark.parametrize(("count", "corrupt"), [(3, 0.0), (5, 0.2), (10, 0.4)])
def test_every_subset_that_the_threshold_allows_may_drop_out_at_every_exchange(
    count: int, corrupt: float, exchange: int
) -> None:
    # "A1 exactness: every dropout subset allowed by t at each of stages 0-4: the sum is the ring sum bit for bit."
    # "the result is the sum of exactly the survivors' vectors modulo 2^bits, or an error; a wrong share never enters
    # the sum."
    most = count - (count + int(corrupt * count)) // 2 - 1
    for size in range(most + 1):
        for members in itertools.combinations(range(count), size):
            world = World(count, corrupt_share=corrupt, length=5)
            total = world.run(lost_at(exchange, members))
            expected = [m for m in range(count) if exchange > 2 or m not in members]
            assert list(world.server.survivors) == expected
            assert np.array_equal(total, world.sum_of(expected))


@pytest.mark.parametrize("exchange", range(1, 5))
def test_one_more_is_an_abort_that_reveals_nothing(exchange: int) -> None:
    # "Too few take part, or are left, for a secure sum; nothing was revealed."
    world = World(9, corrupt_share=0.12)
    with pytest.raises(ThresholdError):
        world.run(lost_at(exchange, (0, 3, 5, 8)))
    unmasked = world.server.masked_total
    assert not any(np.array_equal(unmasked, world.sum_of(some)) for some in every_subset(9) if some)


def every_subset(count: int) -> list[tuple[int, ...]]:
    return [some for size in range(count + 1) for some in itertools.combinations(range(count), size)]


@pytest.mark.parametrize("seed", range(3))
def test_a_hundred_members_survive_random_losses_at_all_exchanges(seed: int) -> None:
    # "A1 exactness: every dropout subset allowed by t at each of stages 0-4 (random ones for n=100)."
    chooser, left, lost = random.Random(seed), set(range(100)), []
    for _ in range(5):
        gone = frozenset(chooser.sample(sorted(left), chooser.randrange(9)))
        lost.append(gone)
        left -= gone
    world = World(100, corrupt_share=0.05, length=40, seed=seed)
    total = world.run(lost)
    assert np.array_equal(total, world.sum_of(set(range(100)) - lost[0] - lost[1] - lost[2]))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_a_sparse_graph_gives_the_exact_sum_despite_losses_at_all_exchanges(bits: int) -> None:
    world = World(104, dropout_share=0.05, security_bits=20, bits=bits)
    lost = [frozenset({1}), frozenset({50}), frozenset({77}), frozenset({9}), frozenset({30})]
    total = world.run(lost)
    assert not world.bulletin.complete
    assert np.array_equal(total, world.sum_of(set(range(104)) - {1, 50, 77}))


def test_the_semi_honest_mode_is_exact_and_signs_nothing() -> None:
    world = World(6, active=False, corrupt_share=0.3)
    for member in world.members:
        world.clients[member]._sign = unexpected
    lost = [frozenset({0}), frozenset(), frozenset({5}), frozenset(), frozenset({2})]
    assert np.array_equal(world.run(lost), world.sum_of({1, 2, 3, 4}))


def unexpected(message: bytes) -> bytes:
    raise AssertionError("nothing is signed in semi-honest mode")


def test_a_masked_vector_is_uniform_and_independent_of_what_it_hides() -> None:
    # "A1 hiding: each y passes chi-square uniformity on every byte (p > 1e-4) and abs(corr(y, x)) < 4/sqrt(d)."
    # "the server sees one masked vector, which is uniform to it unless a quorum confirms the same survivors."
    # "whoever runs it sees masked vectors and their sum."
    size = 40_000
    world = World(3, length=size, vectors={m: np.full(size, 7, "<u4") for m in range(3)})
    world.advertise()
    world.share()
    ramp = np.arange(size)
    for member in world.members:
        _, vector = world.masked(member)
        for place in range(4):
            counts = np.bincount(vector.view(np.uint8)[place::4], minlength=256)
            statistic = float(((counts - size / 256) ** 2 / (size / 256)).sum())
            assert statistic < 345.0  # of 255 degrees of freedom: exceeded by chance once in 10,000 times
        assert abs(float(np.corrcoef(vector.astype(float), ramp)[0, 1])) < 4 / size**0.5


def test_it_holds_one_vector_however_many_members_there_are() -> None:
    # "it holds one vector, however many members there are."
    world = World(12, length=1000)
    world.until_masked()
    arrays = [value for value in vars(world.server).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 4000


STEPS: dict[str, tuple[Phase, Step]] = {
    "advertise": (Phase.FRESH, lambda c, w: c.advertise()),
    "share": (Phase.ADVERTISED, lambda c, w: c.share(w.bulletin)),
    "receive": (Phase.SHARED, lambda c, w: c.receive(w.server.delivery(c.member), BINDING)),
    "mask": (Phase.RECEIVED, lambda c, w: c.mask(w.vectors[0].copy())),
    "confirm": (Phase.MASKED, lambda c, w: c.confirm(write_survivors(range(4)))),
    "unmask": (Phase.CONFIRMED, lambda c, w: c.unmask(w.server.quorum() if w.server.confirmed else b"")),
}


def at_phase(phase: Phase) -> tuple[World, ClientSession]:
    """Return a world of four whose member 0 has reached a phase; for CONFIRMED all others have, too."""
    world = World(4)
    world.advertise(lost=())
    client = world.clients[0]
    if phase == Phase.FRESH:
        client = world.clients[0] = world.client(0)
    if phase >= Phase.SHARED:
        world.share()
    if phase >= Phase.MASKED:
        survivors = world.mask()
        if phase >= Phase.CONFIRMED:
            quorum = world.confirm(survivors)
            if phase is Phase.OVER:
                client.unmask(quorum)
    elif phase is Phase.RECEIVED:
        client.receive(world.server.delivery(0), BINDING)
    assert client.phase is phase
    return world, client


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("name", STEPS)
def test_each_step_is_taken_once_and_in_its_order_or_the_session_is_over(name: str, phase: Phase) -> None:
    # "a step that is asked for out of order, twice, while another is being taken, or that fails for whatever reason,
    # ends the session, and its secrets are overwritten."
    # "a session that met anything that the protocol does not allow is wiped, and answers nothing more."
    # "whoever runs the session calls its steps and nothing else."
    world, client = at_phase(phase)
    before, step = STEPS[name]
    if phase is before:
        step(client, world)
        assert client.phase is Phase(before + 1)
        return
    with pytest.raises(SecureAggregationError, match=name):
        step(client, world)
    assert is_wiped(client)
    for _, other in STEPS.values():
        with pytest.raises(SecureAggregationError):
            other(client, world)


def is_wiped(client: ClientSession) -> bool:
    """Say whether a session is over and nothing that it holds is a secret any more."""
    pairs = [pair for pair in (client._sealing, client._masking) if pair is not None]
    for pair in pairs:
        with pytest.raises(SecureAggregationError, match="wiped"):
            pair.secret()
    seeds = client._seed is None or client._seed.wiped
    return client.phase is Phase.OVER and seeds and not client._held and not client._agreed


def test_a_second_step_during_the_first_ends_the_session() -> None:
    _, client = at_phase(Phase.MASKED)
    failures: list[SecureAggregationError] = []

    def sign(message: bytes) -> bytes:
        try:
            client.confirm(write_survivors((0, 1, 2)))
        except SecureAggregationError as error:
            failures.append(error)
        return identity(0).sign(message)

    client._sign = sign
    with pytest.raises(SecureAggregationError, match="is over"):
        client.confirm(write_survivors(range(4)))
    assert "during another step" in str(failures[0])
    assert is_wiped(client)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("place", ["seal", "mask_key", "read_survivors", "confirmed_by"])
def test_an_interrupted_step_leaves_no_secret(
    monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]
) -> None:
    # "secrets are made from the operating system's randomness, live in this object only, and are overwritten when the
    # session ends."
    phases = {"seal": Phase.ADVERTISED, "mask_key": Phase.RECEIVED, "read_survivors": Phase.MASKED}
    world, client = at_phase(phases.get(place, Phase.CONFIRMED))
    held = [*client._held.values(), *client._agreed.values(), client._seed]

    def interrupted(*_: object) -> None:
        raise error

    monkeypatch.setattr(f"fedml_core.secagg.client.{place}", interrupted)
    step = next(step for before, step in STEPS.values() if before is client.phase)
    with pytest.raises(error):
        step(client, world)
    assert is_wiped(client)
    assert all(secret.wiped for secret in held if isinstance(secret, Secret))


def test_secrets_are_gone_when_a_sum_is_done() -> None:
    world = World(5, corrupt_share=0.2)
    world.advertise()
    world.share()
    seen = [one for client in world.clients.values() for one in (client._seed, *client._held.values())]
    seen += [one for client in world.clients.values() for one in client._agreed.values()]
    world.unmask(world.confirm(world.mask()))
    assert all(is_wiped(client) for client in world.clients.values())
    assert all(secret is not None and secret.wiped for secret in seen)


def test_the_long_lived_secrets_go_as_soon_as_they_are_used() -> None:
    _, client = at_phase(Phase.MASKED)
    assert client._seed is not None and client._seed.wiped and not client._agreed
    for pair in (client._sealing, client._masking):
        assert pair is not None
        with pytest.raises(SecureAggregationError, match="wiped"):
            pair.secret()


def test_what_a_session_signs_is_valid_under_its_partys_key_alone() -> None:
    # "whoever makes a session signs with its party's identity key."
    world = World(3)
    stranger = ClientSession(world.parameters, Party(0, world.roster, identity(1).sign))
    with pytest.raises(SecureAggregationError, match="member 0 is not signed by its identity key"):
        world.server.receive_advert(0, stranger.advertise())
    world.server.receive_advert(0, world.clients[0].advertise())


@pytest.mark.parametrize("phase", list(Phase)[1:])
def test_a_session_neither_prints_nor_copies_what_it_holds(phase: Phase) -> None:
    # "a session is neither copied nor stored, and shows who it is and how far it came, and no more."
    _, client = at_phase(phase)
    shown = repr(client)
    assert shown == f"ClientSession(member=0, phase={phase.name})"
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(SecureAggregationError, match="neither copied nor stored"):
            attempt(client)


def test_a_complaint_can_cross_processes() -> None:
    again = pickle.loads(pickle.dumps(ComplaintError([3, 5])))
    assert again.members == (3, 5) and again.message == ComplaintError([3, 5]).message
    assert str(again) == "the shares of members 3, 5 cannot be opened"


def altered(message: bytes, how: str) -> bytes:
    return {
        "left-over": message + b"\0",
        "cut": message[:-1],
        "empty": b"",
        "version": message[:4] + b"\x63" + message[5:],
        "kind": message[:5] + bytes([message[5] % 16 + 1]) + message[6:],
        "tag": b"xxxx" + message[4:],
        "count": message[:6] + b"\xff\xff\xff\xff" + message[10:],
    }[how]


HOW = ("left-over", "cut", "empty", "version", "kind", "tag", "count")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["bulletin", "delivery", "survivors", "quorum"])
def test_a_member_refuses_every_message_of_another_form_and_is_over(name: str, how: str) -> None:
    # "whatever bytes are read, the outcome is the message's fields or a SecureAggregationError."
    # "it checks the form of a message only; who sent it, and whether it may say that, others check."
    phases = {"bulletin": Phase.ADVERTISED, "delivery": Phase.SHARED, "survivors": Phase.MASKED}
    world, client = at_phase(phases.get(name, Phase.CONFIRMED))
    read: dict[str, Callable[[], Any]] = {
        "bulletin": lambda: client.read_bulletin(altered(world.bulletin.to_bytes, how)),
        "delivery": lambda: client.receive(altered(world.server.delivery(0), how), BINDING),
        "survivors": lambda: client.confirm(altered(write_survivors(range(4)), how)),
        "quorum": lambda: client.unmask(altered(world.server.quorum(), how)),
    }
    with pytest.raises(SecureAggregationError):
        read[name]()
    assert name == "bulletin" or is_wiped(client)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["advert", "shares", "masked", "confirmation", "unmasking", "complaint"])
def test_the_server_refuses_every_message_of_another_form_and_takes_the_right_one_then(name: str, how: str) -> None:
    world = World(4)
    server = world.server
    if name == "advert":
        advert = world.clients[0].advertise()
        message = advert
        take: Callable[[int, bytes], None] = server.receive_advert
    else:
        world.advertise()
        message, take = prepared(world, name)
    if how == "count" and name in ("advert", "masked", "confirmation"):
        message_wrong = message[:6]
    else:
        message_wrong = altered(message, how)
    with pytest.raises(SecureAggregationError):
        take(0, message_wrong)
    take(0, message)
    with pytest.raises(SecureAggregationError):
        take(0, message)


def prepared(world: World, name: str) -> tuple[bytes, Callable[[int, bytes], None]]:
    """Return member 0's next message of a kind, and what takes it."""
    server, client = world.server, world.clients[0]
    if name == "shares":
        return world.share_of(0), server.receive_shares
    world.share()
    if name == "complaint":
        return ComplaintError([2]).message, server.receive_complaint
    if name == "masked":
        message, vector = world.masked(0)
        return message, lambda member, data: server.receive_masked(member, data, vector)
    survivors = world.mask()
    if name == "confirmation":
        return client.confirm(survivors), server.receive_confirmation
    quorum = world.confirm(survivors)
    return client.unmask(quorum), server.receive_unmasking


@pytest.mark.parametrize(
    "vector",
    [np.zeros(7, "<u4"), np.zeros(9, "<u4"), np.zeros((8, 1), "<u4"), np.zeros(8, "<u8"), np.zeros(8, "<i4")],
    ids=lambda vector: f"{vector.dtype}{vector.shape}",
)
def test_a_vector_of_another_shape_or_type_is_refused_on_both_sides(vector: NDArray[Any]) -> None:
    world, client = at_phase(Phase.RECEIVED)
    with pytest.raises(SecureAggregationError, match="must be uint32 of shape"):
        client.mask(vector)
    assert is_wiped(client)
    world, _ = at_phase(Phase.SHARED)
    message, _ = world.masked(0)
    with pytest.raises(SecureAggregationError, match="must be uint32 of shape"):
        world.server.receive_masked(0, message, vector)


def test_steps_of_the_server_are_taken_once() -> None:
    world = World(4)
    with pytest.raises(SecureAggregationError, match="being collected"):
        world.server.receive_shares(0, b"")
    world.advertise()
    with pytest.raises(SecureAggregationError, match="closed already"):
        world.server.close_adverts()
    with pytest.raises(ThresholdError):
        world.server.unmask()  # not zeros: nobody has sent anything
    world.share()
    with pytest.raises(SecureAggregationError, match="closed already"):
        world.server.close_shares(bytes(32))
    quorum = world.confirm(world.mask())
    with pytest.raises(ThresholdError):
        world.server.unmask()
    total = world.unmask(quorum)
    assert np.array_equal(world.server.unmask(), total)


def test_work_ahead_takes_masks_off_while_shares_arrive() -> None:
    world = World(6, corrupt_share=0.2)
    quorum = world.confirm(world.until_masked([*NOBODY[:2], frozenset({4}), *NOBODY[3:]]))
    for member in world.server.confirmed:
        world.server.receive_unmasking(member, world.clients[member].unmask(quorum))
        world.server.work_ahead()
    assert np.array_equal(world.server.masked_total, world.sum_of({0, 1, 2, 3, 5}))
    assert np.array_equal(world.server.unmask(), world.sum_of({0, 1, 2, 3, 5}))


@pytest.mark.parametrize(
    ("survivors", "complaint"),
    [
        ((1, 2, 3), "without itself"),
        ((0, 1, 1, 2), "ascending"),
        ((2, 1, 0), "ascending"),
        ((0, 1, 2, 7), "no member"),
        ((0, 1), "at least 3"),
    ],
)
def test_survivors_that_cannot_be_are_refused(survivors: tuple[int, ...], complaint: str) -> None:
    # "survivors are members in ascending order, at least as many as may be revealed, and connected by masks."
    _, client = at_phase(Phase.MASKED)
    with pytest.raises(SecureAggregationError, match=complaint):
        client.confirm(write_survivors(survivors))
    assert is_wiped(client)


def test_survivors_that_sent_no_shares_are_refused() -> None:
    world = World(5)
    world.advertise()
    world.share(lost={3})
    world.mask()
    with pytest.raises(SecureAggregationError, match="sent no shares"):
        world.clients[0].confirm(write_survivors(range(5)))


def test_equal_lists_are_read_once_and_other_ones_again() -> None:
    world = World(4)
    world.until_masked()
    first = read_survivors(world.bulletin, write_survivors(range(4)))
    assert read_survivors(world.bulletin, write_survivors(range(4))) is first
    assert read_survivors(world.bulletin, write_survivors((0, 1, 2))).members == (0, 1, 2)


def test_too_few_boxes_end_a_session() -> None:
    world, client = at_phase(Phase.SHARED)
    one = boxes_of(world.server.delivery(0))
    writer = Writer(Kind.DELIVERY).number(1).number(1).fixed(one[1], 88)
    with pytest.raises(ThresholdError, match="too few"):
        client.receive(writer.bytes(), BINDING)


@pytest.mark.parametrize("senders", [(1, 1, 2, 3), (3, 2, 1), (0, 1, 2), (1, 2, 9)])
def test_boxes_of_strangers_or_out_of_order_end_a_session(senders: tuple[int, ...]) -> None:
    world, client = at_phase(Phase.SHARED)
    boxes = boxes_of(world.server.delivery(0))
    writer = Writer(Kind.DELIVERY).number(len(senders))
    for sender in senders:
        writer.number(sender).fixed(boxes.get(sender, bytes(88)), 88)
    with pytest.raises(SecureAggregationError, match="twice, or to no neighbour"):
        client.receive(writer.bytes(), BINDING)
    assert is_wiped(client)


def test_lengths_of_messages_are_what_the_specification_says() -> None:
    world = World(6)
    advert = world.client(0).advertise()
    world.advertise()
    shares = world.share_of(0)
    for member in range(1, 6):
        world.server.receive_shares(member, world.share_of(member))
    world.server.receive_shares(0, shares)
    world.server.close_shares(BINDING)
    survivors = world.mask()
    confirmation = world.clients[0].confirm(survivors)
    head = 6
    assert len(advert) == head + 4 + 4 * 32 + 64
    assert len(shares) == head + 4 + 5 * 88
    assert len(world.server.delivery(0)) == head + 4 + 5 * 92
    assert len(survivors) == head + 4 + 6 * 4
    assert len(confirmation) == head + 64
    reader = Reader(survivors, Kind.SURVIVORS)
    assert reader.numbers() == list(range(6))
