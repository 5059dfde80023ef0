"""What a strategy says about its protection, so that whoever runs rounds can account for them and reports can say it.

Guarantees: a delta outside (0, 1), and a unit or adjacency that no accountant knows, are refused.
Trust: terms are public; they repeat what the strategy was constructed with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedml_core.checks import require_number, require_whole
from fedml_core.errors import ConfigError
from fedml_core.privacy.events import ADJACENCIES, UNITS

__all__ = ["Terms", "epsilon_text"]


def epsilon_text(epsilon: float) -> str:
    """Return an epsilon with four decimals, the last of them rounded up: what is printed is never below the cost.

    Guarantees: the number that is printed is at least `epsilon`.
    Trust: none is needed; it computes on what it is given.

    Example:
        >>> epsilon_text(2.95361)
        '2.9537'
    """
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}" if math.isfinite(epsilon) else "infinity"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms on which a strategy's epsilon is claimed.

    Args: delta: in (0, 1). unit: "client" or "example". adjacency: where the mechanism allows one alone; None leaves it
        to the sampling. secret_cohort: whether those whom the noise protects from do not see who takes part, so that
        sampling may amplify. server_noise: whether the server adds the noise, to an empty round's sum, too.
        separation: the fewest rounds from one participation of a client to its next. rounds: where one event covers all
        rounds of a run, how many; None where each round is an event.
    """

    delta: float
    unit: str = "client"
    adjacency: str | None = None
    secret_cohort: bool = True
    server_noise: bool = True
    separation: int = 1
    rounds: int | None = None

    def __post_init__(self) -> None:
        """Check every term."""
        require_number("delta", self.delta, above=0, below=1)
        require_whole("separation", self.separation, at_least=1)
        if self.rounds is not None:
            require_whole("rounds", self.rounds, at_least=1)
        if self.unit not in UNITS or self.adjacency not in (None, *ADJACENCIES):
            raise ConfigError(
                f"unit must be one of {', '.join(UNITS)} and adjacency one of {', '.join(ADJACENCIES)}, "
                f"got {self.unit!r} and {self.adjacency!r}"
            )

    def adjacent(self, sampled: str) -> str:
        """Return how neighbours differ: as the mechanism says, or where it allows several, as the sampling does."""
        return self.adjacency or sampled
