"""Differential privacy without a trusted server: each client adds a share of the noise, and the server sees the sum."""

from __future__ import annotations

from dataclasses import dataclass

from fedml_core.accumulate import Accumulator
from fedml_core.checks import require_number
from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.model import ModelSpec
from fedml_core.privacy.clipping import ClipByNorm
from fedml_core.privacy.distributed_noise import DistributedNoise
from fedml_core.privacy.integer_noise import GaussianIntegers, IntegerNoise
from fedml_core.privacy.terms import Terms
from fedml_core.transform import Chain, Transform, chain
from fedml_core.weighting import Uniform, Weigh
from strategies.strategy import Strategy

__all__ = ["DistributedDP"]


@dataclass(frozen=True)
class DistributedDP(Strategy):
    """A strategy for secure sums whose clients add so little noise each that only their sum is private.

    Wrap it: `SecureAggregation(DistributedDP(...), SecAggPlus(minimum=...))`; anything else refuses it. Each client
    clips its update, rotates it by random signs and a Hadamard matrix, rounds it at random to integers and adds integer
    noise. A sum is revealed only if it holds the noise of `honest` clients that keep theirs secret, so dropouts never
    lower the noise; more clients only add to it. The server sees who takes part, so that sampling amplifies nothing.

    Clients report no metrics: an exact sum of losses or of examples would tell what the noise hides.
    Args: strategy: any whose rule is a sum and which weighs its clients alike: `FedAvg(weighting=Uniform())`.
        clip_norm: the longest update, in parameter units. noise_multiplier: > 0, the noise of `honest` clients over
        clip_norm. delta: in (0, 1), well below 1 / population. size: of the model, `ModelSpec.size`. cohort_size: the
        most clients in a round, and what the mean is divided by. honest: the fewest clients in a revealed sum that do
        not collude: at most the protocol's minimum less corrupt_share of the cohort. bits: of a coordinate's sum: 16
        takes 2 bytes of upload for each coordinate, 20 takes 2 2/3, 32 takes 4; 16 cost about 1 % of epsilon for 1,000
        clients of a million parameters, and more above. noise: `GaussianIntegers()` or `SkellamIntegers()`.
    Raises: PrivacyError: if the strategy cannot be protected so. ConfigError: if a number is out of range, or the bits
        are too few for the cohort.
    Trust: server sees only noised sums; it and the clients that collude with it, as many as `honest` leaves room for,
        may do what they like.
    Source: Kairouz, Liu and Steinke (2021), arXiv:2102.06387; Agarwal, Kairouz and Liu (2021), arXiv:2110.04995.
    """

    strategy: Strategy
    clip_norm: float
    noise_multiplier: float
    delta: float
    size: int
    cohort_size: int
    honest: int
    bits: int = 16
    noise: IntegerNoise = GaussianIntegers()

    def __post_init__(self) -> None:
        """Check what is wrapped, and that all numbers fit together."""
        _require_equal_voices(self.strategy)
        require_number("clip_norm", self.clip_norm, at_least=1e-9, at_most=1e9)
        self.privacy()
        self.pipeline().event()
        super().__post_init__()

    def pipeline(self) -> Transform:
        """Return the strategy's pipeline, then clipping, then the clients' noise."""
        noise = DistributedNoise(self.noise_multiplier, self.size, self.cohort_size, self.honest, self.bits, self.noise)
        return chain(self.strategy.pipeline(), ClipByNorm(self.clip_norm), noise)

    def accumulator(self, spec: ModelSpec) -> Accumulator:
        """Refuse: in the clear, the server would see updates with next to no noise."""
        share = self.noise_multiplier * self.clip_norm / self.honest**0.5
        raise PrivacyError(
            f"under DistributedDP each client adds noise of {share:.3g} alone, which protects nobody; wrap it: "
            "SecureAggregation(DistributedDP(...))"
        )

    def privacy(self) -> Terms:
        """Return the terms: a client's update or an empty one, whoever sees who takes part."""
        return Terms(delta=self.delta, adjacency="replace-special", secret_cohort=False, server_noise=False)

    def protection(self) -> str:
        """Return how much noise there is, and from how many."""
        return (
            f"distributed DP (client level, {type(self.noise).__name__}, noise multiplier {self.noise_multiplier:g} "
            f"from any {self.honest} honest clients, {self.bits}-bit sums)"
        )


def _require_equal_voices(strategy: Strategy) -> None:
    """Refuse strategies whose sum is not one that noise protects."""
    if not isinstance(strategy, Strategy):
        raise ConfigError(f"DistributedDP wraps a strategy, got {strategy!r:.80}")
    name = type(strategy).__name__
    if strategy.takes_secure_sums:
        raise PrivacyError(f"the noise belongs inside the secure sum: {name}(DistributedDP(...)), not the other way")
    if strategy.privacy() is not None:
        raise PrivacyError(f"{name} is private already; DistributedDP around it would be accounted for twice")
    if strategy.needs_single_updates:
        raise PrivacyError(f"{name} does not add updates up, so noise on the sum does not protect; use one that does")
    pipeline = strategy.pipeline()
    for part in pipeline.parts if isinstance(pipeline, Chain) else (pipeline,):
        if isinstance(part, Weigh) and not isinstance(part.by, Uniform):
            raise PrivacyError(
                f"{name} weighs clients by {type(part.by).__name__}, so one client could count for many; "
                "give it weighting=Uniform()"
            )
