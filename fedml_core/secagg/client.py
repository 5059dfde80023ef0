"""A member's half of one secure sum: what it checks before it gives anything away.

Bonawitz et al. (2017), doi:10.1145/3133956.3133982, with the graph of Bell et al. (2020), doi:10.1145/3372297.3417885,
in its active variant; docs/secure-aggregation.md is the specification, and its twin is `server.py`.

Guarantees: a session that met anything that the protocol does not allow is wiped, and answers nothing more.
Guarantees: for no member does it give away both kinds of share, whatever it is sent.
Guarantees: secrets are made from the operating system's randomness, live in this object only, and are overwritten when
    the session ends.
Trust: the server sees one masked vector, which is uniform to it unless a quorum confirms the same survivors.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg import shamir
from fedml_core.secagg.bulletin import Advert, Bulletin
from fedml_core.secagg.codec import Kind, Reader, Writer
from fedml_core.secagg.keys import KeyPair, commitment, derive, fresh_bytes, open_sealed, seal
from fedml_core.secagg.masks import add_masks, ring_type
from fedml_core.secagg.pairing import BOX_SIZE, SHARE_SIZE, bound_id, mask_key, mask_sign
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.party import Party, SecretSession
from fedml_core.secagg.phases import ComplaintError, Phase, step
from fedml_core.secagg.secrets import Secret
from fedml_core.secagg.survivors import (
    SIGNATURE_SIZE,
    Survivors,
    confirmed_by,
    read_survivors,
    survivors_digest,
)

__all__ = [
    "BOX_SIZE",
    "SHARE_SIZE",
    "ClientSession",
    "ComplaintError",
    "Phase",
    "bound_id",
    "mask_key",
    "survivors_digest",
]


class ClientSession(SecretSession):
    """One member's part in one attempt at one secure sum; steps in the order of `Phase`."""

    phase: Phase

    def __init__(self, parameters: Parameters, party: Party) -> None:
        super().__init__(parameters, party, Phase.FRESH)
        self.member = party.number
        self._sealing: KeyPair | None = None
        self._masking: KeyPair | None = None
        self._seed: Secret | None = None
        self._advert: Advert | None = None
        self._bulletin: Bulletin | None = None
        self._agreed: dict[int, Secret] = {}
        self._held: dict[int, Secret] = {}
        self._bound = b""
        self._survivors: Survivors | None = None

    @step(Phase.FRESH, Phase.ADVERTISED)
    def advertise(self) -> bytes:
        """Return this member's advert, with fresh keys."""
        self._sealing = KeyPair.fresh()
        self._masking = KeyPair.fresh()
        self._seed = Secret.fresh(32)
        unsigned = Advert(
            self.member, self._sealing.public, self._masking.public, fresh_bytes(32), commitment(self._seed)
        )
        signature = self._sign(unsigned.signed_bytes(self.parameters.context)) if self.parameters.active else bytes(64)
        self._advert = Advert(**{**vars(unsigned), "signature": signature})
        return self._advert.to_bytes()

    def read_bulletin(self, data: bytes) -> Bulletin:
        """Return the bulletin in a message, checked against this member's own parameters and pinned roster."""
        return Bulletin.read(self.parameters, data, self._roster, self._verify)

    @step(Phase.ADVERTISED, Phase.SHARED)
    def share(self, bulletin: Bulletin) -> bytes:
        """Return the sealed shares of this member's two secrets, for everybody who is to hold some.

        Raises: SecureAggregationError: if the bulletin is for other parameters, was checked against another roster, or
            does not hold this member's advert as it was sent.
        """
        assert self._seed is not None and self._masking is not None
        if bulletin.parameters != self.parameters or bulletin.roster is not self._roster:
            raise SecureAggregationError("the bulletin was not checked against this member's parameters and roster")
        if self.member not in bulletin.places or bulletin.advert(self.member) != self._advert:
            raise SecureAggregationError(f"the bulletin does not hold member {self.member}'s advert as it was sent")
        self._bulletin = bulletin
        holders = bulletin.holders(self.member)
        with self._masking.secret() as mask_secret:
            secrets = np.stack([self._seed.array(), mask_secret.array()])
        try:
            shares = shamir.share(secrets, bulletin.threshold, len(holders))
        finally:
            secrets[:] = 0
        writer = Writer(Kind.SHARES).number(len(holders) - bulletin.complete)
        try:
            for holder, own in zip(holders, shares, strict=True):
                plain = Secret(shamir.to_bytes(own))
                if holder == self.member:
                    self._held[holder] = plain
                    continue
                with plain:
                    writer.fixed(self._seal(holder, plain), BOX_SIZE)
        finally:
            shares[:] = 0
        return writer.bytes()

    def _seal(self, receiver: int, plain: Secret) -> bytes:
        assert self._sealing is not None and self._bulletin is not None
        agreed = self._sealing.agree(self._bulletin.advert(receiver).sealing_key, receiver)
        self._agreed[receiver] = agreed
        return seal(agreed, plain, self._bulletin.session, self.member, receiver)

    @step(Phase.SHARED, Phase.RECEIVED)
    def receive(self, delivery: bytes, binding: bytes) -> None:
        """Open the shares of this member's neighbours; from here on everything is bound to `binding`.

        Args: binding: a digest of the model and of the work that this member was given.
        Raises: ComplaintError: if boxes cannot be opened. ThresholdError: if too few came.
        """
        assert self._bulletin is not None and self._sealing is not None
        boxes = self._read_delivery(delivery)
        if len(boxes) + self._bulletin.complete < self._bulletin.threshold:
            raise ThresholdError(
                f"{len(boxes)} neighbours sent shares, with a threshold of {self._bulletin.threshold} too few"
            )
        bad = [sender for sender, box in boxes.items() if not self._opens(sender, box)]
        if bad:
            raise ComplaintError(bad)
        self._bound = bound_id(self._bulletin, binding)
        for agreed in self._agreed.values():
            agreed.wipe()
        self._agreed.clear()
        self._sealing.wipe()

    def _opens(self, sender: int, box: bytes) -> bool:
        """Open a box and keep what is in it; say whether that was possible, and it holds shares."""
        assert self._bulletin is not None
        with contextlib.suppress(SecureAggregationError):
            plain = open_sealed(self._agreed[sender], box, self._bulletin.session, sender, self.member)
            self._held[sender] = plain
            # What is no share would make its holder look like a liar when it is passed on.
            shamir.from_bytes(plain.bytes(), (2,))
            return True
        return False

    def _read_delivery(self, delivery: bytes) -> dict[int, bytes]:
        assert self._bulletin is not None
        reader = Reader(delivery, Kind.DELIVERY)
        boxes: dict[int, bytes] = {}
        allowed, last = frozenset(self._bulletin.neighbours(self.member)), -1
        for _ in range(reader.count(4 + BOX_SIZE)):
            sender = reader.number()
            if sender <= last or sender not in allowed:
                raise SecureAggregationError(
                    f"shares of member {sender} were delivered twice, or to no neighbour of it"
                )
            boxes[sender], last = reader.fixed(BOX_SIZE), sender
        reader.finish()
        return boxes

    @step(Phase.RECEIVED, Phase.MASKED)
    def mask(self, vector: NDArray[Any]) -> bytes:
        """Mask the ring vector of shape (length,), in place, and return the message that goes with it.

        Raises: SecureAggregationError: if it has another shape or type.
        """
        assert self._bulletin is not None and self._masking is not None and self._seed is not None
        wanted = ring_type(self.parameters.bits)
        if vector.shape != (self.parameters.length,) or vector.dtype != wanted:
            raise SecureAggregationError(
                f"the vector must be {wanted} of shape ({self.parameters.length},), got {vector.dtype} {vector.shape}"
            )
        masks: list[tuple[Secret, int]] = []
        try:
            masks.append((derive(self._seed, "self", self._bound, self.member), 1))
            for other in sorted(set(self._held) - {self.member}):
                key = mask_key(self._bulletin, self._masking, self.member, other, self._bound)
                masks.append((key, mask_sign(self.member, other)))
            add_masks(vector, masks, threads=self._threads)
        finally:
            for key, _ in masks:
                key.wipe()
        # From here on the secrets themselves are with their holders only.
        self._masking.wipe()
        self._seed.wipe()
        return Writer(Kind.MASKED).fixed(self._bound, 32).bytes()

    @step(Phase.MASKED, Phase.CONFIRMED)
    def confirm(self, message: bytes) -> bytes:
        """Check who survived, and return this member's signature under it (zeros in semi-honest mode).

        Raises: SecureAggregationError: if this list cannot be the survivors; ThresholdError: if they are too few.
        """
        assert self._bulletin is not None
        survivors = read_survivors(self._bulletin, message)
        if self.member not in survivors.alive:
            raise SecureAggregationError(f"member {self.member} was asked to confirm survivors without itself")
        near = survivors.alive.intersection(self._bulletin.neighbours(self.member))
        if not all(member in self._held for member in near):
            raise SecureAggregationError("the survivors include neighbours that sent no shares")
        left = len(near) + self._bulletin.complete
        if left < self._bulletin.threshold:
            raise ThresholdError(f"{left} holders of shares survived, the threshold is {self._bulletin.threshold}")
        self._survivors = survivors
        active = self.parameters.active
        signature = self._sign(survivors.digest(self._bound)) if active else bytes(SIGNATURE_SIZE)
        return Writer(Kind.CONFIRMATION).fixed(signature, SIGNATURE_SIZE).bytes()

    @step(Phase.CONFIRMED, Phase.OVER)
    def unmask(self, quorum: bytes = b"") -> bytes:
        """Return one share for each member whose box this member opened, and wipe the session.

        Args: quorum: the signatures of those who confirmed the same survivors; none are looked at in semi-honest mode.
        Raises: ThresholdError: if fewer than a quorum signed the list that this member confirmed.
        """
        assert self._survivors is not None
        if self.parameters.active:
            self._check_quorum(self._survivors, quorum)
        writer = Writer(Kind.UNMASKING).number(len(self._held))
        for member in sorted(self._held):
            half = slice(0, SHARE_SIZE) if member in self._survivors.alive else slice(SHARE_SIZE, None)
            writer.fixed(bytes(self._held[member].view()[half]), SHARE_SIZE)
        return writer.bytes()

    def _check_quorum(self, survivors: Survivors, quorum: bytes) -> None:
        assert self._bulletin is not None
        digest = survivors.digest(self._bound)
        valid = confirmed_by(survivors, quorum, digest, self._bulletin, self._verify)
        if valid < self._bulletin.quorum:
            raise ThresholdError(
                f"{valid} members confirmed the survivors that this member confirmed, the quorum is "
                f"{self._bulletin.quorum}"
            )

    def wipe(self) -> None:
        """Overwrite every secret and end the session. Idempotent."""
        for pair in (self._sealing, self._masking):
            if pair is not None:
                pair.wipe()
        for secret in (self._seed, *self._agreed.values(), *self._held.values()):
            if secret is not None:
                secret.wipe()
        self._agreed.clear()
        self._held.clear()
        self.phase = Phase.OVER
