"""Who takes part in one secure sum: signed advertisements, and what every party works out from them by itself.

Nobody is told the graph, the threshold or the quorum: each party computes them from the advertisements that it saw, so
a server cannot choose them. Bell et al. (2020), doi:10.1145/3372297.3417885, for the graph and the threshold.

Guarantees: all who hold equal bulletins have the same session id, neighbours, threshold and quorum; whoever holds
    another has another session id.
Guarantees: in active mode, every advertisement was signed by the identity key that the pinned roster names for its
    member, and no two members share a key, a nonce or a commitment.
Guarantees: in active mode, no group of members can be summed without the other honest survivors, whatever a server
    tells whom, but for a probability of 2^-security_bits over the drawing of a sparse graph.
Trust: of the members that a server put on it, at most the stated share is corrupt; so a site that fears C corrupt ones
    in its whole roster asks for at least C / corrupt_share members.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedml_core.errors import ConfigError, SecureAggregationError, ThresholdError
from fedml_core.secagg import graph
from fedml_core.secagg.adverts import ADVERT_SIZE, Advert, Verify, check_signature, verify
from fedml_core.secagg.codec import Kind, Reader, Writer
from fedml_core.secagg.parameters import Parameters, digest_of

__all__ = ["Advert", "Bulletin", "Verify", "check_signature", "verify"]


@dataclass(frozen=True, eq=False)
class Bulletin:
    """The advertisements of one attempt, checked, in order of their members.

    Make it with `checked` or `read`; both raise unless everything holds.
    """

    parameters: Parameters
    adverts: tuple[Advert, ...] = field(repr=False)
    roster: Mapping[int, bytes] = field(repr=False)

    @classmethod
    def checked(
        cls, parameters: Parameters, adverts: Sequence[Advert], roster: Mapping[int, bytes], verify: Verify = verify
    ) -> Bulletin:
        """Return the bulletin of `adverts`, after all checks that do not depend on who looks.

        Args: roster: the identity key of every member that may take part; not used in semi-honest mode.
        Raises: ThresholdError: if there are too few. SecureAggregationError: for any other flaw, naming the member.
        """
        _check_order(adverts)
        if len(adverts) < parameters.minimum:
            raise ThresholdError(f"{len(adverts)} members advertised, the minimum is {parameters.minimum}")
        _check_distinct(adverts)
        if parameters.active:
            for advert in adverts:
                check_signature(parameters, advert, roster, verify)
        made = cls(parameters, tuple(adverts), roster)
        try:
            made.threshold  # noqa: B018 - computed here, so that a graph that cannot be is refused here
        except ConfigError as error:
            raise ThresholdError(str(error)) from error
        return made

    @classmethod
    def read(
        cls, parameters: Parameters, data: bytes, roster: Mapping[int, bytes], verify: Verify = verify
    ) -> Bulletin:
        """Return the bulletin in a message, after the checks of `checked`."""
        reader = Reader(data, Kind.BULLETIN)
        adverts = [Advert.read(reader) for _ in range(reader.count(ADVERT_SIZE))]
        reader.finish()
        return cls.checked(parameters, adverts, roster, verify)

    @cached_property
    def to_bytes(self) -> bytes:
        """The bulletin as a message."""
        writer = Writer(Kind.BULLETIN).number(len(self.adverts))
        for advert in self.adverts:
            advert.write(writer)
        return writer.bytes()

    @cached_property
    def session(self) -> bytes:
        """The session id: 32 bytes that depend on the parameters and on every advertisement."""
        return digest_of("session", self.parameters.context, self.to_bytes)

    @cached_property
    def members(self) -> tuple[int, ...]:
        """The members, ascending."""
        return tuple(advert.member for advert in self.adverts)

    @cached_property
    def places(self) -> Mapping[int, int]:
        """Each member's place among the members."""
        return {member: place for place, member in enumerate(self.members)}

    def advert(self, member: int) -> Advert:
        """Return a member's advertisement."""
        return self.adverts[self.places[member]]

    @cached_property
    def degree(self) -> int:
        """How many neighbours each member has."""
        return self._shape[0]

    @cached_property
    def threshold(self) -> int:
        """How many holders of shares it takes to open a secret."""
        return self._shape[1]

    @cached_property
    def _shape(self) -> tuple[int, int]:
        p, count = self.parameters, len(self.adverts)
        # A group can be summed alone only between two gaps on the ring, k / 2 members in a row of whom none is honest
        # and answers. Next to a gap a secret has k / 2 holders and the corrupt ones in the gap, of whom the threshold
        # must be missing one in all pairs of gaps: about n / 2 times as many as there are neighbourhoods.
        pairs = math.ceil(math.log2(max(2, count / 2))) if p.active else 0
        return graph.neighbourhood(
            count, p.corrupt_share, p.dropout_share, active=p.active, security_bits=p.security_bits + pairs
        )

    @property
    def complete(self) -> bool:
        """Whether everybody is everybody's neighbour; then a member holds a share of its own secrets, too."""
        return self.degree >= len(self.adverts) - 1

    @property
    def quorum(self) -> int:
        """How many members must have confirmed the same survivors before anybody unmasks.

        More than half of the honest ones and all corrupt ones: two different sets cannot both have as many.
        """
        count = len(self.adverts)
        return max(self.parameters.minimum, (count + self.parameters.corrupt(count)) // 2 + 1)

    @property
    def fewest(self) -> int:
        """How many members must survive for their sum to be revealed."""
        return (
            self.quorum
            if self.parameters.active
            else max(self.parameters.minimum, self.threshold if self.complete else 2)
        )

    def neighbours(self, member: int) -> tuple[int, ...]:
        """Return the members that `member` shares masks with, ascending."""
        if (known := self._beside.get(member)) is None:
            own = self.places[member]
            if self.complete:
                known = self.members[:own] + self.members[own + 1 :]
            else:
                known = tuple(self.members[place] for place in self._graph[own].tolist())
            self._beside[member] = known
        return known

    @cached_property
    def _beside(self) -> dict[int, tuple[int, ...]]:
        """The neighbours of those members that were asked for: each side asks for the same ones over and over."""
        return {}

    def place_beside(self, member: int, neighbour: int) -> int:
        """Return a neighbour's place, from 0, among the neighbours of `member`."""
        return bisect_left(self.neighbours(member), neighbour)

    def holders(self, member: int) -> tuple[int, ...]:
        """Return who holds a share of `member`'s secrets, ascending; the first share is at point 1."""
        return self.members if self.complete else self.neighbours(member)

    @cached_property
    def _graph(self) -> NDArray[np.int64]:
        """Every member's neighbours by place, ascending: (n, k)."""
        key = digest_of("graph", self.session)
        return graph.neighbours(len(self.adverts), self.degree, key)

    def connects(self, survivors: Sequence[int]) -> bool:
        """Return whether the survivors are connected by masks between them."""
        return self.complete or graph.connected(self._graph, [self.places[member] for member in survivors])


def _check_order(adverts: Sequence[Advert]) -> None:
    members = [advert.member for advert in adverts]
    if any(after <= before for before, after in itertools.pairwise(members)):
        raise SecureAggregationError("the advertisements are not in ascending order of distinct members")


def _check_distinct(adverts: Sequence[Advert]) -> None:
    seen: dict[bytes, int] = {}
    for advert in adverts:
        for value in advert.values:
            if value in seen:
                raise SecureAggregationError(
                    f"members {seen[value]} and {advert.member} advertise the same key, nonce or commitment"
                )
            seen[value] = advert.member
