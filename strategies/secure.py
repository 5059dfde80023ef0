"""Any additive strategy over secure sums: the server learns the sum of its clients' updates, and no update."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedml_core.accumulate import Accumulator, Rule
from fedml_core.checks import require_whole
from fedml_core.errors import ConfigError, PrivacyError, SecureAggregationError, StrategyError
from fedml_core.model import ModelSpec
from fedml_core.named import Named
from fedml_core.privacy.distributed_noise import DistributedNoise, noise_in
from fedml_core.privacy.terms import Terms
from fedml_core.secagg.clip_range import ClipFromSums
from fedml_core.secagg.scalars import Count, Measure, Scalar
from fedml_core.transform import Chain, Draws, State, Transform
from fedml_core.update import Total
from fedml_core.weighting import Uniform, Weigh
from strategies.strategy import Strategy
from strategies.sum_protocols import AssistedOneShot, SecAggPlus, SumProtocol

if TYPE_CHECKING:
    from fedml_core.ring import Encoding

__all__ = ["AdaptiveRange", "AssistedOneShot", "SecAggPlus", "SecureAggregation", "SumProtocol"]

_LARGEST_METRIC = 1e4
"""What a metric, summed by an example, may be at most; beyond it, it is taken for this."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveRange(Named):
    """Widens and narrows the range of coordinates from round to round, by what the sums made public.

    Args: as `fedml_core.secagg.clip_range.ClipFromSums`.
    """

    floor: float = 1e-6
    growth: float = 2.0
    headroom: float = 4.0
    tolerated: float = 1e-4

    def __post_init__(self) -> None:
        """Check every number."""
        self.rule()

    def rule(self) -> ClipFromSums:
        """Return what computes the next range."""
        return ClipFromSums(floor=self.floor, growth=self.growth, headroom=self.headroom, tolerated=self.tolerated)


