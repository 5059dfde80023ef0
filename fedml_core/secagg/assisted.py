"""One-shot aggregation with assistants: the messages that clients, assistants and the server have in common.

A client sends one message: its vector under a mask for every set of `threshold` assistants, and the roots of those
masks sealed to the assistants outside of that set. The assistants tell the server the sum of the contributors' masks,
once.
After Behnia et al. (2024, e-SeaFL), arXiv:2304.03841, with roots replicated so that assistants may be lost; this
combination is this project's own, and docs/secure-aggregation.md is its specification.

Guarantees: all who hold equal panels have the same session id; whoever holds another has another session id.
Guarantees: in active mode, every assistant's keys and every client's roots were signed by the identity key that the
    pinned roster names.
Guarantees: all assistants that accept a contribution hold the same roots: those that its client committed to.
Trust: whoever holds one of the two secret keys of a box can open it; nothing else here is secret.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.adverts import Verify, verify
from fedml_core.secagg.assistance import Assistance
from fedml_core.secagg.codec import Kind, Reader, Writer
from fedml_core.secagg.keys import TAG_SIZE, KeyPair, derive
from fedml_core.secagg.masks import ring_type
from fedml_core.secagg.parameters import Parameters, digest_of
from fedml_core.secagg.secrets import Secret, SecretBytes

__all__ = [
    "ROOT_SIZE",
    "AssistantAdvert",
    "Contribution",
    "Panel",
    "check_ascending",
    "check_vector",
    "contributors_digest",
    "root_key",
]

ROOT_SIZE = 32
_ADVERT_SIZE = 4 + 2 * 32 + 64


@dataclass(frozen=True)
class AssistantAdvert:
    """What an assistant publishes about itself for one sum.

    `sealing_key`: a fresh X25519 public key. `nonce`: 32 random bytes. `signature`: by its identity key over all of it;
    zeros in semi-honest mode.
    """

    assistant: int
    sealing_key: bytes
    nonce: bytes
    signature: bytes = bytes(64)

    def signed_bytes(self, context: bytes) -> bytes:
        """Return what the signature is over."""
        return digest_of("assistant", context, self.assistant.to_bytes(4, "big"), self.sealing_key, self.nonce)

    def check(self, parameters: Parameters, roster: Mapping[int, bytes], verify: Verify) -> None:
        """Check that the advert is one of the sum's assistants', has a key that keeps a secret, and is signed.

        Raises: SecureAggregationError: naming the assistant, otherwise.
        """
        if self.assistant not in Assistance.of(parameters).assistants:
            raise SecureAggregationError(f"number {self.assistant} is no assistant of this sum")
        with KeyPair.fresh() as probe:  # a key that agrees on no secret would stop every client
            probe.agree(self.sealing_key, self.assistant).wipe()
        if not parameters.active:
            return
        if not verify(roster.get(self.assistant, b""), self.signature, self.signed_bytes(parameters.context)):
            raise SecureAggregationError(
                f"the keys of assistant {self.assistant} are not signed by the identity that the pinned roster names"
            )

    def write(self, writer: Writer) -> Writer:
        """Add the advert to a message."""
        return writer.number(self.assistant).fixed(self.sealing_key, 32).fixed(self.nonce, 32).fixed(self.signature, 64)

    @classmethod
    def read(cls, reader: Reader) -> AssistantAdvert:
        """Take an advert from a message."""
        return cls(reader.number(), reader.fixed(32), reader.fixed(32), reader.fixed(64))

    def to_bytes(self) -> bytes:
        """Return the advert as a message of its own."""
        return self.write(Writer(Kind.ASSISTANT)).bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> AssistantAdvert:
        """Return the advert in a message.

        Raises: SecureAggregationError: if it is none.
        """
        reader = Reader(data, Kind.ASSISTANT)
        advert = cls.read(reader)
        reader.finish()
        return advert


@dataclass(frozen=True, eq=False)
class Panel:
    """The assistants that are there for one sum, checked, ascending. Make it with `checked` or `read`."""

    parameters: Parameters
    adverts: tuple[AssistantAdvert, ...] = field(repr=False)
    roster: Mapping[int, bytes] = field(repr=False)

    @classmethod
    def checked(
        cls,
        parameters: Parameters,
        adverts: Sequence[AssistantAdvert],
        roster: Mapping[int, bytes],
        verify: Verify = verify,
    ) -> Panel:
        """Return the panel of `adverts`, after all checks that do not depend on who looks.

        Raises: ThresholdError: if they are fewer than a quorum. SecureAggregationError: for any other flaw.
        """
        made = cls(parameters, tuple(adverts), roster)
        check_ascending(made.assistants, "assistants")
        for advert in adverts:
            advert.check(parameters, roster, verify)
        if len({value for advert in adverts for value in (advert.sealing_key, advert.nonce)}) < 2 * len(adverts):
            raise SecureAggregationError("two assistants advertise the same key or nonce")
        if len(adverts) < made.quorum:
            raise ThresholdError(f"{len(adverts)} assistants advertised, the quorum is {made.quorum}")
        return made

    @classmethod
    def read(cls, parameters: Parameters, data: bytes, roster: Mapping[int, bytes], verify: Verify = verify) -> Panel:
        """Return the panel in a message, after the checks of `checked`."""
        reader = Reader(data, Kind.ASSISTANTS)
        adverts = [AssistantAdvert.read(reader) for _ in range(reader.count(_ADVERT_SIZE))]
        reader.finish()
        return cls.checked(parameters, adverts, roster, verify)

    @cached_property
    def to_bytes(self) -> bytes:
        """The panel as a message."""
        writer = Writer(Kind.ASSISTANTS).number(len(self.adverts))
        for advert in self.adverts:
            advert.write(writer)
        return writer.bytes()

    @cached_property
    def assistance(self) -> Assistance:
        """Who was to assist, and how many must."""
        return Assistance.of(self.parameters)

    @cached_property
    def assistants(self) -> tuple[int, ...]:
        """Who advertised, ascending."""
        return tuple(advert.assistant for advert in self.adverts)

    @property
    def quorum(self) -> int:
        """How many assistants must have signed the same contributors before one answers."""
        return self.assistance.quorum(active=self.parameters.active)

    @cached_property
    def session(self) -> bytes:
        """The session id: 32 bytes that depend on the parameters and on every advertisement."""
        return digest_of("assisted session", self.parameters.context, self.to_bytes)

    def bound(self, binding: bytes) -> bytes:
        """Return the id that boxes, masks and signatures are bound to: the session with the model and the work."""
        return digest_of("assisted bound", self.session, binding)

    def advert(self, assistant: int) -> AssistantAdvert:
        """Return the advert of an assistant on the panel."""
        return self.adverts[self.assistants.index(assistant)]


@dataclass(frozen=True)
class Contribution:
    """What a client sends beside its masked vector; an assistant gets it with its own box only.

    `public_key`: a fresh X25519 key. `commitments`: one to the root of each subset. `boxes`: for each assistant, the
    roots that it holds, sealed. `signature`: zeros in semi-honest mode. What is signed leaves out the boxes: one opens
    only under the signed key, and what it holds must fit the signed commitments.
    """

    member: int
    public_key: bytes
    commitments: tuple[bytes, ...] = field(repr=False)
    boxes: Mapping[int, bytes] = field(repr=False)
    signature: bytes = field(default=bytes(64), repr=False)

    def digest(self, bound: bytes) -> bytes:
        """Return what the signature is over, and what stands for the contribution among the contributors."""
        return digest_of("contribution", bound, self.member.to_bytes(4, "big"), self.public_key, *self.commitments)

    def check(self, bound: bytes, roster: Mapping[int, bytes], verify: Verify) -> None:
        """Raise SecureAggregationError unless the client is on the roster and signed it for this session and work."""
        if not verify(roster.get(self.member, b""), self.signature, self.digest(bound)):
            raise SecureAggregationError(
                f"the contribution of member {self.member} is not signed by the identity that the pinned roster names"
            )

    def to(self, assistant: int) -> Contribution:
        """Return the contribution with one assistant's box only."""
        return replace(self, boxes={assistant: self.boxes[assistant]})

    def write(self, writer: Writer) -> Writer:
        """Add the contribution to a message; its boxes in ascending order of their assistants."""
        writer.number(self.member).fixed(self.public_key, 32)
        for commitment in self.commitments:
            writer.fixed(commitment, 32)
        for assistant in sorted(self.boxes):
            writer.fixed(self.boxes[assistant], len(self.boxes[assistant]))
        return writer.fixed(self.signature, 64)

    @classmethod
    def read(cls, reader: Reader, assistance: Assistance, assistants: Iterable[int]) -> Contribution:
        """Take a contribution with the boxes of `assistants` from a message."""
        member, key = reader.number(), reader.fixed(32)
        commitments = tuple(reader.fixed(32) for _ in assistance.subsets)
        boxes = {one: reader.fixed(box_size(assistance, one)) for one in sorted(assistants)}
        return cls(member, key, commitments, boxes, reader.fixed(64))

    @classmethod
    def size(cls, assistance: Assistance, assistants: Iterable[int]) -> int:
        """Return the bytes that `write` adds for the boxes of `assistants`."""
        return 4 + 32 + 32 * len(assistance.subsets) + sum(box_size(assistance, one) for one in assistants) + 64


