"""FedProx's proximal term (Li et al. 2020, arXiv:1812.06127): training that is drawn back to where it started."""

from __future__ import annotations

from dataclasses import dataclass

from fedml_core.checks import require_number
from fedml_core.transform import Guide, State, Transform


@dataclass(frozen=True)
class Proximal(Transform):
    """Adds mu/2 |w - w_start|² to each client's loss; updates pass unchanged.

    Args: mu: >= 0; 0 is plain descent.
    Source: Li et al. (2020), arXiv:1812.06127, Algorithm 2.
    Example:
        >>> Proximal(0.1).guide({}, {})
        Guide(mu=0.1, offset=None)
    """

    mu: float

    def __post_init__(self) -> None:
        """Check mu."""
        require_number("mu", self.mu, at_least=0)

    def guide(self, told: State, memory: State) -> Guide:
        """Return the guide whose gradient is mu (w - w_start)."""
        return Guide(mu=self.mu)
