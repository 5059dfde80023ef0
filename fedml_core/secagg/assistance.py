"""Which assistants take part in a one-shot sum, which of them holds which root, and how many must agree.

Every set of `threshold` assistants has a root of each client that none of the set holds and that all others do: pseudo-
random secret sharing (Cramer, Damgard, Ishai 2005, doi:10.1007/978-3-540-30576-7_19) of a client's mask.

Guarantees: whatever `threshold` assistants put together, at least one root of every client is missing.
Guarantees: as long as more than `threshold` assistants are left, every root has a holder among them.
Guarantees: in active mode, no two sets of contributors have a quorum each, unless more than `lying` sign both.
Trust: what assistants hold is private as long as at most `threshold` of them show it to the server.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg.parameters import Parameters

__all__ = ["MOST_ASSISTANTS", "Assistance", "assign"]

MOST_ASSISTANTS = 7
"""With more, the roots become many: a client draws one mask for every set of `threshold` assistants."""

_KEY = "assisted"
_FIELDS = ("assistants", "threshold", "lying")


@dataclass(frozen=True)
class Assistance:
    """The assistants of a sum and what is expected of them.

    `assistants`: their numbers on the roster, ascending, 2 to 7 of them. `threshold`: how many may show the server all
    that they have. `lying`: how many of those may also sign what they like; 0 if all follow the protocol.
    """

    assistants: tuple[int, ...]
    threshold: int
    lying: int = 0

    def __post_init__(self) -> None:
        """Check every number: they may come from a stranger."""
        numbers = self.assistants
        if type(numbers) is not tuple or not all(type(one) is int and 0 <= one < 1 << 31 for one in numbers):
            raise SecureAggregationError("assistants are numbers of a roster, from 0 to below 2^31")
        if not 2 <= len(numbers) <= MOST_ASSISTANTS or list(numbers) != sorted(set(numbers)):
            raise SecureAggregationError(
                f"a sum has 2 to {MOST_ASSISTANTS} assistants in ascending order, each once, got {len(numbers)} numbers"
            )
        if type(self.threshold) is not int or not 1 <= self.threshold < len(numbers):
            raise SecureAggregationError(
                f"the threshold of {len(numbers)} assistants must be from 1 to {len(numbers) - 1}, "
                f"got {self.threshold!r:.40}"
            )
        if type(self.lying) is not int or not 0 <= self.lying <= self.threshold:
            raise SecureAggregationError(
                f"lying assistants must be from 0 to the threshold of {self.threshold}, got {self.lying!r:.40}"
            )

    @classmethod
    def of(cls, parameters: Parameters) -> Assistance:
        """Return the assistance that the parameters of a sum name.

        Raises: SecureAggregationError: if they name none, or one that cannot be.
        """
        table = parameters.encoding.get(_KEY)
        if not isinstance(table, Mapping) or set(table) != set(_FIELDS) or not isinstance(table["assistants"], list):
            raise SecureAggregationError("the parameters name no assistants, so the sum is not an assisted one")
        return cls(tuple(table["assistants"]), table["threshold"], table["lying"])

    def within(self, encoding: Mapping[str, Any]) -> dict[str, Any]:
        """Return what stands for `encoding` in the parameters of a sum that has this assistance."""
        return {
            **encoding,
            _KEY: {"assistants": list(self.assistants), "threshold": self.threshold, "lying": self.lying},
        }

    @cached_property
    def subsets(self) -> tuple[tuple[int, ...], ...]:
        """Every set of `threshold` assistants, in the order of its numbers: a client has a root for each."""
        return tuple(itertools.combinations(self.assistants, self.threshold))

    def holders(self, subset: int) -> tuple[int, ...]:
        """Return who holds the roots of a subset, given by its place among `subsets`: everybody who is not in it."""
        return tuple(one for one in self.assistants if one not in self.subsets[subset])

    def held_by(self, assistant: int) -> tuple[int, ...]:
        """Return the places of the subsets whose roots an assistant holds, ascending."""
        return tuple(place for place, subset in enumerate(self.subsets) if assistant not in subset)

    def quorum(self, *, active: bool) -> int:
        """Return how many assistants must have signed the same contributors before any of them answers.

        With A assistants of which L lie, two sets together have at most A + L signatures: each of the others signs
        once. So neither can be answered beside the other if a quorum Q has 2 Q > A + L. More than `threshold` must be
        left in any case, to hold all roots.
        """
        return max(self.threshold + 1, (len(self.assistants) + self.lying) // 2 + 1 if active else 0)

    def spare(self, *, active: bool) -> int:
        """Return how many assistants may be lost."""
        return len(self.assistants) - self.quorum(active=active)


def assign(
    assistance: Assistance, subsets: Collection[int], able: Mapping[int, Collection[int]], each: int = 1
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Return which assistants are to answer for which subsets: the subsets of each group of `each` assistants.

    Everybody gets about as many; where fewer than `each` can answer for a subset, those do.
    Args: able: the assistants that can still be asked, each with the subsets that it was asked for already.
    Raises: ThresholdError: if nobody can answer for one.
    """
    chosen: dict[int, list[int]] = {}
    free: dict[int, list[int]] = {}
    load = dict.fromkeys(able, 0)
    for subset in sorted(subsets):
        free[subset] = [one for one in assistance.holders(subset) if one in able and subset not in able[one]]
        if not free[subset]:
            raise ThresholdError(
                f"no assistant is left that holds the roots which {_names(assistance.subsets[subset])} must not have; "
                f"more than {assistance.threshold} assistants must be left"
            )
        chosen[subset] = free[subset][:each]
        for one in chosen[subset]:
            load[one] += 1
    _level(chosen, free, load)
    groups: dict[tuple[int, ...], list[int]] = {}
    for subset, group in chosen.items():
        groups.setdefault(tuple(sorted(group)), []).append(subset)
    return {group: tuple(places) for group, places in groups.items()}


def _level(chosen: Mapping[int, list[int]], free: Mapping[int, Sequence[int]], load: dict[int, int]) -> None:
    """Move subsets, one by one, from an assistant with more of them to one with at least two fewer."""
    while (move := _move(chosen, free, load)) is not None:
        group, one, other = move
        group[group.index(one)] = other
        load[one], load[other] = load[one] - 1, load[other] + 1


def _move(
    chosen: Mapping[int, list[int]], free: Mapping[int, Sequence[int]], load: Mapping[int, int]
) -> tuple[list[int], int, int] | None:
    """Return a group of which one assistant is to be replaced by another, or None if all have about as many."""
    for subset, group in chosen.items():
        for one, other in itertools.product(group, set(free[subset]).difference(group)):
            if load[one] > load[other] + 1:
                return group, one, other
    return None


def _names(subset: tuple[int, ...]) -> str:
    return f"assistant{'s' if len(subset) > 1 else ''} {', '.join(map(str, subset))}"
