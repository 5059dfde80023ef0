"""An assistant's part in a one-shot sum: it opens roots, signs one set of contributors, and sums up their masks.

docs/secure-aggregation.md is the specification; its twins are `assisted_client.py` and `assisted_server.py`.

Guarantees: a session signs at most one set of contributors, and answers for no other.
Guarantees: it answers only for contributors whose roots it opened, of whom there are as many as its own floor and the
    parameters ask for, and only when a quorum of assistants signed the very set that it signed.
Guarantees: it gives away sums of masks over all contributors, one for each subset at most, and never a root or a key.
Guarantees: memory beyond the roots is one vector and a batch of ciphers, however many contributors there are.
Trust: an assistant sees who contributes, and no update: without the masked vectors a mask says nothing.
Trust: it is believed to sum up the right masks; a wrong sum shows only if two assistants are asked and compared.
Trust: a session knows itself only; whoever makes sessions keeps, durably, that a round was signed in, and never signs
    in it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.assisted import (
    ROOT_SIZE,
    AssistantAdvert,
    Contribution,
    Panel,
    check_ascending,
    contributors_digest,
    root_key,
)
from fedml_core.secagg.codec import Kind, Reader, Writer
from fedml_core.secagg.keys import KeyPair, commitment, fresh_bytes, open_sealed
from fedml_core.secagg.masks import add_masks, ring_type
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.party import Party, SecretSession
from fedml_core.secagg.phases import AssistedPhase, step
from fedml_core.secagg.secrets import Secret

__all__ = ["AssistantSession"]

_BATCH = 256  # ciphers at a time


class AssistantSession(SecretSession):
    """One assistant's part in one attempt at one assisted sum; steps in the order of `AssistedPhase`.

    Args: minimum: its own floor of contributors.
    """

    role = "assistant"
    phase: AssistedPhase

    def __init__(self, parameters: Parameters, party: Party, *, minimum: int = 2) -> None:
        super().__init__(parameters, party, AssistedPhase.FRESH)
        self.assistant = party.number
        self.minimum = max(minimum, parameters.minimum)
        self._pair: KeyPair | None = None
        self._advert: AssistantAdvert | None = None
        self._panel: Panel | None = None
        self._bound = b""
        self._roots: dict[int, Secret] = {}
        self._digests: dict[int, bytes] = {}
        self._refused: set[int] = set()
        self._answered: set[int] = set()

    @step(AssistedPhase.FRESH, AssistedPhase.ADVERTISED)
    def advertise(self) -> bytes:
        """Return this assistant's advert, with a fresh key."""
        self._pair = KeyPair.fresh()
        unsigned = AssistantAdvert(self.assistant, self._pair.public, fresh_bytes(32))
        signature = self._sign(unsigned.signed_bytes(self.parameters.context)) if self.parameters.active else bytes(64)
        self._advert = AssistantAdvert(self.assistant, unsigned.sealing_key, unsigned.nonce, signature)
        self._advert.check(self.parameters, {}, lambda *_: True)
        return self._advert.to_bytes()

    def read_panel(self, data: bytes) -> Panel:
        """Return the panel in a message, checked against this assistant's own parameters and pinned roster."""
        return Panel.read(self.parameters, data, self._roster, self._verify)

    @step(AssistedPhase.ADVERTISED, AssistedPhase.GATHERING)
    def join(self, panel: Panel, binding: bytes) -> None:
        """Begin to gather contributions that were made for this panel and the model and work of `binding`.

        Raises: SecureAggregationError: if the panel was not checked by this session, or does not hold its advert as it
            was sent.
        """
        if panel.parameters != self.parameters or panel.roster is not self._roster:
            raise SecureAggregationError("the panel was not checked against this assistant's parameters and roster")
        if self.assistant not in panel.assistants or panel.advert(self.assistant) != self._advert:
            raise SecureAggregationError(
                f"the panel does not hold the advert of assistant {self.assistant} as it was sent"
            )
        self._panel, self._bound = panel, panel.bound(binding)

    @step(AssistedPhase.GATHERING, AssistedPhase.GATHERING)
    def gather(self, roundup: bytes) -> bytes:
        """Open the roots of more contributions, and return the message that names those which cannot be summed.

        A contribution is refused if it is not signed, its box does not open, or its roots are not the committed ones.
        Raises: SecureAggregationError: if one comes again, or the message is none.
        """
        panel = self._joined
        reader, refused = Reader(roundup, Kind.ROUNDUP), []
        count = reader.count(Contribution.size(panel.assistance, (self.assistant,)))
        listed = [Contribution.read(reader, panel.assistance, (self.assistant,)) for _ in range(count)]
        reader.finish()
        check_ascending([one.member for one in listed], "contributions")
        for contribution in listed:
            member = contribution.member
            if member in self._roots or member in self._refused:
                raise SecureAggregationError(f"a contribution of member {member} came before")
            try:
                self._roots[member] = self._opened(contribution)
                self._digests[member] = contribution.digest(self._bound)
            except SecureAggregationError:
                refused.append(member)
        self._refused.update(refused)
        return Writer(Kind.REFUSALS).numbers(refused).bytes()

    @property
    def _joined(self) -> Panel:
        assert self._panel is not None
        return self._panel

    def _opened(self, contribution: Contribution) -> Secret:
        """Return the roots in this assistant's box, in the order of the subsets that it holds."""
        assert self._pair is not None
        member = contribution.member
        if self.parameters.active:
            contribution.check(self._bound, self._roster, self._verify)
        box = contribution.boxes[self.assistant]
        with self._pair.agree(contribution.public_key, member) as agreed:
            roots = open_sealed(agreed, box, self._bound, member, self.assistant)
        for at, place in enumerate(self._joined.assistance.held_by(self.assistant)):
            if commitment(_root(roots, at), "root") != contribution.commitments[place]:
                roots.wipe()
                raise SecureAggregationError(f"the roots of member {member} are not the ones that it committed to")
        return roots

    @step(AssistedPhase.GATHERING, AssistedPhase.WITNESSED)
    def witness(self, message: bytes) -> bytes:
        """Check who is to be summed, and return this assistant's signature under it (zeros in semi-honest mode).

        Raises: SecureAggregationError: if a contributor's roots were not opened. ThresholdError: if they are too few.
        """
        reader = Reader(message, Kind.CONTRIBUTORS)
        contributors = reader.numbers()
        reader.finish()
        check_ascending(contributors, "contributors")
        if strangers := [member for member in contributors if member not in self._roots]:
            raise SecureAggregationError(f"this assistant has no roots of contributor {strangers[0]}")
        if len(contributors) < self.minimum:
            raise ThresholdError(f"{len(contributors)} members contributed, the minimum is {self.minimum}")
        for member in set(self._roots).difference(contributors):
            self._roots.pop(member).wipe()
        assert self._pair is not None
        self._pair.wipe()
        self._digests = {member: self._digests[member] for member in contributors}
        signature = self._sign(self._signed_digest()) if self.parameters.active else bytes(64)
        return Writer(Kind.WITNESS).fixed(signature, 64).bytes()

    def _signed_digest(self) -> bytes:
        return contributors_digest(self._bound, self._digests.values())

    @step(AssistedPhase.WITNESSED, AssistedPhase.WITNESSED, last=lambda self: self.answered_all)
    def answer(self, request: bytes) -> tuple[bytes, NDArray[Any]]:
        """Return the sum of all contributors' masks for the subsets that are asked for, with the message beside it.

        May be asked again for other subsets, because another assistant is gone; after the last one that this assistant
        holds, the session is over. Until then whoever owns it wipes it at the end of the round.
        Raises: ThresholdError: if fewer than a quorum signed the set that this assistant signed.
            SecureAggregationError: if a subset is not its own, or was answered.
        """
        reader, signed = Reader(request, Kind.WITNESSES), []
        for _ in range(reader.count(68)):
            signed.append((reader.number(), reader.fixed(64)))
        wanted = reader.numbers()
        reader.finish()
        self._check_witnesses(signed)
        check_ascending(wanted, "subsets")
        held = self._joined.assistance.held_by(self.assistant)
        if not wanted or not set(wanted) <= set(held) - self._answered:
            raise SecureAggregationError("a subset was asked for that this assistant does not hold, or answered before")
        vector = self._summed(wanted)
        self._answered.update(wanted)
        return Writer(Kind.ANSWER).numbers(wanted).bytes(), vector

    @property
    def answered_all(self) -> bool:
        """Return whether nothing that this assistant holds is left to be asked for."""
        return len(self._answered) == len(self._joined.assistance.held_by(self.assistant))

    def _check_witnesses(self, signed: Sequence[tuple[int, bytes]]) -> None:
        panel = self._joined
        check_ascending([assistant for assistant, _ in signed], "witnesses")
        if strangers := [assistant for assistant, _ in signed if assistant not in panel.assistants]:
            raise SecureAggregationError(f"witness {strangers[0]} is no assistant of this session")
        digest, valid = self._signed_digest(), len(signed)
        if self.parameters.active:
            valid = sum(self._verify(self._roster.get(one, b""), signature, digest) for one, signature in signed)
        if valid < panel.quorum:
            raise ThresholdError(
                f"{valid} assistants signed the contributors that this one signed, the quorum is {panel.quorum}"
            )

    def _summed(self, wanted: Sequence[int]) -> NDArray[Any]:
        assistance = self._joined.assistance
        at = {place: at for at, place in enumerate(assistance.held_by(self.assistant))}
        total = np.zeros(self.parameters.length, ring_type(self.parameters.bits))
        pairs = [(member, place) for place in wanted for member in self._roots]
        for start in range(0, len(pairs), _BATCH):
            keys = [
                (root_key(_root(self._roots[member], at[place]), self._bound, member, assistance.subsets[place]), 1)
                for member, place in pairs[start : start + _BATCH]
            ]
            add_masks(total, keys, threads=self._threads)
            for key, _ in keys:
                key.wipe()
        return total

    def wipe(self) -> None:
        """Overwrite every secret and end the session. Idempotent."""
        if self._pair is not None:
            self._pair.wipe()
        for roots in self._roots.values():
            roots.wipe()
        self._roots.clear()
        self.phase = AssistedPhase.OVER


def _root(roots: Secret, at: int) -> memoryview:
    return roots.view()[at * ROOT_SIZE : (at + 1) * ROOT_SIZE]
