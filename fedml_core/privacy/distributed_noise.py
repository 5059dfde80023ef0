"""Noise that clients add together under secure aggregation, as the last transform of a pipeline.

Its client half encodes nothing: integers modulo a ring are no update. It is `NoisedEncoding`, which stands where
secure aggregation turns updates into ring vectors; this transform says which one and what it costs, to the server and
to sites, and checks that the sum came that way.

Guarantees: noise without a finite bound to its left, or with what changes the sum to its right, raises PrivacyError.
Guarantees: a sum of updates that carries less noise than this raises PrivacyError and goes no further.
Trust: server sees only noised sums.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.model import ModelSpec
from fedml_core.privacy.integer_noise import GaussianIntegers, IntegerNoise
from fedml_core.transform import Chain, Draws, State, Transform
from fedml_core.update import Total

if TYPE_CHECKING:
    from fedml_core.privacy.noised_encoding import NoisedEncoding

__all__ = ["DistributedNoise", "noise_in"]

_SLACK = 1 - 1e-9


@dataclass(frozen=True)
class DistributedNoise(Transform):
    """Integer noise from every client, of which `honest` clients' together has the deviation noise_multiplier x bound.

    Guarantees: the mean is divided by `cohort_size`, whoever stays away.
    Args: noise_multiplier, size, cohort_size, honest, bits, noise: as `strategies.DistributedDP`. bound: the L2 norm
        that one client's values may have; `chain` fills it in.
    """

    noise_multiplier: float
    size: int
    cohort_size: int
    honest: int
    bits: int = 16
    noise: IntegerNoise = GaussianIntegers()
    bound: float | None = field(default=None, kw_only=True)

    def init(self, spec: ModelSpec) -> State:
        """Return no state, for a model of the planned size.

        Raises: ConfigError: for another.
        """
        if spec.size != self.size:
            raise ConfigError(
                f"the noise was planned for {self.size} values and the model has {spec.size}; set size={spec.size}"
            )
        return {}

    def placed(self, left: Transform, right: Transform) -> Self:
        """Return the noise that is calibrated to the bound of what is left of it.

        Raises: PrivacyError: if that has no finite bound, or changes the length, or anything is right of it.
        """
        bound = left.l2_bound(math.inf)
        if not 0 < bound < math.inf:
            raise PrivacyError("DistributedNoise has no finite bound to calibrate to; put ClipByNorm before it")
        if left.encoded_size(self.size) != self.size:
            raise PrivacyError("DistributedNoise adds up plain updates; what is before it makes them longer or shorter")
        for part in right.parts if isinstance(right, Chain) else (right,):
            kind = type(part)
            if kind.encode is not Transform.encode or kind.decode is not Transform.decode:
                raise PrivacyError(
                    f"DistributedNoise must come last: {kind.__name__} after it would change what its noise is "
                    f"calibrated to; put {kind.__name__} before the clipping"
                )
        return dataclasses.replace(self, bound=bound)

    def encoding(self) -> NoisedEncoding:
        """Return how clients encode their updates for this sum.

        Raises: PrivacyError: if the transform stands in no chain. ConfigError: if the numbers do not fit together.
        """
        from fedml_core.privacy.noised_encoding import NoisedEncoding  # loads cryptography, which few runs need

        if self.bound is None:
            raise PrivacyError("DistributedNoise has no finite bound to calibrate to; chain it after ClipByNorm")
        return NoisedEncoding(
            self.size,
            self.cohort_size,
            self.honest,
            float(self.bound),
            float(self.noise_multiplier),
            sum_bits=self.bits,
            noise=self.noise,
        )

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the sum, to be divided by the cohort's size, once it is certain that it carries the noise."""
        wanted = self.noise_multiplier * (self.bound if self.bound is not None else math.inf)
        if total.count > 0 and not total.facts.get("noise", 0.0) >= wanted * _SLACK:
            raise PrivacyError(
                "the sum came without its clients' noise, and was not used; distributed DP needs SecureAggregation"
            )
        return total.replace(weight=float(self.cohort_size), sums={}), state

    def event(self) -> Mapping[str, Any]:
        """Return the sum of integer noises, as `NoisedEncoding.event`."""
        return self.encoding().event()

    def client_half(self) -> Transform:
        """Return the transform itself: it tells a site what its noise is part of."""
        return self


def noise_in(pipeline: Transform) -> DistributedNoise | None:
    """Return the distributed noise of a pipeline, or None.

    Raises: PrivacyError: if there is more than one: a sum carries one noise.
    """
    found = list(_noises(pipeline))
    if len(found) > 1:
        raise PrivacyError(f"a sum carries one noise, and the pipeline names {len(found)}; leave one")
    return found[0] if found else None


def _noises(pipeline: Transform) -> Iterator[DistributedNoise]:
    if isinstance(pipeline, DistributedNoise):
        yield pipeline
    elif isinstance(pipeline, Chain):
        for part in pipeline.parts:
            yield from _noises(part)
