"""Taking masks off an assisted sum: which are still on it, whom the server asked for them, and whose answers it took.

Guarantees: the sum of a mask is taken off once; an answer that differs from another one for the same masks makes the
    sum void.
Trust: whoever runs it sees sums of masks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.assistance import Assistance, assign
from fedml_core.secagg.assisted_desk import require

__all__ = ["MaskDesk", "Subsets"]

Subsets = tuple[int, ...]


class MaskDesk:
    """The masks of one sum; `each`: how many assistants are asked for the same ones, 1 or 2, to be compared then.

    `left`: the places of the subsets whose masks are on the sum. `compared`: of those that two assistants agreed on.
    """

    def __init__(self, assistance: Assistance, each: int) -> None:
        if each not in (1, 2):
            raise SecureAggregationError(f"1 or 2 assistants are asked for the same masks, got {each}")
        self._assistance, self._each = assistance, each
        self._asked: dict[int, set[int]] = {}
        self._waiting: dict[int, list[Subsets]] = {}
        self._answers: dict[Subsets, tuple[int, bytes]] = {}
        self.left = set(range(len(assistance.subsets)))
        self.compared: set[int] = set()

    @property
    def answered(self) -> Mapping[int, int]:
        """Return which assistant's sum of masks was taken off, by the place of the subset."""
        return {subset: one for subsets, (one, _) in self._answers.items() for subset in subsets}

    @property
    def ready(self) -> bool:
        """Return whether every mask is off the sum, and every comparison made that was asked for."""
        return not self.left and not any(self._waiting.values())

    def ask(self, assistants: Collection[int]) -> dict[int, list[Subsets]]:
        """Return which masks to ask each assistant for: all that nobody has answered or is being asked for.

        Raises: ThresholdError: if none of these is left for a mask.
        """
        due = self.left.difference(*(subsets for waiting in self._waiting.values() for subsets in waiting))
        able = {one: self._asked.get(one, set()) for one in assistants}
        asked: dict[int, list[Subsets]] = {}
        for chosen, subsets in assign(self._assistance, due, able, self._each).items():
            for one in chosen:
                self._asked.setdefault(one, set()).update(subsets)
                self._waiting.setdefault(one, []).append(subsets)
                asked.setdefault(one, []).append(subsets)
        return asked

    def lose(self, assistant: int) -> None:
        """Wait for nothing more of an assistant."""
        self._waiting.pop(assistant, None)

    def require_asked(self, assistant: int, subsets: Subsets) -> None:
        """Raise SecureAggregationError unless an assistant owes the answer for these masks."""
        require(subsets in self._waiting.get(assistant, []), f"assistant {assistant} was not asked for these masks")

    def take(self, assistant: int, subsets: Subsets, masks: NDArray[Any], total: NDArray[Any]) -> None:
        """Take the sum of masks that was asked for off `total`, in place, or compare it with another's.

        Raises: SecureAggregationError: if it differs from the other one: one of both is wrong, and nobody can say
            which. The masks are then on the sum for good.
        """
        self._waiting[assistant].remove(subsets)
        digest = hashlib.sha256(np.ascontiguousarray(masks).data).digest() if self._each > 1 else b""
        if subsets not in self._answers:
            np.subtract(total, masks, out=total)
            self._answers[subsets] = assistant, digest
            self.left.difference_update(subsets)
        elif self._answers[subsets][1] == digest:
            self.compared.update(subsets)
        else:
            self.left.update(subsets)
            raise SecureAggregationError(
                f"assistant {assistant} summed up other masks than another one; the sum is void"
            )
