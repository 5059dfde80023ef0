"""Any strategy with lossy compression of what its clients send."""

from __future__ import annotations

from dataclasses import dataclass

from fedml_core import compression as _compressions  # noqa: F401 - makes them known by name, for configurations
from fedml_core.accumulate import Rule
from fedml_core.privacy.terms import Terms
from fedml_core.transform import Transform, chain
from strategies.strategy import Strategy


@dataclass(frozen=True)
class Compressed(Strategy):
    """A strategy whose clients compress their updates last, after weighing them.

    So TopK's memory is in weighted units: what a client still owes is added with the weight that it had. See
    `fedml_core.compression` for what is lost, and for what is not saved yet.
    Args: strategy: any. compression: `TopK` or `StochasticQuantize`. max_weight: counts instead of the inner one's.
    Example:
        >>> from fedml_core.compression import TopK
        >>> from strategies import FedAdam
        >>> Compressed(FedAdam(learning_rate=0.01), TopK(0.1)).pipeline().parts[-1]
        TopK(fraction=0.1)
    """

    strategy: Strategy
    compression: Transform

    def pipeline(self) -> Transform:
        """Return the strategy's pipeline, then the compression."""
        return chain(self.strategy.pipeline(), self.compression)

    def rule(self) -> Rule | None:
        """Return the strategy's rule."""
        return self.strategy.rule()

    def privacy(self) -> Terms | None:
        """Return the strategy's terms: what is compressed after its noise stays as private as it was."""
        return self.strategy.privacy()

    def protection(self) -> str:
        """Return the strategy's protection."""
        return self.strategy.protection()
