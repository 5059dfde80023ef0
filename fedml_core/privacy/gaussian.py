"""The Gaussian mechanism at the server: noise on the sum of clipped updates (McMahan et al. 2018, arXiv:1710.06963).

Guarantees: noise that finds no finite bound to its left, or what changes a sum to its right, raises PrivacyError.
Guarantees: the mean is divided by a number that is fixed beforehand, and the noise is the same whoever stays away.
Trust: the server sees every update, and is trusted to add the noise and to forget the sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedml_core.checks import require_number
from fedml_core.errors import PrivacyError
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.lattice import Lattice
from fedml_core.transform import Chain, Draws, State, Transform
from fedml_core.update import Total

__all__ = ["ServerGaussian", "ServerNoise"]


@dataclass(frozen=True)
class ServerNoise:
    """What all noise on a sum has: it comes last, is calibrated to what is left of it, and fixes the denominator.

    Inherit from it before `Transform`, and define `decode` and `event`.
    Args: noise_multiplier: > 0; the noise's standard deviation over the L2 norm that one client's values may have.
        expected_cohort: > 0; what the mean to the left divides by in place of the clients that came.
        bound: that norm; `chain` fills it in.
    Raises: ConfigError: if a number is out of range.
    """

    noise_multiplier: float
    expected_cohort: float
    bound: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the numbers."""
        require_number("noise_multiplier", self.noise_multiplier, above=0)
        require_number("expected_cohort", self.expected_cohort, above=0)
        if self.bound is not None:
            require_number("bound", self.bound, above=0)

    def placed(self, left: Transform, right: Transform) -> Any:
        """Return the noise that is calibrated to the bound of what is left of it.

        Guarantees: the bound is that of `left` for any update, and replaces a number that somebody typed.
        Raises: PrivacyError: if `left` has no finite bound, or `right` could change the sum or an update.
        """
        name, bound = type(self).__name__, left.l2_bound(math.inf)
        if not 0 < bound < math.inf:
            raise PrivacyError(f"{name} has no finite bound to calibrate to; put ClipByNorm before it")
        for part in right.parts if isinstance(right, Chain) else (right,):
            kind = type(part)
            if kind.encode is not Transform.encode or kind.decode is not Transform.decode:
                raise PrivacyError(
                    f"{name} must come last: {kind.__name__} after it would change what its noise is calibrated to; "
                    f"put {kind.__name__} before the clipping"
                )
        return dataclasses.replace(self, bound=bound)

    def lattice(self, size: int) -> Lattice:
        """Return the grid that the noise is drawn on.

        Raises: PrivacyError: if the transform stands in no chain, so that nothing bounds an update.
        """
        if self.bound is None:
            raise PrivacyError(f"{type(self).__name__} has no finite bound to calibrate to; chain it after ClipByNorm")
        return Lattice.of(self.noise_multiplier, self.bound, size)

    def released(self, total: Total, values: Any) -> Total:
        """Return the total with noised values and without anything that was exact, but for the count of clients."""
        return total.replace(values=values, weight=float(self.expected_cohort), sums={}, facts={})


@dataclass(frozen=True)
class ServerGaussian(ServerNoise, Transform):
    """Independent Gaussian noise on the sum of every round, from fresh entropy.

    Guarantees: decode(sum(encode(u_i))) is the sum plus noise of standard deviation noise_multiplier x bound on every
        coordinate, up to 1 %; the noise is there for an empty cohort, too.
    Args: as `ServerNoise`.
    Source: McMahan et al. (2018), arXiv:1710.06963, Algorithm 1, with the fixed denominator of its estimator f_f.
    """

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the noised sum; `draws`, which can be reproduced, are not used."""
        noised = self.lattice(total.values.shape[-1]).noised(total.values, NoiseStream.fresh())
        return self.released(total, noised), state

    def event(self) -> Mapping[str, Any]:
        """Return the Gaussian mechanism."""
        return {"name": "gaussian", "noise_multiplier": float(self.noise_multiplier)}
