"""What a server does that does not follow the protocol, with as many colluding members as it is granted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from fedml_core.secagg import graph
from fedml_core.secagg.bulletin import Bulletin
from fedml_core.secagg.client import BOX_SIZE, SHARE_SIZE, bound_id
from fedml_core.secagg.codec import Kind, Writer
from fedml_core.secagg.keys import KeyPair, derive
from fedml_core.secagg.masks import add_masks
from fedml_core.secagg.pairing import mask_key, mask_sign
from fedml_core.secagg.parameters import digest_of
from fedml_core.secagg.secrets import Secret
from tests.adversary.players import BINDING, World, boxes_of, opened, opened_by, secrets_held


@dataclass
class Loot:
    """The shares that a server came by, of either kind: by owner, then by holder."""

    bulletin: Bulletin
    seeds: dict[int, dict[int, bytes]] = field(default_factory=dict)
    keys: dict[int, dict[int, bytes]] = field(default_factory=dict)

    def take(self, holder: int, answer: bytes, held: Mapping[int, bytes]) -> None:
        """Sort the shares that a member answered with, by what it is known to hold."""
        for owner, share in zip(sorted(held), opened_by(answer), strict=True):
            kind = self.seeds if share == held[owner][:SHARE_SIZE] else self.keys
            assert share in (held[owner][:SHARE_SIZE], held[owner][SHARE_SIZE:])
            kind.setdefault(owner, {})[holder] = share

    def take_all(self, holder: int, held: Mapping[int, bytes]) -> None:
        """Take both shares of everybody from a member that colludes."""
        for owner, both in held.items():
            self.seeds.setdefault(owner, {})[holder] = both[:SHARE_SIZE]
            self.keys.setdefault(owner, {})[holder] = both[SHARE_SIZE:]

    def opens(self, kind: Mapping[int, Mapping[int, bytes]], owner: int) -> bool:
        return len(kind.get(owner, ())) >= self.bulletin.threshold

    def seed(self, owner: int) -> bytes:
        return opened(self.bulletin, owner, self.seeds[owner])

    def key(self, owner: int) -> bytes:
        return opened(self.bulletin, owner, self.keys[owner])


def strip_self(bulletin: Bulletin, member: int, seed: bytes, total: NDArray[Any], binding: bytes = BINDING) -> None:
    """Take a member's own mask off a vector."""
    add_masks(total, [(derive(seed, "self", bound_id(bulletin, binding), member), -1)])


def strip_pairs(
    bulletin: Bulletin,
    owner: int,
    key: bytes,
    others: Iterable[int],
    total: NDArray[Any],
    binding: bytes = BINDING,
) -> None:
    """Take the masks between the owner of a key and others off the sum of the others' vectors."""
    bound = bound_id(bulletin, binding)
    with KeyPair.of(key) as pair:
        masks = [(mask_key(bulletin, pair, owner, one, bound), -mask_sign(one, owner)) for one in others]
    add_masks(total, masks)


def strip_own_pairs(bulletin: Bulletin, owner: int, key: bytes, others: Iterable[int], total: NDArray[Any]) -> None:
    """Take the masks between the owner of a key and others off the owner's vector."""
    bound = bound_id(bulletin, BINDING)
    with KeyPair.of(key) as pair:
        masks = [(mask_key(bulletin, pair, owner, one, bound), -mask_sign(owner, one)) for one in others]
    add_masks(total, masks)


class MaliciousServer:
    """Runs the first exchanges of a world with real members and keeps what each of them sent."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.bulletin = world.advertise()
        world.share()
        self.loot = Loot(self.bulletin)
        self.vectors: dict[int, NDArray[Any]] = {}
        self.held: dict[int, dict[int, bytes]] = {}

    def delivery_from(self, member: int, senders: Collection[int]) -> bytes:
        """Return what an honest server would deliver, without the boxes of others than `senders`."""
        boxes = boxes_of(self.world.server.delivery(member))
        chosen = [sender for sender in boxes if sender in senders]
        writer = Writer(Kind.DELIVERY).number(len(chosen))
        for sender in chosen:
            writer.number(sender).fixed(boxes[sender], BOX_SIZE)
        return writer.bytes()

    def collect(self, senders: Mapping[int, Collection[int]] | None = None) -> None:
        """Take every member's masked vector, withholding boxes where `senders` says whose a member gets."""
        for member in self.world.server.sharers:
            chosen = (senders or {}).get(member)
            delivery = None if chosen is None else self.delivery_from(member, chosen)
            _, self.vectors[member] = self.world.masked(member, delivery=delivery)
            self.held[member] = secrets_held(self.world.clients[member])

    def quorum_of(self, signatures: Mapping[int, bytes]) -> bytes:
        writer = Writer(Kind.QUORUM).number(len(signatures))
        for member in sorted(signatures):
            writer.number(member).fixed(signatures[member][-64:], 64)
        return writer.bytes()

    def answer(self, member: int, quorum: bytes) -> None:
        """Ask a member to unmask, and sort what it gives."""
        self.loot.take(member, self.world.clients[member].unmask(quorum), self.held[member])

    def expose(self, member: int) -> NDArray[Any]:
        """Return a member's vector, with both of its secrets."""
        vector = self.vectors[member].copy()
        strip_self(self.bulletin, member, self.loot.seed(member), vector)
        others = [other for other in self.held[member] if other != member]
        strip_own_pairs(self.bulletin, member, self.loot.key(member), others, vector)
        return vector


def ring_of(bulletin: Bulletin) -> list[int]:
    """Return the members in the order of the ring that a sparse graph was drawn on."""
    beside = graph.neighbours(len(bulletin.members), 2, digest_of("graph", bulletin.session)).tolist()
    order, before, here = [0], 0, beside[0][0]
    while here != 0:
        order.append(here)
        before, here = here, beside[here][beside[here][0] == before]
    return [bulletin.members[place] for place in order]


def copied(secret: Secret) -> bytes:
    """Return a secret's bytes and wipe it."""
    with secret:
        return bytes(secret.view())
