"""The mechanism by itself: whether clipping bounds what it says, and whether the noise of a release is all there.

A replica of the server's step is run many times on an empty sum. What it releases is compared with what the same
pipeline would release if its noise were what the accountant was told: same scale, same shape, fresh every time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.errors import FedveilError
from fedml_core.model import ModelSpec
from fedml_core.privacy.goodness import noise_against, unrelated_p
from fedml_core.randomness import seeded
from fedml_core.transform import Chain, Draws, State, Transform
from fedml_core.update import Total, Update
from simulations.audit.correlated_noise import CORRELATED, unmixed_noise
from simulations.audit.findings import REJECT, Finding, Verdict
from strategies.strategy import Strategy

__all__ = ["Residuals", "check_bound", "check_noise", "draws_for", "judge_noise"]

_NUMBERS = 40_000  # measured in all: a scale that is wrong by 5 % shows
_MOST_DRAWS, _FEWEST_DRAWS = 64, 3
_SLACK = 1e-5
_LENGTHS = (0.0, 1e-3, 1.0, 1e3, 1e6)
_SERVER, _CLIENT = "gaussian", "analytic-gaussian-local"
_SHARED = ("discrete-gaussian-sum", "skellam-sum")


@dataclass(frozen=True)
class Residuals:
    """Noise as it was measured and as it should be, (draws, d) each."""

    measured: NDArray[np.float64] = field(repr=False)
    reference: NDArray[np.float64] = field(repr=False)


def check_bound(strategy: Strategy, spec: ModelSpec, template: Update, seed: int) -> Finding:
    """Return whether encoded updates are as short as the noise relies on, for updates of every length."""
    what, parts = "clipping", _parts(strategy)
    noisy = next((place for place, part in enumerate(parts) if _kind(part)), None)
    if noisy is None:
        return Finding(what, Verdict.INFO, "no noise relies on a bound")
    bounded = Chain(parts[:noisy])
    bound = _bound(parts, noisy)
    if _kind(parts[noisy]) not in (_SERVER, *CORRELATED):
        return Finding(what, Verdict.INFO, "clients clip and noise in one step; canaries are longer than the bound")
    half = bounded.client_half() or Chain()
    told, memory = bounded.told(bounded.init(spec)), bounded.memory(spec)
    drawn = torch.from_numpy(seeded(seed, "bound").standard_normal(spec.size)).float()
    longest = 0.0
    for length in _LENGTHS:
        values = drawn / drawn.norm() * length
        encoded, _ = half.encode(template.replace(values=values), told, memory, Draws.of(seed, "bound"))
        longest = max(longest, float(encoded.values.double().norm()))
    numbers = {"bound": bound, "longest": longest}
    if not longest <= bound * (1 + _SLACK):
        said = f"an update of norm {longest:.4g} passes where the noise relies on {bound:.4g}"
        return Finding(what, Verdict.FAIL, said, numbers)
    return Finding(what, Verdict.PASS, f"no encoded update is longer than {bound:.4g}", numbers)


def check_noise(strategy: Strategy, spec: ModelSpec, parameters: Tensor, seed: int) -> tuple[Finding, Residuals | None]:
    """Return whether a release carries the noise that the accountant was told, and what was measured."""
    what, parts = "noise", _parts(strategy)
    place = next((place for place, part in enumerate(parts) if _kind(part)), None)
    if place is None:
        claims = strategy.pipeline().event() is not None
        return _unmeasured() if claims else Finding(what, Verdict.INFO, "no noise is claimed"), None
    try:
        found = _measured(strategy, place, spec, parameters, seed)
    except FedveilError as error:
        return Finding(what, Verdict.FAIL, f"a replica of the release failed: {error}"), None
    if found is None:
        return _unmeasured(), None
    return judge_noise(what, found, fresh=_kind(parts[place]) in CORRELATED), found


def judge_noise(
    what: str, found: Residuals, *, fresh: bool = False, more: Mapping[str, float] | None = None
) -> Finding:
    """Return whether noise is as it should be.

    Args: fresh: whether rows must be alike and unrelated, as rounds that were unmixed. more: further p-values, by what
        they test.
    """
    test = noise_against(found.measured, found.reference)
    others = {**(more or {}), **({"rounds": unrelated_p(found.measured)} if fresh and test.ratio > 0 else {})}
    p_value = min(1.0, (1 + len(others)) * min(test.p_value, *others.values(), 1.0))
    numbers = {
        "configured_sd": float(found.reference.std()),
        "measured_sd": float(np.sqrt((found.measured**2).mean())),
        **dataclasses.asdict(test),
        **others,
        "p_value": p_value,
        "draws": len(found.measured),
    }
    if p_value < REJECT:
        flaw = _flaw(test.ratio, {**dataclasses.asdict(test), **others})
        return Finding(what, Verdict.FAIL, f"the noise is not what was claimed: {flaw}", numbers)
    said = f"measured standard deviation is {test.ratio:.4f} of the configured one (p = {p_value:.2g})"
    return Finding(what, Verdict.PASS, said, numbers)


def _unmeasured() -> Finding:
    return Finding("noise", Verdict.WARN, "this mechanism's noise is not measured by a replica")


def _measured(strategy: Strategy, place: int, spec: ModelSpec, parameters: Tensor, seed: int) -> Residuals | None:
    part = _parts(strategy)[place]
    draws = draws_for(spec.size)
    if _kind(part) in CORRELATED:
        unmixed = unmixed_noise(strategy, place, spec, seed)
        return None if unmixed is None else Residuals(*unmixed)
    if _kind(part) == _SERVER:
        return _server(strategy, spec, parameters, draws, seed)
    if _kind(part) == _CLIENT:
        return _client(part, spec, draws, seed)
    return _shared(strategy, part, spec, draws, seed)


def draws_for(size: int) -> int:
    """Return how often noise of so many numbers is drawn to be measured."""
    return min(_MOST_DRAWS, max(_FEWEST_DRAWS, -(-_NUMBERS // size)))


def _flaw(ratio: float, p_values: Mapping[str, Any]) -> str:
    flaws = {
        "too_little": f"its standard deviation is {ratio:.3f} of the configured one",
        "shape": "its distribution has another shape",
        "within": "it repeats from one coordinate to another",
        "between": "it is the same in two releases",
        "rounds": "its rounds do not hang together as the mechanism's do",
        "several": "steps of one training do not add up as fresh noise does",
    }
    return flaws[min((name for name in flaws if name in p_values), key=lambda name: float(p_values[name]))]


def _server(strategy: Strategy, spec: ModelSpec, parameters: Tensor, draws: int, seed: int) -> Residuals:
    pipeline = Chain(_parts(strategy))
    place = next(place for place, part in enumerate(pipeline.parts) if _kind(part))
    event = pipeline.parts[place].event() or {}
    sd = float(event["noise_multiplier"]) * _bound(pipeline.parts, place)
    cohort = float(getattr(strategy, "expected_cohort", 10.0))
    total = Total(torch.zeros(pipeline.encoded_size(spec.size)), cohort, max(1, round(cohort)))
    state = strategy.init(spec)

    def expected(scale: float, number: int) -> NDArray[np.float64]:
        noise = _Reference(scale, cohort, (seed, number))
        chain = Chain((*pipeline.parts[:place], noise, *pipeline.parts[place + 1 :]))
        decoded, _ = chain.decode(total, state, Draws.of(seed, "replica", number))
        return np.asarray(decoded.values.double().numpy())

    still = expected(0.0, 0)
    released = [
        (strategy.step(parameters, total, state, Draws.of(seed, "replica", number))[0] - parameters).double().numpy()
        for number in range(draws)
    ]
    wanted = [expected(sd, number) for number in range(draws)]
    return Residuals(np.stack(released) - still, np.stack(wanted) - still)


def _client(part: Transform, spec: ModelSpec, draws: int, seed: int) -> Residuals:
    event = part.event() or {}
    sd = float(event["noise_multiplier"]) * float(vars(part)["clip_norm"])
    nothing = Update.of(torch.zeros(spec.size))
    rows = [
        part.encode(nothing, {}, {}, Draws.of(seed, "replica", number))[0].values.double().numpy()
        for number in range(draws)
    ]
    wanted = seeded(seed, "reference noise").standard_normal((draws, spec.size)) * sd
    return Residuals(np.stack(rows), wanted)


def _shared(strategy: Strategy, part: Transform, spec: ModelSpec, draws: int, seed: int) -> Residuals:
    """Return the noise of the fewest honest clients, each of whom adds nothing but its share, in secure sums."""
    from fedml_core.ring import RingSum  # loads cryptography
    from strategies.secure import SecureAggregation

    event = part.event() or {}
    honest, local = int(event["clients"]), float(event["local_noise"])
    assert isinstance(strategy, SecureAggregation)
    encoding = strategy.encoding(max(honest, strategy.protocol.minimum), strategy.clip, ())
    nothing = Update.of(torch.zeros(spec.size))
    rows = []
    for number in range(draws):
        total = RingSum(encoding, spec.size, (seed, "replica", number))
        for client in range(honest):
            total.add(nothing, [client])
        rows.append(total.total().values.double().numpy())
    wanted = seeded(seed, "reference noise").standard_normal((draws, spec.size)) * local * math.sqrt(honest)
    return Residuals(np.stack(rows), wanted)


@dataclass(frozen=True)
class _Reference(Transform):
    """Gaussian noise of a known scale, reproducible: it stands for the audited noise and protects nobody."""

    scale: float
    cohort: float
    key: tuple[int, int]

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        """Return the noised total, with the denominator that the audited noise fixes."""
        noise = seeded(*self.key, "reference noise").standard_normal(total.values.shape[-1]) * self.scale
        values = (total.values.double() + torch.from_numpy(noise)).float()
        return total.replace(values=values, weight=self.cohort, sums={}, facts={}), state


def _parts(strategy: Strategy) -> tuple[Transform, ...]:
    pipeline = strategy.pipeline()
    return pipeline.parts if isinstance(pipeline, Chain) else (pipeline,)


def _bound(parts: tuple[Transform, ...], place: int) -> float:
    return Chain(parts[:place]).l2_bound(math.inf)


def _kind(part: Transform) -> str | None:
    """Return the name of the noise that this part adds, if it is one that a replica measures."""
    event = part.event()
    name = None if event is None else str(event.get("name"))
    return name if name in (_SERVER, _CLIENT, *_SHARED, *CORRELATED) else None
