"""Differential privacy for any additive strategy: noise at the server (CentralDP) or at each client (LocalDP)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fedml_core.accumulate import Accumulator
from fedml_core.checks import require_number
from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.model import ModelSpec
from fedml_core.privacy.adaptive_clip import ClipRule
from fedml_core.privacy.analytic import analytic_gaussian_sigma
from fedml_core.privacy.clipping import BoundedSum, ClipByNorm
from fedml_core.privacy.correlated import Noise
from fedml_core.privacy.gaussian import ServerGaussian
from fedml_core.privacy.local import LocalGaussian
from fedml_core.privacy.terms import Terms
from fedml_core.transform import Chain, Draws, State, Transform, chain
from fedml_core.update import Total
from fedml_core.weighting import Uniform, Weigh
from strategies.strategy import Strategy

__all__ = ["CentralDP", "LocalDP"]


@dataclass(frozen=True)
class CentralDP(Strategy):
    """A strategy whose every released model is differentially private towards whole clients (DP-FedAvg and its kin).

    Clients clip; the server adds noise to the sum, divides by a number fixed beforehand, and goes on as the strategy
    does. An empty round is noised and released as well: that nobody came must not show. With secret Poisson sampling
    (`PoissonSampling`) a round costs less; with others it costs what they can prove; see the report's `privacy`.

    Metrics that clients report are summed exactly. They are for the server's eyes, and epsilon does not cover them.
    Args: strategy: any that adds updates up and weighs clients alike: `FedAvg(weighting=Uniform())`. clip_norm: the
        longest update, in parameter units, or `AdaptiveClip()`. noise_multiplier: > 0, noise over clip norm.
        expected_cohort: > 0, the clients of a round on average: rate x population for Poisson sampling. delta: in
        (0, 1), well below 1 / population. noise: None for fresh noise each round, or `TreeNoise(rounds=...)` or
        `BandedNoise(rounds=..., bands=...)`, which need `MinimumSeparation` instead of secret sampling.
    Raises: PrivacyError: if the strategy cannot be protected so; it says why.
    Trust: server sees every update, and is trusted to add the noise; clients and the world see models that are private.
    Source: McMahan et al. (2018), arXiv:1710.06963.
    """

    strategy: Strategy
    clip_norm: float | ClipRule
    noise_multiplier: float
    expected_cohort: float
    delta: float
    noise: Noise | None = None

    def __post_init__(self) -> None:
        """Check what is wrapped, and every number."""
        _require_additive(self, self.strategy)
        if not isinstance(self.clip_norm, ClipRule):
            require_number("clip_norm", self.clip_norm, at_least=1e-12, at_most=1e12)
        if self.noise is not None and not isinstance(self.noise, Noise):
            raise ConfigError(f"noise must be TreeNoise, BandedNoise or None, got {self.noise!r}")
        self.privacy()
        super().__post_init__()

    @property
    def needs_single_updates(self) -> bool:
        """Return that it does: the server measures each update once more before its noise is relied on."""
        return True

    def pipeline(self) -> Transform:
        """Return the strategy's pipeline, then clipping, then noise."""
        z, cohort = self.noise_multiplier, self.expected_cohort
        noise: Transform = ServerGaussian(z, cohort) if self.noise is None else self.noise.transform(z, cohort)
        rule = self.clip_norm
        clip = rule.transform(z, cohort) if isinstance(rule, ClipRule) else ClipByNorm(rule)
        return chain(self.strategy.pipeline(), clip, noise)

    def accumulator(self, spec: ModelSpec) -> Accumulator:
        """Return a sum that measures each update."""
        pipeline = self.pipeline()
        return BoundedSum(pipeline.encoded_size(spec.size), self.max_weight, pipeline.l2_bound(math.inf))

    def privacy(self) -> Terms:
        """Return the terms: clients as units, and what correlated noise asks of the sampling."""
        if self.noise is None:
            return Terms(delta=self.delta)
        adjacency, apart = "replace-special", self.noise.apart
        return Terms(
            delta=self.delta, adjacency=adjacency, secret_cohort=False, separation=apart, rounds=self.noise.rounds
        )

    def protection(self) -> str:
        """Return who must be trusted, and how much noise there is."""
        noise = "" if self.noise is None else f", {type(self.noise).__name__}"
        return (
            f"central DP (client level, noise multiplier {self.noise_multiplier:g}{noise}; "
            "the server sees every update and is trusted)"
        )

    def step(self, parameters: Tensor, total: Total, state: State, draws: Draws) -> tuple[Tensor, State]:
        """Return the noised step; whoever came, the strategy sees the expected cohort and no exact number."""
        cohort = max(1, round(self.expected_cohort))
        hidden = total.replace(weight=float(self.expected_cohort), count=cohort, sums={}, facts={})
        return super().step(parameters, hidden, state, draws)


