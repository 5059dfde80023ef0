"""A client's part in a one-shot sum with assistants: one message, and nothing to wait for.

docs/secure-aggregation.md is the specification; its twins are `assistant.py` and `assisted_server.py`.

Guarantees: a session that met an error, or that contributed, is wiped, and answers nothing more.
Guarantees: roots and keys are made from the operating system's randomness for this one sum.
Trust: the masked vector is uniform to the server and any `threshold` assistants, until the others sum its masks.
Trust: the client does not see who else contributes: assistants it trusts hold the line at the minimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.assisted import ROOT_SIZE, Contribution, Panel, check_vector, root_key
from fedml_core.secagg.codec import Kind, Writer
from fedml_core.secagg.keys import KeyPair, commitment, seal
from fedml_core.secagg.masks import add_masks
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.party import Party, SecretSession
from fedml_core.secagg.phases import AssistedPhase, step
from fedml_core.secagg.secrets import Secret

__all__ = ["AssistedClient"]


class AssistedClient(SecretSession):
    """One member's part in one attempt at one assisted sum."""

    phase: AssistedPhase

    def __init__(self, parameters: Parameters, party: Party) -> None:
        super().__init__(parameters, party, AssistedPhase.FRESH)
        self.member = party.number
        self._roots: list[Secret] = []

    def read_panel(self, data: bytes) -> Panel:
        """Return the panel in a message, checked against this member's own parameters and pinned roster."""
        return Panel.read(self.parameters, data, self._roster, self._verify)

    @step(AssistedPhase.FRESH, AssistedPhase.OVER)
    def contribute(self, panel: Panel, binding: bytes, vector: NDArray[Any]) -> bytes:
        """Mask the ring vector of shape (length,), in place, and return the message that goes with it.

        Args: binding: a digest of the model and of the work that this member was given.
        Raises: SecureAggregationError: if the panel was not checked by this session, or the vector has another shape or
            type; the vector is then as it was.
        """
        if panel.parameters != self.parameters or panel.roster is not self._roster:
            raise SecureAggregationError("the panel was not checked against this member's parameters and roster")
        check_vector(self.parameters, vector, "the vector")
        bound, subsets = panel.bound(binding), panel.assistance.subsets
        self._roots = [Secret.fresh(ROOT_SIZE) for _ in subsets]
        message = self._message(panel, bound)
        keys = [
            (root_key(root, bound, self.member, subset), 1) for root, subset in zip(self._roots, subsets, strict=True)
        ]
        add_masks(vector, keys, threads=self._threads)
        for key, _ in keys:
            key.wipe()
        return message

    def _message(self, panel: Panel, bound: bytes) -> bytes:
        with KeyPair.fresh() as pair:
            boxes = {}
            for advert in panel.adverts:
                with (
                    pair.agree(advert.sealing_key, advert.assistant) as agreed,
                    _packed(self._roots, panel.assistance.held_by(advert.assistant)) as plain,
                ):
                    boxes[advert.assistant] = seal(agreed, plain, bound, self.member, advert.assistant)
            made = Contribution(
                self.member, pair.public, tuple(commitment(root, "root") for root in self._roots), boxes
            )
        signature = self._sign(made.digest(bound)) if self.parameters.active else bytes(64)
        signed = Contribution(made.member, made.public_key, made.commitments, made.boxes, signature)
        return signed.write(Writer(Kind.CONTRIBUTION).fixed(bound, 32)).bytes()

    def wipe(self) -> None:
        """Overwrite every secret and end the session. Idempotent."""
        for root in self._roots:
            root.wipe()
        self._roots.clear()
        self.phase = AssistedPhase.OVER


def _packed(roots: Sequence[Secret], places: Sequence[int]) -> Secret:
    """Return the roots at `places`, one after the other."""
    packed = bytearray(ROOT_SIZE * len(places))
    for at, place in enumerate(places):
        packed[at * ROOT_SIZE : (at + 1) * ROOT_SIZE] = roots[place].view()
    return Secret.taking(packed)