@dataclass(frozen=True)
class SecureAggregation(Strategy):
    """A strategy whose updates are summed without anybody's seeing one.

    The strategy itself runs unchanged; what it needs of each update by itself (a median, Krum) is refused. Weights,
    losses and counts travel inside the masked vector. It is no differential privacy: the sum is not hidden. Around
    `DistributedDP` it is one: clients add the noise, which brings its own ring, and report no metrics.

    Args: strategy: any whose rule is a sum. protocol: `SecAggPlus()`, or another. clip: the largest absolute coordinate
        of an update; what is larger is clipped, counted and reported. max_weight: the largest weight of one client,
        such as its examples; a larger one sends nothing. None where every client counts 1. bits: of the ring, 16, 32 or
        64. adapt: lets `clip` follow the updates. max_examples: the most examples of one client that reports count.
        draw_masks: False, in simulations only, leaves the masks out and does everything else.
    Trust: server sees only sums; see `protocol` for against whom.
    Example:
        >>> from strategies import FedAvg
        >>> SecureAggregation(FedAvg(), clip=0.5, max_weight=200).protection()
        'secure aggregation (SecAgg+, active server)'
    """

    strategy: Strategy
    protocol: SumProtocol = field(default_factory=SecAggPlus)
    clip: float = field(default=1.0, kw_only=True)
    max_weight: float | None = field(default=None, kw_only=True)  # type: ignore[assignment]  # None: everybody counts 1
    bits: int = field(default=32, kw_only=True)
    adapt: AdaptiveRange | None = field(default=None, kw_only=True)
    max_examples: int = field(default=1_000_000, kw_only=True)
    draw_masks: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        """Check that the strategy is a sum, and that the ranges are ranges."""
        name = type(self.strategy).__name__
        if isinstance(self.strategy, SecureAggregation):
            raise StrategyError("a secure sum within a secure sum protects nothing more; wrap the strategy once")
        if self.strategy.needs_single_updates:
            raise StrategyError(
                f"{name} must see every update by itself, which secure aggregation hides; use a strategy that adds up"
            )
        if not self.draw_masks and isinstance(self.protocol, AssistedOneShot):
            raise ConfigError("an assisted sum is always simulated with its masks; leave out draw_masks=False")
        require_whole("max_examples", self.max_examples, at_least=1)
        if self.max_weight is None and _weighs(self.strategy.pipeline()):
            raise ConfigError(
                f"{name} weighs its clients, so a secure sum needs max_weight: the largest weight of one client, such "
                "as its number of examples; or give it weighting=Uniform()"
            )
        noise = noise_in(self.strategy.pipeline())
        if noise is None:
            self.encoding(self.protocol.minimum, self.clip, ())
        else:
            self._require_noise(noise)

    def encoding(self, clients: int, clip: float, metrics: Sequence[str]) -> Encoding:
        """Return how the updates of at most `clients` clients become ring vectors; `metrics`: what else is summed.

        Raises: SecureAggregationError: if so many clients, or the honest ones among them, are not what noise was
            planned for.
        """
        from fedml_core.secagg.encoding import RingEncoding  # loads cryptography, which other strategies do without

        noise = noise_in(self.strategy.pipeline())
        if noise is not None:
            noised = noise.encoding()
            try:
                noised.admit(clients, self.protocol.minimum, self.protocol.corrupt(clients))
            except PrivacyError as error:
                raise SecureAggregationError(str(error)) from error
            return noised.rotated(secrets.token_hex(16))
        scalars: list[Scalar] = [
            Count(name, self.max_examples) if name == "examples" else Measure(name, _LARGEST_METRIC * self.max_examples)
            for name in metrics
        ]
        return RingEncoding(clip, clients, bits=self.bits, max_weight=self.max_weight, scalars=tuple(scalars))

    def _require_noise(self, noise: DistributedNoise) -> None:
        """Raise PrivacyError if a sum could be revealed with too little noise; ConfigError for a range of its own."""
        own = {"clip": 1.0, "bits": 32, "max_weight": None, "adapt": None}
        if given := [name for name, default in own.items() if getattr(self, name) != default]:
            raise ConfigError(
                f"{type(self.strategy).__name__} brings its own ring and range; leave out {', '.join(given)}"
            )
        noise.encoding().admit(noise.cohort_size, self.protocol.minimum, self.protocol.corrupt(noise.cohort_size))

    def require_cohort(self, fewest: int, most: int) -> None:
        """Check cohorts of so many members.

        Raises: ConfigError: if none reaches the protocol's minimum. PrivacyError: if all are beyond the noise's room.
        """
        if most < self.protocol.minimum:
            raise ConfigError(
                f"a round asks {most} members at most, and the minimum is {self.protocol.minimum}; ask more, or lower "
                "the protocol's minimum"
            )
        noise = noise_in(self.strategy.pipeline())
        if noise is not None and fewest > noise.cohort_size:
            noise.encoding().admit(fewest, self.protocol.minimum, self.protocol.corrupt(fewest))

    def pipeline(self) -> Transform:
        """Return the strategy's own."""
        return self.strategy.pipeline()

    def rule(self) -> Rule | None:
        """Return none: the sum is the rule."""
        return None

    @property
    def takes_secure_sums(self) -> bool:
        """Return that they are."""
        return True

    def client_half(self) -> Transform:
        """Return what the strategy's clients run."""
        return self.strategy.client_half() or Chain()

    def accumulator(self, spec: ModelSpec) -> Accumulator:
        """Refuse: a secure sum is taken by its protocol, not in the clear."""
        raise StrategyError(
            "a secure sum is taken by its protocol: run it with the server, with simulate(), or inside a Flower app"
        )

    def init(self, spec: ModelSpec) -> State:
        """Return the strategy's state and the range of the first round."""
        return {"inner": self.strategy.init(spec), "clip": torch.tensor(self.clip, dtype=torch.float64)}

    def told(self, state: State) -> State:
        """Return what the strategy tells its clients."""
        return self.strategy.told(state["inner"])

    def step(self, parameters: Tensor, total: Total, state: State, draws: Draws) -> tuple[Tensor, State]:
        """Return the strategy's step, and the range of the next round."""
        stepped, inner = self.strategy.step(parameters, total, state["inner"], draws)
        return stepped, {"inner": inner, "clip": self._next_clip(total, state["clip"])}

    def _next_clip(self, total: Total, clip: Tensor) -> Tensor:
        if self.adapt is None or total.count == 0 or total.weight <= 0:
            return clip
        largest = float(total.values.abs().max()) / total.weight
        clipped = total.facts.get("clipped", 0.0) / (total.count * len(total.values))
        following = self.adapt.rule().following(float(clip), largest, count=total.count, clipped_share=clipped)
        return torch.tensor(following, dtype=torch.float64)

    def protection(self) -> str:
        """Return the protocol and its mode, whether masks are drawn at all, and what the strategy adds."""
        masks, inner = "" if self.draw_masks else "; simulated without masks", self.strategy.protection()
        own = f"secure aggregation ({self.protocol.label()}{masks})"
        return own if inner == "none" else f"{own} + {inner}"

    def privacy(self) -> Terms | None:
        """Return the strategy's terms."""
        return self.strategy.privacy()


def _weighs(pipeline: Transform) -> bool:
    """Return whether some transform weighs clients by anything but 1."""
    parts = pipeline.parts if isinstance(pipeline, Chain) else (pipeline,)
    return any(isinstance(part, Weigh) and not isinstance(part.by, Uniform) for part in parts)