def box_size(assistance: Assistance, assistant: int) -> int:
    """Return the bytes of the box that an assistant gets from each client."""
    return ROOT_SIZE * len(assistance.held_by(assistant)) + TAG_SIZE


def root_key(root: SecretBytes, bound: bytes, member: int, subset: Sequence[int]) -> Secret:
    """Return the key of the mask that a member's root makes for a subset of assistants."""
    return derive(root, "assist", bound, member, *subset)


def contributors_digest(bound: bytes, contributions: Iterable[bytes]) -> bytes:
    """Return what assistants sign: the digests of all contributions that are to be summed, by ascending member."""
    return digest_of("contributors", bound, *contributions)


def check_ascending(numbers: Sequence[int], what: str) -> None:
    """Raise SecureAggregationError unless the numbers are in ascending order, each once."""
    if any(after <= before for before, after in itertools.pairwise(numbers)):
        raise SecureAggregationError(f"the {what} are not in ascending order, each once")


def check_vector(parameters: Parameters, vector: NDArray[Any], what: str) -> None:
    """Raise SecureAggregationError unless the vector has the ring's type and the sum's length."""
    wanted = ring_type(parameters.bits)
    if vector.shape != (parameters.length,) or vector.dtype != wanted:
        raise SecureAggregationError(
            f"{what} must be {wanted} of shape ({parameters.length},), got {vector.dtype} {vector.shape}"
        )
