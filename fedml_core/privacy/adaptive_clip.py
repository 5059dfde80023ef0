"""Clipping to a quantile of the clients' own norms, which the rounds estimate under the same noise.

Andrew, Thakkar, McMahan and Ramaswamy (2021), arXiv:1905.03871. Each client scales its update by the norm C that the
server tells, and appends one coordinate: s/2 if it was not clipped, -s/2 if it was. The noise covers all coordinates
alike, so that the counter is noised whoever takes the sum, secure aggregation included, and one Gaussian mechanism
accounts for both.

Guarantees: each encoded update's L2 norm is at most sqrt(1 + s^2 / 4), in every round, whatever C has become.
Guarantees: C shrinks where too many updates are shorter than it, and grows where too many are clipped.
Trust: the server sees each client's bit where it sees each update; what C tells of clients carries noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedml_core.checks import require_number
from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.model import ModelSpec
from fedml_core.named import Named
from fedml_core.privacy.clipping import clipped
from fedml_core.transform import Draws, State, Transform
from fedml_core.update import Total, Update

__all__ = ["AdaptiveClip", "ClipByQuantile", "ClipRule", "noise_beside_counter"]

_INWARDS = 1 - 2.0**-22  # more than rounding to float32 can lengthen a row
_SHORTEST, _LONGEST = 1e-9, 1e9


@dataclass(frozen=True)
class ClipRule(Named):
    """The base of what may stand for a clip norm."""

    def transform(self, noise_multiplier: float, expected_cohort: float) -> Transform:
        """Return the transform that clips, under noise of this multiplier."""
        raise ConfigError(f"{type(self).__name__} must define transform(noise_multiplier, expected_cohort)")


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip(ClipRule):
    """Let the clip norm follow a quantile of the clients' norms.

    Guarantees: updates and counter together cost what noise_multiplier alone costs.
    Args: initial: > 0, the first round's norm, in parameter units. quantile: in (0, 1), the share of clients that shall
        not be clipped. learning_rate: > 0; a round changes the logarithm of the norm by at most about this.
        counter_noise: > 0, the standard deviation of the noise on the count of clients that were not clipped; None for
        a twentieth of the expected cohort.
    Raises: ConfigError: if a number is out of range. PrivacyError: in `transform`, if the counter's noise is so small
        that the counter alone would cost more than noise_multiplier allows.
    """

    initial: float = 0.1
    quantile: float = 0.5
    learning_rate: float = 0.2
    counter_noise: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        require_number("initial", self.initial, at_least=_SHORTEST, at_most=_LONGEST)
        require_number("quantile", self.quantile, above=0, below=1)
        require_number("learning_rate", self.learning_rate, above=0)
        if self.counter_noise is not None:
            require_number("counter_noise", self.counter_noise, above=0)

    def transform(self, noise_multiplier: float, expected_cohort: float) -> Transform:
        """Return the transform that clips, its counter scaled for noise of this multiplier on both."""
        counter_noise = expected_cohort / 20 if self.counter_noise is None else self.counter_noise
        scale = noise_beside_counter(noise_multiplier, counter_noise) / counter_noise
        return ClipByQuantile(self.initial, self.quantile, self.learning_rate, scale, expected_cohort)


@dataclass(frozen=True)
class ClipByQuantile(Transform):
    """Scales updates to a norm of at most 1 with a counter beside them, and follows the quantile.

    Guarantees: decode(sum(encode(u_i))) is the sum of the updates, each clipped to C, in parameter units.
    Args: initial, quantile, learning_rate: as `AdaptiveClip`. counter_scale: s > 0. expected_cohort: > 0, by which the
        count is divided, whoever came; clients that stay away count as half.
    Source: Andrew et al. (2021), arXiv:1905.03871, Algorithm 1.
    """

    initial: float
    quantile: float
    learning_rate: float
    counter_scale: float
    expected_cohort: float

    def __post_init__(self) -> None:
        """Check the numbers."""
        AdaptiveClip(initial=self.initial, quantile=self.quantile, learning_rate=self.learning_rate)
        require_number("counter_scale", self.counter_scale, above=0)
        require_number("expected_cohort", self.expected_cohort, above=0)

    def init(self, spec: ModelSpec) -> State:
        """Return the first norm."""
        return {"clip_norm": torch.tensor(self.initial, dtype=torch.float64)}

    def told(self, state: State) -> State:
        """Return the norm: earlier rounds' noised counts made it, so it may be known."""
        return {"clip_norm": state["clip_norm"]}

    def encoded_size(self, size: int) -> int:
        """Return one more, for the counter."""
        return size + 1

    def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
        """Return the scaled update and its counter; NaN as a whole, where anything is not finite."""
        clip_norm = float(told["clip_norm"])
        unit, norms = clipped(update.values.double() * (_INWARDS / clip_norm), 1.0)
        kept = torch.where(norms <= 1.0, 0.5, -0.5).to(norms) + 0.0 * norms
        counter = (kept * (self.counter_scale * _INWARDS)).unsqueeze(-1)
        return update.replace(values=torch.cat([unit, counter], dim=-1).to(update.values.dtype)), memory

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the sum in parameter units, and the next round's norm."""
        clip_norm = float(state["clip_norm"])
        counted = float(total.values[-1]) / (self.counter_scale * _INWARDS * self.expected_cohort)
        excess = counted + 0.5 - self.quantile
        following = clip_norm * math.exp(min(max(-self.learning_rate * excess, -50.0), 50.0))
        following = min(max(following, _SHORTEST), _LONGEST)
        values = (total.values[:-1].double() * (clip_norm / _INWARDS)).float()
        return total.replace(values=values), {"clip_norm": torch.tensor(following, dtype=torch.float64)}

    def l2_bound(self, incoming: float) -> float:
        """Return the norm of a clipped update with its counter."""
        return math.hypot(1.0, self.counter_scale / 2)


def noise_beside_counter(noise_multiplier: float, counter_noise: float) -> float:
    """Return the noise multiplier z_delta of the updates that, with the counter, costs `noise_multiplier`.

    Guarantees: z_delta^-2 + (2 counter_noise)^-2 = noise_multiplier^-2.
    A bit is +-1/2, so one client moves the count by 1/2 at most.
    Raises: PrivacyError: if the counter's noise leaves nothing for the updates.
    Example:
        >>> round(noise_beside_counter(1.0, 100 / 20), 6)
        1.005038
    """
    share = noise_multiplier / (2 * counter_noise)
    if not share < 1:
        raise PrivacyError(
            f"counter_noise must be > {noise_multiplier / 2:g} for noise_multiplier {noise_multiplier:g}, got "
            f"{counter_noise:g}; by default it is a twentieth of the expected cohort, so ask more clients, or name it"
        )
    return noise_multiplier / math.sqrt((1 - share) * (1 + share))