@dataclass(frozen=True)
class LocalDP(Strategy):
    """A strategy whose clients noise their own updates, so that nobody need be trusted.

    The price is high: with n clients the mean carries noise of sd / sqrt(n) on every one of d coordinates, while the
    mean update itself is no longer than clip_norm. `protection()` says both numbers.
    Args: strategy: any that adds updates up and weighs clients alike: `FedAvg(weighting=Uniform())`. clip_norm: the
        longest update, in parameter units. epsilon, delta: of one client's one update, replaced by any other.
    Raises: PrivacyError: if the strategy cannot be protected so; it says why.
    Trust: server sees noised updates, and who takes part; nobody else sees more.
    Source: Balle and Wang (2018), arXiv:1805.06530.
    """

    strategy: Strategy
    clip_norm: float
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        """Check what is wrapped, and every number."""
        _require_additive(self, self.strategy)
        require_number("clip_norm", self.clip_norm, at_least=1e-12, at_most=1e12)
        self.privacy()
        super().__post_init__()

    @property
    def noise_multiplier(self) -> float:
        """The noise's standard deviation over the clip norm; two clipped updates are up to 2 clip norms apart."""
        return analytic_gaussian_sigma(self.epsilon, self.delta, 2.0)

    def pipeline(self) -> Transform:
        """Return the strategy's pipeline, then noise at the client."""
        return chain(self.strategy.pipeline(), LocalGaussian(self.clip_norm, self.noise_multiplier))

    def privacy(self) -> Terms:
        """Return the terms: replace-one, without amplification, since the server sees who takes part."""
        return Terms(delta=self.delta, adjacency="replace-one", secret_cohort=False, server_noise=False)

    def protection(self) -> str:
        """Return how much noise every coordinate of every update carries."""
        return (
            f"local DP (epsilon {self.epsilon:g} at delta {self.delta:g} for each update; noise of "
            f"{self.noise_multiplier * self.clip_norm:.3g} on every coordinate, {self.noise_multiplier:.3g} times the "
            "longest whole update; nobody is trusted)"
        )


def _require_additive(private: Strategy, strategy: Strategy) -> None:
    """Refuse strategies whose step noise on a sum does not protect."""
    name, wrapper = type(strategy).__name__, type(private).__name__
    if not isinstance(strategy, Strategy):
        raise ConfigError(f"{wrapper} wraps a strategy, got {strategy!r}")
    if strategy.privacy() is not None:
        raise PrivacyError(f"{name} is private already; {wrapper} around it would be accounted for twice, and wrongly")
    if strategy.needs_single_updates:
        raise PrivacyError(f"{name} does not add updates up, so noise on the sum does not protect; use one that does")
    for part in _parts(strategy.pipeline()):
        if isinstance(part, Weigh) and not isinstance(part.by, Uniform):
            raise PrivacyError(
                f"{name} weighs clients by {type(part.by).__name__}, so one client could count for many; "
                "give it weighting=Uniform()"
            )


def _parts(pipeline: Transform) -> tuple[Transform, ...]:
    return pipeline.parts if isinstance(pipeline, Chain) else (pipeline,)
