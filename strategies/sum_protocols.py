"""How a secure sum is taken, as a strategy names it: the protocol, its numbers, and against whom it holds."""

from __future__ import annotations

from dataclasses import dataclass

from fedml_core.checks import require_number, require_whole
from fedml_core.errors import ConfigError, SecureAggregationError, StrategyError
from fedml_core.named import Named

__all__ = ["AssistedOneShot", "SecAggPlus", "SumProtocol"]


@dataclass(frozen=True, kw_only=True)
class SumProtocol(Named):
    """How a secure sum is taken. `minimum`: the fewest clients whose sum is revealed. `attempts`: in one round."""

    minimum: int = 3
    attempts: int = 2

    def __post_init__(self) -> None:
        """Check the numbers."""
        require_whole("minimum", self.minimum, at_least=2)
        require_whole("attempts", self.attempts, at_least=1)

    @property
    def signed(self) -> bool:
        """Return whether members sign what they send, so that a roster must say who they are."""
        return True

    def corrupt(self, members: int) -> int:
        """Return how many of `members` may collude with the server; of a protocol that does not say, all."""
        return members

    def label(self) -> str:
        """Return the protocol's name and what it holds against, as reports say it."""
        raise StrategyError(f"{type(self).__name__} must define label()")


@dataclass(frozen=True, kw_only=True)
class _Signed(SumProtocol):
    """A protocol that members sign if the server may be active, and a share of whose members may collude with it."""

    corrupt_share: float = 0.1
    active: bool = True

    def __post_init__(self) -> None:
        """Check the share."""
        super().__post_init__()
        require_number("corrupt_share", self.corrupt_share, at_least=0, below=1)

    @property
    def signed(self) -> bool:
        """Return whether the server may be active."""
        return self.active

    def corrupt(self, members: int) -> int:
        """Return the colluding share of them."""
        from fedml_core.secagg.graph import at_most  # loads cryptography, which other strategies do without

        return at_most(self.corrupt_share, members)


@dataclass(frozen=True, kw_only=True)
class SecAggPlus(_Signed):
    """Pairwise masks that cancel, on a complete graph up to 100 clients and on a sparse one above.

    Args: corrupt_share, dropout_share: the shares of a cohort that may collude with the server, and that may be lost.
        active: whether the server may deviate from the protocol; otherwise it must be trusted to follow it.
        security_bits: of the statistical security of a sparse graph.
    Trust: server sees only sums, as long as no more clients collude with it than stated.
    Source: Bonawitz et al. (2017), doi:10.1145/3133956.3133982; Bell et al. (2020), doi:10.1145/3372297.3417885.
    """

    dropout_share: float = 0.1
    security_bits: int = 60

    def __post_init__(self) -> None:
        """Check the share and the bits."""
        super().__post_init__()
        require_number("dropout_share", self.dropout_share, at_least=0, below=1)
        require_whole("security_bits", self.security_bits, at_least=20, at_most=100)

    def label(self) -> str:
        """Return the mode."""
        return "SecAgg+, active server" if self.active else "SecAgg+, semi-honest server"


@dataclass(frozen=True, kw_only=True)
class AssistedOneShot(_Signed):
    """Each client sends one message and is done; assistants take the masks off the sum.

    Args: assistants: their client numbers, 2 to 7; they may be in the cohort, too. threshold: how many of them may
        show the server all that they have. lying: how many of those may also sign what they like. active: whether the
        server may deviate from the protocol; otherwise it must be trusted to follow it. each: how many assistants are
        asked for the same masks; with 2, their answers are compared. corrupt_share: of the contributors, for sites that
        ask how many honest ones are in a sum, and for noise; masks hold whatever it is.
    Trust: server sees only sums, as long as no more than `threshold` assistants collude with it.
    Source: Behnia et al. (2024), arXiv:2304.03841, with replicated roots: docs/secure-aggregation.md.
    Example:
        >>> AssistedOneShot(assistants=(4, 0, 2)).assistants
        (0, 2, 4)
    """

    assistants: tuple[int, ...]
    threshold: int = 1
    lying: int = 0
    each: int = 1

    def __post_init__(self) -> None:
        """Put the assistants in order, and check every number."""
        super().__post_init__()
        from fedml_core.secagg.assistance import Assistance  # loads cryptography, which other strategies do without

        require_whole("each", self.each, at_least=1, at_most=2)
        if not isinstance(self.assistants, tuple | list):
            raise ConfigError(f"assistants must be a list of client numbers, got {self.assistants!r:.40}")
        numbers = tuple(self.assistants)
        if all(type(number) is int for number in numbers):
            numbers = tuple(sorted(numbers))
        try:
            named = Assistance(numbers, self.threshold, self.lying)
        except SecureAggregationError as error:
            raise ConfigError(f"AssistedOneShot: {error}") from error
        object.__setattr__(self, "assistants", named.assistants)

    def label(self) -> str:
        """Return the mode."""
        return "assisted, active server" if self.active else "assisted, semi-honest server"
