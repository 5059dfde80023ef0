"""Opening the secrets that a sum's masks come from, although members may have sent wrong shares of them.

Guarantees: a secret that does not match what its owner advertised is never returned.
Guarantees: a member is named a liar only for bytes that no honest member passes on, or for wrong shares of more owners
    than there may be corrupt members: one of those owners is honest, and dealt it right ones.
Trust: of a wrong share alone, its holder and its owner may each be the cause; shares are not committed to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg import shamir
from fedml_core.secagg.bulletin import Bulletin
from fedml_core.secagg.field import LIMBS, PRIME, from_limbs, well_formed
from fedml_core.secagg.keys import KeyPair, commitment, derive
from fedml_core.secagg.masks import add_masks
from fedml_core.secagg.pairing import mask_key, mask_sign
from fedml_core.secagg.robust import reconstruct_despite_liars
from fedml_core.secagg.secrets import Secret

__all__ = ["Opening"]


class Opening:
    """The shares that came of every owner's one secret: the seed of who survived, the mask key of who is gone."""

    def __init__(self, bulletin: Bulletin, owners: Iterable[int], survivors: frozenset[int]) -> None:
        self._bulletin, self._survivors = bulletin, survivors
        self._shares: dict[int, dict[int, bytes]] = {owner: {} for owner in owners}
        self._unripe = set(self._shares)
        self._ripe: list[int] = []
        self._stubborn: set[int] = set()
        self._malformed: set[int] = set()
        self._disputes: dict[int, set[int]] = {}
        self._closed: set[int] = set()

    @property
    def ready(self) -> bool:
        """Return whether enough shares of every secret have come."""
        return not self._unripe

    @property
    def finished(self) -> bool:
        """Return whether every secret was opened and its masks were taken off."""
        return not self._shares

    @property
    def waiting(self) -> int:
        """Return how many secrets have become ripe since the last time."""
        return len(self._ripe)

    @property
    def liars(self) -> set[int]:
        """Return who certainly sent wrong shares."""
        most = self._bulletin.parameters.corrupt(len(self._bulletin.adverts))
        return self._malformed | {member for member, owners in self._disputes.items() if len(owners) > most}

    @property
    def at_fault(self) -> set[int]:
        """Return the liars, and whose secret cannot be opened at all."""
        return self.liars | self._closed

    def add(self, sender: int, owners: Sequence[int], shares: Sequence[bytes]) -> None:
        """Keep a member's shares of those secrets that are still to be opened."""
        for owner, share in zip(owners, shares, strict=True):
            kept = self._shares.get(owner)
            if kept is None:
                continue
            kept[sender] = share
            if len(kept) == self._bulletin.threshold:
                self._unripe.discard(owner)
                self._ripe.append(owner)

    def ripe(self) -> dict[int, Secret]:
        """Return the secrets that can be opened since the last time; those with a wrong share are put off."""
        owners, self._ripe = self._ripe, []
        found = self._open(owners)
        self._stubborn.update(owner for owner in owners if owner not in found)
        return found

    def stubborn(self) -> dict[int, Secret]:
        """Return some of the secrets that were put off; none where none is left.

        Raises: SecureAggregationError: if one cannot be opened, whichever shares are believed.
        """
        if not self._stubborn:
            return {}
        owner = min(self._stubborn)
        found = {owner: self._despite_liars(owner)}
        # Whoever lied once is believed last from here on, so the others open at once as a rule.
        found |= self._open(sorted(self._stubborn - {owner}))
        self._stubborn.difference_update(found)
        return found

    def take_off(self, total: NDArray[Any], secrets: Mapping[int, Secret], bound: bytes, *, threads: int = 1) -> None:
        """Take the masks of opened secrets off the total, in place, and let go of the secrets and their shares."""
        keys: list[tuple[Secret, int]] = []
        try:
            for owner, secret in secrets.items():
                if owner in self._survivors:
                    keys.append((derive(secret, "self", bound, owner), -1))
                else:
                    keys.extend(self._pair_keys(owner, secret, bound))
            add_masks(total, keys, threads=threads)
        finally:
            for key in (*secrets.values(), *(key for key, _ in keys)):
                key.wipe()
        for owner in secrets:
            self._shares.pop(owner, None)

    def _pair_keys(self, gone: int, secret: Secret, bound: bytes) -> list[tuple[Secret, int]]:
        """Return what takes the masks between one who is gone and its surviving neighbours off the total."""
        with KeyPair.of(secret) as pair:
            return [
                (mask_key(self._bulletin, pair, gone, other, bound), -mask_sign(other, gone))
                for other in self._bulletin.neighbours(gone)
                if other in self._survivors
            ]

    def _senders(self, owner: int) -> list[int]:
        """Return the first senders of enough shares, those who were caught last."""
        caught = self._caught
        return sorted(sorted(self._shares[owner], key=lambda one: (one in caught, one))[: self._bulletin.threshold])

    def _open(self, owners: Sequence[int]) -> dict[int, Secret]:
        found: dict[int, Secret] = {}
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for owner in owners:
            senders = self._senders(owner)
            groups.setdefault(tuple(self._points(owner, senders)), []).append((owner, senders))
        for points, together in groups.items():
            for (owner, _), secret in zip(together, self._interpolated(points, together), strict=True):
                if secret is None:
                    continue
                if self._holds(owner, secret):
                    found[owner] = secret
                else:
                    secret.wipe()
            for owner, senders in together:
                if owner in found:
                    self._compare(owner, points, senders)
        return found

    def _compare(self, owner: int, points: Sequence[int], senders: Sequence[int]) -> None:
        """Compare what those who were caught sent of an opened secret with what their shares must be."""
        for sender in self._caught.intersection(self._shares[owner]).difference(senders):
            (here,) = self._points(owner, [sender])
            # The polynomial's value at a point is that at 0 of the polynomial shifted by the point.
            shifted = shamir.Reconstructor([(point - here) % PRIME for point in points])
            packed = b"".join(self._shares[owner][one] for one in senders)
            expected = shifted.limbs(shamir.from_bytes(packed, (len(points), 1)))
            if shamir.to_bytes(expected[0]) != self._shares[owner][sender]:
                self._disputes.setdefault(sender, set()).add(owner)

    @property
    def _caught(self) -> set[int]:
        return self._malformed.union(self._disputes)

    def _points(self, owner: int, senders: Sequence[int]) -> list[int]:
        """Return the x-coordinates of the shares that `senders` hold of an owner's secrets."""
        if self._bulletin.complete:
            return [self._bulletin.places[sender] + 1 for sender in senders]
        return [self._bulletin.place_beside(owner, sender) + 1 for sender in senders]

    def _interpolated(
        self, points: tuple[int, ...], together: Sequence[tuple[int, Sequence[int]]]
    ) -> list[Secret | None]:
        """Return what the shares of each owner open, or None where that is no secret at all."""
        size, shares = len(points), np.empty((len(points), len(together), LIMBS), np.uint32)
        usable = np.ones(len(together), bool)
        for column, (owner, senders) in enumerate(together):
            try:
                shares[:, column] = shamir.from_bytes(b"".join(self._shares[owner][one] for one in senders), (size,))
            except SecureAggregationError:
                shares[:, column], usable[column] = 0, False
        limbs = shamir.Reconstructor(points).limbs(shares)
        usable &= well_formed(limbs)
        limbs[~usable] = 0
        return [
            Secret(bytes(row)) if good else None for row, good in zip(from_limbs(limbs), usable.tolist(), strict=True)
        ]

    def _holds(self, owner: int, secret: Secret) -> bool:
        """Return whether a secret is the one that its owner committed to."""
        advert = self._bulletin.advert(owner)
        if owner in self._survivors:
            return commitment(secret) == advert.commitment
        with KeyPair.of(secret) as pair:
            return pair.public == advert.mask_key

    def _despite_liars(self, owner: int) -> Secret:
        rows: list[NDArray[np.uint32]] = []
        by_point: dict[int, int] = {}
        senders = sorted(self._shares[owner])
        for point, sender in zip(self._points(owner, senders), senders, strict=True):
            try:
                rows.append(shamir.from_bytes(self._shares[owner][sender]))
                by_point[point] = sender
            except SecureAggregationError:
                self._malformed.add(sender)

        def correct(candidate: bytes) -> bool:
            with Secret(candidate) as secret:
                return self._holds(owner, secret)

        shares = np.stack(rows) if rows else np.empty((0, LIMBS), np.uint32)
        try:
            opened = reconstruct_despite_liars(list(by_point), shares, self._bulletin.threshold, correct)
        except SecureAggregationError as error:
            self._closed.add(owner)
            raise SecureAggregationError(f"the secret of member {owner} cannot be opened: {error}") from error
        for point in opened.liars:
            self._disputes.setdefault(by_point[point], set()).add(owner)
        return Secret(opened.secret)
