"""What both halves of a session derive: the id that a session is bound to with its work, and the masks between two.

Guarantees: a mask between two members belongs to one session, model and work, and has opposite signs at its two ends.
Trust: whoever knows one member's secret key knows its masks with everybody; the server does for those who are lost.
"""

from __future__ import annotations

from fedml_core.secagg.bulletin import Bulletin
from fedml_core.secagg.keys import KeyPair, derive
from fedml_core.secagg.parameters import digest_of
from fedml_core.secagg.secrets import Secret

__all__ = ["BOX_SIZE", "SHARE_SIZE", "bound_id", "mask_key", "mask_sign"]

SHARE_SIZE = 36
BOX_SIZE = 2 * SHARE_SIZE + 16


def bound_id(bulletin: Bulletin, binding: bytes) -> bytes:
    """Return the id that masks and confirmations are bound to: the session with the model and work of `binding`."""
    return digest_of("bound", bulletin.session, binding)


def mask_key(bulletin: Bulletin, pair: KeyPair, owner: int, other: int, bound: bytes) -> Secret:
    """Return the key of the mask between two members, made with the key pair of `owner`."""
    with pair.agree(bulletin.advert(other).mask_key, other) as agreed:
        return derive(agreed, "mask", bound, min(owner, other), max(owner, other))


def mask_sign(member: int, other: int) -> int:
    """Return the sign of a pair's mask on the vector of `member`: opposite ones at both ends, so that they cancel."""
    return 1 if member < other else -1
