"""Who takes part in a secure sum, and what every session of one shares.

Guarantees: a session is neither copied nor stored, and shows who it is and how far it came, and no more.
Trust: whoever makes a session signs with its party's identity key.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.adverts import Verify, verify
from fedml_core.secagg.parameters import Parameters

__all__ = ["Party", "SecretSession", "Sign"]

Sign = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Party:
    """One who takes part in a sum.

    `roster`: the pinned identity keys by number, assistants' included; unused in semi-honest mode. `sign`: by the
    party's own identity key. `threads`: to expand masks with.
    """

    number: int
    roster: Mapping[int, bytes] = field(repr=False)
    sign: Sign = field(repr=False)
    verify: Verify = verify
    threads: int = 1


class SecretSession:
    """A party's part in one attempt at one sum, which holds secrets; `fresh` is the phase that it begins in."""

    role: ClassVar[str] = "member"

    def __init__(self, parameters: Parameters, party: Party, fresh: IntEnum) -> None:
        self.parameters = parameters
        self.phase: Any = fresh
        self.stepping = threading.Lock()
        self._number, self._roster, self._sign = party.number, party.roster, party.sign
        self._verify, self._threads = party.verify, party.threads

    def __repr__(self) -> str:
        """Return who it is and how far it came."""
        return f"{type(self).__name__}({self.role}={self._number}, phase={self.phase.name})"

    def __reduce__(self) -> Any:
        """Refuse to be pickled or copied."""
        raise SecureAggregationError("a session holds secrets and is neither copied nor stored")
