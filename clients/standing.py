"""Who a client is in secure sums: its number and key, the roster that it pins, its counter and its floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedml_core.binding import binding_of
from fedml_core.messages import Assignment
from fedml_core.secagg.assisted import Panel
from fedml_core.secagg.bulletin import Bulletin, Verify, verify
from fedml_core.secagg.client import ClientSession
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.party import Party, Sign
from fedml_core.secagg.unmasked import UnmaskedClientSession

__all__ = ["Counter", "Floor", "Session", "Standing"]

Session = ClientSession | UnmaskedClientSession
ReadBulletin = Callable[[Parameters, bytes, Mapping[int, bytes], Verify], Bulletin]
ReadPanel = Callable[[Parameters, bytes, Mapping[int, bytes], Verify], Panel]


class Counter(Protocol):
    """Remembers, on disk, the last attempt that this client took part in."""

    def advance(self, run: str, round_number: int, attempt: int) -> None:
        """Raise RefusalError unless the attempt is newer than every one before; return when that is on disk."""
        ...


class Floor(Protocol):
    """The site's own minimum for a cohort; see `clients.secure_policy`."""

    def check(self, parameters: Parameters) -> None:
        """Raise RefusalError if the parameters ask for less."""
        ...

    def check_attempts(self, round_number: int, attempts: int) -> None:
        """Raise RefusalError if a round is tried for so many times."""
        ...

    def check_members(self, members: int, threshold: int) -> None:
        """Raise RefusalError if so many members with such a threshold are too few."""
        ...

    def check_assistants(self, assistants: Sequence[int]) -> None:
        """Raise RefusalError if one of them may not assist in a sum of this site's updates."""
        ...


@dataclass(frozen=True)
class Standing:
    """Who this client is to the others, and what it insists on.

    `roster`: the pinned identity keys by member; `digest`: of the roster. `sign`: with its own identity key.
    `read_bulletin`, `bind`, `verify`: `Bulletin.read`, `binding_of` and `verify`, or what remembers their results.
    `read_panel`: `Panel.read`, likewise.
    `open_session`: makes a session; only simulations have another than `ClientSession`.
    """

    member: int
    roster: Mapping[int, bytes] = field(repr=False)
    digest: str
    sign: Sign = field(repr=False)
    counter: Counter
    floor: Floor
    verify: Verify = verify
    threads: int = 1
    read_bulletin: ReadBulletin = Bulletin.read
    read_panel: ReadPanel = Panel.read
    bind: Callable[[Assignment], bytes] = binding_of
    open_session: Callable[..., Session] = ClientSession

    @property
    def party(self) -> Party:
        """Return who this client is to its sessions."""
        return Party(self.member, self.roster, self.sign, self.verify, self.threads)
